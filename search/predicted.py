"""The values of candidates: what the predictors and the layers say of an architecture, by name of objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import numpy as np

from predictors.accuracy import RanksNetworks, accuracy_features
from predictors.energy import EnergyPredictor
from predictors.latency import LatencyPredictor
from predictors.memory import MemoryPredictor
from predictors.size import model_bytes
from search.candidates import Values
from search.objectives import Objective
from spaces.choice import Architecture
from spaces.layers import Network
from spaces.space import Space

REMEMBERED = 20_000


class PredictedValues:
    """Predicts objectives of architectures; those that need no accuracy are remembered between rounds.

    Args:
        space: of the architectures.
        objectives: what to predict, of objectives and constraints alike.
        latency: latency predictor by device.
        memory: predictor of the peak memory by device, at least of those that an objective names.
        energy: the same of the energy.
        device: whose file a size is of; the first one's by default.
        proxies: further features `(n, f)` of architectures for the accuracy predictor.
    """

    def __init__(
        self,
        space: Space,
        objectives: Sequence[Objective],
        latency: Mapping[str, LatencyPredictor],
        memory: Mapping[str, MemoryPredictor] | None = None,
        energy: Mapping[str, EnergyPredictor] | None = None,
        device: str | None = None,
        proxies: Callable[[Sequence[Architecture]], np.ndarray] | None = None,
    ) -> None:
        self.space, self.latency = space, latency
        self.measured: dict[str, Mapping[str, MemoryPredictor | EnergyPredictor]] = {
            "peak_memory": memory or {},
            "energy": energy or {},
        }
        self.device = next(iter(latency)) if device is None else device
        self.objectives = list({o.name: o for o in objectives}.values())
        self._costs = lru_cache(REMEMBERED)(self._uncached_costs)
        self._proxies = proxies
        self.network = lru_cache(REMEMBERED)(space.network)

    def costs(self, architecture: Architecture) -> Values:
        """All values but accuracy."""
        return self._costs(architecture)

    def features(self, architectures: Sequence[Architecture]) -> np.ndarray:
        """What the accuracy predictor sees of architectures, `(n, f)`; the proxies' features come last."""
        own = accuracy_features(self.space, architectures, [self.network(a) for a in architectures])
        return own if self._proxies is None else np.hstack([own, self._proxies(architectures)])

    def _uncached_costs(self, architecture: Architecture) -> Values:
        network = self.network(architecture)
        return {o.name: self._cost(o, network) for o in self.objectives if o.quantity != "accuracy"}

    def _cost(self, objective: Objective, network: Network) -> float:
        if objective.quantity == "latency":
            return self.latency[str(objective.device)].predict_us(network)
        if objective.quantity in self.measured:
            device = str(objective.device)
            return self.measured[objective.quantity][device].predict(network, self.latency[device].plan(network))[0]
        if objective.quantity == "size":
            return float(model_bytes(network, self.latency[self.device].plan(network)))
        counted = {"macs": network.macs, "parameters": network.parameters, "memory": network.peak_activation_bytes}
        return float(counted[objective.quantity])

    def predict(self, architectures: Sequence[Architecture], accuracy: RanksNetworks) -> list[Values]:
        """All values, accuracy from its predictor (always there, as `accuracy`)."""
        if not architectures:
            return []
        mean, _ = accuracy.predict(self.features(architectures))
        return [{**self._costs(a), "accuracy": float(m)} for a, m in zip(architectures, mean, strict=True)]
