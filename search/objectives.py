"""Objectives and constraints: what a search improves and what it must respect, as users write them.

`objectives=[accuracy,latency,size]`, `constraints=["latency@x86<=2ms","size<=200kB"]`.

A latency, a peak memory or an energy without a device is open: it means that of each device, and each device is searched for by
a study of its own, whose `Goal` names it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from spaces.errors import UserError

UNITS: dict[str, dict[str, float]] = {
    "accuracy": {"": 1.0, "%": 0.01},
    "latency": {"us": 1.0, "ms": 1e3, "s": 1e6},
    "peak_memory": {"B": 1.0, "kB": 1e3, "MB": 1e6, "KiB": 1024.0, "MiB": 1024.0**2},
    "energy": {"uJ": 1.0, "mJ": 1e3, "J": 1e6},
    "macs": {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9},
    "parameters": {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9},
    "size": {"B": 1.0, "kB": 1e3, "MB": 1e6, "KiB": 1024.0, "MiB": 1024.0**2},
    "memory": {"B": 1.0, "kB": 1e3, "MB": 1e6, "KiB": 1024.0, "MiB": 1024.0**2},
}
ON_DEVICE = ("latency", "peak_memory", "energy")  # quantities that each device has its own of
SOURCES = {
    "accuracy": "validation accuracy with the supernet's weights, or of networks trained one by one",
    "latency": "predicted from the device's table",
    "peak_memory": "most bytes that a run holds on the device, predicted from the layers and from measured networks",
    "energy": "of one run, predicted from the layers' times and networks whose energy the device's meter measured",
    "macs": "counted from the layers; removed weights do not count",
    "parameters": "counted from the layers; removed weights do not count",
    "size": "bytes of the exported file, predicted from the layers' lowerings",
    "memory": "peak of the activations alive at once, from the layers",
}

_CONSTRAINT = re.compile(r"^\s*([\w@.-]+)\s*(<=|>=)\s*([0-9.eE+-]+)\s*([A-Za-z%]*)\s*$")


@dataclass(frozen=True)
class Objective:
    """A quantity with its direction. `quantity` is a key of `UNITS`; one of `ON_DEVICE` without a `device` is open."""

    name: str
    quantity: str
    device: str | None

    @property
    def is_open(self) -> bool:
        """Whether each device has its own."""
        return self.quantity in ON_DEVICE and self.device is None

    def on(self, device: str) -> Objective:
        """The objective of one device; the same where it is not open."""
        return replace(self, name=f"{self.quantity}@{device}", device=device) if self.is_open else self

    @property
    def maximize(self) -> bool:
        return self.quantity == "accuracy"

    @property
    def direction(self) -> Literal["maximize", "minimize"]:
        return "maximize" if self.maximize else "minimize"

    @property
    def unit(self) -> str:
        """The unit in which values are kept: the first of its quantity."""
        return next(iter(UNITS[self.quantity]))

    @property
    def source(self) -> str:
        """Where its values come from."""
        return SOURCES[self.quantity]

    def loss(self, value: float) -> float:
        """The value as something to minimize."""
        return -value if self.maximize else value


@dataclass(frozen=True)
class Constraint:
    """A bound on a quantity. `text` is what the user wrote, `bound` in the objective's unit."""

    text: str
    objective: Objective
    upper: bool
    bound: float

    def on(self, device: str) -> Constraint:
        """The constraint of one device; the same where it is not open."""
        objective = self.objective.on(device)
        return replace(self, text=self.text.replace(self.objective.name, objective.name, 1), objective=objective)

    def violation(self, value: float) -> float:
        """By what share of the bound a value misses it; at most 0 when it holds."""
        miss = value - self.bound if self.upper else self.bound - value
        return miss / max(abs(self.bound), 1e-12)


@dataclass(frozen=True)
class Goal:
    """What one study looks for: nothing in it is open.

    Args:
        devices: that its front is for.
        objectives: what to improve.
        constraints: what to respect.
    """

    devices: tuple[str, ...]
    objectives: tuple[Objective, ...]
    constraints: tuple[Constraint, ...]

    @property
    def name(self) -> str:
        """Of the devices: `x86`, or `x86+wasm` for a front that serves both."""
        return "+".join(self.devices)

    @property
    def values(self) -> tuple[Objective, ...]:
        """Everything that an architecture is judged by, and the latency on each device that the front is for."""
        latencies = (Objective(f"latency@{device}", "latency", device) for device in self.devices)
        return tuple(dict.fromkeys((*self.objectives, *(c.objective for c in self.constraints), *latencies)))


