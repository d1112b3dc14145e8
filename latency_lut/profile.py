"""Profiling: fill a latency table with the layers of a space, then with whole random networks.

A profile can be stopped at any moment and started again: the table is saved after each batch, and only what is missing is
measured. Which pairs are worth measuring is decided by how often sampled networks contain them; the rest is fitted by the
predictor.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np

from latency_lut.device import Device, LoadedModel
from latency_lut.lowering import Description, applicable
from latency_lut.models import build_layer, build_model
from latency_lut.network import random_weights
from latency_lut.table import LatencyTable, NetworkTiming, Pair, pair_key
from latency_lut.timing import Stopwatch, Timing
from spaces.choice import Architecture
from spaces.errors import UserError
from spaces.layers import LayerSpec, Network
from spaces.space import Space

BATCH_PAIRS = 150
ANCHORS = 10
SAMPLED_NETWORKS = 1500
PATIENCE = 200
RARE_SHARE = 0.1
GRADED_NETWORKS = 40
DENSE_SHARE = 0.7
NETWORK_VISIT_S = 0.004
NETWORK_ROUNDS = 25

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ProfileStats:
    """What a call of `profile` did.

    Args:
        pairs: pairs in the table.
        reachable: distinct pairs seen in sampled networks.
        measured: pairs measured in this call.
        networks: networks timed in this call.
        seconds: wall time of this call.
        pairs_per_min: measured pairs per minute, building and loading the models included; 0 when nothing was missing.
        speed: how fast the machine was in the median against the table's speed.
    """

    pairs: int
    reachable: int
    measured: int
    networks: int
    seconds: float
    pairs_per_min: float
    speed: float


def pairs_of(
    space: Space,
    rng: np.random.Generator,
    max_pairs: int,
    samples: int = SAMPLED_NETWORKS,
    description: Description = MappingProxyType({}),
) -> tuple[list[Pair], int]:
    """The pairs to measure, and how many distinct ones the samples contain.

    Half of the samples are uniform, half of random size, plus the largest and the smallest network. When there are more than
    `max_pairs`, most of the chosen are the most frequent; a tenth is drawn from the rare ones, to teach the fit about those.

    Args:
        space: what can be built.
        rng: draws the samples.
        max_pairs: at most so many.
        samples: networks to sample; fewer when `PATIENCE` of them in a row bring nothing new.
        description: of the device, see `Device.describe`; by default one that runs ONNX.

    Returns:
        Pairs in random order, so that any part of them is a spread sample too; number of distinct pairs.

    Raises:
        UserError: the space has a layer that the device cannot run.
    """

    def pairs(spec: LayerSpec) -> list[Pair]:
        names = applicable(spec, description)
        if not names:  # a format that the device lacks
            runtime = description.get("runtime", "ONNX")
            mend = f"leave {spec.precision} out of the space, or take a device that has it"
            raise UserError(f"precision {spec.precision} of layer {spec} does not run in {runtime} here; {mend}")
        return [pair_key(spec, name) for name in names]

    counts: Counter[Pair] = Counter()
    newest = 0
    for index in range(samples):
        draw = space.sample_spread if index % 2 else space.sample
        known = len(counts)
        counts.update({pair for spec in space.layers(draw(rng)) for pair in pairs(spec)})
        newest = index if len(counts) > known else newest
        if index - newest >= PATIENCE:
            break
    for architecture in (space.largest(), space.smallest()):
        for spec in space.layers(architecture):
            counts.update(dict.fromkeys(pairs(spec), samples))
    ranked = sorted(counts, key=lambda pair: (-counts[pair], pair[1], pair[0].to_json()))
    if len(ranked) > max_pairs:
        rare = int(max_pairs * RARE_SHARE)
        tail = ranked[max_pairs - rare :]
        ranked = ranked[: max_pairs - rare] + [tail[i] for i in rng.choice(len(tail), rare, replace=False)]
    return [ranked[i] for i in rng.permutation(len(ranked))], len(counts)


def anchors_of(pairs: Sequence[Pair]) -> tuple[Pair, ...]:
    """A few pairs of every lowering and of all sizes."""
    ordered = sorted(pairs, key=lambda pair: (pair[1], pair[0].macs, pair[0].to_json()))
    positions = np.linspace(0, len(ordered) - 1, min(ANCHORS, len(ordered))).round().astype(int)
    return tuple(ordered[i] for i in np.unique(positions))


def profile(
    space: Space,
    device: Device,
    path: Path | str,
    *,
    seed: int = 0,
    max_pairs: int = 2800,
    networks: int = 40,
    rounds: int = 12,
    visit_s: float = 0.0006,
    on_progress: Progress | None = None,
) -> tuple[LatencyTable, ProfileStats]:
    """Measure what is missing in a table.

    Args:
        space: what can be built.
        device: where.
        path: the table's file; created, or continued.
        seed: decides which pairs and networks are measured.
        max_pairs: pairs to measure.
        networks: whole random networks to time.
        rounds: visits per pair.
        visit_s: seconds of one visit.
        on_progress: called with what is measured (`pairs`, `networks`), how many are done, and of how many.

    Raises:
        UserError: a number is out of range; the file is damaged, of another space or device, or cannot be written.
    """
    for name, value, least in (
        ("seed", seed, 0),
        ("max_pairs", max_pairs, 1),
        ("networks", networks, 0),
        ("rounds", rounds, 3),
    ):
        if type(value) is not int or value < least:
            raise UserError(f"{name} is {value!r}; allowed are integers from {least}")
    if not isinstance(visit_s, (int, float)) or not 0 < visit_s < 60:
        raise UserError(f"visit_s is {visit_s!r}; allowed are seconds above 0 and below 60")
    begin = time.perf_counter()
    report = on_progress or (lambda what, done, total: None)
    path = Path(path)
    table = LatencyTable.load(path) if path.exists() else LatencyTable.empty(space, device)
    table.check(space, device)
    if not path.exists():
        table.save(path)  # a folder that cannot be written is told before anything is measured
    rng = np.random.default_rng(seed)
    wanted, reachable = pairs_of(space, rng, max_pairs, description=table.device)
    session = _Session(table, device, wanted, seed)

    missing = [pair for pair in wanted if pair not in table.entries]
    measure_begin = time.perf_counter()
    for first in range(0, len(missing), BATCH_PAIRS):
        batch = missing[first : first + BATCH_PAIRS]
        session.time_pairs(batch, rounds, visit_s)
        table.save(path)
        report("pairs", len(table.entries), len(table.entries) + len(missing) - first - len(batch))
    measure_s = time.perf_counter() - measure_begin

    timed = sum(network.source == "random" for network in table.networks)
    drawn = _draw_networks(space, table, np.random.default_rng([seed, 1]), networks)[timed:]
    if drawn:
        report("networks", timed, networks)
        session.time_networks(space, drawn, "random")
        if not any(network.source == "graded" for network in table.networks):
            graded_rng = np.random.default_rng([seed, 3])
            graded = [
                (a, tuple(_fastest(table, s, applicable(s, table.device)[0]) for s in space.layers(a)))
                for a in graded_networks(space, graded_rng)
            ]
            session.time_networks(space, graded, "graded")
        report("networks", networks, networks)
    if drawn or missing:
        session.settle()
        table.save(path)
    seconds = time.perf_counter() - begin
    pairs_per_min = 60 * len(missing) / measure_s if missing else 0.0
    speed = 1.0 if session.new else session.stopwatch.speed
    stats = ProfileStats(len(table.entries), reachable, len(missing), len(drawn), seconds, pairs_per_min, speed)
    return table, stats


class _Session:
    """One session of measuring into a table, at the speed of its anchors."""

    def __init__(self, table: LatencyTable, device: Device, wanted: Sequence[Pair], seed: int) -> None:
        self.table, self.device, self.seed = table, device, seed
        self.rng = np.random.default_rng([seed, 2])
        self.runtime = device.load_runtime()
        self.anchors = table.anchors or anchors_of(wanted)
        self.new = not table.anchors
        anchors_us = None if self.new else [table.entries[pair].us for pair in self.anchors]
        self.stopwatch = Stopwatch([self.load(pair) for pair in self.anchors], anchors_us)

    def load(self, pair: Pair) -> LoadedModel:
        spec, lowering = pair
        return self.runtime.load(build_layer(spec, lowering, random_weights(spec, self.rng), self.device.batch), self.device)

    def time_pairs(self, pairs: Sequence[Pair], rounds: int, visit_s: float) -> None:
        others = [pair for pair in pairs if pair not in self.anchors]
        timings = self.stopwatch.time([self.load(pair) for pair in others], rounds, visit_s, self.seed)
        self.table.entries.update(zip(others, timings, strict=True))
        if self.new:
            self.table.anchors = self.anchors
            self.table.entries.update(zip(self.anchors, self.stopwatch.anchor_timings(), strict=True))

    def time_networks(self, space: Space, drawn: Sequence[tuple[Architecture, tuple[str, ...]]], source: str) -> None:
        built = [(space.network(architecture), lowerings) for architecture, lowerings in drawn]
        models = [build_random(network, lowerings, self.rng, self.device) for network, lowerings in built]
        loaded = [self.runtime.load(model, self.device) for model in models]
        timings = self.stopwatch.time(loaded, NETWORK_ROUNDS, NETWORK_VISIT_S, self.seed)
        for (architecture, lowerings), t in zip(drawn, timings, strict=True):
            self.table.networks.append(NetworkTiming(architecture, lowerings, t.us, t.spread_us, t.count, source))

    def settle(self) -> None:
        """Bring everything from the speed of the first batch to the machine's usual speed."""
        factor = self.stopwatch.scale
        scaled = {pair: Timing(e.us * factor, e.spread_us * factor, e.count) for pair, e in self.table.entries.items()}
        self.table.entries = scaled
        self.table.networks = [replace(n, us=n.us * factor, spread_us=n.spread_us * factor) for n in self.table.networks]


