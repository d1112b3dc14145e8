"""Going on measuring where a latency model is least certain, until its error or the time is what was asked for.

The model itself is in the room above, so it comes as a function: it is shown the table and says how large its error is, and
which pairs and networks it wants measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from latency_lut.measuring import MeasuringSettings
from latency_lut.session import Drawn, Session
from latency_lut.table import CurvePoint, LatencyTable, Pair
from spaces.errors import UserError
from spaces.space import Space

# About as long as each other.
STEP_PAIRS = 300
STEP_NETWORKS = 30
MOST_NETWORKS = 2000


class Wished(Protocol):
    """What a model says about a table."""

    @property
    def error(self) -> float:
        """Its mean absolute relative error on whole networks that it was not fitted to."""

    @property
    def pairs(self) -> Sequence[Pair]:
        """Unmeasured pairs that it wants, the most important first."""

    @property
    def networks(self) -> Sequence[Drawn]:
        """Networks that it wants, likewise."""


@dataclass(frozen=True)
class Refinement:
    """When to stop, and whom to ask what to measure.

    Args:
        wishes: given the table, its space and a seed.
        target_error: mean absolute relative error of whole networks at which to stop; `None`: none is small enough.
        budget_s: seconds of measuring, over all sessions, after which no further step is begun; `None`: no limit.

    Raises:
        UserError: both are missing, or out of range.
    """

    wishes: Callable[[LatencyTable, Space, int], Wished]
    target_error: float | None = None
    budget_s: float | None = None

    def __post_init__(self) -> None:
        limits = (("target_error", self.target_error, 1.0), ("budget_s", self.budget_s, 1e6))
        for name, value, most in limits:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value < most):
                raise UserError(f"{name} is {value!r}; allowed are numbers above 0 and below {most:g}, or null")
        if self.target_error is None and self.budget_s is None:
            raise UserError("target_error and budget_s are both null; give one of them")


def refine(
    session: Session,
    space: Space,
    path: Path,
    refinement: Refinement,
    settings: MeasuringSettings,
    spent_s: float,
    report: Callable[[str, int, int], None],
) -> None:
    """Measure what a model wishes, step by step; the table is saved after each, with the curve of the error.

    Args:
        session: measures into its table.
        space: the table's.
        path: the table's file.
        refinement: when to stop.
        settings: how pairs are timed, and how many at most.
        spent_s: seconds that this call of `profile` has taken already.
        report: told the pairs that are there, of those that may be.
    """
    table, begin = session.table, time.perf_counter() - spent_s
    earlier_s = table.curve[-1].seconds if table.curve else 0.0
    step_s = 0.0
    while True:
        step_begin = time.perf_counter()
        wished = refinement.wishes(table, space, session.seed)
        seconds = earlier_s + time.perf_counter() - begin
        point = CurvePoint(len(table.entries), len(table.networks), seconds, wished.error)
        if not table.curve or (point.pairs, point.networks) != (table.curve[-1].pairs, table.curve[-1].networks):
            table.curve.append(point)
            table.save(path)
        pairs = wished.pairs[: min(STEP_PAIRS, max(0, settings.max_pairs - len(table.entries)))]
        networks = wished.networks[:STEP_NETWORKS] if len(table.networks) < MOST_NETWORKS else ()
        reached = refinement.target_error is not None and wished.error <= refinement.target_error
        late = refinement.budget_s is not None and seconds + step_s > refinement.budget_s
        if reached or late or not (pairs or networks):
            return
        if pairs:
            session.time_pairs(pairs, settings.rounds, settings.visit_s)
        if networks:
            session.time_networks(space, networks, "chosen")
        table.save(path)
        step_s = time.perf_counter() - step_begin
        report("pairs", len(table.entries), settings.max_pairs)
