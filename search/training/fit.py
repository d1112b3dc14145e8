"""Running a training to its end, from its last checkpoint where there is one."""

from __future__ import annotations

import logging
import math
import pickle  # for the name of an error; torch.load runs with weights_only
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from search.training.parallel import Processes
from spaces.errors import UserError

CHECKPOINT = "last.ckpt"


class Training(pl.LightningModule):
    """A Lightning module that says how long it is trained.

    Attributes:
        epochs: passes over the training data, those before a checkpoint included.
    """

    epochs: int


class PausedError(Exception):
    """A training reached its limit before its end; its checkpoint says how far it is."""


class _LastCheckpoint(pl.callbacks.ModelCheckpoint):
    """The checkpoint after the last epoch, in a folder that may have been moved since the one before."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class _AfterEpochs(pl.Callback):
    """Tells how far a training is, and ends it after the epoch in which its time is over."""

    def __init__(self, on_epoch: Callable[[int], None], limit_s: float) -> None:
        self.on_epoch, self.end = on_epoch, time.monotonic() + limit_s

    def on_train_epoch_end(self, trainer: pl.Trainer, training: pl.LightningModule) -> None:
        self.on_epoch(trainer.current_epoch + 1)
        if time.monotonic() > self.end:
            trainer.should_stop = True


def quiet_lightning() -> None:
    """Lightning tells nothing but warnings, of which `train` leaves out those about loaders and loggers."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def train(
    training: Training,
    data: pl.LightningDataModule,
    folder: Path,
    processes: Processes | None = None,
    on_epoch: Callable[[int], None] = lambda done: None,
    limit_s: float = math.inf,
) -> None:
    """Train from the last checkpoint in `folder`, if there is one, to the end.

    Args:
        training: what a step does.
        data: training batches.
        folder: receives `last.ckpt` after every epoch.
        processes: on what it runs; one process on the CPU by default.
        on_epoch: called after each epoch with the epochs done.
        limit_s: seconds; the epoch in which they are over is the last one of this call. At least one is done.

    Raises:
        UserError: the loss is not finite.
        PausedError: the limit was reached before the end.
    """
    processes = processes or Processes()
    name = CHECKPOINT.removesuffix(".ckpt")
    checkpoints = _LastCheckpoint(folder, filename=name, save_top_k=1, every_n_epochs=1, enable_version_counter=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning")  # advice on loader workers, validation loops, loggers
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message="The `srun` command is available")  # one process, on a cluster's machine
        trainer = pl.Trainer(
            max_epochs=training.epochs,
            accelerator=processes.accelerator,
            devices=processes.devices,
            num_nodes=processes.num_nodes,
            strategy=processes.strategy(),
            callbacks=[_AfterEpochs(on_epoch, limit_s), checkpoints],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            default_root_dir=folder,
        )
        trainer.fit(training, datamodule=data, ckpt_path=readable_checkpoint(folder / CHECKPOINT), weights_only=True)
    data.trainer = None  # it would go along where the data is sent
    if trainer.current_epoch < training.epochs:
        raise PausedError


def readable_checkpoint(path: Path) -> Path | None:
    """The checkpoint to go on from, `None` when there is none.

    Raises:
        UserError: it is damaged.
    """
    if not path.exists():
        return None
    try:
        torch.load(path, weights_only=True)
    except (RuntimeError, OSError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"checkpoint {path} is damaged ({reason}); delete it to train from the beginning") from error
    return path
