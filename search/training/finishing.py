"""Finishing: a network out of the supernet, trained a little on its own in its final precision and sparsity.

The supernet's weights serve many networks; the few that ship need to serve one. Once-for-All (arXiv:1908.09791, section 4) and
DyNAS-T fine-tune what they deploy in the same way. The teacher is the supernet's largest network, as it stands.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytorch_lightning as pl
import torch
from safetensors.torch import save
from torch import nn

from search.evaluation import Evaluator
from search.training.distillation import Distillation
from search.training.fit import train
from search.training.focusing import MACS_PER_TRAINING
from search.training.module import SupernetTraining
from search.training.parallel import Processes
from search.training.strategy import Losses, Step, Strategy
from spaces.choice import Architecture
from spaces.errors import UserError
from spaces.plain import PlainNetwork
from spaces.space import Space
from spaces.supernet import Supernet


@dataclass(frozen=True)
class FinishSettings:
    """How winners are finished.

    Args:
        share: arithmetic for one network, as a share of what training the supernet took, focus included; the teacher's is
            counted.
        learning_rate: its peak.
        weight_decay: of AdamW.
        labels: share of the labels in the loss, the rest is the teacher's.
        temperature: of the teacher's predictions.

    Raises:
        UserError: a value that is not allowed.
    """

    share: float = 0.05
    learning_rate: float = 0.005
    weight_decay: float = 0.0
    labels: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0 or not self.learning_rate > 0.0:
            found = f"finish.share is {self.share} and finish.learning_rate {self.learning_rate}"
            raise UserError(f"{found}; allowed are a share above 0 up to 1 and a rate above 0")
        if not 0.0 <= self.labels <= 1.0 or not self.temperature > 0.0 or not self.weight_decay >= 0.0:
            found = f"finish.labels is {self.labels}, temperature {self.temperature} and weight_decay {self.weight_decay}"
            raise UserError(f"{found}; allowed are a share from 0 to 1, a value above 0 and a value from 0")


class RememberingTeacher(nn.Module):
    """A teacher that looks at the same batch once.

    Order and augmentation of the data follow from the seed and the epoch alone, so all networks that are finished see the same
    batches, and what the teacher says of them is computed for the first.

    Args:
        network: recalibrated and folded.
    """

    def __init__(self, network: PlainNetwork) -> None:
        super().__init__()
        self.network = network
        self._said: dict[bytes, torch.Tensor] = {}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(n, channels, height, width)` to logits `(n, classes)`."""
        key = hashlib.blake2b(images.detach().cpu().contiguous().numpy().data, digest_size=16).digest()
        if key not in self._said:
            with torch.no_grad():
                self._said[key] = self.network(images)
        return self._said[key]

    @property
    def macs_done(self) -> int:
        """Multiply-accumulates so far."""
        return sum(len(logits) for logits in self._said.values()) * self.network.network.macs


class OneNetwork(Strategy):
    """Every step trains the same network on a teacher's predictions.

    Args:
        architecture: the network.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture

    def backward(self, step: Step) -> Losses:
        step.supernet.start_step(1, 1)  # masks and grids are those that ship, not those with which a training begins
        lesson = step.distillation.lesson(step.supernet, step.images, None)
        return {"network": step.on_lesson(self.architecture, lesson)}


def finishing_epochs(space: Space, architecture: Architecture, images: int, macs: float, networks: int) -> int:
    """Passes over the training data that `macs` multiply-accumulates pay for, at least one.

    Args:
        space: of the network; its largest one teaches.
        architecture: the network.
        images: in the training data.
        macs: that may be spent on one network.
        networks: how many share the teacher.
    """
    each = MACS_PER_TRAINING * space.network(architecture).macs + space.network(space.largest()).macs / networks
    return max(1, round(macs / (each * images)))


def finish_network(
    supernet: Supernet,
    architecture: Architecture,
    teacher: RememberingTeacher,
    evaluator: Evaluator,
    data: pl.LightningDataModule,
    epochs: int,
    settings: FinishSettings,
    seed: int,
    folder: Path,
    on_epoch: Callable[[int], None] = lambda epoch: None,
    limit_s: float = math.inf,
    processes: Processes | None = None,
) -> Supernet:
    """A copy of the supernet in which one network is finished; the others are not to be used.

    Args:
        supernet: trained; stays as it is.
        architecture: what to finish.
        teacher: the supernet's largest network; the same object for all networks that are finished.
        evaluator: of the training's curve.
        data: training batches.
        epochs: passes over them.
        settings: how.
        seed: of the order of the data.
        folder: receives the checkpoint, from which a killed finishing goes on.
        on_epoch: called after each epoch with the epochs done.
        limit_s: see `search.training.fit.train`.
        processes: likewise.

    Raises:
        PausedError: the limit was reached before the end.
    """
    torch.manual_seed(seed)
    own = copy.deepcopy(supernet)
    training = SupernetTraining(
        own,
        OneNetwork(architecture),
        epochs,
        settings.learning_rate,
        settings.weight_decay,
        seed,
        evaluator,
        distillation=Distillation(teacher, settings.labels, settings.temperature),
        curve_points=0,
    )
    train(training, data, folder, processes, on_epoch, limit_s)
    return own


@dataclass(frozen=True)
class Finished:
    """A network that was finished.

    Args:
        weights: safetensors of the supernet's copy; `None` where it did not become better.
        before: validation accuracy with the supernet's weights.
        after: validation accuracy.
        macs: multiply-accumulates of the training.
    """

    weights: bytes | None
    before: float
    after: float
    macs: int


class Finisher:
    """Finishes networks of one supernet, here or on a worker; its teacher remembers what it said to all of them there.

    Args:
        supernet: trained.
        evaluator: measures them on validation data.
        data: training batches.
        settings: how they are finished.
        seed: of the order of the data.
        processes: on what, one process.
    """

    def __init__(
        self,
        supernet: Supernet,
        evaluator: Evaluator,
        data: pl.LightningDataModule,
        settings: FinishSettings,
        seed: int,
        processes: Processes | None = None,
    ) -> None:
        self.supernet, self.evaluator, self.data, self.settings, self.seed = supernet, evaluator, data, settings, seed
        self.processes = processes

    @cached_property
    def teacher(self) -> RememberingTeacher:
        """The supernet's largest network."""
        return RememberingTeacher(self.evaluator.plain(self.supernet, self.supernet.space.largest()))

    def __call__(
        self, item: tuple[Architecture, int], folder: Path, on_epoch: Callable[[int], None], limit_s: float
    ) -> Finished:
        """Finish an architecture for so many epochs; see `search.training.parts.Trainer`."""
        architecture, epochs = item
        parts = (self.supernet, architecture, self.teacher, self.evaluator, self.data, epochs, self.settings, self.seed)
        own = finish_network(*parts, folder, on_epoch, limit_s, self.processes)
        before = self.evaluator.evaluate(self.supernet, architecture).accuracy
        after = self.evaluator.evaluate(own, architecture).accuracy
        weights = save({name: value.contiguous() for name, value in own.state_dict().items()}) if after > before else None
        return Finished(weights, before, after, own.macs_done)


def architecture_key(architecture: Architecture) -> str:
    """A short name for files about an architecture."""
    return hashlib.sha256(architecture.to_json().encode()).hexdigest()[:16]
