"""Choices and architectures: the decisions of a space, and one point of it.

A `Choice` is one named decision. Its options are listed from the cheapest to the most expensive, so that the first options
make the smallest network and the last ones the largest. An `Architecture` holds the value of every *active* choice and
nothing else: two architectures that describe the same network are equal and hash alike.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

Option = int | float | str


@dataclass(frozen=True)
class Choice:
    """One named decision of a space.

    Args:
        name: unique within the space, dotted from outside to inside (`stage1.block2.kernel`).
        options: what can be chosen, from the cheapest to the most expensive; distinct, at least one.
        ordered: whether neighbouring options are similar (widths are, layer types are not).
        when: `(parent, values)`: the choice is active only while the choice `parent` is active and has one of `values`.
            `None`: always active.

    Raises:
        ValueError: no options, or repeated ones.
    """

    name: str
    options: tuple[Option, ...]
    ordered: bool = True
    when: tuple[str, tuple[Option, ...]] | None = None

    def __post_init__(self) -> None:
        if not self.options:
            raise ValueError(f"choice {self.name} has no options")
        if len(set(self.options)) != len(self.options):
            raise ValueError(f"choice {self.name} has repeated options: {list(self.options)}")

    @property
    def kind(self) -> str:
        """The last part of the name (`kernel` of `stage1.block2.kernel`): choices of one kind mean the same thing."""
        return self.name.rsplit(".", 1)[-1]


class Architecture(Mapping[str, Option]):
    """One point of a space: an immutable mapping from active choices to values. Make one with `Space.architecture`."""

    __slots__ = ("_hash", "_values")

    def __init__(self, values: Mapping[str, Option]) -> None:
        self._values = dict(sorted(values.items()))
        self._hash = hash(tuple(self._values.items()))

    def __getitem__(self, name: str) -> Option:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Architecture) and self._hash == other._hash and self._values == other._values

    def __reduce__(self) -> tuple[type[Architecture], tuple[dict[str, Option]]]:
        return Architecture, (self._values,)  # without the hash: those of strings differ between processes

    def __repr__(self) -> str:
        return f"Architecture({self.to_json()})"

    def integer(self, name: str) -> int:
        """The value of an integer choice.

        Raises:
            TypeError: the choice holds something else.
        """
        value = self._values[name]
        if not isinstance(value, int):
            raise TypeError(f"choice {name} is {value!r}, not an integer")
        return value

    def to_json(self) -> str:
        """One line of JSON with sorted keys: the form in which architectures are stored everywhere."""
        return json.dumps(self._values, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Architecture:
        """The inverse of `to_json`. `Space.architecture` checks it against a space.

        Raises:
            ValueError: the text is not a JSON object of numbers and strings.
        """
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"an architecture is a JSON object, not {text[:80]!r}")
        for name, value in values.items():
            plain = isinstance(value, (int, float, str)) and not isinstance(value, bool)
            if not plain or (isinstance(value, float) and not math.isfinite(value)):
                raise ValueError(f"choice {name} has the value {value!r}; allowed are numbers and strings")
        return Architecture(values)
