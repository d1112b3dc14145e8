"""How much each weight of a layer matters: what a mask (`spaces.sparsity`) ranks weights by.

A saliency is one function with `@saliency`, chosen once for a whole supernet by its name and never by a layer. It gives a
number per weight; a pattern that keeps or removes weights together adds them up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from spaces.errors import UserError


class Saliency(Protocol):
    """A saliency of weights."""

    def __call__(self, weight: torch.Tensor, gradient: torch.Tensor | None = None, seed: int = 0) -> torch.Tensor:
        """How much each weight matters, float, not negative, of the weight's shape, without a gradient of its own.

        Args:
            weight: `(out, in / groups, ...)`.
            gradient: of the loss by the weight, cut to the same shape; `None` when there is none yet.
            seed: for what is random.
        """


SALIENCIES: dict[str, Saliency] = {}
BY_WEIGHT_ALONE: set[str] = set()


def saliency(name: str, by_weight_alone: bool = False) -> Callable[[Saliency], Saliency]:
    """Register a saliency.

    Args:
        name: in configurations.
        by_weight_alone: it needs no gradient, so that networks of one step, which add to gradients but change no weight, can
            share their masks.
    """

    def register(function: Saliency) -> Saliency:
        SALIENCIES[name] = function
        if by_weight_alone:
            BY_WEIGHT_ALONE.add(name)
        return function

    return register


def saliency_of(name: str) -> Saliency:
    """The saliency of a name.

    Raises:
        UserError: there is none of that name.
    """
    if name not in SALIENCIES:
        raise UserError(f"saliency {name!r}; allowed are {', '.join(SALIENCIES)}")
    return SALIENCIES[name]


@saliency("magnitude", by_weight_alone=True)
def magnitude(weight: torch.Tensor, gradient: torch.Tensor | None = None, seed: int = 0) -> torch.Tensor:
    """|w|; added up over a unit it is the L1 norm. A masked weight keeps its mask."""
    return weight.detach().abs()


@saliency("taylor")
def taylor(weight: torch.Tensor, gradient: torch.Tensor | None = None, seed: int = 0) -> torch.Tensor:
    """|w g|: what the loss would change to first order without the weight (Molchanov et al. 2019, arXiv:1906.10771).

    Units add up the |w g| of their weights, where the paper squares the sum. Without a gradient yet (in the first step, or
    after it was set to `None`) it is the magnitude.

    Raises:
        ValueError: a gradient of another shape than the weight.
    """
    if gradient is None:
        return magnitude(weight)
    if gradient.shape != weight.shape:
        raise ValueError(f"gradient of shape {tuple(gradient.shape)} for a weight of shape {tuple(weight.shape)}")
    return (weight.detach() * gradient.detach()).abs()


@saliency("random", by_weight_alone=True)
def random(weight: torch.Tensor, gradient: torch.Tensor | None = None, seed: int = 0) -> torch.Tensor:
    """Random numbers fixed by the seed and the shape: the neutral baseline of Random Pruning (arXiv:2202.02643).

    They are drawn on the CPU, so that every torch device has the same. Two layers of one shape have the same mask unless their
    seeds differ.
    """
    return torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)).to(weight.device)