def build_random(network: Network, lowerings: Sequence[str], rng: np.random.Generator, device: Device) -> bytes:
    """A network with random weights, for timing."""
    weights = {node.name: random_weights(node.spec, rng) for node in network.nodes}
    return build_model(network, lowerings, weights, device.batch)


def graded_networks(space: Space, rng: np.random.Generator, count: int = GRADED_NETWORKS) -> list[Architecture]:
    """Networks such as a search ends with: of one precision, or of two that change once along the depth, mostly dense.

    Random networks, whose every layer has a precision of its own, are never like them. These take part in fitting a latency
    model, not in testing it. The smallest and the largest of each precision are among them.
    """
    precision = [choice for choice in space.choices if choice.kind == "precision"]
    options = dict.fromkeys(option for choice in precision for option in choice.options)
    networks = [space.graded(end, precision=bits, sparsity="dense") for end in (0.0, 1.0) for bits in options]
    while len(networks) < count:
        values = {choice.name: choice.options[0] for choice in space.choices} | dict(space.sample_spread(rng))
        change = int(rng.integers(len(precision) + 1))
        first, second = rng.permutation(2)
        for index, choice in enumerate(precision):
            values[choice.name] = choice.options[-1 if (first if index < change else second) else 0]
        if rng.random() < DENSE_SHARE:
            values |= {choice.name: choice.options[-1] for choice in space.choices if choice.kind == "sparsity"}
        networks.append(space.architecture(values))
    return list(dict.fromkeys(networks))


