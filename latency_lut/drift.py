"""Drift: whether a device still costs what its table says.

A device changes after it was measured: another version of the runtime, another system, a hotter processor. The first two show
in its fingerprint, the last in a short re-check: a few pairs of the table, spread over kinds and sizes, are timed again, by the
clock and not at the speed of the table's anchors, which would hide that everything became slower.

A busy neighbour slows a machine for seconds, too: what looks like drift is measured twice more, and the median counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from latency_lut.device import Device
from latency_lut.lowering import Description
from latency_lut.models import build_layer
from latency_lut.network import random_weights
from latency_lut.remote import WATCH, Watch
from latency_lut.table import LatencyTable, Pair
from latency_lut.there import time_pairs_elsewhere
from latency_lut.timing import Stopwatch, Timing
from spaces.errors import UserError

PAIRS = 20
TOLERANCE = 0.1
ROUNDS = 40
VISIT_S = 0.001
PASSES = 3
SURE = 3.0  # standard errors


@dataclass(frozen=True)
class Moved:
    """A pair that was timed again.

    Args:
        pair: the layer and its lowering.
        was_us: its entry in the table.
        now_us: what it costs now, by the clock.
        error: standard error of `now_us / was_us`, as a share of it.
    """

    pair: Pair
    was_us: float
    now_us: float
    error: float

    @property
    def factor(self) -> float:
        """By what its cost was multiplied since."""
        return self.now_us / self.was_us


@dataclass(frozen=True)
class Drift:
    """What a re-check found.

    Args:
        changed: what the device says of itself otherwise than the table: name, then and now.
        checked: the pairs that were timed again.
        tolerance: a share by which a cost may differ.
    """

    changed: Mapping[str, tuple[str | int | None, str | int | None]]
    checked: tuple[Moved, ...]
    tolerance: float

    @property
    def common_factor(self) -> float:
        """By what the cost of the median pair was multiplied: below 1 the machine is faster than it was."""
        return float(np.median([pair.factor for pair in self.checked]))

    @property
    def speed_changed(self) -> bool:
        """Whether the machine as a whole became slower or faster by more than the tolerance."""
        return bool(abs(np.log(self.common_factor)) > np.log1p(self.tolerance))

    @property
    def worst(self) -> Moved:
        """The pair that moved most."""
        return max(self.checked, key=self._moved_by)

    @property
    def moved(self) -> list[Moved]:
        """Pairs beyond the tolerance and beyond doubt (three standard errors), the one that moved most first."""
        beyond = [pair for pair in self.checked if self._moved_by(pair) > np.log1p(self.tolerance) + SURE * pair.error]
        return sorted(beyond, key=self._moved_by, reverse=True)

    def _moved_by(self, pair: Moved) -> float:
        """By how much a pair moved, as a logarithm; what it shares with all others counts only where that is a drift itself."""
        shared = 1.0 if self.speed_changed else self.common_factor
        return float(abs(np.log(pair.factor / shared)))

    @property
    def costs_changed(self) -> bool:
        return bool(self.moved) or self.speed_changed

    @property
    def drifted(self) -> bool:
        """Whether the table should not be believed any more."""
        return bool(self.changed) or self.costs_changed

    def sentences(self) -> list[str]:
        """What is to be told, a line each: changes of the device, then what moved."""
        told = [f"{name} was {then!r}, is {now!r}" for name, (then, now) in self.changed.items()]
        worst = self.worst
        told.append(
            f"{len(self.moved)} of {len(self.checked)} pairs moved by more than {self.tolerance:.0%}; cost of the median pair "
            f"{self.common_factor - 1:+.1%}, of the worst {worst.factor - 1:+.1%} ({worst.pair[0]}, {worst.pair[1]})"
        )
        return told


def check(
    table: LatencyTable,
    device: Device,
    *,
    pairs: int = PAIRS,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    folder: Path = Path(),
    watch: Watch = WATCH,
) -> Drift:
    """Compare a device with its table: what it is, and what some pairs cost now. Takes seconds.

    Args:
        table: of this device with the same settings.
        device: as it is now.
        pairs: how many to time again; fewer where the table has fewer.
        tolerance: a share by which a cost may differ.
        seed: of the weights and the order of visits.
        folder: for what goes to a device elsewhere and comes back.
        watch: told what happens with one.

    Raises:
        UserError: a number is out of range, or the table is of another runtime or of other settings, or has no pairs; a device
            elsewhere cannot be reached.
    """
    if type(pairs) is not int or pairs < 1:
        raise UserError(f"check.pairs is {pairs!r}; allowed are integers from 1")
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 < tolerance < 10:
        raise UserError(f"check.tolerance is {tolerance!r}; allowed are shares above 0 and below 10, such as 0.1")
    mend = f"run: python -m latency_lut device={device.name}"
    if not table.entries:
        raise UserError(f"the table of {device.name} has no pairs to check; {mend}")
    for name, is_now in device.settings.items():
        if table.device.get(name) != is_now:
            then = table.device.get(name)
            raise UserError(f"the table of {device.name} was measured with {name} {then!r}, not {is_now!r}; {mend}")
    chosen = spread_pairs(table, pairs)

    def timed(pass_: int) -> tuple[list[Timing], Description]:
        if device.elsewhere:
            return time_pairs_elsewhere(chosen, table, device, folder, ROUNDS, VISIT_S, seed=seed + pass_, watch=watch)
        return _timed(chosen, device, seed + pass_), device.describe()

    first, now = timed(0)
    changed = {name: (table.device.get(name), now.get(name)) for name in {**table.device, **now}}
    changed = {name: (then, is_now) for name, (then, is_now) in changed.items() if then != is_now}
    passes = [first]
    drift = _compared(table, chosen, passes, changed, tolerance)
    while len(passes) < PASSES and drift.costs_changed:
        passes.append(timed(len(passes))[0])
        drift = _compared(table, chosen, passes, changed, tolerance)
    return drift


def spread_pairs(table: LatencyTable, count: int) -> list[Pair]:
    """Pairs of all kinds and sizes: every kind of layer with a lowering gives a share, evenly spread over its MACs."""
    kinds: dict[tuple[str, str], list[Pair]] = {}
    for pair in sorted(table.entries, key=lambda pair: (pair[0].macs, pair[0].to_json())):
        kinds.setdefault((pair[0].kind, pair[1]), []).append(pair)
    shares = dict.fromkeys(kinds, 0)
    while sum(shares.values()) < min(count, len(table.entries)):
        open_kinds = [kind for kind, members in kinds.items() if shares[kind] < len(members)]
        # Of kinds with equally many, the one with more pairs in the table first.
        shares[min(open_kinds, key=lambda kind: (shares[kind], -len(kinds[kind])))] += 1
    chosen = []
    for kind, share in shares.items():
        members = kinds[kind]
        middles = (np.arange(share) + 0.5) * len(members) / max(share, 1)
        chosen += [members[int(position)] for position in middles]
    return chosen


def age_days(table: LatencyTable, now: datetime | None = None) -> float:
    """Days since measuring a table began; infinite where it does not say when."""
    try:
        created = datetime.fromisoformat(table.created)
    except ValueError:
        return float("inf")
    if created.tzinfo is None:
        created = created.replace(tzinfo=UTC)
    return ((now or datetime.now(UTC)) - created).total_seconds() / 86_400


def _timed(pairs: Sequence[Pair], device: Device, seed: int) -> list[Timing]:
    """What pairs cost by the clock."""
    rng = np.random.default_rng([seed, 4])
    runtime = device.load_runtime()
    models = [runtime.load(build_layer(*pair, random_weights(pair[0], rng), device.batch), device) for pair in pairs]
    return Stopwatch([]).time(models, ROUNDS, VISIT_S, seed)


def _compared(
    table: LatencyTable,
    pairs: Sequence[Pair],
    passes: Sequence[Sequence[Timing]],
    changed: Mapping[str, tuple[str | int | None, str | int | None]],
    tolerance: float,
) -> Drift:
    checked = []
    for index, pair in enumerate(pairs):
        entry, timings = table.entries[pair], [timings[index] for timings in passes]
        now_us = float(np.median([timing.us for timing in timings]))
        spread = float(np.median([timing.spread_us / timing.us for timing in timings]))
        checked.append(Moved(pair, entry.us, now_us, float(np.hypot(spread, entry.spread_us / entry.us))))
    return Drift(changed, tuple(checked), tolerance)
