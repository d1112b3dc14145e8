"""Kernels that quantize their input by its own range in every run, and kernels for weights in a few bits.

MatMulNBits is onnxruntime's (domain com.microsoft), in the browser too; it runs linear layers only.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from latency_lut.graph import GraphBuilder, Tensor
from latency_lut.lowerings.base import LayerWeights, lowering
from latency_lut.lowerings.floating import computes_in_floats
from latency_lut.lowerings.integer import levels_of
from latency_lut.lowerings.nodes import bias_of, encoded_weight, flat, weight_of
from spaces.layers import LayerSpec
from spaces.precision import PER_CHANNEL, PER_INPUT

MICROSOFT = "com.microsoft"
MATMUL_BITS = (2, 4, 8)
CHANNEL_BLOCK = 32  # inputs per scale where a whole output channel has one scale
FLOAT_ARITHMETIC, INTEGER_ARITHMETIC = 1, 4  # accuracy levels of MatMulNBits


@lowering(
    "dynamic_int8",
    lambda spec: spec.arithmetic.activations == "dynamic" and spec.arithmetic.scales == PER_CHANNEL and not spec.rank,
    lambda spec: replace(spec, sparsity="dense"),
    integer_kernels=1,
)
def dynamic_int8(g: GraphBuilder, spec: LayerSpec, weights: LayerWeights, x: Tensor) -> ir.Value:
    """Bytes by the input's range of the moment, integer products, float output."""
    value = g.dequantize(flat(g, spec, x), "in_dq")
    names = ("in_q", "in_scale", "in_zero")
    quantized, scale, zero = g.ops("DynamicQuantizeLinear", [value], names)
    codes, scales = levels_of(spec, weight_of(weights), weights.encoded)
    shape = (1, -1) if spec.operator == "linear" else (1, -1, 1, 1)
    if spec.operator == "linear":
        levels = g.constant("weight", np.ascontiguousarray(codes.T))
        product = g.op("MatMulInteger", [quantized, levels, zero], "matmul")
    else:
        pads, strides = [spec.kernel // 2] * 4, [spec.stride] * 2
        inputs = [quantized, g.constant("weight", codes), zero]
        product = g.op(
            "ConvInteger", inputs, "conv", group=spec.groups, kernel_shape=[spec.kernel] * 2, pads=pads, strides=strides
        )
    both = g.op("Mul", [scale, g.constant("weight_scale", scales.reshape(shape))], "scale")
    y = g.op("Mul", [g.op("Cast", [product], "cast", to=int(ir.DataType.FLOAT)), both], "scaled")
    return g.op("Add", [y, g.constant("bias", bias_of(weights).astype(np.float32).reshape(shape))], "biased")


def _in_few_bits(spec: LayerSpec) -> bool:
    precision = spec.arithmetic
    integer = precision.weights == "integer" and precision.weight_bits in MATMUL_BITS and precision.scales != PER_INPUT
    return integer and spec.operator == "linear" and not spec.rank


@lowering(
    "matmul_nbits",
    lambda spec: computes_in_floats(spec) and _in_few_bits(spec),
    lambda spec: replace(spec, sparsity="dense", precision=f"w{spec.arithmetic.weight_bits}@{_block(spec)}"),
)
def matmul_nbits(g: GraphBuilder, spec: LayerSpec, weights: LayerWeights, x: Tensor) -> ir.Value:
    """Weights stay in a few bits in memory and are unpacked tile by tile; float arithmetic (accuracy level 1)."""
    return _matmul_nbits(g, spec, weights, x, FLOAT_ARITHMETIC)


@lowering(
    "matmul_nbits_a8",
    lambda spec: spec.arithmetic.activations == "dynamic" and spec.arithmetic.scales != PER_CHANNEL and _in_few_bits(spec),
    lambda spec: replace(spec, sparsity="dense"),
)
def matmul_nbits_a8(g: GraphBuilder, spec: LayerSpec, weights: LayerWeights, x: Tensor) -> ir.Value:
    """The same with the input in bytes, one scale per block of inputs (accuracy level 4)."""
    return _matmul_nbits(g, spec, weights, x, INTEGER_ARITHMETIC)


def _block(spec: LayerSpec) -> int:
    scales = spec.arithmetic.scales
    return scales if isinstance(scales, int) else CHANNEL_BLOCK


def _matmul_nbits(g: GraphBuilder, spec: LayerSpec, weights: LayerWeights, x: Tensor, accuracy_level: int) -> ir.Value:
    encoded = encoded_weight(spec, weight_of(weights), weights.encoded)
    if encoded is None:
        raise ValueError(f"the weights of {spec} have no integer levels")
    bits, block = spec.arithmetic.weight_bits, _block(spec)
    out, inputs = spec.weight_shape
    blocks = -(-inputs // block)
    # Unsigned codes around the zero point 2^(bits - 1), `block` of them in consecutive bytes, the lowest bits first.
    zero = 1 << (bits - 1)
    unsigned = np.full((out, blocks * block), zero, np.uint8)
    unsigned[:, :inputs] = encoded.codes.numpy().astype(np.int16) + zero
    per_byte = 8 // bits
    shifts = (np.arange(per_byte) * bits).astype(np.uint8)
    packed = np.bitwise_or.reduce(unsigned.reshape(out, blocks, block // per_byte, per_byte) << shifts, axis=-1)
    scales = np.ascontiguousarray(np.broadcast_to(encoded.scales.numpy().astype(np.float32), (out, blocks)))
    operands = [
        g.dequantize(flat(g, spec, x), "in_dq"),
        g.constant("weight", packed.astype(np.uint8)),
        g.constant("weight_scale", scales.reshape(-1)),
        None,
        None,
        g.constant("bias", bias_of(weights).astype(np.float32)),
    ]
    attributes = {"K": inputs, "N": out, "bits": bits, "block_size": block, "accuracy_level": accuracy_level}
    return g.op("MatMulNBits", operands, "matmul", domain=MICROSOFT, **attributes)
