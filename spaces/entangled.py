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

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np
import torch
from torch.nn import functional as F

from spaces.choice import Architecture, Choice, Option
from spaces.depthwise import depthwise_conv2d
from spaces.errors import UserError
from spaces.layers import INPUT, LayerSpec, Network, Node
from spaces.plain import run_network
from spaces.precision import parse_precision
from spaces.quantizers import quantize_to_own_range
from spaces.space import Space
from spaces.supernet import Supernet
from spaces.weights import ElasticWeight

Gates = Mapping[str, torch.Tensor]
Open = Mapping[str, Sequence[int]]
Quantize = Callable[[ElasticWeight, torch.Tensor, str], torch.Tensor]

MIXED = ("out_channels", "kernel", "sparsity", "precision", "present")
FOLLOWING = ("in_channels", "groups", "input_bits", "output_bits")  # from what other layers are
MOST_COMBINATIONS = 512
LOOKED_AT = 64


@dataclass(frozen=True)
class Mix:
    """A property of one layer as a function of the choices that it depends on.

    Args:
        choices: their names.
        options: their numbers of options.
        values: the property for every combination of options, the last choice's fastest.
    """

    choices: tuple[str, ...]
    options: tuple[int, ...]
    values: tuple[Option, ...]

    def probabilities(self, gates: Gates, opened: Open) -> dict[Option, torch.Tensor]:
        """By value that the open options can give, the sum over its combinations of the products of their gates, a scalar."""
        found: dict[Option, torch.Tensor] = {}
        for picked in product(*(opened.get(name, range(n)) for name, n in zip(self.choices, self.options, strict=True))):
            index = 0
            for option, count in zip(picked, self.options, strict=True):
                index = index * count + option
            share = torch.stack([gates[name][option] for name, option in zip(self.choices, picked, strict=True)]).prod()
            value = self.values[index]
            found[value] = found[value] + share if value in found else share
        return found


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
        run = _Pass(self.supernet, network, self._mixes, gates, opened, quantize or _on_grid)
        self.supernet.macs_done += (3 if torch.is_grad_enabled() else 1) * len(images) * network.macs
        return run_network(network, images, run.layer)


