"""Lowerings: the ways in which a layer becomes nodes of a graph.

`lower` is called by the profiler with random weights and by the exporter with trained ones; nothing else turns a layer into
nodes, so what was measured is what ships. A layer can have several lowerings (a sparse layer also runs dense, with zeros); all
compute the same function, and `applicable` lists them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from latency_lut.graph import GraphBuilder, Tensor
from spaces.layers import FLOAT_BITS, LayerSpec
from spaces.quantizers import activation_grid, weight_levels
from spaces.sparsity import GROUP_BLOCKS, group_channels, kept_inputs, parse

Range = tuple[float, float]

BIAS_LEVELS = 2.0**29


@dataclass(frozen=True)
class LayerWeights:
    """What fills a layer in its final form: batch norm folded, mask applied, weights on their grid.

    Args:
        weight: float32 of `LayerSpec.weight_shape`, `None` for layers without weights.
        bias: `(out_channels,)` float32, `None` likewise.
        output_range: range of the output's grid, when the output is quantized.
        input_range: range of the input's grid, when an integer layer gets a float input.
        sum_range: range of the convolution's own output before a skip is added, in an integer layer.
    """

    weight: np.ndarray | None = None
    bias: np.ndarray | None = None
    output_range: Range | None = None
    input_range: Range | None = None
    sum_range: Range | None = None


@dataclass(frozen=True)
class Lowering:
    """One way to lower a layer: `applies` says to which, `core` makes the arithmetic's nodes."""

    name: str
    applies: Callable[[LayerSpec], bool]
    core: Callable[[GraphBuilder, LayerSpec, LayerWeights, Tensor], ir.Value]


LOWERINGS: dict[str, Lowering] = {}

Core = Callable[[GraphBuilder, LayerSpec, LayerWeights, Tensor], ir.Value]


def lowering(name: str, applies: Callable[[LayerSpec], bool]) -> Callable[[Core], Core]:
    """Register a lowering."""

    def register(core: Core) -> Core:
        LOWERINGS[name] = Lowering(name, applies, core)
        return core

    return register


def applicable(spec: LayerSpec) -> tuple[str, ...]:
    """Names of the lowerings that can make this layer."""
    return tuple(name for name, entry in LOWERINGS.items() if entry.applies(spec))


def lower(name: str, g: GraphBuilder, spec: LayerSpec, weights: LayerWeights, x: Tensor, skip: Tensor | None) -> Tensor:
    """Append a layer's nodes to a graph.

    Args:
        name: a lowering out of `applicable(spec)`.
        g: the graph; its scope names the layer.
        spec: the layer.
        weights: what fills it.
        x: main input, quantized as `spec.input_bits` says.
        skip: what is added before the activation, when `spec.skip_bits` is not 0.

    Raises:
        ValueError: the lowering does not apply, or a range that the layer needs is missing.
    """
    if name not in LOWERINGS or not LOWERINGS[name].applies(spec):
        raise ValueError(f"lowering {name!r} does not apply to {spec}; allowed are {', '.join(applicable(spec))}")
    y = LOWERINGS[name].core(g, spec, weights, x)
    integer = spec.weight_bits < FLOAT_BITS
    if skip is not None:
        if integer:
            quantized = g.quantize(y, *activation_grid(*_range(weights.sum_range, "sum_range", spec)), name="sum_q")
            y = g.dequantize(quantized, "sum_dq")
        y = g.op("Add", [y, g.dequantize(skip, "skip_dq")], "add")
    # Between two quantized tensors onnxruntime turns a float Conv into an integer one (WeightBiasQuantization), with other
    # speed and other outputs than the architecture says. It looks through Relu only; a LeakyRelu computes the same (slope 0
    # is ReLU, slope 1 the identity), fuses into the Conv for free, and stops it.
    guarded = not integer and spec.weight_shape and skip is None and spec.input_bits < FLOAT_BITS > spec.output_bits
    if guarded:
        y = g.op("LeakyRelu", [y], "act", alpha=0.0 if spec.activation == "relu" else 1.0)
    elif spec.activation == "relu":
        y = g.op("Relu", [y], "act")
    if spec.output_bits < FLOAT_BITS:
        return g.quantize(y, *activation_grid(*_range(weights.output_range, "output_range", spec)), name="out_q")
    return Tensor(y)


def _range(value: Range | None, what: str, spec: LayerSpec) -> Range:
    if value is None:
        raise ValueError(f"{what} is missing for {spec}; calibrate the network first")
    return value


# -- the lowerings -----------------------------------------------------------------------------------------------------------


def _is_float(spec: LayerSpec) -> bool:
    return spec.weight_bits == FLOAT_BITS


def _has_groups(spec: LayerSpec) -> bool:
    return spec.operator == "conv2d" and spec.groups == 1 and parse(spec.sparsity).pattern == "group"


@lowering("fp32", _is_float)
def fp32(g: GraphBuilder, spec: LayerSpec, weights: LayerWeights, x: Tensor) -> ir.Value:
    """Float arithmetic with the dense weight; what a mask has removed is multiplied as zero."""
    if spec.operator == "global_pool":
        return g.op("GlobalAveragePool", [g.dequantize(x, "in_dq")], "pool")
    value = g.dequantize(_flat(g, spec, x), "in_dq")
    return _arithmetic(g, spec, value, *_float_weights(g, _weight(weights), _bias(weights)), spec.groups)


