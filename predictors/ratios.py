"""By what share a model is off: the ratios of measured to modelled values that were seen, and what they say of new ones.

The median ratio is taken out, and the rest is the uncertainty, as quantiles that assume nothing of the errors (split conformal
prediction, Vovk et al. 2005; Lei et al. 2018).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

COVERAGE = 0.9


@dataclass(frozen=True)
class RatioQuality:
    """Errors on networks that a model was not fitted to, as shares of what was measured.

    Args:
        mape: mean of the absolute errors.
        p95: their 95th percentile.
        spearman: rank correlation.
        coverage: share of the networks inside of their 90 % interval.
        n: networks.
    """

    mape: float
    p95: float
    spearman: float
    coverage: float
    n: int


class Ratios:
    """Measured over modelled values of networks that take no part in testing.

    Attributes:
        median: what a modelled value is to be multiplied by.
        std: standard deviation of the ratios.
    """

    def __init__(self, modelled: Sequence[float], measured: Sequence[float]) -> None:
        self._sorted = np.sort(np.asarray(measured, float) / np.asarray(modelled, float))
        self.median, self.std = float(np.median(self._sorted)), float(np.std(self._sorted))

    def interval(self, coverage: float = COVERAGE) -> tuple[float, float]:
        """Ratios between which a share of new ones lies: ranks among one more than were seen."""
        count, tail = len(self._sorted), (1.0 - coverage) / 2.0
        low = max(math.floor((count + 1) * tail), 1) - 1
        high = min(math.ceil((count + 1) * (1.0 - tail)), count) - 1
        return float(self._sorted[low]), float(self._sorted[high])

    def quality(self, modelled: Sequence[float], measured: Sequence[float]) -> RatioQuality:
        """Errors on other networks; at least two."""
        wanted, model = np.asarray(measured, float), np.asarray(modelled, float)
        errors = np.abs(model * self.median / wanted - 1.0)
        low, high = self.interval()
        inside = (model * low <= wanted) & (wanted <= model * high)
        # Where all values are alike there is no order to get right.
        rank = float(spearmanr(model, wanted).statistic) if np.ptp(model) > 0 and np.ptp(wanted) > 0 else 1.0
        return RatioQuality(float(errors.mean()), float(np.quantile(errors, 0.95)), rank, float(inside.mean()), len(wanted))
