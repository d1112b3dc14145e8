"""A new device's table from the tables of other devices and a few measurements.

Half of the samples are single layers (pairs), which also tie later sessions to the same speed of the machine, half are whole
networks. What they say of everything else is a model's, which is in the room above and so comes as a function. A few random
networks are timed besides, which the model does not see: they tell how wrong it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from latency_lut.device import Device
from latency_lut.lowering import applicable
from latency_lut.measuring import DEFAULTS, MeasuringSettings
from latency_lut.session import Drawn, Session
from latency_lut.table import LatencyTable, Pair
from latency_lut.transferred import Transferred
from spaces.errors import UserError
from spaces.space import Space

LEAST_SAMPLES = 3
MOST_SAMPLES = 1000
MOST_PAIRS = 100_000
LEAST_SOURCES = 2
LEAST_CHECKED = 2
PAIR_ROUNDS = 25  # of few pairs, so each may take more visits than in a profile

Progress = Callable[[str, int, int], None]


class Model(Protocol):
    """What predicts a table, see `predictors.transfer_table`."""

    def propose_pairs(self, count: int) -> Sequence[Pair]:
        """Pairs to measure next."""

    def propose_networks(self, count: int) -> Sequence[Drawn]:
        """Networks to measure next."""

    def fit(self, table: LatencyTable) -> None:
        """Learn what was measured on the new device, all that its table holds now."""

    def transferred(self) -> Transferred:
        """Predictions of all that was not measured."""


MakeModel = Callable[[Space, LatencyTable, Mapping[str, LatencyTable], int, int], Model]


@dataclass(frozen=True)
class Samples:
    """What is to be measured: pairs, and whole networks, each with its source, see `latency_lut.table.NetworkTiming`."""

    pairs: tuple[Pair, ...]
    networks: tuple[tuple[Drawn, str], ...]


TakeSamples = Callable[[Samples, LatencyTable], LatencyTable | None]  # `None`: stopped


@dataclass(frozen=True)
class TransferStats:
    """What a call of `transfer` did: pairs and networks measured in it, its seconds, and as many samples to measure next."""

    pairs: int
    networks: int
    seconds: float
    proposed_pairs: tuple[Pair, ...]
    proposed_networks: tuple[Drawn, ...]


def read_sources(folder: Path, names: Sequence[str], device: Device, space: Space) -> dict[str, LatencyTable]:
    """The tables of the devices to transfer from, by name.

    Raises:
        UserError: too few, one that is not there, is the new device itself, of another space, or itself transferred.
    """
    wanted = [str(name) for name in names]
    found = sorted(path.stem for path in folder.glob("*.parquet") if path.stem != device.name)
    there = f"in {folder} there are {', '.join(found) or 'none'}"
    distinct = list(dict.fromkeys(wanted))
    if device.name in distinct:
        raise UserError(f"transfer has {device.name}, which is the device itself; give other devices: {there}")
    for name in distinct:
        if name not in found:
            raise UserError(f"no table of {name!r} to transfer from; {there}; run: python -m latency_lut device={name}")
    if len(distinct) < LEAST_SOURCES:
        raise UserError(f"transfer is {wanted}; allowed are at least {LEAST_SOURCES} different devices: {there}")
    sources = {name: LatencyTable.load(folder / f"{name}.parquet") for name in distinct}
    for name, table in sources.items():
        if table.space_fingerprint != space.fingerprint:
            mend = f"run: python -m latency_lut device={name} tables=FOLDER"
            of = f"space {table.space_name} {table.space_fingerprint}, not of {space.name} {space.fingerprint}"
            raise UserError(f"the table of {name} is of {of}; {mend}")
        if table.transferred is not None:
            raise UserError(f"the table of {name} was transferred, not measured; run: python -m latency_lut device={name}")
        if table.device_fingerprint == device.fingerprint:
            raise UserError(f"{name} is the device {device.name} itself under another name; give other devices: {there}")
    return sources


def transfer(
    space: Space,
    device: Device,
    path: Path,
    sources: Mapping[str, LatencyTable],
    make_model: MakeModel,
    take: TakeSamples,
    *,
    samples: int = 10,
    checked_networks: int = 8,
    max_pairs: int = DEFAULTS.max_pairs,
    seed: int = DEFAULTS.seed,
    turn: Callable[[], AbstractContextManager[None]] = nullcontext,
    on_progress: Progress | None = None,
) -> tuple[LatencyTable, TransferStats] | None:
    """Measure what is missing of the samples, predict the rest.

    Args:
        space: what can be built.
        device: the new one.
        path: its table's file; created, or continued with the samples that are there.
        sources: from `read_sources`.
        make_model: given the space, the new table, the sources, the number of pairs and a seed.
        take: measures what it is given, and returns the table with it: `take_here`, or `latency_lut.elsewhere.take_there`.
        samples: measurements that the model sees, in all.
        checked_networks: random networks that it does not see.
        max_pairs: pairs in the table.
        seed: same seed, same proposals from the same measurements.
        turn: entered for work that needs this machine's processor, but for what `take` does.
        on_progress: called with what is done, how much of it, and of how much.

    Returns:
        The table and what was done; `None` when it was stopped.

    Raises:
        UserError: a number is out of range; the table is damaged, of another space or device, was measured without a transfer,
            or cannot be written.
    """
    for name, value, least, most in (
        ("samples", samples, LEAST_SAMPLES, MOST_SAMPLES),
        ("checked_networks", checked_networks, LEAST_CHECKED, MOST_SAMPLES),
        ("max_pairs", max_pairs, 1, MOST_PAIRS),
    ):
        if type(value) is not int or not least <= value <= most:
            raise UserError(f"{name} is {value!r}; allowed are integers from {least} to {most}")
    begin = time.perf_counter()
    report = on_progress or (lambda what, done, total: None)
    table = LatencyTable.load(path) if path.exists() else LatencyTable.empty(space, device)
    table.check(space, device)
    interrupted = _count(table, "sample") and len(table.entries) <= samples  # before anything was predicted
    if table.entries and table.transferred is None and not interrupted:
        raise UserError(f"table {path} was measured, which is better; use it, or take another folder: tables=FOLDER")
    known = len(table.entries), len(table.networks)
    wanted_pairs = samples // 2
    wanted_networks = samples - wanted_pairs
    with turn():
        report("models of the sources", 0, 1)
        model = make_model(space, table, sources, max_pairs, seed)
        networks = model.propose_networks(wanted_networks - _count(table, "sample"))
        rng = np.random.default_rng([seed, 8, _count(table, "random")])
        missing = range(checked_networks - _count(table, "random"))
        drawn = *((n, "sample") for n in networks), *((_random(space, table, rng, i), "random") for i in missing)
        wanted = Samples(tuple(model.propose_pairs(wanted_pairs - len(table.entries))), drawn)
    taken = take(wanted, table)
    if taken is None:
        return None
    with turn():
        report("predictions", 0, 1)
        model.fit(taken)
        taken.transferred = model.transferred()
        taken.save(path)
        proposed = tuple(model.propose_pairs(wanted_pairs)), tuple(model.propose_networks(wanted_networks))
    counts = len(taken.entries) - known[0], len(taken.networks) - known[1]
    return taken, TransferStats(*counts, time.perf_counter() - begin, *proposed)


def take_here(
    space: Space,
    device: Device,
    samples: Samples,
    table: LatencyTable,
    settings: MeasuringSettings = DEFAULTS,
    *,
    on_progress: Progress | None = None,
) -> LatencyTable:
    """Measure samples on this machine.

    Args:
        space: what can be built.
        device: on this machine.
        samples: what to measure.
        table: gets them.
        settings: how it is measured; with `PAIR_ROUNDS` visits of a pair.
        on_progress: called with what is measured, how many are done, and of how many.

    Raises:
        UserError: the device is elsewhere.
    """
    report = on_progress or (lambda what, done, total: None)
    total = len(samples.pairs) + len(samples.networks)
    if not total:
        return table
    session = Session(table, device, samples.pairs, settings.seed)
    report("samples", 0, total)
    if samples.pairs:
        session.time_pairs(samples.pairs, PAIR_ROUNDS, settings.visit_s)
    report("samples", len(samples.pairs), total)
    for source in dict.fromkeys(source for _, source in samples.networks):
        session.time_networks(space, [drawn for drawn, of in samples.networks if of == source], source)
    session.settle()
    report("samples", total, total)
    return table


def _count(table: LatencyTable, source: str) -> int:
    return sum(network.source == source for network in table.networks)


def _random(space: Space, table: LatencyTable, rng: np.random.Generator, index: int) -> Drawn:
    architecture = space.sample_spread(rng) if index % 2 else space.sample(rng)
    return architecture, tuple(str(rng.choice(applicable(spec, table.device))) for spec in space.layers(architecture))
