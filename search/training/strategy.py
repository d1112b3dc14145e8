"""What a training strategy is: which networks one optimizer step trains, and on what.

A strategy runs the forward and backward passes of one step; optimizer, learning rate, checkpoints and figures belong to
`search.training.module`. One that has parameters of its own (weights of choices, say) is a module and has them trained with the
supernet's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from search.training.distillation import Distillation, Lesson
from spaces.choice import Architecture
from spaces.space import Space
from spaces.supernet import Outputs, Supernet

Losses = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Step:
    """One optimizer step, as a strategy sees it.

    Args:
        supernet: the shared weights; their gradients are zero when the step begins.
        images: `(n, channels, height, width)`.
        labels: `(n,)`.
        index: optimizer steps done before.
        steps: optimizer steps of the whole training.
        rng: draws the same for the same seed and step, on every process.
        distillation: how students learn from a teacher.
        smoothing: of the labels where the largest network learns from them, and where nobody teaches.
        backward: adds a loss's gradients to the weights'.
    """

    supernet: Supernet
    images: torch.Tensor
    labels: torch.Tensor
    index: int
    steps: int
    rng: np.random.Generator
    distillation: Distillation
    smoothing: float
    backward: Callable[[torch.Tensor], None]

    @property
    def progress(self) -> float:
        """Share of the training that is done, from 0 to below 1."""
        return self.index / self.steps

    def on_labels(self, architecture: Architecture, scale: float = 1.0, smoothing: float = 0.0) -> tuple[torch.Tensor, Outputs]:
        """Train one network on the labels.

        Args:
            architecture: the network.
            scale: of its gradients.
            smoothing: of the labels.

        Returns:
            Its loss, without gradient, and its outputs.
        """
        outputs = self._forward(architecture)
        loss = F.cross_entropy(outputs.logits, self.labels, label_smoothing=smoothing)
        self.backward(loss * scale)
        return loss.detach(), outputs

    def on_lesson(self, architecture: Architecture, lesson: Lesson, scale: float = 1.0) -> torch.Tensor:
        """Train one network on what a teacher says of the images; returns its loss, without gradient."""
        loss = lesson.loss(architecture, self._forward(architecture), self.labels)
        self.backward(loss * scale)
        return loss.detach()

    def _forward(self, architecture: Architecture) -> Outputs:
        self.supernet.activate(architecture)
        return self.supernet.outputs(self.images)


class Strategy(nn.Module, ABC):
    """Which networks a step trains. One file and one class each; chosen by `_target_` in `conf/supernet/`."""

    def check(self, space: Space, distillation: Distillation) -> None:
        """Called before anything takes time, and again before `prepare`.

        Raises:
            UserError: the strategy cannot train this space, or does not use a setting of the distillation.
        """

    def prepare(self, supernet: Supernet, distillation: Distillation) -> None:
        """Called once, before training or resuming. What has to survive a kill is a parameter or buffer made here."""

    @abstractmethod
    def backward(self, step: Step) -> Losses:
        """The passes of one step. Returns losses by name, without gradients; `largest` and `smallest` where there are such."""

    def own_parameters(self) -> list[dict[str, object]]:
        """Parameter groups for the optimizer, beside the supernet's weights."""
        parameters = list(self.parameters())
        return [{"params": parameters, "weight_decay": 0.0}] if parameters else []


class OnLabels(Strategy):
    """A strategy in which nobody teaches: every network learns from the labels."""

    def check(self, space: Space, distillation: Distillation) -> None:
        why = f"the strategy {type(self).__name__} trains all networks on the labels"
        distillation.refuse(list(distillation.settings), why, "a strategy in which one teaches, such as supernet=sandwich")


def drawn(space: Space, rng: np.random.Generator, count: int, spread: bool = False) -> list[Architecture]:
    """`count` random architectures, each choice drawn by itself or, where they are spread, by `Space.sample_spread`."""
    return [space.sample_spread(rng) if spread else space.sample(rng) for _ in range(count)]
