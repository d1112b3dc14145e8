"""A device's table from the tables of others and a few measurements: which to take, and what they say of all the rest.

What a layer or a network costs on every source comes from that source's own latency model. Two `TransferPredictor`s learn from
it, one of single layers and one of whole networks, because what a network saves against its layers differs between devices,
too. Values are taken relative to the sources' geometric mean; the features of a row are the shares that kinds of layers with
their lowerings have in it, and how many of them there are. A lowering that a source lacks costs there what its fastest does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar

import numpy as np

from latency_lut.lowering import applicable
from latency_lut.profile import graded_networks, pairs_of
from latency_lut.session import Drawn
from latency_lut.table import LatencyTable, Pair, pair_key
from latency_lut.transferred import Estimate, Transferred, TransferredNetwork
from predictors.latency import LatencyPredictor
from predictors.transfer import TransferPredictor
from spaces.space import Space

NETWORKS = 300  # random ones, beside graded ones
SOURCE_HELD_OUT = 2
LEAST_LEFT_OUT = 2  # fewer cannot be predicted from each other

Key = TypeVar("Key", Pair, Drawn)


class TableTransfer:
    """Proposes what to measure on a new device, and predicts the rest of its table.

    Args:
        space: of all tables.
        table: of the new device, with what was measured there so far: pairs, and networks of the source `sample`.
        sources: tables of other devices, by name.
        max_pairs: pairs to predict.
        seed: draws pairs and networks; same seed, same result.

    Raises:
        UserError: the table of a source has too few networks for a latency model.
    """

    def __init__(
        self, space: Space, table: LatencyTable, sources: Mapping[str, LatencyTable], max_pairs: int, seed: int = 0
    ) -> None:
        self._space, self._device, self._sources, self._seed = space, table.device, sources, seed
        self._models = [LatencyPredictor.fit(source, space, SOURCE_HELD_OUT, seed) for source in sources.values()]
        self._costs: dict[Pair, tuple[np.ndarray, tuple[str, ...]]] = {}
        wanted, _ = pairs_of(space, np.random.default_rng(seed), max_pairs, description=table.device)
        pairs = list(dict.fromkeys([*wanted, *table.entries]))
        samples = [(n.architecture, n.lowerings) for n in table.networks if n.source == "sample"]
        networks = list(dict.fromkeys([*self._draw_networks(), *samples]))
        self._pairs = _Rows(pairs, [[pair] for pair in pairs], np.array([self._on_sources(p)[0] for p in pairs]), self, seed)
        layers = [self._layers(drawn) for drawn in networks]
        self._networks = _Rows(networks, layers, np.array([self._network_us(drawn) for drawn in networks]), self, seed)
        self.fit(table)

    def fit(self, table: LatencyTable) -> None:
        """Learn what was measured on the new device, all that its table holds now."""
        self._pairs.fit({pair: entry.us for pair, entry in table.entries.items()})
        networks = [n for n in table.networks if n.source == "sample"]
        self._networks.fit({(n.architecture, n.lowerings): n.us for n in networks})

    def propose_pairs(self, count: int) -> list[Pair]:
        """Pairs to measure next, at most `count`."""
        return self._pairs.propose(count)

    def propose_networks(self, count: int) -> list[Drawn]:
        """Networks to measure next, at most `count`."""
        return self._networks.propose(count)

    def transferred(self) -> Transferred:
        """All that was not measured, predicted from what was.

        Raises:
            RuntimeError: no pair or no network was measured.
        """
        fingerprints = {name: source.fingerprint for name, source in self._sources.items()}
        errors = self._pairs.error(), self._networks.error()
        networks = [TransferredNetwork(*drawn, estimate) for drawn, estimate in self._networks.estimates().items()]
        samples = len(self._pairs.measured), len(self._networks.measured)
        return Transferred(fingerprints, *samples, *errors, self._pairs.estimates(), networks)

    # -- what the sources say -------------------------------------------------------------------------------------------------

    def cost(self, pair: Pair) -> float:
        """Geometric mean of a pair over the sources, in microseconds."""
        return float(np.exp(np.log(self._on_sources(pair)[0]).mean()))

    def _on_sources(self, pair: Pair) -> tuple[np.ndarray, tuple[str, ...]]:
        """Of every source, what a pair costs there, and the lowering that stands for the pair's."""
        found = self._costs.get(pair)
        if found is None:
            spec, name = pair
            prices = []
            for model in self._models:
                options = model.prices(spec)
                same = [price for price in options if price.lowering == name]
                prices.append(same[0] if same else min(options, key=lambda price: price.us))
            found = np.array([price.us for price in prices]), tuple(price.lowering for price in prices)
            self._costs[pair] = found
        return found

    def _network_us(self, drawn: Drawn) -> np.ndarray:
        """Microseconds of a network on every source."""
        network = self._space.network(drawn[0])
        names = [self._on_sources((spec, name))[1] for spec, name in zip(network.layers, drawn[1], strict=True)]
        return np.array([model.predict_us(network, [of[i] for of in names]) for i, model in enumerate(self._models)])

    def _layers(self, drawn: Drawn) -> list[Pair]:
        return [pair_key(spec, name) for spec, name in zip(self._space.layers(drawn[0]), drawn[1], strict=True)]

    def _draw_networks(self) -> list[Drawn]:
        """Random networks of all sizes, a third of them with random lowerings, and graded ones."""
        rng, space = np.random.default_rng([self._seed, 7]), self._space
        architectures = [space.sample_spread(rng) if index % 2 else space.sample(rng) for index in range(NETWORKS)]
        drawn = []
        for index, architecture in enumerate([*architectures, *graded_networks(space, rng)]):
            lowerings = []
            for spec in space.layers(architecture):
                names = applicable(spec, self._device)
                cheapest = min(names, key=lambda name: self.cost(pair_key(spec, name)))
                lowerings.append(cheapest if index % 3 or index >= NETWORKS else str(rng.choice(names)))
            drawn.append((architecture, tuple(lowerings)))
        return drawn


