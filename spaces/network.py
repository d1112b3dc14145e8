"""Layers joined by name into a network, and the builder that settles which tensors between them are quantized.

A tensor between two layers is quantized as soon as its producer or one of its consumers computes in integers;
`NetworkBuilder` decides that once, for torch and for every runtime.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache

from spaces.layer_spec import LayerSpec
from spaces.low_rank import rank_of
from spaces.precision import FLOAT, FLOAT_BITS, parse_precision

INPUT = "input"


@dataclass(frozen=True)
class Node:
    """A layer in its place. `inputs` are names of nodes (or `INPUT`): the main input, then the skip if the layer has one."""

    name: str
    spec: LayerSpec
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Network:
    """Layers joined into a graph, in an order in which they can run. The last node is the output.

    Args:
        input_shape: `(channels, height, width)` of one sample.
        nodes: the layers.
    """

    input_shape: tuple[int, int, int]
    nodes: tuple[Node, ...]

    @cached_property
    def layers(self) -> tuple[LayerSpec, ...]:
        return tuple(node.spec for node in self.nodes)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest over the whole structure."""
        text = json.dumps([self.input_shape, [asdict(node) for node in self.nodes]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def macs(self) -> int:
        return sum(spec.macs for spec in self.layers)

    @property
    def parameters(self) -> int:
        return sum(spec.parameters for spec in self.layers)

    @property
    def weight_bytes(self) -> int:
        return sum(spec.weight_bytes for spec in self.layers)

    @property
    def peak_activation_bytes(self) -> int:
        """Largest sum of tensors alive at once for one sample, when nodes run in order and a tensor dies after its last use.

        What a layer needs only while it runs (`LayerSpec.scratch_bytes`) is counted too.
        """
        size = {INPUT: 4 * self.input_shape[0] * self.input_shape[1] * self.input_shape[2]}
        last_use = {name: index for index, node in enumerate(self.nodes) for name in (node.name, *node.inputs)}
        alive, peak = size[INPUT], 0
        for index, node in enumerate(self.nodes):
            size[node.name] = node.spec.output_bytes
            alive += node.spec.output_bytes
            peak = max(peak, alive + node.spec.scratch_bytes)
            alive -= sum(size[name] for name in {node.name, *node.inputs} if last_use[name] == index)
        return peak


@dataclass(frozen=True)
class _Row:
    """A layer whose tensors' bits are not settled yet: the leading fields of its `LayerSpec`, and the last ones."""

    name: str
    fields: tuple[str, int, int, int, int, int, int, int, str, str]
    sparsity: str
    rank: int
    heads: int
    inputs: tuple[str, ...]

    @property
    def integer(self) -> bool:
        return parse_precision(self.fields[-1]).integer


# Sampled networks are made of the same few thousand layers again and again: they are made and checked once.
_layer = lru_cache(maxsize=65536)(LayerSpec)


class NetworkBuilder:
    """Collects the layers of one network, tracks shapes, and settles which tensors between layers are quantized."""

    def __init__(self, channels: int, height: int, width: int) -> None:
        self._input_shape = (channels, height, width)
        self._shapes = {INPUT: self._input_shape}
        self._rows: list[_Row] = []

    def add(
        self,
        name: str,
        operator: str,
        source: str,
        out_channels: int | None = None,
        *,
        kernel: int = 1,
        stride: int = 1,
        depthwise: bool = False,
        activation: str = "none",
        precision: str = FLOAT,
        sparsity: str = "dense",
        rank: int = 0,
        heads: int = 0,
        skip: str | None = None,
    ) -> str:
        """Append a layer that reads `source` (and adds `skip`), return its name.

        Without `out_channels` it has as many as its input, attention a third of them.

        Raises:
            ValueError: the name is taken, a tensor that is read is unknown, or the skip has another shape than the output.
        """
        if name in self._shapes or source not in self._shapes:
            raise ValueError(f"layer {name} reads {source}; names are distinct, and what is read comes first")
        channels, height, width = self._shapes[source]
        kept = channels // 3 if operator == "attention" else channels
        out = kept if out_channels is None else out_channels
        groups = channels if depthwise else 1
        fields = (operator, channels, out, height, width, kernel, stride, groups, activation, precision)
        spec = _layer(*fields, heads=heads)
        shape = (out, spec.out_height, spec.out_width)
        if skip is not None and self._shapes.get(skip) != shape:
            raise ValueError(f"{name} gives {shape} but adds {skip}, which is {self._shapes.get(skip)}")
        self._shapes[name] = shape
        self._rows.append(_Row(name, fields, sparsity, rank, heads, (source,) if skip is None else (source, skip)))
        return name

    def shape(self, source: str) -> tuple[int, int, int]:
        """`(channels, height, width)` of a tensor that is there."""
        return self._shapes[source]

    def rank(self, text: str, source: str, out_channels: int) -> int:
        """The rank that an option such as `1/4` or `full` means for a 1x1 convolution that reads `source`; 0 for full."""
        return rank_of(text, min(self._shapes[source][0], out_channels))

    def build(self) -> Network:
        """The network, with `input_bits`, `output_bits` and `skip_bits` settled.

        Raises:
            ValueError: it has no layers.
        """
        if not self._rows:
            raise ValueError("a network needs at least one layer")
        quantized = {row.name for row in self._rows if row.integer} | {row.inputs[0] for row in self._rows if row.integer}
        quantized -= {INPUT, self._rows[-1].name}  # the network's own input and output stay float
        nodes = []
        for row in self._rows:
            bits = [8 if name in quantized else FLOAT_BITS for name in (row.inputs[0], row.name, *row.inputs[1:])]
            skip_bits = bits[2] if len(bits) > 2 else 0
            settled = (bits[0], bits[1], skip_bits, row.sparsity, row.rank, row.heads)
            nodes.append(Node(row.name, _layer(*row.fields, *settled), row.inputs))
        return Network(self._input_shape, tuple(nodes))
