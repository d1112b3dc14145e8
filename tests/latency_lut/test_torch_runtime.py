"""The runtime torch, really, on the CPU; what needs a GPU is skipped where there is none."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from latency_lut.device import Device
from latency_lut.lowering import applicable
from latency_lut.measuring import MeasuringSettings
from latency_lut.network import random_weights
from latency_lut.profile import profile
from latency_lut.programs import build_layer, build_model, read_program
from latency_lut.runtimes import torch as runtime
from predictors.latency import LatencyPredictor
from predictors.size import model_bytes
from spaces.errors import UserError
from spaces.layers import LayerSpec
from spaces.mobile import MobileSpace

CPU = Device("torch_cpu", runtime="torch", provider="cpu")
BF16 = replace(CPU, provider="cpu-bf16")
GPU_MISSING = not torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(GPU_MISSING, reason="no GPU that torch can use")
SMALL, LARGE = LayerSpec("conv2d", 8, 8, 8, 8, 3), LayerSpec("conv2d", 64, 64, 24, 24, 3)
STAGES = [{"widths": [16, 24], "depths": [2], "stride": 2}]
SPACE = MobileSpace(1, 10, [12], [8, 16], STAGES, [2, 4], [3, 5], [32], ["w8a8", "fp32"], ["dense", "group@1/2"])


def layer(spec: LayerSpec, lowering: str = "torch_fp32", batch: int = 1) -> bytes:
    return build_layer(spec, lowering, random_weights(spec, np.random.default_rng(0)), batch)


def random_network(seed: int, device: Device) -> tuple[bytes, int]:
    """A random network, and how many bytes its file is predicted to have."""
    rng = np.random.default_rng(seed)
    architecture = SPACE.sample(rng)
    network = SPACE.network(architecture)
    lowerings = [str(rng.choice(applicable(spec, device.describe()))) for spec in network.layers]
    weights = {node.name: random_weights(node.spec, rng) for node in network.nodes}
    model = build_model(network, lowerings, weights, device.batch, {"netwright.architecture": architecture.to_json()})
    return model, model_bytes(network, lowerings)


def test_a_larger_layer_takes_longer() -> None:
    small, large = (runtime.load(layer(spec), CPU) for spec in (SMALL, LARGE))
    assert 0 < small.visit(0.002) < large.visit(0.002)


def test_the_threads_of_the_process_are_left_as_they_were() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        runtime.load(layer(SMALL), CPU).visit(0.0001)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_program_runs_in_torch_without_netwright_and_says_what_it_is() -> None:
    model, _ = random_network(0, BF16)
    x = np.random.default_rng(1).standard_normal((1, 1, 12, 12), dtype=np.float32)
    plain = torch.export.load(io.BytesIO(model), extra_files=(said := {"netwright.json": ""}))
    with torch.no_grad():
        expected = plain.module()(torch.from_numpy(x)).numpy()
    np.testing.assert_array_equal(runtime.load(model, BF16).run({"input": x}), expected)
    assert json.loads(json.loads(said["netwright.json"])["netwright.architecture"])
    assert set(runtime.optimized_operators(model, BF16)) >= {"aten.conv2d.default", "aten.linear.default"}


def test_the_same_network_gives_programs_of_the_same_outputs() -> None:
    x = {"input": np.random.default_rng(1).standard_normal((1, 1, 12, 12), dtype=np.float32)}
    first, second = (runtime.load(random_network(3, CPU)[0], CPU).run(x) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("seed", range(4))
def test_bytes_of_a_file_are_predicted(seed: int) -> None:
    model, predicted = random_network(seed, BF16)
    assert predicted == pytest.approx(len(model), rel=0.1)


def test_borders_are_the_conversions_of_a_layer_alone() -> None:
    for input_bits, output_bits, skip_bits in ((32, 32, 32), (32, 32, 0), (8, 32, 8), (8, 8, 32), (32, 8, 0)):
        spec = LayerSpec("conv2d", 8, 8, 6, 6, input_bits=input_bits, output_bits=output_bits, skip_bits=skip_bits)
        borders = [runtime.borders(spec, name, BF16.describe()) for name in ("torch_fp32", "torch_bf16")]
        counts = [b.foreign_input + b.foreign_skip + b.foreign_output for b in borders]
        alone = [
            runtime.optimized_operators(layer(spec, name), BF16).count("aten.to.dtype") for name in ("torch_fp32", "torch_bf16")
        ]
        assert counts[0] == 0
        # Bytes are converted to floats and back by both; bfloat16 goes through single precision to bytes.
        assert counts[1] == alone[1] - alone[0] - (output_bits == 8)


def test_a_profile_teaches_the_latency_of_whole_networks(tiny_space: MobileSpace, tmp_path: Path) -> None:
    table, _ = profile(tiny_space, CPU, tmp_path / "torch_cpu.parquet", MeasuringSettings(max_pairs=40, networks=12, rounds=5))
    table.check(tiny_space, CPU)
    assert {name for _, name in table.entries} == {"torch_fp32", "torch_gather_fp32", "torch_int8"}
    fitted = LatencyPredictor.fit(table, tiny_space, held_out=6)
    assert fitted.quality.mape < 0.25


# -- what goes wrong ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", ["cuda", "cuda-bf16", "cuda-fp16"])
@pytest.mark.skipif(not GPU_MISSING, reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told_with_what_to_do(provider: str) -> None:
    with pytest.raises(UserError, match=f"'{provider}'; available here are cpu, .*NVIDIA driver.*device=torch_cpu") as caught:
        Device("cuda", runtime="torch", provider=provider)
    assert "\n" not in str(caught.value)


def test_a_gpu_without_bfloat16_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "providers", lambda: ["cuda-bf16"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    device = Device("cuda", runtime="torch", provider="cuda-bf16")
    with pytest.raises(UserError, match=r"bfloat16 needs compute capability 8.0, this GPU has 7.5; .*provider=cuda-fp16"):
        device.describe()


class Explosive:
    """What a pickle can do."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('unpickled')",)


