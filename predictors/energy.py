"""Energy of a network on a device: the predicted time of its layers, each kind of layer with a power of its own.

    E = latency * sum over kinds of (power * share of the layers' time)

The powers are fitted to the measured networks, none below zero, and drawn towards the power that all have in common, because a
network's layers differ less in power than in time. A kind is a layer's operator with its arithmetic, floats or integers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import nnls

from latency_lut.networks import NetworkTable
from predictors.latency import LatencyPredictor
from predictors.ratios import COVERAGE, RatioQuality, Ratios
from spaces.errors import UserError
from spaces.layers import LayerSpec, Network
from spaces.space import Space

LEAST_NETWORKS = 30
SHRINKAGE = 0.1  # weight of the common power, where that of a network made of one kind alone is 1
FITTED_SHARE = 0.5  # of the networks that are not held out; the others tell how far the fit is off


class EnergyPredictor:
    """Predicts the energy of networks on a device. Make one with `fit`.

    Attributes:
        power_w: fitted power by kind of layer.
        quality: errors on held-out networks.
    """

    def __init__(self, latency: LatencyPredictor, power_w: dict[str, float], common_w: float) -> None:
        self._latency, self.power_w, self._common_w = latency, power_w, common_w
        self._ratios = Ratios([1.0], [1.0])
        self.quality: RatioQuality = self._ratios.quality([1.0, 1.0], [1.0, 1.0])

    @classmethod
    def fit(
        cls, table: NetworkTable, space: Space, latency: LatencyPredictor, held_out: int = 20, seed: int = 0
    ) -> EnergyPredictor:
        """Fit to measured networks.

        Args:
            table: the networks.
            space: of the networks.
            latency: predictor of the same device.
            held_out: networks that are kept for `quality`, at most a third of them.
            seed: draws them.

        Raises:
            UserError: there are too few networks.
        """
        if len(table.networks) < LEAST_NETWORKS:
            raise UserError(f"{len(table.networks)} networks with measured energy; a model needs {LEAST_NETWORKS}")
        order = np.random.default_rng(seed).permutation(len(table.networks))
        held_out = min(held_out, len(order) // 3)
        fitted = held_out + round(FITTED_SHARE * (len(order) - held_out))
        parts = [[table.networks[i] for i in part] for part in (order[:held_out], order[held_out:fitted], order[fitted:])]
        networks = [[(space.network(n.architecture), n.lowerings) for n in part] for part in parts]
        measured = [np.array([n.value for n in part]) for part in parts]
        times = [times_us(network, lowerings, latency) for network, lowerings in networks[1]]
        common_w = float(np.median([uj / sum(row.values()) for uj, row in zip(measured[1], times, strict=True)]))
        kinds = sorted({kind for row in times for kind in row})
        design = np.array([[row.get(kind, 0.0) for kind in kinds] for row in times]) / measured[1][:, None]
        prior = np.eye(len(kinds)) * SHRINKAGE / common_w  # errors as shares, of the measured energy and of the common power
        rows = np.vstack([design, prior])
        power, _ = nnls(rows, np.concatenate([np.ones(len(design)), np.full(len(kinds), SHRINKAGE)]))
        predictor = cls(latency, dict(zip(kinds, map(float, power), strict=True)), common_w)
        modelled = [[predictor._modelled(*network) for network in part] for part in networks]
        predictor._ratios = Ratios(modelled[2], measured[2].tolist())
        predictor.quality = predictor._ratios.quality(modelled[0], measured[0].tolist())
        return predictor

    def predict(self, network: Network, lowerings: Sequence[str]) -> tuple[float, float]:
        """Energy of a run of a network with one lowering per node: microjoules, and their standard deviation."""
        modelled = self._modelled(network, lowerings)
        return modelled * self._ratios.median, modelled * self._ratios.std

    def interval(self, network: Network, lowerings: Sequence[str], coverage: float = COVERAGE) -> tuple[float, float]:
        """Microjoules between which the measured energy lies for a share of all networks."""
        low, high = self._ratios.interval(coverage)
        modelled = self._modelled(network, lowerings)
        return modelled * low, modelled * high

    def _modelled(self, network: Network, lowerings: Sequence[str]) -> float:
        times = times_us(network, lowerings, self._latency)
        return sum(us * self.power_w.get(kind, self._common_w) for kind, us in times.items())


def _kind(spec: LayerSpec) -> str:
    return f"{spec.kind} {'integer' if spec.integer else 'float'}"


def times_us(network: Network, lowerings: Sequence[str], latency: LatencyPredictor) -> dict[str, float]:
    """The network's predicted latency, shared out among kinds of layers by what the layers cost alone."""
    alone: dict[str, float] = {}
    for spec, lowering in zip(network.layers, lowerings, strict=True):
        prices = {price.lowering: price.us for price in latency.prices(spec)}
        alone[_kind(spec)] = alone.get(_kind(spec), 0.0) + prices[lowering]
    whole_us = latency.predict_us(network, lowerings) / sum(alone.values())
    return {kind: us * whole_us for kind, us in alone.items()}