class _Rows(Generic[Key]):
    """What of one kind can be measured on the new device, layers or whole networks, with a predictor of it.

    Args:
        keys: of the rows.
        layers: of each row, as pairs.
        source_us: `(n, d)`, on the sources.
        transfer: knows what pairs cost.
        seed: of the predictor.
    """

    def __init__(
        self, keys: Sequence[Key], layers: Sequence[Sequence[Pair]], source_us: np.ndarray, transfer: TableTransfer, seed: int
    ) -> None:
        self._keys: list[Key] = list(keys)
        self._index: dict[Key, int] = {key: index for index, key in enumerate(keys)}
        self._level_us = np.exp(np.log(source_us).mean(axis=1))
        self._predictor = TransferPredictor(
            _features(layers, self._level_us, transfer), source_us / self._level_us[:, None], seed
        )
        self.measured: dict[Key, float] = {}

    def fit(self, measured_us: Mapping[Key, float]) -> None:
        """Learn measurements; without any, forget those of before."""
        self.measured = dict(measured_us)
        self._ids = np.array([self._index[key] for key in self.measured], dtype=int)
        self._relative = np.array(list(self.measured.values())) / self._level_us[self._ids]
        self._predictor.forget()
        if self.measured:
            self._predictor.fit(self._ids, self._relative)

    def propose(self, count: int) -> list[Key]:
        """Which rows to measure next, at most `count`."""
        count = min(count, len(self._keys) - len(self.measured))
        return [self._keys[index] for index in self._predictor.propose(count)] if count > 0 else []

    def error(self) -> float | None:
        """Mean absolute relative error of the measured rows, each predicted from the others; `None` where there are too few."""
        if len(self.measured) < LEAST_LEFT_OUT:
            return None
        return float(np.mean(np.abs(self._predictor.left_out() / self._relative - 1.0)))

    def estimates(self) -> dict[Key, Estimate]:
        """Of every row that was not measured."""
        mean, std = self._predictor.predict()
        told = zip(self._keys, mean * self._level_us, std * self._level_us, strict=True)
        return {key: Estimate(float(us), float(std_us)) for key, us, std_us in told if key not in self.measured}


def _features(layers: Sequence[Sequence[Pair]], level_us: np.ndarray, transfer: TableTransfer) -> np.ndarray:
    """Features of rows, relative to their level, `(n, 2 * kinds + 2)`.

    Of every kind of layer with a lowering its time and its number, then what a row costs beyond its layers, and a constant.
    """
    costs = {pair: transfer.cost(pair) for row in layers for pair in row}
    kinds: defaultdict[tuple[str, str], int] = defaultdict(lambda: len(kinds))
    columns = {pair: kinds[pair[0].kind, pair[1]] for pair in costs}
    features, least_us = np.zeros((len(layers), 2 * len(kinds) + 2)), min(costs.values())
    for index, row in enumerate(layers):
        for pair in row:
            features[index, 2 * columns[pair]] += costs[pair]
            features[index, 2 * columns[pair] + 1] += least_us
        features[index, -2] = level_us[index] - sum(costs[pair] for pair in row)
        features[index, -1] = float(np.median(level_us))
    return np.asarray(features / level_us[:, None])
