"""Layers of every kind, and what they compute: the plain reference that lowerings of all runtimes are held against.

It computes in double precision and simulates the integer grids. Quantizers are tested in tests/spaces.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional

from latency_lut.lowering import LayerWeights
from latency_lut.network import BORDER_SCALE, random_weights
from spaces.layers import LayerSpec
from spaces.precision import parse_precision
from spaces.quantizers import EncodedWeight, QuantizerSettings, activation_grid, quantizer_of
from spaces.tokens import EPSILON


def specs() -> list[LayerSpec]:
    conv = LayerSpec("conv2d", 9, 6, 7, 6)
    everywhere = [
        replace(conv, precision=w, input_bits=i, output_bits=o, skip_bits=s, activation=a, sparsity=p, kernel=k)
        for w, i, o, s, a, (p, k) in itertools.product(
            ("w8a8", "fp32"), (8, 32), (8, 32), (0, 8, 32), ("relu", "none"), (("dense", 3), ("group@1/3", 1))
        )
    ]
    geometry = [
        replace(shape, kernel=k, stride=s, precision=p, input_bits=b, output_bits=b)
        for shape, k, s, (p, b) in itertools.product(
            (
                LayerSpec("conv2d", 5, 7, 8, 5),
                LayerSpec("conv2d", 1, 4, 5, 9),
                LayerSpec("conv2d", 16, 32, 4, 4, activation="relu"),
                LayerSpec("conv2d", 7, 7, 6, 7, groups=7, activation="relu"),
                LayerSpec("conv2d", 16, 16, 5, 5, groups=16),
                LayerSpec("conv2d", 13, 10, 5, 6, sparsity="group@1/2", activation="relu"),
                LayerSpec("conv2d", 16, 8, 5, 6, sparsity="group@1/4"),
                LayerSpec("conv2d", 1, 2, 5, 6, sparsity="group@1/4"),
            ),
            (1, 3, 5, 7),
            (1, 2),
            (("w8a8", 8), ("fp32", 32)),
        )
    ]
    linear = [
        LayerSpec("linear", 10, 7, activation=a, precision=w, input_bits=i, output_bits=o)
        for a, w, i, o in itertools.product(("relu", "none"), ("w8a8", "fp32"), (8, 32), (8, 32))
    ]
    linear.append(LayerSpec("linear", 12, 6, sparsity="group@1/2"))
    pools = [LayerSpec("global_pool", 6, 6, 5, 7, input_bits=i, output_bits=o) for i, o in itertools.product((8, 32), (8, 32))]
    return list(dict.fromkeys([*everywhere, *geometry, *linear, *pools, *formats(), *low_ranks(), *tokens()]))


def formats() -> list[LayerSpec]:
    """Every kind of precision, on a convolution, a sparse one and linear layers."""
    conv = LayerSpec("conv2d", 12, 6, 7, 6, 3, activation="relu")
    sparse, linear = replace(conv, kernel=1, sparsity="group@1/2"), LayerSpec("linear", 70, 7)
    floats = (
        "w8",
        "w4",
        "w3",
        "w2",
        "w4@32",
        "w4@tensor",
        "w4@inputs",
        "ternary",
        "binary",
        "power4",
        "codebook3",
        "partial@1/8",
    )
    found = [replace(s, precision=p) for s, p in itertools.product((conv, linear), floats)]
    zeros = (p for p in floats if parse_precision(p).has_zero)
    found += [replace(sparse, precision=p) for p in zeros]
    integers = ("w7a8", "w4a8", "w2a8", "w4a8@tensor", "ternary_a8", "binary_a8")
    found += [replace(conv, precision=p, input_bits=8, output_bits=8) for p in integers]
    found += [replace(linear, precision=p, input_bits=8) for p in integers]
    found += [replace(s, precision="w8d8") for s in (conv, replace(conv, sparsity="2:4"), linear)]
    found += [replace(s, precision="w7d8") for s in (conv, linear)]
    found += [replace(linear, precision=p) for p in ("w8@16", "w4@64", "w2@16", "w8d8@32", "w4d8@32", "w4d8@16")]
    found += [
        replace(conv, activation="hard_swish", precision=p, input_bits=b, output_bits=b, skip_bits=s)
        for (p, b), s in itertools.product((("fp32", 32), ("w8a8", 8), ("fp32", 8)), (0, 32))
    ]
    return [*found, *(replace(conv, sparsity=s) for s in ("1:4", "2:4+selective", "block3x2@1/2", "unstructured@1/4"))]


def low_ranks() -> list[LayerSpec]:
    conv, linear = LayerSpec("conv2d", 8, 6, 7, 6, 3, stride=2, activation="relu", rank=3), LayerSpec("linear", 20, 7, rank=2)
    found = [replace(conv, precision=p, input_bits=b, output_bits=b) for p, b in (("fp32", 32), ("w4", 32), ("w8a8", 8))]
    return [*found, *(replace(linear, precision=p) for p in ("fp32", "w4", "w8a8"))]


def tokens() -> list[LayerSpec]:
    """Operators of transformers on maps and sequences, in every surrounding."""
    shapes = (
        LayerSpec("layer_norm", 6, 6, 5, 7),
        LayerSpec("layer_norm", 17, 17, 1, 3, activation="relu"),
        LayerSpec("attention", 24, 8, 5, 3, heads=2),
        LayerSpec("attention", 15, 5, 1, 9, heads=5, activation="relu"),
        LayerSpec("attention", 48, 16, 1, 1, heads=1),
    )
    bits = itertools.product((8, 32), (8, 32), (0, 8, 32))
    return [replace(s, input_bits=i, output_bits=o, skip_bits=k) for (i, o, k), s in itertools.product(bits, shapes)]


def float8s() -> list[LayerSpec]:
    """Layers of 8-bit floats; not every runtime has them."""
    conv, linear = (
        LayerSpec("conv2d", 12, 6, 7, 6, 3, activation="relu", precision="fp8"),
        LayerSpec("linear", 70, 7, precision="fp8"),
    )
    found = [replace(conv, stride=s, kernel=k, sparsity=p) for s, k, p in ((1, 3, "dense"), (2, 1, "2:4"), (2, 5, "group@1/2"))]
    bits = itertools.product((8, 32), (8, 32), (0, 8, 32))
    found += [replace(conv, input_bits=i, output_bits=o, skip_bits=s) for i, o, s in bits]
    return [*found, linear, replace(linear, input_bits=8), LayerSpec("conv2d", 16, 16, 5, 5, 3, groups=16, precision="fp8")]


SPECS = specs()

# -- the reference ------------------------------------------------------------------------------------------------------------


def on_grid(x: np.ndarray, scale: float, zero_point: int) -> np.ndarray:
    return np.asarray((np.clip(np.rint(x / scale) + zero_point, 0, 255) - zero_point) * scale)


def in_range(x: np.ndarray, limits: tuple[float, float] | None) -> np.ndarray:
    assert limits is not None
    scale, zero_point = activation_grid(*limits)
    return on_grid(x, float(scale), zero_point)


def scales_of(spec: LayerSpec, weight: np.ndarray) -> np.ndarray:
    encoded = encoding(spec, weight)
    return np.asarray(encoded.scales.double().reshape(-1).numpy())


def bias_scales_of(spec: LayerSpec, weight: np.ndarray) -> np.ndarray:
    """Weights of few levels get a finer grid, so that their bias is not rounded as coarsely as they are."""
    most = int(encoding(spec, weight).codes.abs().max())
    return scales_of(spec, weight) / max(1, 64 // most)


def encoding(spec: LayerSpec, weight: np.ndarray) -> EncodedWeight:
    """Quantizers are tested in tests/spaces; here their codes are taken for granted."""
    quantizer = quantizer_of(spec.arithmetic, weight.shape, QuantizerSettings())
    assert quantizer is not None
    encoded = quantizer.encode(torch.from_numpy(weight))
    assert encoded is not None
    return encoded


def stored(spec: LayerSpec, weight: np.ndarray) -> np.ndarray:
    """The weight that the precision stores, in double precision."""
    if spec.arithmetic.float_weights or spec.arithmetic.weights in ("partial", "float8"):
        return weight.astype(np.float64)
    return np.asarray(encoding(spec, weight).decode().double().numpy())


def own_range(spec: LayerSpec, x: np.ndarray) -> np.ndarray:
    """The input in 8 bits by its own range: one unsigned grid, or one symmetric grid per block of features."""
    block = spec.arithmetic.scales
    if not isinstance(block, int):
        low, high = min(x.min(), 0.0), max(x.max(), 0.0)
        return on_grid(x, (high - low) / 255, int(np.rint(-low / ((high - low) / 255))))
    flat = x.reshape(len(x), -1)
    y = np.empty_like(flat)
    for begin in range(0, flat.shape[1], block):
        part = flat[:, begin : begin + block]
        step = np.abs(part).max(axis=1, keepdims=True) / 127
        y[:, begin : begin + block] = np.rint(part / step) * step
    return y.reshape(x.shape)


def in_float8(x: np.ndarray) -> np.ndarray:
    """Rows rounded to e4m3, the largest magnitude of a row on 448: three bits after the first one, exponents from -6."""
    flat = x.reshape(len(x), -1)
    scale = np.abs(flat).max(axis=1, keepdims=True) / 448
    scaled = flat / np.where(scale > 0, scale, 1)
    step = 2.0 ** (np.maximum(np.floor(np.log2(np.maximum(np.abs(scaled), 1e-30))), -6) - 3)
    return np.asarray((np.rint(scaled / step) * step * scale).reshape(x.shape))


def low_rank(spec: LayerSpec, weights: LayerWeights, x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Two convolutions, one after the other."""
    assert weights.factor is not None
    first = replace(spec, out_channels=spec.rank, rank=0, input_bits=spec.input_bits, skip_bits=0)
    middle = arithmetic(first, replace(weights, weight=weights.factor, bias=np.zeros(spec.rank, np.float32)), x)
    input_scale = 1.0
    if spec.integer:
        assert weights.factor_range is not None
        middle = in_range(middle, weights.factor_range)
        input_scale = float(activation_grid(*weights.factor_range)[0])
        scales = bias_scales_of(spec, np.asarray(weights.weight))
        bias = np.rint(bias / (scales * input_scale)) * scales * input_scale
    y = np.einsum("oi,nihw->nohw", weight.reshape(len(weight), -1), middle) + bias[:, None, None]
    return np.asarray(y)


