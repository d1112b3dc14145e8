"""A space: the choices that define a family of networks, and the one walk from an architecture to its layers."""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property

import numpy as np

from spaces.choice import Architecture, Choice, Option
from spaces.layers import LayerSpec, Network


class Space(ABC):
    """A family of networks.

    A subclass sets `name` and `choices` (a parent before the choices that depend on it) and defines `network`. Everything
    else follows: sampling, counting, features for predictors, tables' keys, the supernet and the exported graph.

    Attributes:
        shares_weights: whether one supernet has the weights of all networks; else networks are trained one by one.
        selective: whether networks have masks that are chosen for the activations (`spaces.selective`).
    """

    name: str
    choices: tuple[Choice, ...]
    shares_weights: bool = True
    selective: bool = False

    @abstractmethod
    def network(self, architecture: Architecture) -> Network:
        """The layers of an architecture. This is the only place that walks a network's shapes."""

    def stored_network(self) -> Network:
        """The layers of the largest architecture, each in the largest form that any architecture has of it.

        What a supernet stores. A space in which another architecture has a wider layer than the largest says so here.
        """
        return self.network(self.largest())

    def layers(self, architecture: Architecture) -> tuple[LayerSpec, ...]:
        """The layer specifications of an architecture, in the order in which they run."""
        return self.network(architecture).layers

    # -- architectures ------------------------------------------------------------------------------------------------

    def architecture(self, values: Mapping[str, Option]) -> Architecture:
        """The architecture that `values` describe. Values of inactive choices are dropped.

        Raises:
            ValueError: an active choice is missing, has a value that is not an option, or a name is unknown.
        """
        unknown = set(values) - self._names
        if unknown:
            raise ValueError(f"space {self.name} has no choice {sorted(unknown)[0]}")
        active: dict[str, Option] = {}
        for choice in self.choices:
            if not _active(choice, active):
                continue
            if choice.name not in values:
                raise ValueError(f"choice {choice.name} is missing; allowed are {list(choice.options)}")
            value = values[choice.name]
            if not any(value == option and type(value) is type(option) for option in choice.options):
                raise ValueError(f"choice {choice.name} is {value!r}; allowed are {list(choice.options)}")
            active[choice.name] = value
        return Architecture(active)

    def completed(self, values: Mapping[str, Option]) -> Architecture:
        """The architecture that `values` describe, with the last option of every active choice that they leave open.

        Raises:
            ValueError: as `architecture`.
        """
        return self.architecture({choice.name: choice.options[-1] for choice in self.choices} | dict(values))

    def largest(self) -> Architecture:
        """The last option of every choice."""
        return self.completed({})

    def smallest(self) -> Architecture:
        """The first option of every choice."""
        return self.architecture({choice.name: choice.options[0] for choice in self.choices})

    def sample(self, rng: np.random.Generator) -> Architecture:
        """An architecture with every active choice drawn uniformly from its options."""
        return self.architecture({c.name: c.options[rng.integers(len(c.options))] for c in self.choices})

    def sample_spread(self, rng: np.random.Generator) -> Architecture:
        """An architecture of a random size: choices of one kind lean together towards small or large.

        Independent draws concentrate around the middle of the space; a predictor that is fitted on those has never seen the
        ends of the front. Here each kind of choice draws a quantile around which its options are taken.
        """
        centre = {kind: rng.uniform() for kind in self.kinds}
        return self.architecture({choice.name: _leaning(choice, centre[choice.kind], rng) for choice in self.choices})

    def sample_kind(self, rng: np.random.Generator, architecture: Architecture) -> Architecture:
        """An architecture like another one but in one kind of choices, which lean together towards small or large.

        What is left of a kind where each choice changes by itself is a few places; whether all kernels should be larger shows
        only when they are.
        """
        kind, centre = self.kinds[rng.integers(len(self.kinds))], rng.uniform()
        values = {c.name: c.options[rng.integers(len(c.options))] for c in self.choices} | dict(architecture)
        return self.architecture(values | {c.name: _leaning(c, centre, rng) for c in self.choices if c.kind == kind})

    def sample_near(self, rng: np.random.Generator, architecture: Architecture, change: float) -> Architecture:
        """An architecture like another one: each choice is drawn anew with probability `change`, and otherwise kept."""
        values = {c.name: c.options[rng.integers(len(c.options))] for c in self.choices}
        return self.architecture(values | {name: value for name, value in architecture.items() if rng.uniform() >= change})

    def graded(self, position: float, **kinds: Option) -> Architecture:
        """The architecture at a relative position of all options, 0 the smallest and 1 the largest.

        Args:
            position: in [0, 1].
            kinds: values of whole kinds of choices instead, such as `precision=8`; kinds that do not have it stay as they are.
        """
        values = {}
        for choice in self.choices:
            wanted = kinds.get(choice.kind)
            at = round(position * (len(choice.options) - 1))
            values[choice.name] = wanted if wanted is not None and wanted in choice.options else choice.options[at]
        return self.architecture(values)

    def replaced(self, architecture: Architecture, **kinds: Option) -> Architecture:
        """The same architecture with other values of whole kinds of choices, such as `precision="fp32"`."""
        values: dict[str, Option] = dict(architecture)
        for choice in self.choices:
            if choice.name in values and kinds.get(choice.kind) in choice.options:
                values[choice.name] = kinds[choice.kind]
        return self.completed(values)

    # -- the space as a whole -------------------------------------------------------------------------------------------

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of choices, in order of appearance."""
        return tuple(dict.fromkeys(choice.kind for choice in self.choices))

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(choice.name for choice in self.choices)

    def size(self) -> int:
        """Number of distinct architectures."""
        children: dict[str | None, list[Choice]] = {}
        for choice in self.choices:
            children.setdefault(choice.when[0] if choice.when else None, []).append(choice)

        def count(choice: Choice) -> int:
            return sum(
                math.prod(count(child) for child in children.get(choice.name, ()) if option in (child.when or ("", ()))[1])
                for option in choice.options
            )

        return math.prod(count(choice) for choice in children.get(None, ()))

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the choices and of the largest and smallest network: equal for equal spaces."""
        choices = [[c.name, c.options, c.ordered, c.when] for c in self.choices]
        ends = [self.network(self.largest()).fingerprint, self.network(self.smallest()).fingerprint]
        return hashlib.sha256(json.dumps([self.name, choices, ends]).encode()).hexdigest()[:16]

    # -- features ---------------------------------------------------------------------------------------------------------

    @cached_property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the columns of `encode`."""
        return tuple(f"{c.name}={option}" for c in self.choices for option in c.options)

    @cached_property
    def _columns(self) -> dict[tuple[str, Option], int]:
        pairs = [(c.name, option) for c in self.choices for option in c.options]
        return {pair: column for column, pair in enumerate(pairs)}

    def encode(self, architectures: list[Architecture]) -> np.ndarray:
        """One-hot features of architectures, all zero where a choice is inactive.

        Returns:
            `(n, len(feature_names))` float32.
        """
        features = np.zeros((len(architectures), len(self._columns)), dtype=np.float32)
        for row, architecture in enumerate(architectures):
            features[row, [self._columns[item] for item in architecture.items()]] = 1.0
        return features

    def positions(self, architectures: list[Architecture]) -> np.ndarray:
        """Relative positions of the chosen options, 0 the cheapest and 1 the most expensive; NaN where a choice is inactive.

        Returns:
            `(n, len(choices))` float64.
        """
        lookup = self._positions
        return np.array([[lookup.get((c.name, a.get(c.name)), np.nan) for c in self.choices] for a in architectures])

    @cached_property
    def _positions(self) -> dict[tuple[str, Option | None], float]:
        return {(c.name, option): i / max(1, len(c.options) - 1) for c in self.choices for i, option in enumerate(c.options)}


def _active(choice: Choice, values: Mapping[str, Option]) -> bool:
    return choice.when is None or values.get(choice.when[0]) in choice.when[1]


def _leaning(choice: Choice, centre: float, rng: np.random.Generator) -> Option:
    """An option near a relative position of all, 0 the first and 1 the last."""
    position = np.clip(centre + rng.normal(0.0, 0.25), 0.0, 1.0 - 1e-9)
    return choice.options[int(position * len(choice.options))]
