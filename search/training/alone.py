"""Training one network by itself, in parts: as far as a rung of successive halving asks for, and later further.

The learning rate is that of the full training at every point, so a network that is trained to its end in parts is the one that
is trained in one go. Everything follows from the seed and the epoch: a training that was killed goes on from its last epoch and
ends with the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F

from search.training.fit import Training, train
from search.training.parallel import Processes
from search.training.schedule import check_schedule, rate_factor
from spaces.errors import UserError


@dataclass(frozen=True)
class AloneSettings:
    """How networks are trained one by one, with successive halving (arXiv:1502.07943).

    Args:
        epochs: passes over the training data of a network that is trained to the end.
        shortest: passes after which networks are compared for the first time.
        reduction: at every comparison one in so many networks goes on, for so many times as long.
        learning_rate: its peak.
        weight_decay: of AdamW, on weights of convolutions and linear layers only.
        label_smoothing: of the labels.
        schedule: `cosine` or `constant_ending`, see `search.training.schedule`.

    Raises:
        UserError: a value that is not allowed.
    """

    epochs: int = 12
    shortest: int = 2
    reduction: int = 3
    learning_rate: float = 0.01
    weight_decay: float = 0.02
    label_smoothing: float = 0.0
    schedule: str = "cosine"

    def __post_init__(self) -> None:
        whole = all(type(value) is int for value in (self.epochs, self.shortest, self.reduction))
        if not whole or not 1 <= self.shortest <= self.epochs or self.reduction < 2:
            found = (
                f"supernet.shortest is {self.shortest}, supernet.epochs {self.epochs} and supernet.reduction {self.reduction}"
            )
            raise UserError(f"{found}; allowed are epochs from 1, a shortest up to them, and a reduction from 2")
        check_schedule(self.schedule)
        if not self.learning_rate > 0 or not self.weight_decay >= 0 or not 0 <= self.label_smoothing < 1:
            found = f"supernet.learning_rate is {self.learning_rate}, weight_decay {self.weight_decay}"
            raise UserError(
                f"{found} and label_smoothing {self.label_smoothing}; allowed are above 0, from 0, and from 0 to below 1"
            )

    @property
    def rungs(self) -> tuple[int, ...]:
        """Epochs after which networks are compared; the last are `epochs`."""
        rungs = [self.shortest]
        while rungs[-1] * self.reduction < self.epochs:
            rungs.append(rungs[-1] * self.reduction)
        return tuple(dict.fromkeys((*rungs, self.epochs)))


class AloneTraining(Training):
    """One network on the labels.

    Args:
        network: images `(n, channels, height, width)` to logits `(n, classes)`.
        settings: how.
        epochs: passes over the training data until it stops, at most `settings.epochs`.
        seed: of the order and augmentation of the data.
    """

    def __init__(self, network: nn.Module, settings: AloneSettings, epochs: int, seed: int) -> None:
        super().__init__()
        self.network, self.settings, self.epochs, self.seed = network, settings, epochs, seed

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        decayed = [p for p in parameters if p.dim() > 1]
        groups = [
            {"params": decayed, "weight_decay": self.settings.weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self._batches = -(-int(self.trainer.estimated_stepping_batches) // self.epochs)
        return torch.optim.AdamW(groups, lr=self.settings.learning_rate, fused=True)

    def on_train_epoch_start(self) -> None:
        torch.manual_seed(self.seed * 100_003 + self.current_epoch)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_index: int) -> torch.Tensor:
        images, labels = batch
        images = images.contiguous(memory_format=torch.channels_last)  # gradients of depthwise weights are twice as fast
        done, steps = self.current_epoch * self._batches + batch_index, self.settings.epochs * self._batches
        optimizer: Any = self.optimizers()
        for group in optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * rate_factor(self.settings.schedule, done, steps)
        loss = F.cross_entropy(self.network(images), labels, label_smoothing=self.settings.label_smoothing)
        if not loss.isfinite():
            raise UserError(f"the loss is not finite in epoch {self.current_epoch + 1}; lower supernet.learning_rate")
        return loss


def train_alone(
    network: nn.Module,
    settings: AloneSettings,
    epochs: int,
    seed: int,
    data: pl.LightningDataModule,
    calibration: Sequence[torch.Tensor],
    folder: Path,
    on_epoch: Callable[[int], None] = lambda done: None,
    limit_s: float = math.inf,
    processes: Processes | None = None,
) -> None:
    """Train a network until `epochs` are done, going on from the last checkpoint in `folder`; then in evaluation mode.

    Args:
        network: fresh, its initial weights drawn.
        settings: how.
        epochs: passes over the training data, those of earlier parts included.
        seed: of the data's order.
        data: training batches.
        calibration: training images for the statistics of batch norm.
        folder: receives `last.ckpt`.
        on_epoch: called after each epoch with the epochs done.
        limit_s: see `search.training.fit.train`.
        processes: likewise.

    Raises:
        UserError: the loss is not finite.
        PausedError: the limit was reached before the end.
    """
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    training = AloneTraining(network, settings, epochs, seed)
    train(training, data, folder, processes, on_epoch, limit_s)
    recalibrate(network, calibration)


@torch.no_grad()
def recalibrate(network: nn.Module, batches: Sequence[torch.Tensor]) -> None:
    """Set batch-norm statistics from images, averaged over batches, and switch to evaluation mode (arXiv:2105.07576)."""
    network.eval()
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # an average
        norm.train()
    for images in batches:
        network(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
