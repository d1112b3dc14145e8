"""One session of measuring: pairs and whole networks, timed into a table at the speed of its anchors.

Networks keep time for networks: what slows a machine for seconds slows whole networks and single layers differently, so that
batches of networks which only layers tie together are some percent apart. So once a table has networks, some of the first, of
all sizes, are loaded and timed along with every further batch of networks. These are always the same, and they are loaded among
the others in random order: a model that is loaded early runs about half a percent slower than the same one loaded late, which
adds up when each batch is tied to the one before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from latency_lut.device import Device, LoadedModel
from latency_lut.models import build_layer, build_model
from latency_lut.network import random_weights
from latency_lut.table import LatencyTable, NetworkTiming, Pair
from latency_lut.timing import Stopwatch, Timing
from spaces.choice import Architecture
from spaces.layers import Network
from spaces.space import Space

ANCHORS = 10
NETWORK_ANCHORS = 16
FIRST_NETWORKS = 100  # of a table, among which its anchors are
NETWORK_VISIT_S = 0.004
NETWORK_ROUNDS = 25

Drawn = tuple[Architecture, tuple[str, ...]]  # an architecture with a lowering for every layer


class Session:
    """One session of measuring into a table, at the speed of its anchors."""

    def __init__(self, table: LatencyTable, device: Device, wanted: Sequence[Pair], seed: int) -> None:
        device.check_here("timing in this process")
        self.table, self.device, self.seed = table, device, seed
        self.rng = np.random.default_rng([seed, 2])
        self.runtime = device.load_runtime()
        self.anchors = table.anchors or anchors_of(wanted)
        self.new = not table.anchors
        anchors_us = None if self.new else [table.entries[pair].us for pair in self.anchors]
        self.stopwatch = Stopwatch([self.load(pair) for pair in self.anchors], anchors_us)

    def load(self, pair: Pair) -> LoadedModel:
        """A pair with random weights, ready to run."""
        spec, lowering = pair
        return self.runtime.load(build_layer(spec, lowering, random_weights(spec, self.rng), self.device.batch), self.device)

    def time_pairs(self, pairs: Sequence[Pair], rounds: int, visit_s: float) -> None:
        """Time a batch of pairs into the table."""
        others = [pair for pair in pairs if pair not in self.anchors]
        timings = self.stopwatch.time([self.load(pair) for pair in others], rounds, visit_s, self.seed)
        self.table.entries.update(zip(others, timings, strict=True))
        if self.new:
            self.table.anchors = self.anchors
            self.table.entries.update(zip(self.anchors, self.stopwatch.anchor_timings(), strict=True))

    def time_networks(self, space: Space, drawn: Sequence[Drawn], source: str) -> None:
        """Time a batch of whole networks, given with their lowerings, into the table."""
        built = [(space.network(architecture), lowerings) for architecture, lowerings in drawn]
        stopwatch, loaded = self.load_networks(space, [self._model(network, lowerings) for network, lowerings in built])
        timings = stopwatch.time(loaded, NETWORK_ROUNDS, NETWORK_VISIT_S, self.seed)
        for (architecture, lowerings), t in zip(drawn, timings, strict=True):
            self.table.networks.append(NetworkTiming(architecture, lowerings, t.us, t.spread_us, t.count, source))

    def load_networks(self, space: Space, models: Sequence[bytes]) -> tuple[Stopwatch, list[LoadedModel]]:
        """Serialized networks, ready to run, and a stopwatch with networks of the table as anchors.

        Where the table has too few networks, it is the stopwatch whose anchors are layers.
        """
        known = sorted(self.table.networks[:FIRST_NETWORKS], key=lambda network: network.us)
        if len(known) < NETWORK_ANCHORS:
            return self.stopwatch, [self.runtime.load(model, self.device) for model in models]
        anchors = [known[i] for i in np.linspace(0, len(known) - 1, NETWORK_ANCHORS).round().astype(int)]
        everything = [*(self._model(space.network(a.architecture), a.lowerings) for a in anchors), *models]
        loaded = {i: self.runtime.load(everything[i], self.device) for i in self.rng.permutation(len(everything)).tolist()}
        in_order = [loaded[i] for i in range(len(everything))]
        stopwatch = Stopwatch(in_order[: len(anchors)], [anchor.us for anchor in anchors], by_size=True)
        return stopwatch, in_order[len(anchors) :]

    def _model(self, network: Network, lowerings: Sequence[str]) -> bytes:
        return build_random(network, lowerings, self.rng, self.device)

    def settle(self) -> None:
        """Bring everything from the speed of the first batch to the machine's usual speed."""
        factor = self.stopwatch.scale
        scaled = {pair: Timing(e.us * factor, e.spread_us * factor, e.count) for pair, e in self.table.entries.items()}
        self.table.entries = scaled
        self.table.networks = [replace(n, us=n.us * factor, spread_us=n.spread_us * factor) for n in self.table.networks]


def anchors_of(pairs: Sequence[Pair]) -> tuple[Pair, ...]:
    """A few pairs of every lowering and of all sizes."""
    ordered = sorted(pairs, key=lambda pair: (pair[1], pair[0].macs, pair[0].to_json()))
    positions = np.linspace(0, len(ordered) - 1, min(ANCHORS, len(ordered))).round().astype(int)
    return tuple(ordered[i] for i in np.unique(positions))


def build_random(network: Network, lowerings: Sequence[str], rng: np.random.Generator, device: Device) -> bytes:
    """A network with random weights, for timing."""
    weights = {node.name: random_weights(node.spec, rng) for node in network.nodes}
    return build_model(network, lowerings, weights, device.batch)


def retime(
    models: Sequence[bytes], space: Space, table: LatencyTable, device: Device, *, rounds: int = NETWORK_ROUNDS, seed: int = 0
) -> tuple[list[Timing], float]:
    """Time whole models at the speed at which a table was measured.

    Args:
        models: serialized.
        space: the table's.
        table: some of its networks are timed along.
        device: where.
        rounds: visits of every model.
        seed: of the order of visits.

    Returns:
        A timing per model, and how fast the machine was meanwhile against the table (1: as fast). A timing as it was on the
        clock is `us / speed`, but for what large models were slowed down more, see `latency_lut.timing.size_slope`.
    """
    session = Session(table, device, (), seed)
    stopwatch, loaded = session.load_networks(space, models)
    timings = stopwatch.time(loaded, rounds, NETWORK_VISIT_S, seed)
    return timings, stopwatch.speed
