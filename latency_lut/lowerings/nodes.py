"""Nodes that several lowerings share: stored weights, the operator itself, gathered channels."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from latency_lut.graph import GraphBuilder, Tensor
from latency_lut.lowerings.base import LayerWeights
from spaces.layers import LayerSpec
from spaces.quantizers import EncodedWeight, QuantizerSettings, quantizer_of
from spaces.sparsity import GROUP_BLOCKS, group_channels, kept_inputs


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


def gathered(g: GraphBuilder, spec: LayerSpec, weight: np.ndarray, x: Tensor) -> tuple[np.ndarray, Tensor]:
    """`group` sparsity: input channels that each block keeps, `(GROUP_BLOCKS, kept)`, and the input with them in a row."""
    channels = group_channels(torch.from_numpy(weight), kept_inputs(spec.sparsity, spec.in_channels)).numpy()
    index = g.constant("channels", channels.reshape(-1).astype(np.int64))
    return channels, Tensor(g.op("Gather", [x.value, index], "gather", axis=1), x.scale, x.zero_point)


def kept_columns(weight: np.ndarray, channels: np.ndarray) -> np.ndarray:
    """The columns `channels` `(GROUP_BLOCKS, kept)` of each block of rows of `(out, in, ...)`: `(out, kept, ...)`."""
    rows = len(weight) // GROUP_BLOCKS
    return np.concatenate([weight[b * rows : (b + 1) * rows, channels[b]] for b in range(GROUP_BLOCKS)])
