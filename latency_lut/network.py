"""Whole networks as ONNX models: every layer through its lowering, joined as the `Network` says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch

from latency_lut.graph import GraphBuilder, Tensor
from latency_lut.lowering import LayerWeights, lower
from spaces.layers import INPUT, LayerSpec, Network
from spaces.low_rank import factors_of
from spaces.precision import FLOAT_BITS
from spaces.sparsity import mask

BORDER_SCALE = 0.02  # of the bytes that enter a layer alone


def build_model(
    network: Network,
    lowerings: Sequence[str],
    weights: Mapping[str, LayerWeights],
    batch: int = 1,
    metadata: dict[str, str] | None = None,
) -> bytes:
    """A network as a serialized ONNX model with input `input` and output `output`.

    Args:
        network: the layers.
        lowerings: one per node.
        weights: by node name.
        batch: samples per run; the shape is fixed.
        metadata: string properties stored in the model.

    Raises:
        ValueError: another number of lowerings than nodes, or one that does not apply.
    """
    if len(lowerings) != len(network.nodes):
        raise ValueError(f"{len(lowerings)} lowerings for {len(network.nodes)} layers")
    g = GraphBuilder()
    tensors = {INPUT: Tensor(g.input(INPUT, (batch, *network.input_shape)))}
    for node, name in zip(network.nodes, lowerings, strict=True):
        g.scope = node.name
        inputs = [tensors[source] for source in node.inputs]
        skip = inputs[1] if node.spec.skip_bits else None
        tensors[node.name] = lower(name, g, node.spec, weights[node.name], inputs[0], skip)
    output = tensors[network.nodes[-1].name].value
    output.name = "output"
    last = network.nodes[-1].spec
    shape: tuple[int, ...] = (batch, last.out_channels, last.out_height, last.out_width)
    if last.operator == "linear":
        shape = (batch, last.out_channels)
    elif last.program:
        shape = (batch, *last.traced.output)
    output.shape, output.type = ir.Shape(list(shape)), ir.TensorType(ir.DataType.FLOAT)
    return g.model(output, metadata)


def random_weights(spec: LayerSpec, rng: np.random.Generator) -> LayerWeights:
    """Weights that keep activations in range, for timing: a layer's speed does not depend on their values."""
    output_range = (0.0, 4.0) if spec.activation == "relu" else (-4.0, 4.0)
    if spec.operator == "layer_norm":
        weight, bias = rng.uniform(0.5, 1.5, (2, spec.out_channels)).astype(np.float32)
        return LayerWeights(weight, bias, output_range)
    if spec.program:
        shapes = spec.traced.weights
        return LayerWeights(traced=tuple(rng.uniform(0.1, 0.3, shape).astype(np.float32) for shape in shapes))
    if not spec.weight_shape:
        return LayerWeights(output_range=output_range)
    fan_in = int(np.prod(spec.weight_shape[1:]))
    weight = rng.standard_normal(spec.weight_shape, dtype=np.float32) * np.float32(np.sqrt(2.0 / fan_in))
    keep = mask(torch.from_numpy(weight), spec.sparsity)
    bias = rng.standard_normal(spec.out_channels, dtype=np.float32) * np.float32(0.1)
    factor = None
    if spec.rank:
        first, second = factors_of(torch.from_numpy(weight), spec.rank)
        factor, weight = first.numpy(), second.numpy()
    masked = weight if keep is None else weight * keep.numpy()
    wide = (-4.0, 4.0)
    return LayerWeights(masked, bias, output_range, (-2.0, 2.0), sum_range=wide, factor=factor, factor_range=wide)


def build_layer(spec: LayerSpec, lowering: str, weights: LayerWeights, batch: int = 1) -> bytes:
    """One layer alone as a serialized ONNX model, in the surroundings that it has in a network.

    Quantized tensors enter and leave as bytes in the order rows, columns, channels, because that is how integer layers hand
    them on: the transpositions written here cancel against those that the runtime puts around its integer kernels, and
    what stays is what the layer pays in a network.
    """
    g = GraphBuilder()
    output = _lower_alone(g, spec, lowering, weights, batch).value
    if spec.output_bits < FLOAT_BITS and spec.operator != "linear":
        output = g.op("Transpose", [output], "rows_out", perm=[0, 2, 3, 1])
    return g.model(output)


def layer_bytes(spec: LayerSpec, lowering: str, scope: str) -> int:
    """Bytes that the nodes and constants of one layer, called `scope`, add to a model file."""
    g = GraphBuilder()
    _lower_alone(g, spec, lowering, random_weights(spec, np.random.default_rng(0)), 1, scope)
    return g.scope_bytes(scope)


def _lower_alone(
    g: GraphBuilder, spec: LayerSpec, lowering: str, weights: LayerWeights, batch: int, scope: str = "layer"
) -> Tensor:
    g.scope = "border"
    shapes = [(batch, *shape) for shape in spec.input_shapes]
    x = _border_input(g, "input", shapes[0], spec.input_bits)
    skip = _border_input(g, "skip", shapes[1], spec.skip_bits) if spec.skip_bits else None
    g.scope = scope
    return lower(lowering, g, spec, weights, x, skip)


def _border_input(g: GraphBuilder, name: str, shape: tuple[int, ...], bits: int) -> Tensor:
    if bits == FLOAT_BITS:
        return Tensor(g.input(name, shape))
    batch, channels, height, width = shape
    rows = g.input(name, (batch, height, width, channels), ir.DataType.UINT8)
    scale = g.constant(f"{name}_scale", np.array(BORDER_SCALE, np.float32))
    zero_point = g.constant(f"{name}_zero", np.array(0, np.uint8))
    return Tensor(g.op("Transpose", [rows], f"{name}_rows", perm=[0, 3, 1, 2]), scale, zero_point)
