"""Peak memory of a network on a device: `predictors.tensors` plays a run through, measured networks tell how far it is off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from latency_lut.networks import NetworkTable
from predictors.ratios import COVERAGE, RatioQuality, Ratios
from predictors.tensors import peak_tensor_bytes
from spaces.errors import UserError
from spaces.layers import Network
from spaces.space import Space

LEAST_NETWORKS = 20


class MemoryPredictor:
    """Predicts the peak memory of networks on a device. Make one with `fit`.

    Attributes:
        quality: errors on held-out networks.
    """

    def __init__(self, description: Mapping[str, str | int], ratios: Ratios, quality: RatioQuality) -> None:
        self._description, self._ratios, self.quality = description, ratios, quality

    @classmethod
    def fit(cls, table: NetworkTable, space: Space, held_out: int = 20, seed: int = 0) -> MemoryPredictor:
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
        played = [_played(space.network(n.architecture), n.lowerings, table.device) for n in table.networks]
        values = [[(played[i], table.networks[i].value) for i in part] for part in (order[held_out:], order[:held_out])]
        kept, held = (tuple(zip(*pairs, strict=True)) for pairs in values)
        ratios = Ratios(*kept)
        return cls(table.device, ratios, ratios.quality(*held))

    def predict(self, network: Network, lowerings: Sequence[str]) -> tuple[float, float]:
        """Peak memory of a network with one lowering per node: bytes, and their standard deviation."""
        played = _played(network, lowerings, self._description)
        return played * self._ratios.median, played * self._ratios.std

    def interval(self, network: Network, lowerings: Sequence[str], coverage: float = COVERAGE) -> tuple[float, float]:
        """Bytes between which the measured peak lies for a share of all networks."""
        low, high = self._ratios.interval(coverage)
        played = _played(network, lowerings, self._description)
        return played * low, played * high


def _played(network: Network, lowerings: Sequence[str], description: Mapping[str, str | int]) -> int:
    return peak_tensor_bytes(network, lowerings, description, int(description["batch"]))
