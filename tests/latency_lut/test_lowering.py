"""Every lowering of every kind of layer, run in onnxruntime and held against a plain reference.

A new lowering is under test as soon as it is registered, if it applies to one of `SPECS`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch

from latency_lut.device import Device
from latency_lut.lowering import LOWERINGS, applicable
from latency_lut.network import BORDER_SCALE, build_layer, layer_bytes, random_weights
from latency_lut.ort_session import session_options
from latency_lut.runtimes.onnxruntime import optimized_operators
from latency_lut.table import pair_key
from spaces.errors import UserError
from spaces.layers import LayerSpec
from spaces.quantizers import activation_grid
from tests.latency_lut.layer_reference import SPECS, Example, check, example, low_ranks, tokens


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Tiny tensors: more threads only wait for each other, and for seconds where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


CASES = [(name, spec) for spec in SPECS for name in applicable(spec)]

# -- the runtime --------------------------------------------------------------------------------------------------------------


def run(model: bytes, inputs: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(model, session_options(1), providers=["CPUExecutionProvider"])
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
    of_onnx = {name for name, entry in LOWERINGS.items() if entry.model_kind == "onnx"}
    assert {name for name, _ in CASES} == of_onnx - {"traced"}  # held against the foreign module in tests/spaces/test_nni.py
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


LARGE = (
    LayerSpec("conv2d", 35, 34, 3, 3, 3, input_bits=8, output_bits=8, activation="relu"),  # codes do not fill the last byte
    LayerSpec("conv2d", 64, 48, 3, 3, 3, input_bits=8, output_bits=8, sparsity="group@1/2"),
    LayerSpec("linear", 141, 97, input_bits=8),
    LayerSpec("conv2d", 128, 128, 3, 3, input_bits=8, output_bits=8, rank=63),
)


@pytest.mark.parametrize(
    ("precision", "bits"), [("w4a8", 4), ("w4a8@tensor", 4), ("w3a8", 4), ("w2a8", 2), ("ternary_a8", 2), ("binary_a8", 1)]
)
@pytest.mark.parametrize("largest", LARGE, ids=str)
def test_integer_weights_of_few_bits_are_packed_and_run_as_bytes_do(largest: LayerSpec, precision: str, bits: int) -> None:
    if largest.sparsity != "dense" and bits == 1:
        return  # has no zero
    spec, whole = replace(largest, precision=precision), replace(largest, precision="w8a8")
    case = example(spec)
    for name in applicable(spec):
        check(case, layer_output(name, case))
        small, large = (build_layer(s, name, random_weights(s, np.random.default_rng(0))) for s in (spec, whole))
        assert optimized_operators(small, Device("x86")) == optimized_operators(large, Device("x86"))
        kept = spec.kept_weights if name == "gather_groups_qdq" else sum(map(np.prod, spec.factor_shapes)) if spec.rank else 0
        kept = kept or int(np.prod(spec.weight_shape))
        saved = kept * (8 - bits) / 8
        assert saved - 2500 < len(large) - len(small) < saved
        assert layer_bytes(spec, name, "layer") == pytest.approx(len(small), abs=350)  # the border's nodes are not its own


@pytest.mark.parametrize("precision", ["w7a8", "w7d8", "w4a8", "w2a8", "ternary_a8", "binary_a8"])
@pytest.mark.parametrize("largest", [LayerSpec("conv2d", 64, 48, 3, 3, 3), LayerSpec("linear", 300, 97)], ids=str)
def test_products_of_weights_up_to_7_bits_need_no_precise_kernels(largest: LayerSpec, precision: str) -> None:
    """The largest products with bytes, by default kernels, whose outputs would saturate on CPUs without VNNI."""
    bits = 32 if precision.endswith("d8") else 8
    spec = replace(largest, precision=precision, input_bits=bits, output_bits=bits)
    weights = random_weights(spec, np.random.default_rng(0))
    weight, high = np.abs(weights.weight), (weights.input_range or (0.0, 0.0))[1]
    largest_sum = high * weight.reshape(len(weight), -1).sum(1).max()
    weights = replace(weights, weight=weight, output_range=(0.0, largest_sum), sum_range=(0.0, largest_sum))
    model = build_layer(spec, applicable(spec)[0], weights)
    outputs = []
    for precise in ("0", "1"):
        options = session_options(1)
        options.add_session_config_entry("session.x64quantprecision", precise)
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        name, kind = session.get_inputs()[0].name, np.uint8 if bits == 8 else np.float32
        outputs.append(np.asarray(session.run(None, {name: np.full(session.get_inputs()[0].shape, 255, kind)})[0]))
    np.testing.assert_array_equal(*outputs)


def test_layers_are_priced_as_the_kernels_that_they_run_on() -> None:
    for name, spec in CASES:
        if spec.integer and LOWERINGS[name].model_kind == "onnx":
            measured = pair_key(spec, name)[0]
            assert measured.precision == ("w8a8" if spec.arithmetic.weight_bits == 8 else "w7a8")


def test_a_switched_off_channel_takes_no_more_bits() -> None:
    """Its grid is widened for its bias; its levels stay multiples of the others' step."""
    spec = LayerSpec("conv2d", 64, 64, 3, 3, precision="w4a8", input_bits=8, output_bits=8)
    weights, sizes = random_weights(spec, np.random.default_rng(0)), []
    for scale in (1.0, 1e-6, 3e-8, 1e-9):
        weight, bias = np.array(weights.weight), np.array(weights.bias)
        weight[5] *= scale
        bias[5] = 2.0
        sizes.append(len(build_layer(spec, "qdq_u8", replace(weights, weight=weight, bias=bias))))
    assert len(set(sizes)) == 1
    assert sizes[0] < len(build_layer(replace(spec, precision="w8a8"), "qdq_u8", weights)) - 1000


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
