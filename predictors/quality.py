"""How well latencies are predicted: errors on whole networks that a model was not fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr


@dataclass(frozen=True)
class LatencyQuality:
    """Errors on whole networks that the model was not fitted to; relative errors are shares of the measured latency.

    Args:
        mape: mean of the absolute relative errors.
        p95: their 95th percentile.
        p99: their 99th percentile.
        spearman: rank correlation of predicted and measured latency.
        n: networks.
        predicted_us: predictions.
        measured_us: measurements.
    """

    mape: float
    p95: float
    p99: float
    spearman: float
    n: int
    predicted_us: tuple[float, ...]
    measured_us: tuple[float, ...]

    @staticmethod
    def of(predicted_us: Sequence[float], measured_us: Sequence[float]) -> LatencyQuality:
        """The errors of predictions; at least two."""
        predicted, measured = np.asarray(predicted_us), np.asarray(measured_us)
        errors = np.abs(predicted / measured - 1.0)
        p95, p99 = np.quantile(errors, [0.95, 0.99])
        rank = float(spearmanr(predicted, measured).statistic)
        values = (tuple(map(float, predicted)), tuple(map(float, measured)))
        return LatencyQuality(float(errors.mean()), float(p95), float(p99), rank, len(errors), *values)
