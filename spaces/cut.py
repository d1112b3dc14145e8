"""A weight cut into sets of units, and the most salient units of every set.

Every sparsity pattern (`spaces.sparsity`) is such a cut; how many units stay is decided there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

ROW_BLOCKS, ROWS, COLUMN_BLOCKS, COLUMNS, POSITIONS = range(5)
TOURNAMENT_UNITS = 16  # up to so many units in a set, comparing all pairs is faster than topk


@dataclass(frozen=True)
class Cut:
    """A weight seen as sets of units.

    The weight is reshaped to the axes `ROW_BLOCKS`, `ROWS` (together the outputs), `COLUMN_BLOCKS`, `COLUMNS` (the inputs) and
    `POSITIONS` (the kernel). Axes that are neither units nor members number the sets.

    Args:
        shape: sizes of the five axes.
        units: axes along which a set keeps some and removes the others.
        members: axes along which all weights of a unit stay or go together; their saliencies are added up.
    """

    shape: tuple[int, int, int, int, int]
    units: tuple[int, ...]
    members: tuple[int, ...] = ()

    @property
    def units_per_set(self) -> int:
        return math.prod(self.shape[axis] for axis in self.units)

    def kept_units(self, saliency: torch.Tensor, kept: int) -> torch.Tensor:
        """Which units stay, bool of shape `shape` with every axis of `members` being 1.

        Args:
            saliency: of every weight, not negative, any shape with as many elements.
            kept: units to keep per set.
        """
        scores = saliency.detach().float().reshape(self.shape)
        if self.members:
            scores = scores.sum(dim=self.members, keepdim=True)
        sizes = [scores.shape[axis] for axis in self.units]
        last = tuple(range(5 - len(self.units), 5))
        keep = _largest(scores.movedim(self.units, last).flatten(last[0]), kept)
        return keep.reshape(*keep.shape[:-1], *sizes).movedim(last, self.units)


def _largest(scores: torch.Tensor, kept: int) -> torch.Tensor:
    """The `kept` largest along the last axis as bool, between equals the first; exactly so many, even of zeros or NaN.

    Float32 numbers that are not negative order as their bits do, read as integers. Among those NaN is an ordinary number.
    """
    units = scores.shape[-1]
    bits = scores.contiguous().view(torch.int32)
    if units <= TOURNAMENT_UNITS:
        return _tournament(bits.movedim(-1, 0).contiguous(), kept).movedim(0, -1)
    # With the position in the lower half no two keys are equal, and the choice of topk is unique and reproducible.
    keys = (bits.long() << 32) | torch.arange(units - 1, -1, -1, device=bits.device)
    keep = torch.zeros(keys.shape, dtype=torch.bool, device=bits.device)
    return keep.scatter_(-1, keys.topk(kept, dim=-1, sorted=False).indices, True)


def _tournament(bits: torch.Tensor, kept: int) -> torch.Tensor:
    """The `kept` largest along the first axis: each unit's rank is the number of pairs that it loses, all pairs compared."""
    rank = torch.zeros(bits.shape, dtype=torch.uint8, device=bits.device)
    for distance in range(1, len(bits)):
        first_wins = bits[:-distance] >= bits[distance:]
        rank[distance:] += first_wins
        rank[:-distance] += ~first_wins
    return rank < kept
