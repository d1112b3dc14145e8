"""What a gradient strategy is: how probabilities of options become gates of a forward pass, and what is added to the loss.

A strategy gives the loss of one batch with a gradient to the logits of the choices and to the weights; optimizers, the cost,
checkpoints and the sweep belong to `search.relaxation.family`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from search.relaxation.relaxed import Relaxed
from spaces.entangled import Entangled
from spaces.mixing import Gates, Open, Quantize


@dataclass(frozen=True)
class SearchStep:
    """One batch, as a strategy sees it.

    Args:
        entangled: the forward pass with gates.
        relaxed: the choices.
        images: `(n, channels, height, width)`.
        labels: `(n,)`.
        progress: share of the search that is done, from 0 to below 1.
        rng: draws the same for the same seed, member and step.
    """

    entangled: Entangled
    relaxed: Relaxed
    images: torch.Tensor
    labels: torch.Tensor
    progress: float
    rng: np.random.Generator

    def loss(self, gates: Gates, opened: Open | None = None, quantize: Quantize | None = None) -> torch.Tensor:
        """Cross-entropy of the network that the gates mix."""
        return F.cross_entropy(self.entangled.outputs(self.images, gates, opened, quantize), self.labels)


class GradientStrategy(ABC):
    """How choices are relaxed. One file and one class each; chosen by `_target_` in `conf/relaxation/`."""

    name: ClassVar[str]

    def check(self, entangled: Entangled) -> None:  # noqa: B027
        """Called before anything is trained.

        Raises:
            UserError: the strategy cannot work on this space.
        """

    def prepare(self, relaxed: Relaxed) -> None:  # noqa: B027
        """Called once, before a search or its resuming: parameters of the strategy's own go into `relaxed.own`."""

    @abstractmethod
    def loss(self, step: SearchStep) -> torch.Tensor:
        """The loss of a batch without the cost, a scalar."""

    def cost_share(self, progress: float) -> float:
        """By how much the cost counts at a share of the search that is done, from 0 to 1."""
        return 1.0

    def regularizer(self, step: SearchStep) -> torch.Tensor | None:
        """What is added to the loss while the logits are trained."""
        return None

    def after_step(self, relaxed: Relaxed) -> None:  # noqa: B027
        """Called after every step of the logits' optimizer."""
