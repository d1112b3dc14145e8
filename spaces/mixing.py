"""The forward pass of mixed networks: each layer computes with what its choices mix.

Kernels, sparsities and precisions are mixed as weights, each step of a weight's pipeline on its own; widths as a gate for each
channel behind the batch norm; depths as a gate on the branch of a residual block. What depends on which choice is read off a
space in `spaces.entangled`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch.nn import functional as F

from spaces.choice import Option
from spaces.depthwise import depthwise_conv2d
from spaces.layers import INPUT, Network, Node
from spaces.precision import parse_precision
from spaces.quantizers import quantize_to_own_range
from spaces.supernet import Supernet
from spaces.weights import ElasticWeight

Gates = Mapping[str, torch.Tensor]
Open = Mapping[str, Sequence[int]]
Quantize = Callable[[ElasticWeight, torch.Tensor, str], torch.Tensor]


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


class MixedPass:
    """One forward pass: the mixes of every layer of a network at the given gates.

    Args:
        supernet: the shared weights.
        network: the widest open one.
        mixes: by layer and property, those that depend on choices.
        gates: by choice, `(options,)`.
        opened: by choice, positions of the options that take part; all where it is not named.
        quantize: from a stored weight, what it became and a precision, to the weight to compute with; by default the
            precision's own grid.
    """

    def __init__(
        self,
        supernet: Supernet,
        network: Network,
        mixes: Mapping[tuple[str, str], Mix],
        gates: Gates,
        opened: Open,
        quantize: Quantize | None = None,
    ) -> None:
        self.supernet, self.mixes, self.gates, self.opened = supernet, mixes, gates, opened
        self.quantize = quantize or _on_grid
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
