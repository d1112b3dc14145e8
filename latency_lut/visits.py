"""Visits of models in turn, in changing order: the raw numbers of every timing; `latency_lut.timing` says what they mean.

Needs numpy only: it is part of a bundle's runner, which works where Netwright is not installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Timed(Protocol):
    """What can be timed."""

    def visit(self, seconds: float) -> float:
        """Median microseconds of one run, from runs during about `seconds`."""


def interleaved(models: Sequence[Timed], rounds: int, visit_s: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Visit every model once per round, in a new order every round.

    Args:
        models: loaded models; memory bounds their number, 150 layers are a good batch.
        rounds: visits of every model.
        visit_s: seconds of one visit.
        seed: of the order.

    Returns:
        Microseconds per run `(models, rounds)`, and the models in the order of each round `(rounds, models)`.
    """
    rng = np.random.default_rng(seed)
    times_us = np.empty((len(models), rounds))
    orders = np.array([rng.permutation(len(models)) for _ in range(rounds)])
    for round_, order in enumerate(orders):
        for index in order:
            times_us[index, round_] = models[index].visit(visit_s)
    return times_us, orders