def arithmetic(spec: LayerSpec, weights: LayerWeights, x: np.ndarray) -> np.ndarray:
    """The layer without skip, activation and output grid; `(batch, channels, height, width)` in double precision."""
    if spec.operator == "global_pool":
        return np.asarray(x.mean(axis=(2, 3), keepdims=True))
    if spec.operator == "attention":
        return attention(spec, x)
    assert weights.weight is not None
    assert weights.bias is not None
    if spec.operator == "layer_norm":
        normal = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + EPSILON)
        return np.asarray(normal * weights.weight[:, None, None] + weights.bias[:, None, None])
    weight, bias = stored(spec, weights.weight), weights.bias.astype(np.float64)
    if spec.arithmetic.activations == "dynamic":
        x = own_range(spec, x)
    if spec.arithmetic.activations == "float8":
        x = in_float8(x)
    if spec.rank:
        return low_rank(spec, weights, x, weight, bias)
    if spec.integer:
        input_scale = BORDER_SCALE
        if spec.input_bits == 32:
            assert weights.input_range is not None
            x, input_scale = in_range(x, weights.input_range), float(activation_grid(*weights.input_range)[0])
        scales = bias_scales_of(spec, weights.weight)
        bias = np.rint(bias / (scales * input_scale)) * scales * input_scale
    weight = weight.reshape(*weight.shape[:2], spec.kernel, spec.kernel)
    x, weight, bias = (np.ascontiguousarray(array, np.float64) for array in (x, weight, bias))
    tensors = (torch.from_numpy(x), torch.from_numpy(weight), torch.from_numpy(bias))
    y = functional.conv2d(*tensors, stride=spec.stride, padding=spec.kernel // 2, groups=spec.groups)
    return np.asarray(y.numpy())


def attention(spec: LayerSpec, x: np.ndarray) -> np.ndarray:
    """Head by head, query by query."""
    y = np.empty((len(x), spec.out_channels, spec.tokens))
    flat, width = x.reshape(len(x), -1, spec.tokens), spec.out_channels // spec.heads
    for n, head, token in np.ndindex(len(x), spec.heads, spec.tokens):
        features = np.arange(head * width, (head + 1) * width)
        query, key, value = (flat[n, 3 * features + role] for role in range(3))
        score = np.exp(query[:, token] @ key / np.sqrt(width))
        y[n, features, token] = value @ (score / score.sum())
    return y.reshape(len(x), spec.out_channels, spec.height, spec.width)


def complete(spec: LayerSpec, weights: LayerWeights, y: np.ndarray, skip: np.ndarray | None) -> np.ndarray:
    """Skip and activation."""
    if spec.integer and (skip is not None or spec.activation == "hard_swish"):
        y = in_range(y, weights.sum_range)
    if skip is not None:
        y = y + skip
    if spec.activation == "hard_swish":
        return y * np.clip(y / 6 + 0.5, 0, 1)
    return np.maximum(y, 0) if spec.activation == "relu" else y


@dataclass(frozen=True)
class Example:
    """A layer filled and calibrated, with inputs as values and the expected output, before its grid."""

    spec: LayerSpec
    weights: LayerWeights
    x: np.ndarray
    skip: np.ndarray | None
    expected: np.ndarray


def border(rng: np.random.Generator, shape: tuple[int, ...], bits: int) -> np.ndarray:
    if bits == 8:
        return rng.integers(0, 256, shape) * BORDER_SCALE
    return rng.uniform(-1, 1, shape).astype(np.float32).astype(np.float64)


def example(spec: LayerSpec, batch: int = 1, seed: int = 0) -> Example:
    rng = np.random.default_rng(seed)
    x = border(rng, (batch, spec.in_channels, spec.height, spec.width), spec.input_bits)
    skip = border(rng, (batch, spec.out_channels, spec.out_height, spec.out_width), spec.skip_bits) if spec.skip_bits else None
    weights = replace(random_weights(spec, rng), input_range=(-2.0, 6.0))
    if spec.arithmetic.weights == "float8" and weights.weight is not None:  # it has no codes, so the weight comes on its grid
        weights = replace(weights, weight=in_float8(weights.weight.astype(np.float64)).astype(np.float32))
    y = arithmetic(spec, weights, x)
    low, high = min(float(y.min()), 0.0), max(float(y.max()), 0.1)
    weights = replace(weights, sum_range=(low, high))
    expected = complete(spec, weights, y, skip)
    # With a skip the output's step is larger than the sum's, so that a rounding of the sum moves the output by one step.
    top = max(float(expected.max()), 1.2 * (high - low) if spec.skip_bits else 0.1)
    output_range = (0.0 if spec.activation == "relu" else min(float(expected.min()), 0.0), top)
    return Example(spec, replace(weights, output_range=output_range), x, skip, expected)


def check(case: Example, output: np.ndarray, tolerance: float = 1e-4) -> None:
    """Float: a tolerance times the largest value. Integer: one step in a small share of the elements."""
    few = max(1, round(0.03 * output.size))
    if case.spec.output_bits == 8:
        assert case.weights.output_range is not None
        scale, zero_point = activation_grid(*case.weights.output_range)
        expected = np.clip(np.rint(case.expected / scale) + zero_point, 0, 255)
        assert len(np.unique(expected)) > 2, "the example shows nothing"
        difference = np.abs(output - expected)
        assert difference.max() <= 1
        assert (difference > 0).sum() <= few
        return
    difference = np.abs(output - case.expected) / np.abs(case.expected).max()
    if case.spec.integer and case.skip is not None:
        assert case.weights.sum_range is not None
        step = activation_grid(*case.weights.sum_range)[0] / np.abs(case.expected).max()
        assert difference.max() <= 1.01 * step
        assert (difference > tolerance).sum() <= few
        return
    assert difference.max() <= tolerance
