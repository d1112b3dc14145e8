"""A weight cut into sets of units, and the most salient units of every set.

Every sparsity pattern (`spaces.sparsity`) is such a cut; how many units stay is decided there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

ROW_BLOCKS, ROWS, COLUMN_BLOCKS, COLUMNS, POSITIONS = range(5)
PAIRED_UNITS = 8  # up to so many units in a set, comparing all pairs is faster than a partition

Bits = NDArray[np.int32]
Bools = NDArray[np.bool_]


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
    bits = scores.contiguous().view(torch.int32)
    if bits.is_cpu:
        sets = bits.numpy().reshape(-1, bits.shape[-1])
        keep = _by_pairs(sets, kept) if sets.shape[1] <= PAIRED_UNITS else sets >= _smallest_kept(sets, kept)
        # No set keeps too few. When all together keep as many as wanted, none keeps too many: no choice between equals.
        if np.count_nonzero(keep) == len(sets) * kept:
            return torch.from_numpy(keep).view(bits.shape)
    # With the position in the lower half no two keys are equal, and the choice of topk is unique and reproducible.
    keys = (bits.long() << 32) | torch.arange(bits.shape[-1] - 1, -1, -1, device=bits.device)
    chosen = torch.zeros(keys.shape, dtype=torch.bool, device=bits.device)
    return chosen.scatter_(-1, keys.topk(kept, dim=-1, sorted=False).indices, True)


def _by_pairs(sets: Bits, kept: int) -> Bools:
    """Which of `(sets, units)` fewer than `kept` of their set exceed. With the units first, long rows are compared."""
    units = np.ascontiguousarray(sets.T)
    exceeds = (units[:, None] > units).view(np.uint8)
    return np.ascontiguousarray((exceeds.sum(0, dtype=np.uint8) < kept).T)


def _smallest_kept(sets: Bits, kept: int) -> Bits:
    """The `kept`-th largest of each set, `(sets, 1)`; numpy has it up to six times as fast as torch's kthvalue and topk."""
    place = sets.shape[1] - kept
    return np.partition(sets, place, axis=1)[:, place : place + 1]
