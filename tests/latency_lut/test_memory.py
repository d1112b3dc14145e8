"""Peak memory, measured for real; the file that keeps it is not believed before it is checked."""

import json

import numpy as np
import pytest

from latency_lut import ort_memory
from latency_lut.device import Device
from latency_lut.memory import check_measures_memory, measure_memory
from latency_lut.network import build_model, random_weights
from latency_lut.networks import NetworkTable
from latency_lut.runtimes import onnxruntime as runtime
from spaces.errors import UserError
from spaces.layers import INPUT, NetworkBuilder


def model_of(builder, device):
    network = builder.build()
    rng = np.random.default_rng(0)
    weights = {node.name: random_weights(node.spec, rng) for node in network.nodes}
    return build_model(network, ["fp32"] * len(network.nodes), weights, device.batch)


def chain(channels=32, depth=3, size=16):
    builder, source = NetworkBuilder(16, size, size), INPUT
    for index in range(depth):
        source = builder.add(f"layer{index}", "conv2d", source, channels, activation="relu")
    return builder


def test_a_chain_of_layers_holds_two_tensors_at_once(x86):
    tensor_bytes = 4 * 32 * 16 * 16
    short, long = (runtime.peak_bytes(model_of(chain(depth=depth), x86), x86) for depth in (3, 6))
    assert 2 * tensor_bytes <= short <= 4 * tensor_bytes
    assert long == short


def test_memory_grows_with_what_is_held_and_not_with_weights(x86):
    peaks = [runtime.peak_bytes(model_of(chain(size=size), x86), x86) for size in (8, 16, 32)]
    assert peaks[1] == pytest.approx(4 * peaks[0], rel=0.05)
    assert peaks[2] == pytest.approx(4 * peaks[1], rel=0.05)
    two = Device("two", batch=2)
    assert runtime.peak_bytes(model_of(chain(), two), two) == pytest.approx(2 * peaks[1], rel=0.05)


def test_what_loading_took_is_no_part_of_a_run(x86):
    """Packing the weights of a wide layer takes more than its few outputs."""
    builder = NetworkBuilder(512, 2, 2)
    builder.add("wide", "conv2d", INPUT, 512)
    assert runtime.peak_bytes(model_of(builder, x86), x86) < 10 * 4 * 512 * 2 * 2


def test_measuring_again_gives_the_same(small_space, x86, tmp_path):
    once, again = (measure_memory(small_space, x86, tmp_path / name, networks=6) for name in ("a", "b"))
    assert once == again
    assert len({network.value for network in once.networks}) > 3


def test_a_table_is_continued_and_one_of_another_space_is_not(small_space, tiny_space, x86, tmp_path):
    path = tmp_path / "x86.json"
    few = measure_memory(small_space, x86, path, networks=3)
    seen = []
    more = measure_memory(small_space, x86, path, networks=5, on_progress=lambda what, done, total: seen.append((done, total)))
    assert more.networks[:3] == few.networks
    assert seen == [(4, 5), (5, 5)]
    assert NetworkTable.load(path) == more
    other = measure_memory(tiny_space, x86, path, networks=2)
    assert len(other.networks) == 2
    assert other.space_fingerprint == tiny_space.fingerprint


@pytest.mark.parametrize("provider", ["wasm", "cpu"])
def test_a_runtime_that_does_not_tell_is_refused(provider):
    device = Device("d", runtime="torch" if provider == "cpu" else "onnxruntime_web", provider=provider)
    with pytest.raises(UserError, match="does not tell how much memory a run takes; onnxruntime's CPUExecutionProvider does"):
        check_measures_memory(device)


def test_an_onnxruntime_that_does_not_tell_is_told(x86, monkeypatch):
    monkeypatch.setattr(ort_memory, "_FIGURES", ("mem_of_another_version",))
    with pytest.raises(UserError, match="does not tell how much memory its kernels hold; run: pip install"):
        runtime.peak_bytes(model_of(chain(), x86), x86)


@pytest.mark.parametrize(
    "damage",
    [
        {"schema_version": 99},
        {"unit": 5},
        {"device": []},
        {"space_fingerprint": 3},
        {"networks": [["{}", ["fp32"], -1]]},
        {"networks": [["{}", ["fp32"], "1.5"]]},
        {"networks": [["{}", ["fp32"], float("nan")]]},
        {"networks": [["{}", ["no_such_lowering"], 100]]},
        {"networks": [["not JSON", ["fp32"], 100]]},
        {"networks": [[]]},
        {"networks": 7},
    ],
)
def test_a_damaged_file_is_told(small_space, x86, tmp_path, damage):
    path = tmp_path / "x86.json"
    measure_memory(small_space, x86, path, networks=1)
    path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
    with pytest.raises(UserError, match=r"is damaged .* delete it"):
        NetworkTable.load(path)
    path.write_bytes(b"\xff{")
    with pytest.raises(UserError, match="is damaged"):
        measure_memory(small_space, x86, path, networks=1)