@lowering("qdq_u8", lambda spec: not _is_float(spec))
def qdq_u8(g: GraphBuilder, spec: LayerSpec, weights: LayerWeights, x: Tensor) -> ir.Value:
    """Integer arithmetic: uint8 activations, int8 weights per output channel, written as QuantizeLinear / DequantizeLinear."""
    x = _flat(g, spec, _quantized_input(g, spec, weights, x))
    return _arithmetic(
        g, spec, g.dequantize(x, "in_dq"), *_integer_weights(g, x, _weight(weights), _bias(weights)), spec.groups
    )


@lowering("gather_groups", lambda spec: _is_float(spec) and _has_groups(spec))
def gather_groups(g: GraphBuilder, spec: LayerSpec, weights: LayerWeights, x: Tensor) -> ir.Value:
    """`group` sparsity in float: gather each block's input channels, then a grouped convolution over the kept weights."""
    weight, x = _gathered(g, spec, _weight(weights), x)
    return _arithmetic(g, spec, g.dequantize(x, "in_dq"), *_float_weights(g, weight, _bias(weights)), GROUP_BLOCKS)


@lowering("gather_groups_qdq", lambda spec: not _is_float(spec) and _has_groups(spec))
def gather_groups_qdq(g: GraphBuilder, spec: LayerSpec, weights: LayerWeights, x: Tensor) -> ir.Value:
    """`group` sparsity in integers: the gather runs on bytes."""
    weight, x = _gathered(g, spec, _weight(weights), _quantized_input(g, spec, weights, x))
    return _arithmetic(g, spec, g.dequantize(x, "in_dq"), *_integer_weights(g, x, weight, _bias(weights)), GROUP_BLOCKS)


def _weight(weights: LayerWeights) -> np.ndarray:
    if weights.weight is None:
        raise ValueError("this layer needs a weight")
    return weights.weight


def _bias(weights: LayerWeights) -> np.ndarray:
    if weights.bias is None:
        raise ValueError("this layer needs a bias")
    return weights.bias


def _arithmetic(g: GraphBuilder, spec: LayerSpec, x: ir.Value, weight: ir.Value, bias: ir.Value, groups: int) -> ir.Value:
    if spec.operator == "linear":
        return g.op("Gemm", [x, weight, bias], "gemm", transB=1)
    pads = [spec.kernel // 2] * 4
    strides = [spec.stride] * 2
    return g.op("Conv", [x, weight, bias], "conv", group=groups, kernel_shape=[spec.kernel] * 2, pads=pads, strides=strides)


def _float_weights(g: GraphBuilder, weight: np.ndarray, bias: np.ndarray) -> tuple[ir.Value, ir.Value]:
    return g.constant("weight", weight.astype(np.float32)), g.constant("bias", bias.astype(np.float32))


def _integer_weights(g: GraphBuilder, x: Tensor, weight: np.ndarray, bias: np.ndarray) -> tuple[ir.Value, ir.Value]:
    levels, scales = weight_levels(weight)
    if x.scale is None or x.scale.const_value is None:
        raise ValueError("an integer layer needs a quantized input")
    input_scale = x.scale.const_value.numpy()
    # A bias is a 32-bit level of scale(input) * scale(weight). Where batch norm has all but switched a channel off, its bias
    # would not fit: then the weight's grid is widened, which costs that channel's tiny weights nothing that matters.
    widened = np.maximum(scales, np.abs(bias) / (input_scale * BIAS_LEVELS)).astype(np.float32)
    levels = np.rint(levels * (scales / widened).reshape(-1, *[1] * (levels.ndim - 1))).astype(np.int8)
    bias_scales = widened * input_scale
    bias_levels = np.rint(bias / bias_scales.astype(np.float64)).astype(np.int32)
    scales = widened
    return _dequantized(g, "weight", levels, scales), _dequantized(g, "bias", bias_levels, bias_scales)


def _dequantized(g: GraphBuilder, name: str, levels: np.ndarray, scales: np.ndarray) -> ir.Value:
    """A constant on an integer grid. Zero points are written although they are 0: onnxruntime fuses a Gemm only with them."""
    zeros = np.zeros(len(scales), levels.dtype)
    inputs = [g.constant(name, levels), g.constant(f"{name}_scale", scales), g.constant(f"{name}_zero", zeros)]
    return g.op("DequantizeLinear", inputs, f"{name}_dq", axis=0)


def _quantized_input(g: GraphBuilder, spec: LayerSpec, weights: LayerWeights, x: Tensor) -> Tensor:
    if x.scale is not None:
        return x
    return g.quantize(x.value, *activation_grid(*_range(weights.input_range, "input_range", spec)), name="in_q")


def _flat(g: GraphBuilder, spec: LayerSpec, x: Tensor) -> Tensor:
    """The input of a linear layer as `(batch, features)`."""
    return Tensor(g.op("Flatten", [x.value], "flat"), x.scale, x.zero_point) if spec.operator == "linear" else x


def _gathered(g: GraphBuilder, spec: LayerSpec, weight: np.ndarray, x: Tensor) -> tuple[np.ndarray, Tensor]:
    """The kept weights `(out, kept, ...)` and the input with each block's channels one after the other."""
    channels = group_channels(torch.from_numpy(weight), kept_inputs(spec.sparsity, spec.in_channels)).numpy()
    per_block = spec.out_channels // GROUP_BLOCKS
    kept = np.concatenate([weight[b * per_block : (b + 1) * per_block, channels[b]] for b in range(GROUP_BLOCKS)])
    index = g.constant("channels", channels.reshape(-1).astype(np.int64))
    return kept, Tensor(g.op("Gather", [x.value, index], "gather", axis=1), x.scale, x.zero_point)
