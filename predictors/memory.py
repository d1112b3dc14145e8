"""Peak memory of a network on a device: from its layers, corrected by networks that were measured.

`predictors.tensors` plays a run through. By what share that is off is learned from measured networks: the median is taken out,
and the rest is the uncertainty, as quantiles that assume nothing of the errors (split conformal prediction, Vovk et al. 2005;
Lei et al. 2018).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

from latency_lut.memory import MemoryTable, NetworkMemory
from predictors.tensors import peak_tensor_bytes
from spaces.errors import UserError
from spaces.layers import Network
from spaces.space import Space

LEAST_NETWORKS = 20
COVERAGE = 0.9


@dataclass(frozen=True)
class MemoryQuality:
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


class MemoryPredictor:
    """Predicts the peak memory of networks on a device. Make one with `fit`.

    Attributes:
        quality: errors on held-out networks.
    """

    def __init__(self, description: Mapping[str, str | int], ratios: Sequence[float]) -> None:
        self._description, self._batch = description, int(description["batch"])
        self._ratios = np.sort(np.asarray(ratios))
        self._median = float(np.median(self._ratios))
        self._std = float(np.std(self._ratios))
        self.quality = MemoryQuality(math.nan, math.nan, math.nan, math.nan, 0)

    @classmethod
    def fit(cls, table: MemoryTable, space: Space, held_out: int = 20, seed: int = 0) -> MemoryPredictor:
        """Fit to measured networks.

        Args:
            table: the networks.
            space: of the networks.
            held_out: networks that are kept for `quality`, at most half of them.
            seed: draws them.

        Raises:
            UserError: there are too few networks.
        """
        held_out = min(held_out, len(table.networks) // 2)
        if len(table.networks) - held_out < LEAST_NETWORKS // 2 or held_out < 2:
            raise UserError(f"{len(table.networks)} networks with measured memory; a model needs {LEAST_NETWORKS}")
        order = np.random.default_rng(seed).permutation(len(table.networks))
        batch = int(table.device["batch"])

        def played(networks: Sequence[NetworkMemory]) -> list[int]:
            return [peak_tensor_bytes(space.network(n.architecture), n.lowerings, table.device, batch) for n in networks]

        held, kept = ([table.networks[i] for i in part] for part in (order[:held_out], order[held_out:]))
        ratios = [n.peak_bytes / count for n, count in zip(kept, played(kept), strict=True)]
        fitted = cls(table.device, ratios)
        fitted.quality = fitted.quality_of(played(held), [n.peak_bytes for n in held])
        return fitted

    def quality_of(self, played_bytes: Sequence[int], measured_bytes: Sequence[int]) -> MemoryQuality:
        """Errors on networks whose runs were played through, and measured; at least two."""
        played, measured = np.asarray(played_bytes, float), np.asarray(measured_bytes, float)
        predicted = played * self._median
        errors = np.abs(predicted / measured - 1.0)
        low, high = self._quantiles(COVERAGE)
        inside = (played * low <= measured) & (measured <= played * high)
        rank = float(spearmanr(predicted, measured).statistic)
        return MemoryQuality(float(errors.mean()), float(np.quantile(errors, 0.95)), rank, float(inside.mean()), len(measured))

    def predict(self, network: Network, lowerings: Sequence[str]) -> tuple[float, float]:
        """Peak memory of a network with one lowering per node: bytes, and their standard deviation."""
        played = self._played(network, lowerings)
        return played * self._median, played * self._std

    def interval(self, network: Network, lowerings: Sequence[str], coverage: float = COVERAGE) -> tuple[float, float]:
        """Bytes between which the measured peak lies for a share of all networks."""
        played, (low, high) = self._played(network, lowerings), self._quantiles(coverage)
        return played * low, played * high

    def _played(self, network: Network, lowerings: Sequence[str]) -> int:
        return peak_tensor_bytes(network, lowerings, self._description, self._batch)

    def _quantiles(self, coverage: float) -> tuple[float, float]:
        """Ratios of measured to played that hold a share of new ones: ranks among one more than were seen."""
        count = len(self._ratios)
        tail = (1.0 - coverage) / 2.0
        low = max(math.floor((count + 1) * tail), 1) - 1
        high = min(math.ceil((count + 1) * (1.0 - tail)), count) - 1
        return float(self._ratios[low]), float(self._ratios[high])
