"""Weights of few bits packed into bytes, for small files.

They are unpacked by nodes that depend on constants alone, so a runtime does that once, when it loads the model (onnxruntime's
constant folding): the file is small, and runs as fast as one with the weights as floats or bytes.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from latency_lut.graph import GraphBuilder
from latency_lut.lowerings.nodes import values_of
from spaces.layers import LayerSpec
from spaces.precision import FLOAT_BITS
from spaces.quantizers import EncodedWeight

BYTE_BITS = 8
UNPACKING_BYTES = 1500  # about what the nodes take that unpack codes: where they save less, plain numbers are smaller


def float_weight(
    g: GraphBuilder, spec: LayerSpec, weight: np.ndarray, encoded: EncodedWeight | None, name: str = "weight"
) -> ir.Value:
    """A weight for float arithmetic, stored as small as its codes are: in a file that runs as fast as one with floats."""
    if encoded is None or _saved_bytes(encoded) < UNPACKING_BYTES:
        return g.constant(name, values_of(weight, encoded).astype(np.float32))
    codes, scales = encoded.codes.numpy(), encoded.scales.numpy().astype(np.float32)
    if encoded.codebook is not None:
        book = g.constant(f"{name}_codebook", encoded.codebook.numpy().astype(np.float32).reshape(-1))
        index = _unpacked(g, codes.astype(np.uint8), encoded.bits, ir.DataType.INT32, name)
        values = g.op("Gather", [book, index], f"{name}_values", axis=0)
    else:
        values = _levels(g, codes.astype(np.int64), encoded.bits, name)
    shared = spec.arithmetic.scales
    if isinstance(shared, int):
        inputs = math.prod(codes.shape[1:])
        block_of = g.constant(f"{name}_block", (np.arange(inputs) // shared).astype(np.int32))
        scale = g.op("Gather", [g.constant(f"{name}_scales", scales), block_of], f"{name}_scale", axis=1)
        scale = g.reshaped(scale, codes.shape, f"{name}_scale_shape")
    else:
        scale = g.constant(f"{name}_scale", scales.reshape(*scales.shape, *[1] * (codes.ndim - 2)))
    return g.op("Mul", [values, scale], name)


def integer_levels(g: GraphBuilder, levels: np.ndarray, bits: int, name: str) -> ir.Value:
    """Levels of integer arithmetic (int8), which are multiples of a step, stored in the bits of their codes.

    The step keeps biases fine (`spaces.quantizers.integer_layer`), so a table gives the level of a code.

    Args:
        levels: int8, any shape.
        bits: of a code; more where its levels need more.
        name: of the value.
    """
    if _width(bits) == BYTE_BITS:
        return g.constant(name, levels)
    step = max(1, int(np.gcd.reduce(np.abs(levels.astype(np.int64)), axis=None)))
    codes = levels.astype(np.int64) // step
    lowest, highest = int(codes.min()), int(codes.max())
    if bits == 1 and not (codes == 0).any():
        table, index = np.array([-1, 1]), (codes + 1) // 2
    else:
        bits = max(bits, (highest - lowest).bit_length())
        table, index = np.arange(lowest, highest + 1), codes - lowest
    saved = levels.size * (BYTE_BITS - _width(bits)) // BYTE_BITS
    if saved < UNPACKING_BYTES:
        return g.constant(name, levels)
    values = g.constant(f"{name}_table", (table * step).astype(np.int8))
    return g.op("Gather", [values, _unpacked(g, index.astype(np.uint8), bits, ir.DataType.INT32, name)], name, axis=0)


def _width(bits: int) -> int:
    """Bits that a code takes in a byte: 1, 2, 4 or 8."""
    return 1 << max(0, bits - 1).bit_length()


def _saved_bytes(encoded: EncodedWeight) -> int:
    """What codes and scales take less than floats would."""
    return encoded.codes.numel() * (FLOAT_BITS - encoded.bits) // BYTE_BITS - encoded.scales.numel() * FLOAT_BITS // BYTE_BITS


def _levels(g: GraphBuilder, codes: np.ndarray, bits: int, name: str) -> ir.Value:
    """Integer codes as a float value of their shape: `step * stored + lowest`."""
    lowest, highest = int(codes.min()), int(codes.max())
    step = 2 if bits == 1 else 1
    lowest = -1 if bits == 1 else lowest
    needed = max(bits, int((highest - lowest) // step).bit_length())
    if needed > BYTE_BITS // 2:
        return g.op("Cast", [g.constant(f"{name}_codes", codes.astype(np.int8))], f"{name}_values", to=int(ir.DataType.FLOAT))
    stored = _unpacked(g, ((codes - lowest) // step).astype(np.uint8), needed, ir.DataType.FLOAT, name)
    if step > 1:
        stored = g.op("Mul", [stored, g.constant(f"{name}_step", np.array(step, np.float32))], f"{name}_steps")
    return g.op("Add", [stored, g.constant(f"{name}_lowest", np.array(lowest, np.float32))], f"{name}_values")


def _unpacked(g: GraphBuilder, codes: np.ndarray, bits: int, dtype: ir.DataType, name: str) -> ir.Value:
    """Unsigned codes packed into bytes (1, 2 or 4 bits each), unpacked into their shape and cast."""
    width = _width(bits)
    per_byte = BYTE_BITS // width
    padded = np.zeros(-(-codes.size // per_byte) * per_byte, np.uint8)
    padded[: codes.size] = codes.reshape(-1)
    shifts = (np.arange(per_byte) * width).astype(np.uint8)
    packed = np.bitwise_or.reduce(padded.reshape(-1, per_byte) << shifts, axis=1).astype(np.uint8)
    shifted = g.op(
        "BitShift",
        [g.constant(f"{name}_packed", packed[:, None]), g.constant(f"{name}_shifts", shifts[None])],
        f"{name}_shifted",
        direction="RIGHT",
    )
    value = g.op("BitwiseAnd", [shifted, g.constant(f"{name}_mask", np.array((1 << width) - 1, np.uint8))], f"{name}_codes")
    value = g.op("Cast", [value], f"{name}_cast", to=int(dtype))
    if len(padded) > codes.size:
        value = g.reshaped(value, (-1,), f"{name}_row")
        ends = [g.constant(f"{name}_{end}", np.array([at], np.int64)) for end, at in (("begin", 0), ("end", codes.size))]
        value = g.op("Slice", [value, *ends], f"{name}_cut")
    return g.reshaped(value, codes.shape, f"{name}_shape")
