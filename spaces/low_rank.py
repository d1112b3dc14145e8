"""Low rank: a weight as the product of two factors that meet in fewer channels.

The factors are nested, so that every prefix of their shared channels is a network of its own: sampling ranks while training
orders the channels by importance (ordered dropout, as in Maestro, arXiv:2308.14929). They start from the singular value
decomposition of the weight, with which every prefix is the best approximation of its rank.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache

import torch

from spaces.errors import UserError

FULL = "full"


@cache
def rank_of(text: str, full_rank: int) -> int:
    """The rank that an option means for a layer: `1/4` of the weight's smaller side, at least 1; 0 for `full`.

    Args:
        text: `full` or a share.
        full_rank: see `LayerSpec.full_rank`.

    Raises:
        UserError: it is neither.
    """
    if text == FULL:
        return 0
    try:
        share = Fraction(text)
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if not 0 < share < 1:
        raise UserError(f"rank {text!r}; allowed are {FULL} and shares of the smaller side between 0 and 1, such as 1/4")
    return max(1, round(full_rank * share))


def factors_of(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best factors of a rank, by singular values; each takes their square roots.

    Args:
        weight: `(out, in, ...)`.
        rank: at most the smaller side of the weight as a matrix `(out, in * ...)`.

    Returns:
        `(rank, in, ...)`, and `(out, rank, 1, ...)`.
    """
    out_channels, *inputs = weight.shape
    u, s, v = torch.linalg.svd(weight.detach().reshape(out_channels, -1), full_matrices=False)
    roots = s[:rank].sqrt()
    first = (roots[:, None] * v[:rank]).reshape(rank, *inputs)
    second = (u[:, :rank] * roots).reshape(out_channels, rank, *[1] * (len(inputs) - 1))
    return first.contiguous(), second.contiguous()


def nuclear_norm_gradient(weight: torch.Tensor) -> torch.Tensor:
    """A subgradient of the sum of singular values of a weight `(out, in, ...)`, of its shape: `U V^T`.

    Added to the gradient now and then, it drives small singular values to 0 (trained rank pruning, TRP, arXiv:1910.04576).
    """
    u, _, v = torch.linalg.svd(weight.detach().reshape(len(weight), -1), full_matrices=False)
    return torch.matmul(u, v).reshape(weight.shape)


def truncated(weight: torch.Tensor, energy: float) -> tuple[torch.Tensor, int]:
    """A weight without its smallest singular values, and the rank that is left (the other half of TRP).

    Args:
        weight: `(out, in, ...)`.
        energy: share of the squared singular values that stays, in (0, 1].

    Raises:
        UserError: `energy` is out of range.
    """
    if not 0.0 < energy <= 1.0:
        raise UserError(f"energy is {energy}; allowed are numbers above 0 up to 1")
    u, s, v = torch.linalg.svd(weight.detach().reshape(len(weight), -1), full_matrices=False)
    cumulated = (s**2).cumsum(0)
    rank = int((cumulated < energy * cumulated[-1] * (1.0 - 1e-6)).sum()) + 1
    rank = min(rank, math.prod(s.shape))
    return ((u[:, :rank] * s[:rank]) @ v[:rank]).reshape(weight.shape), rank
