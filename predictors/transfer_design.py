"""Which networks to measure on a new device: those that leave the least expected error over all networks.

How far a new device differs from the known ones, and how noisy its measurements are, is not known before it is measured, and
what tells most depends on it: with little noise every direction in which devices differ is worth a measurement, with much
noise the few largest are. So what is left is averaged over cells of the process's grid, drawn by their weights, instead of
taken at the mean of the cells. What is averaged is the standard deviation with which a network would be predicted, that is,
its expected absolute error: of squared errors, the most extreme networks and devices would have nearly the whole. It is the
Bayesian design of a hierarchical model (Chaloner and Verdinelli, "Bayesian experimental design: a review", 1995), chosen
greedily.
"""

from __future__ import annotations

import numpy as np

from predictors.transfer_process import NOISE_VARIANCES, SHAPE, VARIANCES, Process

CELLS = 64  # that are drawn


def most_telling(
    process: Process, weights: np.ndarray, measured: np.ndarray, pool: np.ndarray, targets: np.ndarray, count: int
) -> np.ndarray:
    """Networks whose measurement lowers the expected error over the targets most, chosen one after another.

    Args:
        process: the prior over all networks.
        weights: of the cells of its grid, `SHAPE`.
        measured: networks that were measured, `(m,)`.
        pool: to choose from, `(p,)`.
        targets: over which the error is averaged.
        count: how many, at most `p`.

    Returns:
        `(count,)`, out of the pool, the most telling first.
    """
    drawn, shares = drawn_cells(weights)
    cells = [_Cell(process, g, s, measured, pool, targets) for g, s in zip(*np.unravel_index(drawn, SHAPE), strict=True)]
    chosen: list[int] = []
    free = np.ones(len(pool), dtype=bool)
    for _ in range(count):
        left = sum(share * cell.left() for share, cell in zip(shares, cells, strict=True))
        best = int(np.argmin(np.where(free, left, np.inf)))
        free[best] = False
        chosen.append(best)
        for cell in cells:
            cell.tell(best)
    return np.asarray(pool[chosen])


def drawn_cells(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flat indices of at most `CELLS` cells and their shares: all that weigh something, or a systematic sample of these.

    The likeliest ones alone would not do: where the weights are flat they hold a small part of them.
    """
    flat = weights.ravel() / weights.sum()
    some = np.flatnonzero(flat)
    if len(some) <= CELLS:
        return some, flat[some]
    steps = (np.arange(CELLS) + 0.5) / CELLS
    cells = some[np.minimum(np.searchsorted(np.cumsum(flat[some]), steps), len(some) - 1)]
    drawn, times = np.unique(cells, return_counts=True)
    return drawn, times / CELLS


class _Cell:
    """What measurements say of pool and targets under one cell of the grid, `g` of its variances and `s` of its noises."""

    def __init__(self, process: Process, g: int, s: int, measured: np.ndarray, pool: np.ndarray, targets: np.ndarray) -> None:
        scales = np.sqrt(VARIANCES[g])
        factor = np.hstack([scale * part for scale, part in zip(scales, process.factors, strict=True) if scale > 0])
        known, self._pool, self._noise = factor[measured], factor[pool], float(NOISE_VARIANCES[s])
        root = np.linalg.cholesky(known @ known.T + self._noise * np.eye(len(measured)))
        of_pool = np.linalg.solve(root, known @ self._pool.T)
        of_targets = np.linalg.solve(root, known @ factor[targets].T)
        self._told = list(of_pool)  # what each measurement says of the pool
        self._across = factor[targets] @ self._pool.T - of_targets.T @ of_pool  # covariances of targets and pool
        self._own = (self._pool**2).sum(axis=1) - (of_pool**2).sum(axis=0)
        self._left = (factor[targets] ** 2).sum(axis=1) - (of_targets**2).sum(axis=0)  # variances of the targets

    def left(self) -> np.ndarray:
        """Mean standard deviation of measurements of the targets, after measuring each of the pool."""
        lowered = self._across**2 / -(np.maximum(self._own, 0.0) + self._noise)
        lowered += self._left[:, None]
        np.maximum(lowered, 0.0, out=lowered)
        lowered += self._noise
        return np.asarray(np.sqrt(lowered, out=lowered).mean(axis=0))

    def tell(self, row: int) -> None:
        """One of the pool is measured."""
        of_pool = self._pool @ self._pool[row] - sum(told * told[row] for told in self._told)
        deviation = np.sqrt(max(float(of_pool[row]), 0.0) + self._noise)
        of_pool = of_pool / deviation
        of_targets = self._across[:, row] / deviation
        self._across -= np.outer(of_targets, of_pool)
        self._own -= of_pool**2
        self._left -= of_targets**2
        self._told.append(of_pool)