def rewritten(model: bytes, changes: dict[str, bytes]) -> bytes:
    """A program with other content in files whose names end in the keys; new files where there are none."""
    old, content = zipfile.ZipFile(io.BytesIO(model)), io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            changed = [data for ending, data in changes.items() if name.endswith(ending)]
            new.writestr(name, changed[0] if changed else old.read(name))
        for ending, data in changes.items():
            if not any(name.endswith(ending) for name in old.namelist()):
                new.writestr(old.namelist()[0].partition("/")[0] + "/" + ending, data)
    return content.getvalue()


def test_nothing_in_a_program_is_unpickled() -> None:
    model, bomb = layer(SMALL), pickle.dumps(Explosive())
    read_program(rewritten(model, {}))
    archive = zipfile.ZipFile(io.BytesIO(model))
    config = next(name for name in archive.namelist() if name.endswith("model_weights_config.json"))
    weights = json.loads(archive.read(config))
    for tensor in weights["config"].values():
        tensor["use_pickle"] = True
    graph = next(name for name in archive.namelist() if name.endswith("models/model.json"))
    other = archive.read(graph).replace(b"torch.ops.aten.conv2d.default", b"builtins.exec")
    for changes in (
        {"data/sample_inputs/model.pt": bomb},
        {"data/weights/model.pt": bomb},
        {"data/constants/model.pt": bomb},
        {"model_weights_config.json": json.dumps(weights).encode(), "weight_0": bomb},
        {"models/model.json": other},
        {"models/model.json": archive.read(graph).replace(b"aten.conv2d.default", b"aten.from_file.default")},
        {"data/aotinductor/model/model.so": b"code"},
        {"models/other.json": archive.read(graph)},
    ):
        with pytest.raises(UserError, match="not a program of this runtime") as caught:
            read_program(rewritten(model, changes))
        assert "\n" not in str(caught.value)


def test_a_program_of_an_older_version_is_not_unpickled() -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in ("serialized_state_dict.pt", "serialized_constants.pt", "serialized_example_inputs.pt"):
            archive.writestr(name, pickle.dumps(Explosive()))
        archive.writestr("serialized_exported_program.json", b"{}")
        archive.writestr("version", b"8.0")
    with pytest.raises(UserError, match="not a program of this runtime"):
        read_program(content.getvalue())


def test_damage_is_told_in_one_line() -> None:
    model, rng = layer(SMALL), np.random.default_rng(0)
    archive = zipfile.ZipFile(io.BytesIO(model))
    said: list[str] = []
    for ending in ("models/model.json", "model_weights_config.json"):
        text = archive.read(next(name for name in archive.namelist() if name.endswith(ending)))
        for _ in range(60):
            damaged = bytearray(text)
            damaged[int(rng.integers(len(damaged)))] = int(rng.choice(list(b'0123456789"{}[]:,aT-')))
            try:
                runtime.load(rewritten(model, {ending: bytes(damaged)}), CPU)
            except UserError as error:
                said.append(str(error))
    assert len(said) > 60
    assert all(text.startswith("not a program of this runtime") and "\n" not in text for text in said)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x05\x06" + bytes(18)])
def test_what_is_no_program_is_told_in_one_line(content: bytes) -> None:
    with pytest.raises(UserError, match="not a program of this runtime"):
        runtime.load(content, CPU)
    with pytest.raises(UserError, match="make the model again"):
        runtime.load(layer(SMALL)[:-100], CPU)


# -- on a GPU -----------------------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("lowering", ["torch_fp32", "torch_fp16", "torch_int8"])
def test_on_a_gpu_outputs_are_those_of_the_cpu(lowering: str) -> None:
    device = Device("cuda", runtime="torch", provider="cuda-fp16")
    spec = replace(LARGE, precision="w8a8") if lowering == "torch_int8" else LARGE
    model = layer(spec, lowering, batch=4)
    x = {"input": np.random.default_rng(0).standard_normal((4, 64, 24, 24), dtype=np.float32)}
    expected = runtime.load(model, CPU).run(x)
    found = runtime.load(model, device).run(x)
    np.testing.assert_allclose(found, expected, atol=(1e-2 if lowering == "torch_fp16" else 1e-4) * np.abs(expected).max())


@needs_gpu
def test_on_a_gpu_graphs_are_replayed_and_a_larger_layer_takes_longer() -> None:
    device = Device("cuda", runtime="torch", provider="cuda")
    large = LayerSpec("conv2d", 256, 256, 56, 56, 3)
    small_us, large_us = (runtime.load(layer(spec, batch=8), device).visit(0.01) for spec in (SMALL, large))
    assert 0 < small_us < large_us