def _draw_networks(
    space: Space, table: LatencyTable, rng: np.random.Generator, count: int
) -> list[tuple[Architecture, tuple[str, ...]]]:
    """Random networks of all sizes; two thirds with the fastest known lowerings, one third with random ones."""
    drawn = []
    for index in range(count):
        architecture = space.sample_spread(rng)
        lowerings = []
        for spec in space.layers(architecture):
            pick = str(rng.choice(applicable(spec, table.device)))
            lowerings.append(_fastest(table, spec, pick) if index % 3 else pick)
        drawn.append((architecture, tuple(lowerings)))
    return drawn


def _fastest(table: LatencyTable, spec: LayerSpec, otherwise: str) -> str:
    """The fastest lowering of a layer when all of them were measured."""
    names = applicable(spec, table.device)
    costs = [entry.us for name in names if (entry := table.entry(spec, name)) is not None]
    return names[int(np.argmin(costs))] if len(costs) == len(names) else otherwise


def retime(
    models: Sequence[bytes], table: LatencyTable, device: Device, *, rounds: int = NETWORK_ROUNDS, seed: int = 0
) -> tuple[list[Timing], float]:
    """Time whole models at the speed at which a table was measured.

    Args:
        models: serialized.
        table: its anchors are timed along.
        device: where.
        rounds: visits of every model.
        seed: of the order of visits.

    Returns:
        A timing per model, and how fast the machine was meanwhile against the table (1: as fast). A timing as it was on the
        clock is `us / speed`.
    """
    session = _Session(table, device, (), seed)
    loaded = [session.runtime.load(model, device) for model in models]
    timings = session.stopwatch.time(loaded, rounds, NETWORK_VISIT_S, seed)
    return timings, session.stopwatch.speed
