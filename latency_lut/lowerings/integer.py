"""Integer arithmetic with fixed activation ranges, written as QuantizeLinear / DequantizeLinear, which runtimes fuse.

Weights of fewer than 8 bits run in the kernels for bytes.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from latency_lut.graph import GraphBuilder, Tensor
from latency_lut.lowerings.base import LayerWeights, as_byte_products, lowering, range_of
from latency_lut.lowerings.floating import has_groups
from latency_lut.lowerings.nodes import bias_of, encoded_weight, flat, gathered, kept_columns, operator, weight_of
from latency_lut.lowerings.packing import integer_levels
from spaces.layers import LayerSpec
from spaces.quantizers import EncodedWeight, activation_grid
from spaces.quantizers.integer_layer import fine_levels, with_bias
from spaces.sparsity import GROUP_BLOCKS


@lowering(
    "qdq_u8",
    lambda spec: spec.integer and not spec.rank,
    lambda spec: replace(as_byte_products(spec), sparsity="dense"),
    integer_kernels=1,
)
def qdq_u8(g: GraphBuilder, spec: LayerSpec, weights: LayerWeights, x: Tensor) -> ir.Value:
    """Integer arithmetic: uint8 activations, int8 weights per output channel."""
    x = flat(g, spec, quantized_input(g, spec, weights, x))
    codes, scales = levels_of(spec, weight_of(weights), weights.encoded)
    weight, bias = integer_weights(g, spec, x, codes, scales, bias_of(weights))
    return operator(g, spec, g.dequantize(x, "in_dq"), weight, bias, spec.groups)


@lowering("gather_groups_qdq", lambda spec: spec.integer and has_groups(spec), as_byte_products, integer_kernels=1)
def gather_groups_qdq(g: GraphBuilder, spec: LayerSpec, weights: LayerWeights, x: Tensor) -> ir.Value:
    """`group` sparsity in integers: the gather runs on bytes."""
    dense = weight_of(weights)
    codes, scales = levels_of(spec, dense, weights.encoded)
    channels, x = gathered(g, spec, dense, quantized_input(g, spec, weights, x))
    weight, bias = integer_weights(g, spec, x, kept_columns(codes, channels), scales, bias_of(weights))
    return operator(g, spec, g.dequantize(x, "in_dq"), weight, bias, GROUP_BLOCKS)


def levels_of(spec: LayerSpec, weight: np.ndarray, encoded: EncodedWeight | None) -> tuple[np.ndarray, np.ndarray]:
    """Levels (int8, shape of `weight`) and scales `(out,)` of a weight; see `fine_levels`.

    Raises:
        ValueError: the weight has no integer levels.
    """
    found = encoded_weight(spec, weight, encoded)
    if found is None or found.codebook is not None:
        raise ValueError(f"the weights of {spec} have no integer levels")
    return fine_levels(found)


def integer_weights(
    g: GraphBuilder,
    spec: LayerSpec,
    x: Tensor,
    levels: np.ndarray,
    scales: np.ndarray,
    bias: np.ndarray | None,
    name: str = "",
) -> tuple[ir.Value, ir.Value | None]:
    """Weight and bias as integers with their DequantizeLinear nodes.

    Raises:
        ValueError: the input is not quantized.
    """
    weight_name, bias_name = f"{name}weight", f"{name}bias"
    bias_levels = bias_scales = None
    if bias is not None:
        if x.scale is None or x.scale.const_value is None:
            raise ValueError("an integer layer needs a quantized input")
        input_scale = np.float32(x.scale.const_value.numpy())
        levels, scales, bias_levels, bias_scales = with_bias(levels, scales, bias, input_scale)
    stored = integer_levels(g, levels, spec.arithmetic.weight_bits, weight_name)
    weight = _dequantized(g, weight_name, stored, np.zeros(len(scales), np.int8), scales)
    if bias_levels is None or bias_scales is None:
        return weight, None
    stored = g.constant(bias_name, bias_levels)
    return weight, _dequantized(g, bias_name, stored, np.zeros(len(scales), np.int32), bias_scales)


def quantized_input(g: GraphBuilder, spec: LayerSpec, weights: LayerWeights, x: Tensor) -> Tensor:
    """The input on its grid, quantized here when it arrives as floats."""
    if x.scale is not None:
        return x
    return g.quantize(x.value, *activation_grid(*range_of(weights.input_range, "input_range", spec)), name="in_q")


def _dequantized(g: GraphBuilder, name: str, levels: ir.Value, zeros: np.ndarray, scales: np.ndarray) -> ir.Value:
    """Levels on an integer grid. Zero points are written although they are 0: onnxruntime fuses a Gemm only with them."""
    inputs = [levels, g.constant(f"{name}_scale", scales), g.constant(f"{name}_zero", zeros)]
    return g.op("DequantizeLinear", inputs, f"{name}_dq", axis=0)