def goals_of(objectives: Sequence[Objective], constraints: Sequence[Constraint], devices: Sequence[str]) -> list[Goal]:
    """One goal per device when an objective or a constraint is open, otherwise one whose front serves all devices."""
    is_open = any(o.is_open for o in (*objectives, *(c.objective for c in constraints)))
    return [
        Goal(served, tuple(o.on(served[0]) for o in objectives), tuple(c.on(served[0]) for c in constraints))
        for served in ([(device,) for device in devices] if is_open else [tuple(devices)])
    ]


def devices_of(goals: Sequence[Goal], quantity: str) -> list[str]:
    """Names of the devices on which some goal asks for a quantity."""
    return list(dict.fromkeys(str(o.device) for goal in goals for o in goal.values if o.quantity == quantity))


def parse_objective(text: str, devices: Sequence[str]) -> Objective:
    """An objective from its name.

    Args:
        text: a quantity; one that each device has its own of may have `@device`.
        devices: names of the devices of the run.

    Raises:
        UserError: unknown quantity or device.
    """
    quantity, at, device = text.partition("@")
    allowed = [f"{name}, {name}@{'|'.join(devices)}" if name in ON_DEVICE else name for name in UNITS]
    if quantity not in UNITS or (at and quantity not in ON_DEVICE):
        raise UserError(f"objective {text!r}; allowed are {', '.join(allowed)}")
    if at and device not in devices:
        raise UserError(
            f"objective {text!r}: no device {device!r} in this run; allowed are {', '.join(allowed)}; add it: device=[...]"
        )
    return Objective(text, quantity, device or None)


def parse_objectives(texts: Sequence[str], devices: Sequence[str]) -> list[Objective]:
    """Objectives of a search, at least one, each once.

    Raises:
        UserError: unknown, repeated (an open latency repeats that of a device) or none.
    """
    objectives = [parse_objective(str(text), devices) for text in texts]
    repeated = any(len({o.on(device).name for o in objectives}) < len(objectives) for device in devices)
    if not objectives or repeated:
        raise UserError(f"objectives are {list(texts)}; allowed are one or more, each once")
    return objectives


def parse_constraint(text: str, devices: Sequence[str]) -> Constraint:
    """A constraint such as `latency@x86<=2ms`.

    Raises:
        UserError: it does not read as `objective<=number unit`, or the unit is not one of the objective's.
    """
    match = _CONSTRAINT.match(text)
    if match is None:
        raise UserError(
            f"constraint {text!r}; allowed is OBJECTIVE<=NUMBER UNIT, such as latency@{devices[0]}<=2ms or accuracy>=95%"
        )
    name, relation, number, unit = match.groups()
    objective = parse_objective(name, devices)
    units = UNITS[objective.quantity]
    try:
        value = float(number)
    except ValueError:
        raise UserError(f"constraint {text!r}: {number!r} is not a number") from None
    if unit not in units:
        raise UserError(f"constraint {text!r}: unit {unit!r}; allowed are {', '.join(u or 'none' for u in units)}")
    bound = value * units[unit]
    if not math.isfinite(bound) or (objective.quantity == "accuracy" and not 0 <= bound <= 1):
        allowed = "0 to 1, or 0% to 100%" if objective.quantity == "accuracy" else "finite numbers"
        raise UserError(f"constraint {text!r} has the bound {number}{unit}; allowed are {allowed}")
    return Constraint(text, objective, relation == "<=", bound)


def hypervolume(points: Sequence[Sequence[float]], reference: Sequence[float]) -> float:
    """Volume that points dominate up to a reference, all coordinates to be minimized.

    Exact, by slicing along the last coordinate (Zitzler 2001); meant for fronts of at most a few hundred points.
    """
    inside = [tuple(p) for p in points if all(x < r for x, r in zip(p, reference, strict=True))]
    if not inside:
        return 0.0
    if len(reference) == 1:
        return float(reference[0] - min(p[0] for p in inside))
    ordered = sorted(inside, key=lambda p: p[-1])
    total = 0.0
    for index, point in enumerate(ordered):
        upper = ordered[index + 1][-1] if index + 1 < len(ordered) else reference[-1]
        if upper > point[-1]:
            total += (upper - point[-1]) * hypervolume([p[:-1] for p in ordered[: index + 1]], reference[:-1])
    return total
