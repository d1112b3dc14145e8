"""Training supernets: `SupernetTraining` with a `Strategy` and a `Distillation`, run by `train`."""

from search.training.distillation import Distillation
from search.training.fit import CHECKPOINT, readable_checkpoint, train
from search.training.module import SupernetTraining
from search.training.strategy import Step, Strategy

__all__ = ["CHECKPOINT", "Distillation", "Step", "Strategy", "SupernetTraining", "readable_checkpoint", "train"]
