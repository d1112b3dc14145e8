"""How well latencies are predicted: errors on whole networks that a model was not fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm, spearmanr


@dataclass(frozen=True)
class LatencyQuality:
    """Errors on whole networks that the model was not fitted to; relative errors are shares of the measured latency.

    Args:
        mape: mean of the absolute relative errors.
        p95: their 95th percentile.
        p99: their 99th percentile.
        within_5: share of the networks with an error of at most 5 %.
        within_10: of at most 10 %.
        coverage: share of the networks that lie in their 90 % interval.
        spearman: rank correlation of predicted and measured latency.
        n: networks.
        predicted_us: predictions.
        measured_us: measurements.
    """

    mape: float
    p95: float
    p99: float
    within_5: float
    within_10: float
    coverage: float
    spearman: float
    n: int
    predicted_us: tuple[float, ...]
    measured_us: tuple[float, ...]

    @staticmethod
    def of(predicted_us: Sequence[float], std_us: Sequence[float], measured_us: Sequence[float]) -> LatencyQuality:
        """The errors of predictions with their standard deviations; at least two."""
        predicted, measured = np.asarray(predicted_us), np.asarray(measured_us)
        errors = np.abs(predicted / measured - 1.0)
        half_us = float(norm.ppf(0.95)) * np.asarray(std_us)
        p95, p99 = np.quantile(errors, [0.95, 0.99])
        return LatencyQuality(
            mape=float(errors.mean()),
            p95=float(p95),
            p99=float(p99),
            within_5=float(np.mean(errors <= 0.05)),
            within_10=float(np.mean(errors <= 0.1)),
            coverage=float(np.mean(np.abs(predicted - measured) <= half_us)),
            spearman=float(spearmanr(predicted, measured).statistic),
            n=len(errors),
            predicted_us=tuple(map(float, predicted)),
            measured_us=tuple(map(float, measured)),
        )
