"""Layer norm and attention, always in floats.

Maps keep their channels first between layers; `spaces.tokens` gives the order of an attention's channels. Each has two
lowerings, because either is the faster one somewhere: transpositions are dear in WebAssembly, and the scores of a thousand
tokens do not fit into caches.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from latency_lut.graph import GraphBuilder, Tensor
from latency_lut.lowerings.base import LayerWeights, lowering
from latency_lut.lowerings.dynamic import MICROSOFT
from latency_lut.lowerings.nodes import bias_of, weight_of
from spaces.layers import LayerSpec
from spaces.tokens import EPSILON


@lowering("layer_norm", lambda spec: spec.operator == "layer_norm")
def layer_norm(g: GraphBuilder, spec: LayerSpec, weights: LayerWeights, x: Tensor) -> ir.Value:
    """onnxruntime's kernel, which wants channels last; where neighbours do too, the transpositions cancel."""
    last = g.op("Transpose", [g.dequantize(x, "in_dq")], "last", perm=[0, 2, 3, 1])
    weight, bias = (values.astype(np.float32) for values in (weight_of(weights), bias_of(weights)))
    inputs = [last, g.constant("weight", weight), g.constant("bias", bias)]
    y = g.op("LayerNormalization", inputs, "norm", axis=-1, epsilon=EPSILON)
    return g.op("Transpose", [y], "first", perm=[0, 3, 1, 2])


@lowering("layer_norm_first", lambda spec: spec.operator == "layer_norm")
def layer_norm_first(g: GraphBuilder, spec: LayerSpec, weights: LayerWeights, x: Tensor) -> ir.Value:
    """Sums over channels that come first: more kernels, no transposition."""
    value, axes = g.dequantize(x, "in_dq"), g.constant("axes", np.array([1], np.int64))
    centred = g.op("Sub", [value, g.op("ReduceMean", [value, axes], "mean")], "centred")
    variance = g.op("ReduceMean", [g.op("Mul", [centred, centred], "square"), axes], "variance")
    positive = g.op("Add", [variance, g.constant("epsilon", np.array(EPSILON, np.float32))], "positive")
    normal = g.op("Div", [centred, g.op("Sqrt", [positive], "deviation")], "normal")
    weight, bias = (v.astype(np.float32).reshape(-1, 1, 1) for v in (weight_of(weights), bias_of(weights)))
    return g.op("Add", [g.op("Mul", [normal, g.constant("weight", weight)], "weighted"), g.constant("bias", bias)], "norm")


def exchanges_rows(spec: LayerSpec, name: str) -> bool:
    """Whether a lowering takes and gives bytes with channels last, though it computes in floats.

    The optimizer of onnxruntime cancels the transpositions of `layer_norm` against those around bytes, and takes out those
    around `layer_norm_first` when there is one at both sides.
    """
    return spec.operator == "layer_norm" and (name == "layer_norm" or (spec.input_bits, spec.output_bits) == (8, 8))


@lowering("attention", lambda spec: spec.operator == "attention")
def attention(g: GraphBuilder, spec: LayerSpec, weights: LayerWeights, x: Tensor) -> ir.Value:
    """Two products around a softmax. Transposed operands and the scale become part of the products (FusedMatMul)."""
    query, key, value = _parts(g, spec, x)
    # The scale stands before the product also because a product of two dequantized tensors would become one of integers.
    scale = g.constant("scale", np.array(1.0 / math.sqrt(spec.out_channels // spec.heads), np.float32))
    scaled = g.op("Mul", [query, scale], "scaled")
    scores = g.op("MatMul", [g.op("Transpose", [scaled], "query_t", perm=[0, 1, 3, 2]), key], "scores")
    shares = g.op("Softmax", [scores], "shares", axis=-1)
    y = g.op("MatMul", [value, g.op("Transpose", [shares], "shares_t", perm=[0, 1, 3, 2])], "mixed")
    return g.reshaped(y, (-1, spec.out_channels, spec.height, spec.width), "map")


@lowering("multi_head_attention", lambda spec: spec.operator == "attention")
def multi_head_attention(g: GraphBuilder, spec: LayerSpec, weights: LayerWeights, x: Tensor) -> ir.Value:
    """onnxruntime's kernel, which keeps a block of scores at a time (FlashAttention-2, arXiv:2307.08691)."""
    query, key, value = _parts(g, spec, x)
    query = g.op("Transpose", [g.reshaped(query, (-1, spec.out_channels, spec.tokens), "flat")], "query_t", perm=[0, 2, 1])
    last = [g.op("Transpose", [part], name, perm=[0, 1, 3, 2]) for part, name in ((key, "key_t"), (value, "value_t"))]
    y = g.op("MultiHeadAttention", [query, *last], "attention", domain=MICROSOFT, num_heads=spec.heads)
    y = g.op("Transpose", [y], "mixed", perm=[0, 2, 1])
    return g.reshaped(y, (-1, spec.out_channels, spec.height, spec.width), "map")


def _parts(g: GraphBuilder, spec: LayerSpec, x: Tensor) -> list[ir.Value]:
    """Queries, keys and values, `(batch, heads, head_width, tokens)` each.

    Those of a feature are neighbours, so they are one row of 3 * tokens numbers, and no transposition is needed.
    """
    shape = (-1, spec.heads, spec.out_channels // spec.heads, 3 * spec.tokens)
    rows = g.reshaped(g.dequantize(x, "in_dq"), shape, "rows")
    return g.ops("Split", [rows], ("query", "key", "value"), axis=3, num_outputs=3)
