"""Entangled networks: all networks of a space in one forward pass, mixed by a gate for every option of every choice.

The options of a choice share their weights, so they are mixed where they differ (TangleNAS, arXiv:2312.10440) instead of as
outputs of parallel branches: kernels, sparsities and precisions as weights, each step of a weight's pipeline on its own; widths
as a gate for each channel behind the batch norm; depths as a gate on the branch of a residual block. Activations are as large
as those of one network, however many options there are, and for gates of 0 and 1 the result is that of the one network that
they pick, apart from masks and ranges of weights, which are those of the widest open one.

What a choice does to which layer is not declared anywhere: it is read off the space's walk. So any space can be mixed, as far
as its choices change nothing but the above.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from math import prod

import numpy as np
import torch

from spaces.choice import Architecture, Choice, Option
from spaces.errors import UserError
from spaces.layers import LayerSpec, Network, Node
from spaces.mixing import Gates, Mix, MixedPass, Open, Quantize
from spaces.plain import run_network
from spaces.precision import parse_precision
from spaces.space import Space
from spaces.supernet import Supernet

MIXED = ("out_channels", "kernel", "sparsity", "precision", "present")
FOLLOWING = ("in_channels", "groups", "input_bits", "output_bits")  # from what other layers are
MOST_COMBINATIONS = 512
LOOKED_AT = 64


class Entangled:
    """A supernet whose forward pass takes gates instead of an architecture.

    Args:
        supernet: the shared weights.
        held: by kind of choice, the option at which it stays; such choices have no gates.

    Attributes:
        choices: those that have gates.

    Raises:
        UserError: a choice changes something that cannot be mixed, or `held` names what the space does not have.
    """

    def __init__(self, supernet: Supernet, held: Mapping[str, Option] | None = None) -> None:
        self.supernet, self.space, self.held = supernet, supernet.space, dict(held or {})
        check_held(self.space, self.held)
        self.largest = self.space.graded(1.0, **self.held)
        self._networks: dict[Architecture, Network] = {}
        self.choices = free_choices(self.space, self.held)
        self._mixes = self._read_off()

    def network(self, architecture: Architecture) -> Network:
        """The network of an architecture, remembered."""
        if architecture not in self._networks:
            if len(self._networks) > 4096:
                self._networks.clear()
            self._networks[architecture] = self.space.network(architecture)
        return self._networks[architecture]

    def widest(self, opened: Open) -> Architecture:
        """The architecture with the last open option of each choice."""
        values = {c.name: c.options[max(opened[c.name])] for c in self.choices if c.name in opened}
        return self.space.completed({**self.largest, **values})

    # -- reading off what choices do ------------------------------------------------------------------------------------------

    def _read_off(self) -> dict[tuple[str, str], Mix]:
        base = self.network(self.largest)
        influences: dict[tuple[str, str], list[Choice]] = {}
        for choice in self.choices:
            changed: set[tuple[str, str]] = set()
            for option in choice.options:
                if choice.kind == "precision" and parse_precision(str(option)).rounds_input:
                    raise cannot(choice, option, "the layer rounds its input by ranges of its own")
                variant = self.network(self.space.completed({**self.largest, choice.name: option}))
                changed |= self._differences(choice, option, base, variant)
            for key in changed:
                influences.setdefault(key, []).append(choice)
        self._check_together(base)
        return {key: self._mix(key, choices) for key, choices in influences.items()}

    def _check_together(self, base: Network) -> None:
        """Layers have to be joined in the same way in all combinations, of which some are looked at."""
        rng = np.random.default_rng(0)
        for _ in range(LOOKED_AT):
            there = {n.name: n for n in self.network(self.space.replaced(self.space.sample(rng), **self.held)).nodes}
            missing = {node.name: node for node in base.nodes if node.name not in there}
            for node in base.nodes:
                if node.name in there and tuple(_source(name, missing) for name in node.inputs) != there[node.name].inputs:
                    raise UserError(
                        f"{node.name} reads other tensors in some networks (a residual connection that only some widths "
                        "allow), which cannot be relaxed; hold the widths: +relaxation.held.width=..."
                    )

    def _differences(self, choice: Choice, option: Option, base: Network, variant: Network) -> set[tuple[str, str]]:
        there = {node.name: node for node in variant.nodes}
        missing = {node.name: node for node in base.nodes if node.name not in there}
        if there.keys() - {node.name for node in base.nodes} or base.nodes[-1].name in missing:
            raise cannot(choice, option, "it has layers that the largest network does not have")
        changed = {(name, "present") for name in missing}
        for node in base.nodes:
            if node.name in missing:
                continue
            other = there[node.name]
            if tuple(_source(name, missing) for name in node.inputs) != other.inputs:
                raise cannot(choice, option, f"{node.name} reads another tensor then")
            for field in LayerSpec.__dataclass_fields__:
                ours, theirs = getattr(node.spec, field), getattr(other.spec, field)
                if ours == theirs or field in FOLLOWING or (field == "skip_bits" and ours and theirs):
                    continue
                if field not in MIXED:
                    raise cannot(choice, option, f"it changes the {field} of {node.name}")
                if field == "out_channels" and node.spec.operator in ("attention", "layer_norm"):
                    raise cannot(choice, option, f"{node.name} computes over all channels together")
                if field == "out_channels" and theirs > ours:
                    raise cannot(choice, option, f"{node.name} is wider then than in the largest network")
                changed.add((node.name, field))
        return changed

    def _mix(self, key: tuple[str, str], choices: Sequence[Choice]) -> Mix:
        name, field = key
        if prod(len(c.options) for c in choices) > MOST_COMBINATIONS:
            raise UserError(
                f"{field} of {name} depends on {len(choices)} choices; at most {MOST_COMBINATIONS} combinations mix"
            )
        values: list[Option] = []
        for combination in product(*(c.options for c in choices)):
            picked = {c.name: option for c, option in zip(choices, combination, strict=True)}
            nodes = {n.name: n.spec for n in self.network(self.space.completed({**self.largest, **picked})).nodes}
            if field == "present":
                values.append(int(name in nodes))
            else:  # a layer that is not there may be anything
                values.append(getattr(nodes[name], field) if name in nodes else getattr(self._spec(name), field))
        return Mix(tuple(c.name for c in choices), tuple(len(c.options) for c in choices), tuple(values))

    def _spec(self, name: str) -> LayerSpec:
        return next(node.spec for node in self.network(self.largest).nodes if node.name == name)

    # -- the forward pass -----------------------------------------------------------------------------------------------------

    def outputs(
        self, images: torch.Tensor, gates: Gates, opened: Open | None = None, quantize: Quantize | None = None
    ) -> torch.Tensor:
        """Logits of the mixed network.

        Args:
            images: `(n, channels, height, width)`.
            gates: by choice, `(options,)`, with a sum of 1.
            opened: by choice, positions of the options that take part, the others' gates being 0; all by default. The pass
                costs what the widest open network costs.
            quantize: from a stored weight, what it became and a precision, to the weight to compute with; by default the
                precision's own grid.

        Returns:
            `(n, classes)`.
        """
        opened = opened or {}
        network = self.network(self.widest(opened))
        run = MixedPass(self.supernet, network, self._mixes, gates, opened, quantize)
        self.supernet.macs_done += (3 if torch.is_grad_enabled() else 1) * len(images) * network.macs
        return run_network(network, images, run.layer)


def free_choices(space: Space, held: Mapping[str, Option]) -> tuple[Choice, ...]:
    """The choices with several options whose kind is not held."""
    return tuple(c for c in space.choices if c.kind not in held and len(c.options) > 1)


def check_held(space: Space, held: Mapping[str, Option]) -> None:
    """Make sure that kinds of choices can be held at options.

    Raises:
        UserError: no choice is of such a kind, or one does not have the option.
    """
    for kind, option in held.items():
        choices = [c for c in space.choices if c.kind == kind]
        if not choices:
            raise UserError(f"held kind {kind} is none of the space; allowed are {', '.join(space.kinds)}")
        for choice in choices:
            if option not in choice.options:
                raise UserError(f"{kind} is held at {option!r}; {choice.name} has {', '.join(map(str, choice.options))}")


def cannot(choice: Choice, option: Option, why: str) -> UserError:
    """What is told of a choice that cannot be mixed."""
    mend = f"hold it at one option: +relaxation.held.{choice.kind}={choice.options[-1]}"
    return UserError(f"{choice.name}={option} cannot be relaxed: {why}; {mend}")


def _source(name: str, missing: Mapping[str, Node]) -> str:
    """The tensor that is left of `name` when the branches of missing residual blocks give 0."""
    while name in missing and len(missing[name].inputs) > 1:
        name = missing[name].inputs[1]
    return name
