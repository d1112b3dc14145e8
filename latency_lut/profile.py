"""Profiling: fill a latency table with the layers of a space, then with whole random networks.

A profile can be stopped at any moment and started again: the table is saved after each batch, and only what is missing is
measured. Which pairs are worth measuring is decided by how often sampled networks contain them; the rest is fitted by the
predictor.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from latency_lut.device import Device
from latency_lut.lowering import LOWERINGS, Description, applicable
from latency_lut.measuring import DEFAULTS, MeasuringSettings
from latency_lut.refine import Refinement, refine
from latency_lut.session import Drawn, Session
from latency_lut.table import LatencyTable, Pair, pair_key
from spaces.choice import Architecture
from spaces.errors import UserError
from spaces.layers import LayerSpec
from spaces.space import Space

BATCH_PAIRS = 150
BATCH_NETWORKS = 100
SPREAD_PAIRS = 600
SAMPLED_NETWORKS = 1500
PATIENCE = 200
RARE_SHARE = 0.1
GRADED_NETWORKS = 40
DENSE_SHARE = 0.7

LEAST_NETWORKS = 8  # fewer are not enough for a latency model

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
    """

    pairs: int
    reachable: int
    measured: int
    networks: int
    seconds: float
    pairs_per_min: float


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


def profile(
    space: Space,
    device: Device,
    path: Path | str,
    settings: MeasuringSettings = DEFAULTS,
    *,
    refinement: Refinement | None = None,
    on_progress: Progress | None = None,
) -> tuple[LatencyTable, ProfileStats]:
    """Measure what is missing in a table; what was transferred to it (`latency_lut.transfer`) is dropped.

    Args:
        space: what can be built.
        device: where.
        path: the table's file; created, or continued.
        settings: what is measured, and how.
        refinement: how to go on after a spread sample of `SPREAD_PAIRS` pairs; `None`: measure `max_pairs` pairs and be done.
        on_progress: called with what is measured (`pairs`, `networks`), how many are done, and of how many.

    Raises:
        UserError: too few networks for a refinement; the file is damaged, of another space or device, or cannot be written.
    """
    seed, networks = settings.seed, settings.networks
    if networks < LEAST_NETWORKS and refinement is not None:
        raise UserError(f"networks is {networks}; a target_error or budget_s needs at least {LEAST_NETWORKS}")
    begin = time.perf_counter()
    report = on_progress or (lambda what, done, total: None)
    path = Path(path)
    table = LatencyTable.load(path) if path.exists() else LatencyTable.empty(space, device)
    table.check(space, device)
    table.transferred = None  # what is measured now replaces what was predicted from other devices
    known_pairs, known_networks = len(table.entries), len(table.networks)
    if not path.exists():
        table.save(path)  # a folder that cannot be written is told before anything is measured
    rng = np.random.default_rng(seed)
    wanted, reachable = pairs_of(space, rng, settings.max_pairs, description=table.device)
    session = Session(table, device, wanted, seed)
    spread = wanted if refinement is None else wanted[:SPREAD_PAIRS]

    missing = [pair for pair in spread if pair not in table.entries]
    measure_begin = time.perf_counter()
    for first in range(0, len(missing), BATCH_PAIRS):
        batch = missing[first : first + BATCH_PAIRS]
        session.time_pairs(batch, settings.rounds, settings.visit_s)
        table.save(path)
        report("pairs", len(table.entries), len(table.entries) + len(missing) - first - len(batch))
    measure_s = time.perf_counter() - measure_begin

    timed = sum(network.source == "random" for network in table.networks)
    drawn = draw_networks(space, table, seed, networks)[timed:]
    for first in range(0, len(drawn), BATCH_NETWORKS):
        report("networks", timed + first, networks)
        session.time_networks(space, drawn[first : first + BATCH_NETWORKS], "random")
        table.save(path)
    if drawn and not any(network.source == "graded" for network in table.networks):
        graded = draw_graded(space, table, seed)
        session.time_networks(space, graded, "graded")
    if drawn:
        report("networks", networks, networks)
    if refinement is not None:
        refine(session, space, path, refinement, settings, time.perf_counter() - begin, report)
    if (known_pairs, known_networks) != (len(table.entries), len(table.networks)):
        session.settle()
        table.save(path)
    seconds = time.perf_counter() - begin
    pairs_per_min = 60 * len(missing) / measure_s if missing else 0.0
    counts = len(table.entries) - known_pairs, len(table.networks) - known_networks
    stats = ProfileStats(len(table.entries), reachable, *counts, seconds, pairs_per_min)
    return table, stats


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


def draw_networks(space: Space, table: LatencyTable, seed: int, count: int) -> list[Drawn]:
    """Random networks of all sizes; two thirds with the fastest known lowerings, one third with random ones."""
    rng, drawn = np.random.default_rng([seed, 1]), []
    for index in range(count):
        architecture = space.sample_spread(rng)
        lowerings = []
        for spec in space.layers(architecture):
            pick = str(rng.choice(applicable(spec, table.device)))
            lowerings.append(_fastest(table, spec, pick) if index % 3 else pick)
        drawn.append((architecture, tuple(lowerings)))
    return drawn


def draw_graded(space: Space, table: LatencyTable, seed: int) -> list[Drawn]:
    """The networks of `graded_networks` with the fastest known lowerings; where none is known, each network prefers some."""
    rng, drawn = np.random.default_rng([seed, 3]), []
    for architecture in graded_networks(space, rng):
        liked = [str(name) for name in rng.permutation(list(LOWERINGS))]
        specs = space.layers(architecture)
        likely = [min(applicable(spec, table.device), key=liked.index) for spec in specs]
        drawn.append((architecture, tuple(_fastest(table, *pick) for pick in zip(specs, likely, strict=True))))
    return drawn


def _fastest(table: LatencyTable, spec: LayerSpec, otherwise: str) -> str:
    """The fastest lowering of a layer when all of them were measured."""
    names = applicable(spec, table.device)
    costs = [entry.us for name in names if (entry := table.entry(spec, name)) is not None]
    return names[int(np.argmin(costs))] if len(costs) == len(names) else otherwise