class _Pass:
    """One forward pass: the mixes of every layer of a network at the given gates."""

    def __init__(
        self,
        supernet: Supernet,
        network: Network,
        mixes: Mapping[tuple[str, str], Mix],
        gates: Gates,
        opened: Open,
        quantize: Quantize,
    ) -> None:
        self.supernet, self.mixes, self.gates, self.opened, self.quantize = supernet, mixes, gates, opened, quantize
        self.integer = {node.name: self._integer(node) for node in network.nodes}
        self.rounded: dict[str, torch.Tensor] = {}  # share of a tensor's readers and writer that want it in 8 bits
        readers: dict[str, list[str]] = {}
        for node in network.nodes:
            readers.setdefault(node.inputs[0], []).append(node.name)
        # A depthwise layer keeps channels apart: gated once behind it, a closed channel still learns what opening it would do,
        # where the product of two closed gates has no gradient.
        depthwise = {node.name for node in network.nodes if node.spec.depthwise}
        skips = {name for node in network.nodes for name in node.inputs[1:]}
        self.gated_later = {name for name, by in readers.items() if set(by) <= depthwise and name not in skips}
        one = next(iter(self.integer.values())).new_ones(())
        for node in network.nodes[:-1]:
            stays = one - self.integer[node.name]
            for reader in readers.get(node.name, ()):
                stays = stays * (one - self.integer[reader])
            self.rounded[node.name] = one - stays

    def _shares(self, node: Node, field: str) -> dict[Option, torch.Tensor]:
        mix = self.mixes.get((node.name, field))
        if mix is not None:
            return mix.probabilities(self.gates, self.opened)
        one = next(self.supernet.parameters()).new_ones(())
        return {1 if field == "present" else getattr(node.spec, field): one}

    def _integer(self, node: Node) -> torch.Tensor:
        shares = self._shares(node, "precision")
        integer = sum((share for text, share in shares.items() if parse_precision(str(text)).integer), torch.zeros(()))
        present: torch.Tensor = self._shares(node, "present")[1]
        return present * integer

    def layer(self, node: Node, x: torch.Tensor, skip: torch.Tensor | None) -> torch.Tensor:
        """One layer, as `spaces.elastic.ElasticLayer.forward` has it, with gates."""
        spec, layer, integer = node.spec, self.supernet.layer(node.name), self.integer[node.name]
        if spec.operator == "linear":
            x = x.flatten(1)
        if node.inputs[0] == INPUT:
            x = _partly_rounded(x, integer)
        if spec.weight_shape:
            (elastic, shape), *_ = layer.weights_of(spec)
            weight = self.weight(node, elastic, shape)
            if spec.operator == "linear":
                y = F.linear(x, weight, layer.get_parameter("bias")[: spec.out_channels])
            else:
                if spec.depthwise:
                    y = depthwise_conv2d(x, weight, spec.stride)
                else:
                    y = F.conv2d(x, weight, None, spec.stride, shape[-1] // 2, groups=spec.groups)
                scale, shift = (layer.get_parameter(f"norm_{part}")[: spec.out_channels] for part in ("weight", "bias"))
                y = F.batch_norm(y, None, None, scale, shift, training=True)
                y = self._gated(node, y)
        else:
            y = layer.arithmetic(spec, x)
        if spec.skip_bits or spec.activation == "hard_swish":
            y = _partly_rounded(y, integer)
        if skip is not None:
            y = skip + y * self._shares(node, "present")[1] if (node.name, "present") in self.mixes else skip + y
        if spec.activation != "none":
            y = F.relu(y) if spec.activation == "relu" else F.hardswish(y)
        return _partly_rounded(y, self.rounded[node.name]) if node.name in self.rounded else y

    def weight(self, node: Node, elastic: ElasticWeight, shape: tuple[int, ...]) -> torch.Tensor:
        """The mixed weight of a layer, one step of its pipeline after the other."""
        weight = elastic.masked(shape, "dense")
        kernels = self._shares(node, "kernel")
        if len(kernels) > 1:
            weight = _weighted((_centre(weight, int(kernel)), share) for kernel, share in kernels.items())
        sparsities = self._shares(node, "sparsity")
        if list(sparsities) != ["dense"]:
            full = weight
            weight = _weighted((elastic.with_mask(full, str(text)), share) for text, share in sparsities.items())
        masked = weight
        precisions = self._shares(node, "precision")
        return _weighted((self.quantize(elastic, masked, str(text)), share) for text, share in precisions.items())

    def _gated(self, node: Node, y: torch.Tensor) -> torch.Tensor:
        widths = self._shares(node, "out_channels")
        if len(widths) == 1 or node.name in self.gated_later:
            return y
        channels = torch.arange(y.shape[1], device=y.device)
        gate = _weighted(((channels < int(width)).to(y.dtype), share) for width, share in widths.items())
        return y * gate.reshape(-1, 1, 1)


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


def _on_grid(elastic: ElasticWeight, weight: torch.Tensor, precision: str) -> torch.Tensor:
    return elastic.on_grid(weight, precision)


def _partly_rounded(x: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    if not share.requires_grad and float(share) in (0.0, 1.0):
        return quantize_to_own_range(x)[0] if float(share) else x
    return x + share * (quantize_to_own_range(x)[0] - x)


def _centre(weight: torch.Tensor, kernel: int) -> torch.Tensor:
    border = (weight.shape[-1] - kernel) // 2
    if not border:
        return weight
    return F.pad(weight[..., border:-border, border:-border], [border] * 4)


def _weighted(terms: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """The sum of values times their shares."""
    total: torch.Tensor | None = None
    for value, share in terms:
        term = value * share if share.requires_grad or float(share) != 1.0 else value
        total = term if total is None else total + term
    if total is None:
        raise ValueError("nothing to mix")
    return total
