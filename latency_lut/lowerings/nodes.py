"""Nodes that several lowerings share: stored weights, the operator itself, gathered channels."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import torch

from latency_lut.graph import GraphBuilder, Tensor
from latency_lut.lowerings.base import LayerWeights
from spaces.layers import LayerSpec
from spaces.precision import FLOAT_BITS
from spaces.quantizers import EncodedWeight, QuantizerSettings, quantizer_of
from spaces.sparsity import GROUP_BLOCKS, group_channels, kept_inputs

BYTE_BITS = 8
UNPACKING_BYTES = 1500  # about what the nodes take that unpack codes: where they save less, floats are smaller


def weight_of(weights: LayerWeights) -> np.ndarray:
    """The layer's weight.

    Raises:
        ValueError: there is none.
    """
    if weights.weight is None:
        raise ValueError("this layer needs a weight")
    return weights.weight


def bias_of(weights: LayerWeights) -> np.ndarray:
    """The layer's bias.

    Raises:
        ValueError: there is none.
    """
    if weights.bias is None:
        raise ValueError("this layer needs a bias")
    return weights.bias


def encoded_weight(spec: LayerSpec, weight: np.ndarray, encoded: EncodedWeight | None) -> EncodedWeight | None:
    """How a weight of a layer is stored; `None`: as floats."""
    if encoded is not None or spec.arithmetic.float_weights:
        return encoded
    quantizer = quantizer_of(spec.arithmetic, weight.shape, QuantizerSettings())
    return None if quantizer is None else quantizer.encode(torch.from_numpy(weight))


def values_of(weight: np.ndarray, encoded: EncodedWeight | None) -> np.ndarray:
    """The float values of a weight, on its grid where it has one."""
    return weight if encoded is None else np.asarray(encoded.decode().numpy())


def flat(g: GraphBuilder, spec: LayerSpec, x: Tensor) -> Tensor:
    """The input of a linear layer as `(batch, features)`."""
    return Tensor(g.op("Flatten", [x.value], "flat"), x.scale, x.zero_point) if spec.operator == "linear" else x


def operator(
    g: GraphBuilder, spec: LayerSpec, x: ir.Value, weight: ir.Value, bias: ir.Value | None, groups: int, name: str = ""
) -> ir.Value:
    """The Conv or Gemm of a layer."""
    inputs = [x, weight] if bias is None else [x, weight, bias]
    if spec.operator == "linear":
        return g.op("Gemm", inputs, f"{name}gemm", transB=1)
    pads, strides = [spec.kernel // 2] * 4, [spec.stride] * 2
    return g.op("Conv", inputs, f"{name}conv", group=groups, kernel_shape=[spec.kernel] * 2, pads=pads, strides=strides)


def float_weight(
    g: GraphBuilder, spec: LayerSpec, weight: np.ndarray, encoded: EncodedWeight | None, name: str = "weight"
) -> ir.Value:
    """A weight for float arithmetic, stored as small as its codes are.

    Codes are packed into bytes and unpacked by nodes that depend on constants alone, so a runtime does that once, when it loads
    the model (onnxruntime's constant folding): the file is small, and runs as fast as one with floats.
    """
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
    width = 1 << max(0, bits - 1).bit_length()
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


def gathered(g: GraphBuilder, spec: LayerSpec, weight: np.ndarray, x: Tensor) -> tuple[np.ndarray, Tensor]:
    """`group` sparsity: input channels that each block keeps, `(GROUP_BLOCKS, kept)`, and the input with them in a row."""
    channels = group_channels(torch.from_numpy(weight), kept_inputs(spec.sparsity, spec.in_channels)).numpy()
    index = g.constant("channels", channels.reshape(-1).astype(np.int64))
    return channels, Tensor(g.op("Gather", [x.value, index], "gather", axis=1), x.scale, x.zero_point)


def kept_columns(weight: np.ndarray, channels: np.ndarray) -> np.ndarray:
    """The columns `channels` `(GROUP_BLOCKS, kept)` of each block of rows of `(out, in, ...)`: `(out, kept, ...)`."""
    rows = len(weight) // GROUP_BLOCKS
    return np.concatenate([weight[b * rows : (b + 1) * rows, channels[b]] for b in range(GROUP_BLOCKS)])
