"""Measuring the accuracy of a network of the supernet: extract, recalibrate, count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import pytorch_lightning as pl
import torch
from torch.nn import functional as F

from spaces.choice import Architecture
from spaces.plain import PlainNetwork
from spaces.space import Space

CALIBRATION_BATCH = 128


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation measured on a split: share of correct labels, mean cross-entropy."""

    accuracy: float
    loss: float


class Weights(Protocol):
    """Where networks come from: a supernet, or what was trained one by one."""

    space: Space

    def extract(self, architecture: Architecture) -> PlainNetwork:
        """The network, in training mode where it has to be recalibrated."""


@dataclass(frozen=True)
class Split:
    """Images `(n, channels, height, width)` and labels `(n,)`."""

    images: torch.Tensor
    labels: torch.Tensor


class Evaluator:
    """Recalibrates and measures networks on fixed images.

    Args:
        calibration: batches of training images for batch-norm statistics and activation ranges.
        split: what accuracy is measured on.
        batch_size: images per forward pass.
    """

    def __init__(self, calibration: Sequence[torch.Tensor], split: Split, batch_size: int = 256) -> None:
        self.calibration, self.split, self.batch_size = list(calibration), split, batch_size

    def plain(self, weights: Weights, architecture: Architecture) -> PlainNetwork:
        """The network as it would ship: extracted, calibrated, in evaluation mode, batch norm folded."""
        network = weights.extract(architecture).cpu()  # where the images are, wherever the weights are trained
        if network.training:
            network.recalibrate(self.calibration)
        network.fold()
        return network

    def evaluate(self, weights: Weights, architecture: Architecture) -> Evaluation:
        """Accuracy and loss of an architecture with these weights."""
        return self.measure(self.plain(weights, architecture))

    def measure(self, network: PlainNetwork) -> Evaluation:
        """Accuracy and loss of a plain network."""
        logits = predict(network, self.split.images, self.batch_size)
        labels = self.split.labels
        accuracy = (logits.argmax(dim=1) == labels).double().mean().item()
        return Evaluation(accuracy, F.cross_entropy(logits.double(), labels).item())


def predict(network: PlainNetwork, images: torch.Tensor, batch_size: int = 256) -> torch.Tensor:
    """Logits `(n, classes)` of images `(n, channels, height, width)`."""
    with torch.no_grad():
        return torch.cat([network(images[first : first + batch_size]) for first in range(0, len(images), batch_size)])


def collect(data: pl.LightningDataModule, split: str) -> Split:
    """All batches of `validation` or `test` as one."""
    loader = data.val_dataloader() if split == "validation" else data.test_dataloader()
    batches = list(loader)
    return Split(torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches]))


def training_sample(data: pl.LightningDataModule, images: int, seed: int) -> Split:
    """Training images with their labels, as many as asked for where there are so many; the same for the same seed."""
    torch.manual_seed(seed)
    batches: list[tuple[torch.Tensor, torch.Tensor]] = []
    for batch, labels in data.train_dataloader():
        batches.append((batch, labels))
        if sum(len(b) for b, _ in batches) >= images:
            break
    return Split(torch.cat([b for b, _ in batches])[:images], torch.cat([y for _, y in batches])[:images])


def calibration_batches(data: pl.LightningDataModule, images: int, seed: int) -> list[torch.Tensor]:
    """Training images in batches, as many as asked for where there are so many; the same for the same seed."""
    joined = training_sample(data, images, seed).images
    return [joined[first : first + CALIBRATION_BATCH] for first in range(0, len(joined), CALIBRATION_BATCH)]
