"""Which networks to measure on a new device: those that leave the least error to be expected over all networks.

It is the Bayesian I-optimal design of a linear model (Chaloner and Verdinelli, "Bayesian experimental design: a review", 1995),
chosen greedily, for a device that differs from the known ones as far, and is as noisy, as they do in the mean.
"""

from __future__ import annotations

import numpy as np

from predictors.transfer_process import Process


def most_telling(
    process: Process,
    variances: np.ndarray,
    noise: float,
    measured: np.ndarray,
    pool: np.ndarray,
    targets: np.ndarray,
    count: int,
) -> np.ndarray:
    """Networks whose measurement lowers the expected squared error over the targets most, chosen one after another.

    Args:
        process: the prior over all networks.
        variances: of its factors, `(4,)`.
        noise: variance of a measurement.
        measured: networks that were measured, `(m,)`.
        pool: to choose from, `(p,)`.
        targets: over which the error is averaged.
        count: how many, at most `p`.

    Returns:
        `(count,)`, out of the pool, the most telling first.
    """
    factor = np.hstack([np.sqrt(v) * f for v, f in zip(variances, process.factors, strict=True)])
    pool_factor, target_factor = factor[pool], factor[targets]
    across = target_factor @ pool_factor.T
    own = (pool_factor**2).sum(axis=1)
    told: list[tuple[np.ndarray, np.ndarray]] = []  # of every measurement, what it says of the pool and of all networks

    def tell(row: int) -> None:
        of_all = factor @ factor[row]
        for _, earlier in told:
            of_all = of_all - earlier * earlier[row]
        of_all = of_all / np.sqrt(max(of_all[row], 0.0) + noise)
        told.append((of_all[pool], of_all))
        nonlocal across, own
        across = across - np.outer(of_all[targets], of_all[pool])
        own = np.maximum(own - of_all[pool] ** 2, 0.0)

    for row in measured:
        tell(int(row))
    chosen: list[int] = []
    free = np.ones(len(pool), dtype=bool)
    for _ in range(count):
        gains = np.where(free, (across**2).sum(axis=0) / (own + noise), -1.0)
        best = int(np.argmax(gains))
        free[best] = False
        chosen.append(int(pool[best]))
        tell(chosen[-1])
    return np.array(chosen)
