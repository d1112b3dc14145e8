"""Low rank: a layer as two, or multiplied out again when that is faster."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from latency_lut.graph import GraphBuilder, Tensor
from latency_lut.lowerings.base import LayerWeights, as_byte_products, lowering, range_of
from latency_lut.lowerings.floating import computes_in_floats
from latency_lut.lowerings.integer import integer_weights, levels_of, quantized_input
from latency_lut.lowerings.nodes import bias_of, encoded_weight, flat, operator, values_of, weight_of
from latency_lut.lowerings.packing import float_weight
from spaces.layers import LayerSpec
from spaces.precision import FLOAT
from spaces.quantizers import activation_grid


def _second(spec: LayerSpec) -> LayerSpec:
    """The second factor as a layer: 1x1, from the rank to the output's channels."""
    height, width = spec.out_height, spec.out_width
    return replace(spec, in_channels=spec.rank, height=height, width=width, kernel=1, stride=1, rank=0)


@lowering("two_factors", lambda spec: bool(spec.rank) and computes_in_floats(spec), lambda s: replace(s, precision=FLOAT))
def two_factors(g: GraphBuilder, spec: LayerSpec, weights: LayerWeights, x: Tensor) -> ir.Value:
    """Two float layers, the first without a bias."""
    value = g.dequantize(flat(g, spec, x), "in_dq")
    factor, weight = _factor(weights), weight_of(weights)
    first = float_weight(g, spec, factor, encoded_weight(spec, factor, weights.factor_encoded), "factor")
    middle = operator(g, spec, value, first, None, 1, "factor_")
    second = float_weight(g, spec, weight, encoded_weight(spec, weight, weights.encoded))
    return operator(g, _second(spec), middle, second, g.constant("bias", bias_of(weights)), 1)


@lowering(
    "factors_multiplied",
    lambda spec: bool(spec.rank) and computes_in_floats(spec),
    lambda spec: replace(spec, precision=FLOAT, rank=0),
    measured_as="fp32",
)
def factors_multiplied(g: GraphBuilder, spec: LayerSpec, weights: LayerWeights, x: Tensor) -> ir.Value:
    """The product of the factors as one float layer: more arithmetic and bytes, fewer kernels."""
    value = g.dequantize(flat(g, spec, x), "in_dq")
    factor, weight = _factor(weights), weight_of(weights)
    factor = values_of(factor, encoded_weight(spec, factor, weights.factor_encoded))
    weight = values_of(weight, encoded_weight(spec, weight, weights.encoded))
    product = (weight.reshape(len(weight), -1) @ factor.reshape(len(factor), -1)).reshape(spec.weight_shape)
    return operator(g, spec, value, g.constant("weight", product), g.constant("bias", bias_of(weights)), 1)


@lowering(
    "two_factors_qdq",
    lambda spec: bool(spec.rank) and spec.integer,
    as_byte_products,
    integer_kernels=2,
)
def two_factors_qdq(g: GraphBuilder, spec: LayerSpec, weights: LayerWeights, x: Tensor) -> ir.Value:
    """Two integer layers; what is between them has a grid of its own."""
    x = flat(g, spec, quantized_input(g, spec, weights, x))
    first, _ = integer_weights(g, spec, x, *levels_of(spec, _factor(weights), weights.factor_encoded), None, "factor_")
    y = operator(g, spec, g.dequantize(x, "in_dq"), first, None, 1, "factor_")
    middle = g.quantize(y, *activation_grid(*range_of(weights.factor_range, "factor_range", spec)), name="factor_q")
    codes, scales = levels_of(spec, weight_of(weights), weights.encoded)
    second, bias = integer_weights(g, spec, middle, codes, scales, bias_of(weights))
    return operator(g, _second(spec), g.dequantize(middle, "factor_dq"), second, bias, 1)


def _factor(weights: LayerWeights) -> np.ndarray:
    if weights.factor is None:
        raise ValueError("this layer needs a factor")
    return weights.factor
