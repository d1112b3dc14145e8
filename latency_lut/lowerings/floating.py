"""Float arithmetic: dense, and `group` sparsity as a gather with a grouped convolution."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import torch

from latency_lut.graph import GraphBuilder, Tensor
from latency_lut.lowerings.base import LayerWeights, as_dense_float, lowering
from latency_lut.lowerings.nodes import (
    bias_of,
    encoded_weight,
    flat,
    gathered,
    kept_columns,
    operator,
    values_of,
    weight_of,
)
from latency_lut.lowerings.packing import float_weight
from spaces.layers import TOKEN_OPERATORS, LayerSpec
from spaces.precision import FLOAT, PER_CHANNEL, PER_TENSOR
from spaces.quantizers import EncodedWeight
from spaces.sparsity import GROUP_BLOCKS, parse


def computes_in_floats(spec: LayerSpec) -> bool:
    """Whether inputs are not quantized; weights may be."""
    return spec.arithmetic.activations == "float"


def has_groups(spec: LayerSpec) -> bool:
    """Whether the layer can run as a gather and a grouped convolution."""
    return spec.operator == "conv2d" and spec.groups == 1 and parse(spec.sparsity).pattern == "group"


def _is_one_node(spec: LayerSpec) -> bool:
    return computes_in_floats(spec) and not spec.rank and spec.operator not in (*TOKEN_OPERATORS, "traced")


@lowering("fp32", _is_one_node, as_dense_float)
def fp32(g: GraphBuilder, spec: LayerSpec, weights: LayerWeights, x: Tensor) -> ir.Value:
    """Float arithmetic with the dense weight; what a mask has removed is multiplied as zero."""
    if spec.operator == "global_pool":
        return g.op("GlobalAveragePool", [g.dequantize(x, "in_dq")], "pool")
    value = g.dequantize(flat(g, spec, x), "in_dq")
    dense = weight_of(weights)
    weight = float_weight(g, spec, dense, encoded_weight(spec, dense, weights.encoded))
    return operator(g, spec, value, weight, g.constant("bias", bias_of(weights)), spec.groups)


@lowering(
    "gather_groups",
    lambda spec: computes_in_floats(spec) and has_groups(spec),
    lambda spec: replace(spec, precision=FLOAT),
)
def gather_groups(g: GraphBuilder, spec: LayerSpec, weights: LayerWeights, x: Tensor) -> ir.Value:
    """`group` sparsity in float: gather each block's input channels, then a grouped convolution over the kept weights."""
    dense = weight_of(weights)
    encoded = encoded_weight(spec, dense, weights.encoded)
    channels, x = gathered(g, spec, dense, x)
    weight = float_weight(g, spec, kept_columns(values_of(dense, encoded), channels), _kept_codes(spec, encoded, channels))
    value = g.dequantize(x, "in_dq")
    return operator(g, spec, value, weight, g.constant("bias", bias_of(weights)), GROUP_BLOCKS)


def _kept_codes(spec: LayerSpec, encoded: EncodedWeight | None, channels: np.ndarray) -> EncodedWeight | None:
    """Codes of the kept weights; `None`, so stored as floats, where scales belong to inputs and would have to be kept too."""
    if encoded is None or spec.arithmetic.scales not in (PER_CHANNEL, PER_TENSOR):
        return None
    return replace(encoded, codes=torch.from_numpy(kept_columns(encoded.codes.numpy(), channels)))
