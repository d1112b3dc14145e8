"""Every lowering of every kind of layer, run in onnxruntime and held against a plain reference.

The reference computes in double precision and simulates the integer grids. A new lowering is under test as soon as it is
registered, if it applies to one of `SPECS`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnxruntime
import pytest
import torch
from torch.nn import functional

from latency_lut.device import Device
from latency_lut.lowering import LOWERINGS, LayerWeights, applicable
from latency_lut.network import build_layer, random_weights
from latency_lut.runtimes.onnxruntime import optimized_operators
from latency_lut.table import pair_key
from spaces.errors import UserError
from spaces.layers import LayerSpec
from spaces.precision import parse_precision
from spaces.quantizers import EncodedWeight, QuantizerSettings, activation_grid, quantizer_of
from spaces.tokens import EPSILON

BORDER_SCALE = 0.02  # of quantized inputs of `build_layer`, whose zero point is 0
# Levels above 128 saturate in the integer kernels of processors without VNNI; that is theirs, not ours.
BORDER_LEVELS = 128


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Tiny tensors: more threads only wait for each other, and for seconds where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    integers = ("w4a8", "w2a8", "w4a8@tensor", "ternary_a8", "binary_a8")
    found += [replace(conv, precision=p, input_bits=8, output_bits=8) for p in integers]
    found += [replace(linear, precision=p, input_bits=8) for p in integers]
    found += [replace(s, precision="w8d8") for s in (conv, replace(conv, sparsity="2:4"), linear)]
    found += [replace(linear, precision=p) for p in ("w8@16", "w4@64", "w2@16", "w8d8@32", "w4d8@32", "w4d8@16")]
    found += [
        replace(conv, activation="hard_swish", precision=p, input_bits=b, output_bits=b, skip_bits=s)
        for (p, b), s in itertools.product((("fp32", 32), ("w8a8", 8), ("fp32", 8)), (0, 32))
    ]
    return [*found, *(replace(conv, sparsity=s) for s in ("1:4", "block3x2@1/2", "unstructured@1/4"))]


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


SPECS = specs()
CASES = [(name, spec) for spec in SPECS for name in LOWERINGS if LOWERINGS[name].applies(spec)]

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
    if spec.arithmetic.float_weights or spec.arithmetic.weights == "partial":
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
        return rng.integers(0, BORDER_LEVELS + 1, shape) * BORDER_SCALE
    return rng.uniform(-1, 1, shape).astype(np.float32).astype(np.float64)


def example(spec: LayerSpec, batch: int = 1, seed: int = 0) -> Example:
    rng = np.random.default_rng(seed)
    x = border(rng, (batch, spec.in_channels, spec.height, spec.width), spec.input_bits)
    skip = border(rng, (batch, spec.out_channels, spec.out_height, spec.out_width), spec.skip_bits) if spec.skip_bits else None
    weights = replace(random_weights(spec, rng), input_range=(-2.0, 6.0))
    y = arithmetic(spec, weights, x)
    low, high = min(float(y.min()), 0.0), max(float(y.max()), 0.1)
    weights = replace(weights, sum_range=(low, high))
    expected = complete(spec, weights, y, skip)
    # With a skip the output's step is larger than the sum's, so that a rounding of the sum moves the output by one step.
    top = max(float(expected.max()), 1.2 * (high - low) if spec.skip_bits else 0.1)
    output_range = (0.0 if spec.activation == "relu" else min(float(expected.min()), 0.0), top)
    return Example(spec, replace(weights, output_range=output_range), x, skip, expected)


# -- the runtime --------------------------------------------------------------------------------------------------------------


def run(model: bytes, inputs: dict[str, np.ndarray]) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, inputs)[0])


def as_input(value: np.ndarray, bits: int) -> np.ndarray:
    """Quantized tensors cross the border of `build_layer` as bytes in the order rows, columns, channels."""
    if bits == 32:
        return value.astype(np.float32)
    return np.ascontiguousarray(np.rint(value / BORDER_SCALE).astype(np.uint8).transpose(0, 2, 3, 1))


def layer_output(lowering: str, case: Example) -> np.ndarray:
    """Output of the layer alone: float values, or levels as integers, in the order channels, rows, columns."""
    inputs = {"input": as_input(case.x, case.spec.input_bits)}
    if case.skip is not None:
        inputs["skip"] = as_input(case.skip, case.spec.skip_bits)
    output = run(build_layer(case.spec, lowering, case.weights, len(case.x)), inputs)
    if case.spec.output_bits == 8:
        assert output.dtype == np.uint8
        output = output.astype(np.int64)
        output = output.transpose(0, 3, 1, 2) if output.ndim == 4 else output
    return output.reshape(case.expected.shape)


def check(case: Example, output: np.ndarray) -> None:
    """Float: 1e-4 of the largest value. Integer: one step in a small share of the elements."""
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
        assert (difference > 1e-4).sum() <= few
        return
    assert difference.max() <= 1e-4


# -- tests --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lowering", "spec"), CASES, ids=[f"{name} {spec}" for name, spec in CASES])
def test_a_layer_alone_computes_what_the_reference_computes(lowering: str, spec: LayerSpec) -> None:
    case = example(spec)
    check(case, layer_output(lowering, case))


@pytest.mark.parametrize(("lowering", "spec"), CASES, ids=[f"{name} {spec}" for name, spec in CASES])
def test_the_key_of_a_layer_can_be_measured_and_is_its_own_key(lowering: str, spec: LayerSpec) -> None:
    key, name = pair_key(spec, lowering)
    assert name in applicable(key)
    assert pair_key(key, name) == (key, name)
    assert LayerSpec.from_json(key.to_json()) == key
    sizes = ("operator", "in_channels", "out_channels", "height", "width", "kernel", "stride", "groups", "activation")
    assert all(getattr(key, size) == getattr(spec, size) for size in sizes)


def test_every_lowering_and_every_spec_is_covered() -> None:
    assert {name for name, _ in CASES} == set(LOWERINGS)
    assert all(applicable(spec) for spec in SPECS)


def test_applicable_lists_what_applies() -> None:
    conv = LayerSpec("conv2d", 8, 8, 4, 4, 3)
    assert set(applicable(conv)) == {"fp32"}
    assert set(applicable(replace(conv, precision="w8a8"))) == {"qdq_u8"}
    assert set(applicable(replace(conv, sparsity="group@1/2"))) == {"fp32", "gather_groups"}
    assert set(applicable(replace(conv, sparsity="group@1/2", precision="w8a8"))) == {"qdq_u8", "gather_groups_qdq"}
    assert set(applicable(LayerSpec("global_pool", 8, 8, 4, 4))) == {"fp32"}
    assert set(applicable(LayerSpec("layer_norm", 8, 8, 4, 4))) == {"layer_norm", "layer_norm_first"}
    assert set(applicable(LayerSpec("attention", 24, 8, 4, 4, heads=2))) == {"attention", "multi_head_attention"}


@pytest.mark.parametrize(("precision", "bits"), [("w8a8", 8), ("fp32", 32)])
@pytest.mark.parametrize("skip_bits", [0, 8])
def test_all_lowerings_of_a_layer_agree(precision: str, bits: int, skip_bits: int) -> None:
    spec = LayerSpec("conv2d", 16, 12, 9, 9, 3, 1, 1, "relu", precision, bits, bits, skip_bits, "group@1/4")
    case = example(spec)
    outputs = [layer_output(name, case) for name in applicable(spec)]
    assert len(outputs) >= 2
    for output in outputs[1:]:
        difference = np.abs(output - outputs[0])
        assert difference.max() <= (1 if bits == 8 else 1e-4 * np.abs(outputs[0]).max())
        assert (difference > 1e-4).mean() < 0.01


@pytest.mark.parametrize(
    "spec", [SPECS[0], LayerSpec("linear", 10, 7, precision="w8a8"), *low_ranks()[-1:], *tokens()[-5:]], ids=str
)
def test_batches(spec: LayerSpec) -> None:
    case = example(spec, batch=3)
    for name in applicable(spec):
        check(case, layer_output(name, case))


@pytest.mark.parametrize("spec", tokens(), ids=str)
def test_between_quantized_tensors_tokens_are_computed_in_floats(spec: LayerSpec) -> None:
    for name in applicable(spec):
        operators = optimized_operators(build_layer(spec, name, example(spec).weights), Device("x86"))
        assert not [o for o in operators if "Integer" in o or o.startswith(("QLinear", "QGemm"))], operators


@pytest.mark.parametrize("groups", [2, 8])
def test_sparsity_in_a_grouped_convolution(groups: int) -> None:
    """A gather over all channels does not fit a convolution that is grouped already."""
    spec = LayerSpec("conv2d", 8, 8, 5, 5, 3, groups=groups, sparsity="group@1/2")
    case = example(spec)
    for name in applicable(spec):
        check(case, layer_output(name, case))


@pytest.mark.parametrize("magnitude", [0.0, 1e-9, 1e-7, 1e-6, 1e-4])
@pytest.mark.parametrize("operator", ["conv2d", "linear"])
def test_a_dead_channel_keeps_its_bias(magnitude: float, operator: str) -> None:
    """Batch norm folded into a channel whose scale has gone to zero leaves tiny weights and a bias that counts."""
    output_bits = 8 if operator == "conv2d" else 32
    spec = LayerSpec(operator, 8, 4, precision="w8a8", input_bits=8, output_bits=output_bits)
    case = example(spec)
    weight, bias = np.array(case.weights.weight), np.array([1.5, -0.5, 0.0, 1.0], np.float32)
    weight[0] = magnitude
    weight[1] *= magnitude
    weights = replace(case.weights, weight=weight, bias=bias, output_range=(-4.0, 4.0))
    inputs = {"input": as_input(case.x, 8)}
    output = run(build_layer(spec, "qdq_u8", weights), inputs).reshape(-1).astype(np.float64)
    if output_bits == 8:
        scale, zero_point = activation_grid(-4.0, 4.0)
        output = (output - zero_point) * scale
    assert output[:2] == pytest.approx([1.5, -0.5], abs=0.05)


@pytest.mark.parametrize(("precision", "bits"), [("w8a8", 8), ("fp32", 32)])
def test_a_linear_layer_with_a_skip_is_refused(precision: str, bits: int) -> None:
    with pytest.raises(ValueError, match="adds no skip"):
        LayerSpec("linear", 6, 6, precision=precision, input_bits=bits, skip_bits=bits)


def test_an_unknown_activation_is_not_left_out_silently() -> None:
    with pytest.raises(ValueError, match="hardswish"):
        build_layer(LayerSpec("conv2d", 4, 4, 4, 4, activation="hardswish"), "fp32", example(SPECS[0]).weights)


# -- errors -------------------------------------------------------------------------------------------------------------------

CONV = LayerSpec("conv2d", 8, 8, 4, 4)
INTEGER = replace(CONV, precision="w8a8", output_bits=8)


@pytest.mark.parametrize(
    ("name", "spec", "allowed"),
    [
        ("qdq_u8", CONV, "fp32"),
        ("fp32", INTEGER, "qdq_u8"),
        ("gather_groups", CONV, "fp32"),
        ("gather_groups", replace(INTEGER, sparsity="group@1/2"), "qdq_u8, gather_groups_qdq"),
        ("gather_groups_qdq", replace(CONV, sparsity="group@1/2"), "fp32, gather_groups"),
        ("gather_groups", LayerSpec("linear", 8, 8, sparsity="group@1/2"), "fp32"),
        ("fp64", CONV, "fp32"),
    ],
)
def test_a_lowering_that_does_not_apply_is_refused(name: str, spec: LayerSpec, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*8->8.*allowed are {allowed}$"):
        build_layer(spec, name, example(spec).weights)


@pytest.mark.parametrize(
    ("spec", "missing"),
    [
        (INTEGER, "input_range"),
        (INTEGER, "output_range"),
        (replace(INTEGER, skip_bits=8), "sum_range"),
        (replace(CONV, output_bits=8), "output_range"),
        (LayerSpec("global_pool", 8, 8, 4, 4, input_bits=8, output_bits=8), "output_range"),
        (INTEGER, "weight"),
        (INTEGER, "bias"),
        (CONV, "weight"),
        (CONV, "bias"),
        (replace(CONV, sparsity="group@1/2"), "weight"),
    ],
)
def test_what_is_missing_is_named(spec: LayerSpec, missing: str) -> None:
    weights = replace(example(spec).weights, **{missing: None})
    for name in applicable(spec):
        with pytest.raises(ValueError, match=missing) as caught:
            build_layer(spec, name, weights)
        assert len(str(caught.value).splitlines()) == 1
        assert "range" not in missing or "calibrate" in str(caught.value)


def test_ranges_that_are_not_needed_may_be_missing() -> None:
    plain = replace(example(CONV).weights, input_range=None, output_range=None, sum_range=None)
    build_layer(CONV, "fp32", plain)
    build_layer(replace(INTEGER, input_bits=8), "qdq_u8", replace(plain, output_range=(-1.0, 1.0)))


def test_group_sparsity_refuses_channels_that_do_not_divide() -> None:
    with pytest.raises(UserError, match="divisible by 2, got 7"):
        LayerSpec("conv2d", 8, 7, 4, 4, sparsity="group@1/2")
