"""Every lowering of the runtime torch, run on the CPU and held against the plain reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

from latency_lut.device import Device
from latency_lut.lowering import LOWERINGS, applicable
from latency_lut.lowerings.torch_matrices import matrix_of, packed_2_4
from latency_lut.network import BORDER_SCALE
from latency_lut.programs import build_layer, operators_of, read_program
from latency_lut.runtimes.torch import load
from latency_lut.table import pair_key
from spaces.layers import LayerSpec
from spaces.quantizers import activation_grid
from tests.latency_lut.layer_reference import SPECS, Example, check, example, float8s

CPU = Device("torch_cpu", runtime="torch", provider="cpu")
DEVICES = [CPU, *(Device("torch_cpu", runtime="torch", provider=f"cpu-{half}") for half in ("bf16", "fp16"))]
DESCRIPTIONS = [device.describe() for device in DEVICES]
SOME = [spec for i, spec in enumerate(SPECS) if i % 4 == 0 or spec.rank]  # making a program takes a twentieth of a second
# Largest difference that the numbers of a lowering explain, as a share of the largest value: some of their roundings.
PRECISIONS = {"bf16": 2e-2, "fp16": 3e-3}
BIAS_ROUNDING = 3e-4  # the reference rounds the biases of integer layers as integer kernels need it, torch does not


def names_of(spec: LayerSpec) -> list[str]:
    return list(dict.fromkeys(name for description in DESCRIPTIONS for name in applicable(spec, description)))


CASES = [(name, spec) for spec in (*SOME, *float8s()) for name in names_of(spec)]


def output_of(lowering: str, case: Example, device: Device = CPU) -> np.ndarray:
    """Output of the layer alone: float values, or levels as integers."""
    feeds = {}
    for name, value, bits in (("input", case.x, case.spec.input_bits), ("skip", case.skip, case.spec.skip_bits)):
        if value is not None:
            feeds[name] = np.rint(value / BORDER_SCALE).astype(np.uint8) if bits == 8 else value.astype(np.float32)
    output = load(build_layer(case.spec, lowering, case.weights, len(case.x)), device).run(feeds)
    assert output.dtype == (np.uint8 if case.spec.output_bits == 8 else np.float32)
    return output.astype(np.float64).reshape(case.expected.shape)


def check_rounded(case: Example, output: np.ndarray, precision: float) -> None:
    """As `check`, with the roundings of smaller floats: some steps at most, and far less than one in the mean."""
    largest, expected = np.abs(case.expected).max(), case.expected
    step = 0.0
    if case.weights.sum_range is not None and case.spec.quantizes_sum:
        step = float(activation_grid(*case.weights.sum_range)[0])
    if case.spec.rank and case.spec.integer:  # a value between the factors that falls to the other side
        assert case.weights.factor_range is not None
        assert case.weights.weight is not None
        step += float(activation_grid(*case.weights.factor_range)[0] * np.abs(case.weights.weight).max())
    if case.spec.output_bits == 8:
        assert case.weights.output_range is not None
        scale, zero_point = activation_grid(*case.weights.output_range)
        expected, largest, step = np.clip(np.rint(expected / scale) + zero_point, 0, 255), 255.0, step / float(scale) + 1.0
    difference = np.abs(output - expected)
    assert difference.max() <= precision * largest + step
    assert difference.mean() <= 0.3 * precision * largest + 0.5 * step


@pytest.mark.parametrize(("lowering", "spec"), CASES, ids=[f"{name} {spec}" for name, spec in CASES])
def test_a_layer_alone_computes_what_the_reference_computes(lowering: str, spec: LayerSpec) -> None:
    case = example(spec)
    half = lowering.rpartition("_")[2]
    if half in PRECISIONS:
        check_rounded(case, output_of(lowering, case), PRECISIONS[half])
    else:
        check(case, output_of(lowering, case), BIAS_ROUNDING if spec.integer else 1e-4)


def test_every_lowering_is_covered_and_every_layer_can_be_run() -> None:
    on_gpus = {name for name, entry in LOWERINGS.items() if not any(entry.runs_on(d) for d in DESCRIPTIONS)}
    programs = {name for name, entry in LOWERINGS.items() if entry.model_kind == "pt2"}
    assert {name for name, _ in CASES} == programs - on_gpus
    assert all(applicable(spec, DESCRIPTIONS[0]) for spec in SPECS)


def test_smaller_floats_run_where_the_provider_names_them() -> None:
    spec = LayerSpec("conv2d", 8, 8, 4, 4)
    assert [applicable(spec, description) for description in DESCRIPTIONS] == [
        ("torch_fp32",),
        ("torch_fp32", "torch_bf16"),
        ("torch_fp32", "torch_fp16"),
    ]


@pytest.mark.parametrize("spec", [*SPECS, *float8s()], ids=str)
def test_the_key_of_a_layer_can_be_measured_and_is_its_own_key(spec: LayerSpec) -> None:
    for lowering in names_of(spec):
        key, name = pair_key(spec, lowering)
        assert name in names_of(key)
        assert pair_key(key, name) == (key, name)
        sizes = ("operator", "in_channels", "out_channels", "height", "width", "kernel", "stride", "groups", "activation")
        assert all(getattr(key, size) == getattr(spec, size) for size in sizes)


@pytest.mark.parametrize(
    "spec", [SPECS[0], *(LayerSpec("linear", 20, 7, precision=p) for p in ("w8d8", "fp8")), SPECS[-1]], ids=str
)
def test_batches(spec: LayerSpec) -> None:
    if spec.arithmetic.rounds_input:  # each sample by its own range
        cases = [example(spec, seed=seed) for seed in range(3)]
        together = replace(cases[0], x=np.concatenate([case.x for case in cases]), expected=np.zeros((3, 7, 1, 1)))
        cases = [replace(case, weights=cases[0].weights) for case in cases]
        for name in applicable(spec, DESCRIPTIONS[0]):
            alone = np.concatenate([output_of(name, case) for case in cases])
            np.testing.assert_allclose(output_of(name, together), alone, rtol=1e-4, atol=1e-4)
        return
    case = example(spec, batch=3)
    for name in applicable(spec, DESCRIPTIONS[0]):
        check(case, output_of(name, case))


def test_a_lowering_that_does_not_apply_is_refused() -> None:
    spec = LayerSpec("conv2d", 8, 8, 4, 4)
    for name in ("torch_gather_fp32", "fp32", "fp64"):
        with pytest.raises(ValueError, match=f"lowering '{name}' does not apply to .*; allowed are torch_fp32"):
            build_layer(spec, name, example(spec).weights)
    missing = replace(example(spec).weights, output_range=None)
    with pytest.raises(ValueError, match=r"output_range is missing .* calibrate"):
        build_layer(replace(spec, output_bits=8), "torch_fp32", missing)


@pytest.mark.parametrize(("capability", "names"), [(86, ()), (89, ("torch_fp8",)), (90, ("torch_fp8",))])
def test_a_gpu_without_8_bit_floats_runs_no_layer_of_them(capability: int, names: tuple[str, ...]) -> None:
    assert applicable(LayerSpec("linear", 32, 16, precision="fp8"), {"model_kind": "pt2", "capability": capability}) == names


# -- 2:4, whose kernel only GPUs have -----------------------------------------------------------------------------------------

AMPERE = {"model_kind": "pt2", "half": "fp16", "capability": 80}
SPARSE = [
    LayerSpec("linear", 64, 32, sparsity="2:4"),
    LayerSpec("linear", 20, 7, sparsity="2:4", precision="w4", activation="relu"),
    LayerSpec("conv2d", 16, 10, 5, 6, sparsity="2:4"),
    LayerSpec("conv2d", 12, 6, 7, 6, 3, stride=2, sparsity="2:4", input_bits=8, output_bits=8, skip_bits=8),
]


def product_by_definition(
    bias: torch.Tensor, packed: torch.Tensor, places: torch.Tensor, dense: torch.Tensor, **other: object
) -> torch.Tensor:
    return sparse_semi_structured_to_dense_cutlass(packed, places) @ dense + bias[:, None]


def test_2_4_is_offered_where_a_gpu_has_it() -> None:
    assert applicable(SPARSE[0], AMPERE) == ("torch_fp32", "torch_fp16", "torch_2_4_fp16")
    assert applicable(SPARSE[0], AMPERE | {"half": "bf16"}) == ("torch_fp32", "torch_bf16", "torch_2_4_bf16")
    for other in ({"half": ""}, {"capability": 75}, {"capability": 90}, {"capability": "80"}):
        assert not [name for name in applicable(SPARSE[0], AMPERE | other) if "2_4" in name]
    for spec in (replace(SPARSE[0], sparsity="1:4"), replace(SPARSE[0], precision="w8d8"), LayerSpec("linear", 64, 32)):
        assert not [name for name in applicable(spec, AMPERE) if "2_4" in name]


@pytest.mark.parametrize("shape", [(32, 64), (7, 20), (48, 132)])
def test_packing_keeps_every_weight_in_its_place(shape: tuple[int, int]) -> None:
    spec = LayerSpec("linear", shape[1], shape[0], sparsity="2:4")
    weight = torch.from_numpy(np.array(example(spec).weights.weight)).half()
    packed, places = packed_2_4(weight)
    whole = sparse_semi_structured_to_dense_cutlass(packed, places)
    assert torch.equal(whole[: shape[0], : shape[1]], weight)
    assert int(whole.count_nonzero()) == int(weight.count_nonzero())


@pytest.mark.parametrize("half", ["bf16", "fp16"])
@pytest.mark.parametrize("spec", SPARSE, ids=str)
def test_around_the_kernel_of_2_4_all_is_right(spec: LayerSpec, half: str) -> None:
    """The kernel itself is taken by its definition: no GPU is needed, and none is tested."""
    case, name = example(spec), f"torch_2_4_{half}"
    assert "aten._sparse_semi_structured_addmm.default" in operators_of(read_program(build_layer(spec, name, case.weights)))
    with torch.library._scoped_library("aten", "IMPL") as kernels:
        kernels.impl("_sparse_semi_structured_addmm", product_by_definition, "CPU")
        check_rounded(case, output_of(name, case), PRECISIONS[half])


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_weight_as_a_matrix_has_the_inputs_of_a_position_together(kernel: int) -> None:
    weight = torch.arange(2 * 4 * kernel**2).reshape(2, 4, kernel, kernel)
    matrix = matrix_of(weight)
    for position, (row, column) in enumerate(np.ndindex(kernel, kernel)):
        assert torch.equal(matrix[:, 4 * position : 4 * position + 4], weight[:, :, row, column])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
@pytest.mark.parametrize("spec", SPARSE, ids=str)
def test_on_a_gpu_2_4_computes_what_the_reference_computes(spec: LayerSpec) -> None:
    device, case = Device("cuda", runtime="torch", provider="cuda-fp16"), example(spec)
    if "torch_2_4_fp16" not in applicable(spec, device.describe()):
        pytest.skip("this GPU has no 2:4")
    check_rounded(case, output_of("torch_2_4_fp16", case, device), PRECISIONS["fp16"])
