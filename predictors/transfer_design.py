"""Which networks to measure on a new device: those that leave the least expected error over all networks.

How far a new device differs from the known ones, and how noisy its measurements are, is not known before it is measured, and
what tells most depends on it: with little noise every direction in which devices differ is worth a measurement, with much
noise the few largest are. So the squared error that is expected after the measurements is averaged over the likeliest cells
of the process's grid, with their weights, instead of taken at the mean of the cells. It is the Bayesian I-optimal design of a
hierarchical model (Chaloner and Verdinelli, "Bayesian experimental design: a review", 1995), chosen greedily.
"""

from __future__ import annotations

import numpy as np

from predictors.transfer_process import NOISE_VARIANCES, SHAPE, VARIANCES, Process

CELLS = 16  # the likeliest


def most_telling(
    process: Process, weights: np.ndarray, measured: np.ndarray, pool: np.ndarray, targets: np.ndarray, count: int
) -> np.ndarray:
    """Networks whose measurement lowers the expected squared error over the targets most, chosen one after another.

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
    likeliest = np.argsort(-weights, axis=None, kind="stable")[:CELLS]
    cells = [_Cell(process, g, s, measured, pool, targets) for g, s in zip(*np.unravel_index(likeliest, SHAPE), strict=True)]
    shares = weights.ravel()[likeliest]
    chosen: list[int] = []
    free = np.ones(len(pool), dtype=bool)
    for _ in range(count):
        gains = sum(share * cell.gains() for share, cell in zip(shares, cells, strict=True))
        best = int(np.argmax(np.where(free, gains, -1.0)))
        free[best] = False
        chosen.append(best)
        for cell in cells:
            cell.tell(best)
    return np.asarray(pool[chosen])


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

    def gains(self) -> np.ndarray:
        """By how much measuring each of the pool lowers the summed variance of the targets."""
        return np.asarray((self._across**2).sum(axis=0) / (np.maximum(self._own, 0.0) + self._noise))

    def tell(self, row: int) -> None:
        """One of the pool is measured."""
        of_pool = self._pool @ self._pool[row] - sum(told * told[row] for told in self._told)
        deviation = np.sqrt(max(float(of_pool[row]), 0.0) + self._noise)
        of_pool = of_pool / deviation
        self._across -= np.outer(self._across[:, row] / deviation, of_pool)
        self._own -= of_pool**2
        self._told.append(of_pool)
