"""The options that a study does not propose because they do not pay on its devices.

They are options of precision and sparsity that `latency_lut.unprofitable` found nowhere faster. One stays when the study asks
for something that it makes smaller, when it pays on one of the devices whose latency counts, or when no latency counts at all.
What is evaluated before the first round and the random baseline are not touched.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from latency_lut.table import LatencyTable
from latency_lut.unprofitable import SMALLER, Unprofitable, unprofitable
from search.objectives import Constraint, Objective
from spaces.choice import Choice, Option
from spaces.space import Space


@dataclass(frozen=True)
class LeftOut:
    """What is left out.

    Args:
        instead: by choice, the options that are left out, each with the one to take instead.
        devices: on which they do not pay.
        considered: options of all choices of the space.
    """

    instead: Mapping[str, Mapping[Option, Option]] = field(default_factory=dict)
    devices: tuple[str, ...] = ()
    considered: int = 0

    @property
    def count(self) -> int:
        """How many options are left out."""
        return sum(map(len, self.instead.values()))

    def options(self, choice: Choice) -> tuple[Option, ...]:
        """The options of a choice that remain, at least one."""
        return tuple(option for option in choice.options if option not in self.instead.get(choice.name, ()))

    def replaced(self, values: Mapping[str, Option]) -> dict[str, Option]:
        """Values of choices with those that remain in place of those that do not."""
        return {name: self.instead.get(name, {}).get(value, value) for name, value in values.items()}

    def sentences(self) -> list[str]:
        """What is left out, a sentence per kind of choice and option, such as `precision 8 of stem, head`."""
        layers: dict[tuple[str, Option], list[str]] = defaultdict(list)
        for name, options in self.instead.items():
            layer, _, kind = name.rpartition(".")
            for option in options:
                layers[kind, option].append(layer)
        return [f"{kind} {option} of {', '.join(names)}" for (kind, option), names in layers.items()]


NOTHING = LeftOut()


def left_out(
    space: Space, tables: Mapping[str, LatencyTable], objectives: Sequence[Objective], constraints: Sequence[Constraint]
) -> LeftOut:
    """The options that a study with these objectives and constraints need not propose.

    Args:
        space: of the study.
        tables: by device, at least of those whose latency is an objective or a constraint.
        objectives: what the study improves.
        constraints: what it respects.
    """
    wanted = [*objectives, *(constraint.objective for constraint in constraints)]
    devices = tuple(dict.fromkeys(o.device for o in wanted if o.device is not None))
    considered = sum(len(choice.options) for choice in space.choices)
    others = {o.quantity for o in wanted} - {"accuracy", "latency"}
    if not devices or not others <= set(SMALLER):
        return LeftOut({}, devices, considered)
    found = [{(u.choice, u.option): u for u in unprofitable(tables[device], space)} for device in devices]
    instead: dict[str, dict[Option, Option]] = defaultdict(dict)
    for key, verdict in found[0].items():
        everywhere: list[Unprofitable] = [of_device[key] for of_device in found if key in of_device]
        if len(everywhere) == len(devices) and not any(others & u.smaller for u in everywhere):
            instead[verdict.choice][verdict.option] = verdict.instead
    return LeftOut(dict(instead), devices, considered)
