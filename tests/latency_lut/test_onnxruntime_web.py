"""onnxruntime-web, really: outputs against native onnxruntime, timing, memory, errors, in Node and in Chromium."""

import contextlib
import gc
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from torch import nn

from latency_lut.device import Device
from latency_lut.lowering import LOWERINGS, applicable
from latency_lut.network import build_layer, random_weights
from latency_lut.runtimes import onnxruntime as native
from latency_lut.runtimes import onnxruntime_web as web
from latency_lut.web import chromium, package
from latency_lut.web.worker import WebError, Worker
from spaces.errors import UserError
from spaces.layers import LayerSpec
from spaces.mobile import MobileSpace
from tests.spaces.traced_layer import traced_layer

ROOT = Path(__file__).resolve().parents[2]
X86 = Device("x86")
NODE_MISSING = shutil.which("node") is None or shutil.which("npm") is None
needs_node = pytest.mark.skipif(NODE_MISSING, reason="Node.js with npm is not installed")


def has_chromium() -> bool:
    try:
        chromium.browser()
    except UserError:
        return False
    return not NODE_MISSING


needs_chromium = pytest.mark.skipif(not has_chromium(), reason="Chromium is not installed")

BYTES: dict[str, Any] = {"precision": "w8a8", "input_bits": 8, "output_bits": 8}
SMALL = LayerSpec("conv2d", 8, 8, 8, 8, 3)
LARGE = LayerSpec("conv2d", 64, 64, 24, 24, 3)
INTEGER = LayerSpec("conv2d", 16, 16, 8, 8, 3, activation="relu", **BYTES)
SPECS = [
    SMALL,
    LayerSpec("conv2d", 16, 16, 9, 9, 3, stride=2, groups=16, activation="relu"),
    LayerSpec("conv2d", 16, 24, 8, 8, 1, skip_bits=32, activation="relu"),
    LayerSpec("conv2d", 16, 24, 8, 8, 1, input_bits=8, output_bits=8, skip_bits=8),
    LayerSpec("conv2d", 16, 16, 8, 8, 3, sparsity="group@1/2"),
    LayerSpec("global_pool", 16, 16, 7, 7),
    LayerSpec("global_pool", 16, 16, 7, 7, input_bits=8, output_bits=8),
    LayerSpec("linear", 24, 10),
    INTEGER,
    LayerSpec("conv2d", 16, 16, 8, 8, 3, groups=16, **BYTES),
    LayerSpec("conv2d", 16, 24, 8, 8, 1, skip_bits=8, **BYTES),
    LayerSpec("conv2d", 16, 16, 8, 8, 1, sparsity="group@1/4", **BYTES),
    LayerSpec("linear", 24, 10, precision="w8a8", input_bits=8),
    LayerSpec("linear", 24, 10, precision="w7a8", input_bits=8),
    LayerSpec("conv2d", 16, 16, 8, 8, 3, precision="w2", activation="hard_swish"),
    LayerSpec("conv2d", 16, 16, 8, 8, 3, precision="codebook4"),
    LayerSpec("conv2d", 48, 48, 6, 6, 3, **{**BYTES, "precision": "w2a8"}),
    LayerSpec("conv2d", 16, 16, 8, 8, 3, precision="w8d8"),
    LayerSpec("conv2d", 16, 16, 8, 8, 3, rank=4),
    LayerSpec("conv2d", 16, 16, 8, 8, 3, rank=4, **BYTES),
    LayerSpec("linear", 70, 10, precision="w4@32"),
    LayerSpec("linear", 70, 10, precision="w4d8@32"),
    LayerSpec("linear", 70, 10, precision="w8d8"),
    LayerSpec("layer_norm", 24, 24, 5, 5),
    LayerSpec("layer_norm", 24, 24, 5, 5, input_bits=8, output_bits=8),
    LayerSpec("attention", 96, 32, 5, 5, heads=4),
    LayerSpec("attention", 96, 32, 1, 30, heads=2, input_bits=8, output_bits=8, skip_bits=8),
    traced_layer(nn.AvgPool2d(2), nn.Sigmoid()),
]
PAIRS = [(spec, name) for spec in SPECS for name in applicable(spec)]


@pytest.fixture(scope="module")
def wasm() -> Device:
    return Device("wasm", runtime="onnxruntime_web", provider="wasm")


@pytest.fixture(scope="module")
def in_browser() -> Device:
    return Device("wasm_chromium", runtime="onnxruntime_web", provider="wasm-chromium")


def layer(spec: LayerSpec, lowering: str = "fp32", batch: int = 1) -> bytes:
    return build_layer(spec, lowering, random_weights(spec, np.random.default_rng(0)), batch)


def feeds_of(model: bytes) -> dict[str, np.ndarray]:
    rng, feeds = np.random.default_rng(1), {}
    for value in onnx.load_model_from_string(model).graph.input:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        integer = np.issubdtype(dtype, np.integer)
        feeds[value.name] = (rng.integers(0, 255, shape) if integer else rng.standard_normal(shape)).astype(dtype)
    return feeds


def identity(elem_type: int, shape: list[int | str]) -> bytes:
    """A model of one node, with an input of any type and shape."""
    x, y = (onnx.helper.make_tensor_value_info(name, elem_type, shape) for name in ("x", "y"))
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "one", [x], [y])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10).SerializeToString()


def assert_equal(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    if np.issubdtype(expected.dtype, np.integer):
        assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1
    else:
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=0.1 * tolerance * np.abs(expected).max())


def test_every_lowering_is_tested() -> None:
    assert {name for _, name in PAIRS} == {name for name, entry in LOWERINGS.items() if entry.model_kind == "onnx"}


@needs_node
@pytest.mark.parametrize(("spec", "name"), PAIRS, ids=str)
def test_outputs_are_those_of_native_onnxruntime(wasm: Device, spec: LayerSpec, name: str) -> None:
    model = layer(spec, name)
    feeds = feeds_of(model)
    expected = native.load(model, X86).run(feeds)
    assert np.ptp(expected.astype(float)) > 0
    # WebAssembly has no MatMulNBits on bytes: it takes the input as floats, which is off by its rounding.
    assert_equal(web.load(model, wasm).run(feeds), expected, 0.2 if name == "matmul_nbits_a8" else 1e-4)


@needs_node
@pytest.mark.parametrize("dtype", ["float32", "uint8", "int8", "int32", "int64"])
def test_tensors_of_every_type_come_back_as_they_were_sent(wasm: Device, dtype: str) -> None:
    x = np.random.default_rng(0).integers(0, 127, (3, 5)).astype(dtype)
    session = web.load(identity(onnx.helper.np_dtype_to_tensor_dtype(x.dtype), [3, 5]), wasm)
    y = session.run({"x": x.T[::-1].T})  # not contiguous
    np.testing.assert_array_equal(y, x.T[::-1].T)
    assert y.dtype == x.dtype
    assert session.visit(0.001) > 0


@needs_node
def test_a_batch_runs_as_a_whole(wasm: Device) -> None:
    model = layer(SMALL, batch=3)
    feeds = feeds_of(model)
    assert_equal(web.load(model, wasm).run(feeds), native.load(model, X86).run(feeds))


@needs_node
def test_a_larger_layer_takes_longer_and_no_longer_than_the_visit(wasm: Device) -> None:
    small, large = web.load(layer(SMALL), wasm), web.load(layer(LARGE), wasm)
    small.visit(0.001)
    begin = time.perf_counter()
    small_us, large_us = small.visit(0.05), large.visit(0.05)
    elapsed_us = 1e6 * (time.perf_counter() - begin)
    assert 1 < small_us < large_us < elapsed_us / 4  # a warm-up and three readings at least
    assert elapsed_us > 2 * 0.05e6


@needs_node
def test_a_session_is_released_with_its_object(wasm: Device) -> None:
    worker = web.worker_of(wasm)
    gc.collect()
    before = worker.call("hello")[0]["sessions"]
    sessions = [web.load(layer(SMALL), wasm) for _ in range(4)]
    assert worker.call("hello")[0]["sessions"] == before + 4
    sessions.clear()
    gc.collect()
    assert worker.call("hello")[0]["sessions"] == before


@needs_node
def test_memory_stays_flat_over_hundreds_of_models(wasm: Device) -> None:
    models = [layer(LARGE), layer(INTEGER, "qdq_u8")]
    process = psutil.Process(web.worker_of(wasm).pid)

    def load_and_drop(count: int) -> float:
        for index in range(count):
            web.load(models[index % 2], wasm).visit(0.0001)
        return process.memory_info().rss / 2**20

    settled_mib = load_and_drop(200)
    assert load_and_drop(400) < settled_mib + 25  # 400 models that are kept hold 50 MiB


@needs_node
def test_optimized_operators_are_what_runs(wasm: Device) -> None:
    assert web.optimized_operators(layer(INTEGER, "qdq_u8"), wasm) == ["QLinearConv"]
    assert web.optimized_operators(layer(SMALL), wasm) == ["Conv"]
    linear = LayerSpec("linear", 24, 10, precision="w8a8", input_bits=8)
    assert "QGemm" in web.optimized_operators(layer(linear, "qdq_u8"), wasm)


@needs_node
def test_borders_are_the_transpositions_of_a_layer_alone(wasm: Device) -> None:
    stages = [{"widths": [16, 24], "depths": [2], "stride": 2}]
    space = MobileSpace(
        1, 10, [12], [8, 16], stages, [2, 4], [3, 5], [64], ["w8a8", "fp32"], ["dense", "group@1/2", "group@1/4"]
    )
    rng, pairs = np.random.default_rng(0), set()
    for _ in range(12):
        pairs |= {(spec, str(rng.choice(applicable(spec)))) for spec in space.network(space.sample(rng)).layers}
    for spec, name in pairs:
        borders = web.borders(spec, name, {})
        # Conversions inside an integer layer, which it pays in a network as well: of a float input to bytes, after a gather of
        # bytes, and before a float skip is added.
        inside = spec.integer * ((spec.input_bits == 32 or "gather" in name) + (spec.skip_bits == 32))
        found = web.optimized_operators(layer(spec, name), wasm).count("Transpose") - inside
        assert found == borders.foreign_input + borders.foreign_skip + borders.foreign_output, (spec, name)
        assert not borders.fuses_skip
    assert len(pairs) > 60


@needs_node
@pytest.mark.parametrize("name", ["layer_norm", "layer_norm_first", "attention", "multi_head_attention"])
def test_borders_of_layers_of_tokens_with_bytes(wasm: Device, name: str) -> None:
    attends = LayerSpec("attention", 48, 16, 4, 4, input_bits=8, output_bits=8, heads=2)
    spec = attends if "attention" in name else LayerSpec("layer_norm", 16, 16, 4, 4, input_bits=8, output_bits=8)
    borders = web.borders(spec, name, {})
    inside = 4 if name == "multi_head_attention" else 0  # of queries, keys, values and the result
    found = web.optimized_operators(layer(spec, name), wasm).count("Transpose") - inside
    assert found == borders.foreign_input + borders.foreign_output


# -- what goes wrong ----------------------------------------------------------------------------------------------------------


@needs_node
def test_a_refused_model_is_told_in_one_line_and_the_worker_goes_on(wasm: Device) -> None:
    session = web.load(layer(SMALL), wasm)
    for broken in (b"no ONNX", b"", layer(SMALL)[:-50]):
        with pytest.raises(WebError, match="onnxruntime-web: ") as caught:
            web.load(broken, wasm)
        assert "\n" not in str(caught.value)
    with pytest.raises(WebError):
        session.run({"other": np.zeros((1, 8, 8, 8), np.float32)})
    with pytest.raises(ValueError, match="float64; allowed are float32"):
        session.run({"input": np.zeros((1, 8, 8, 8))})
    assert session.visit(0.0001) > 0


@needs_node
def test_open_shapes_cannot_be_timed(wasm: Device) -> None:
    with pytest.raises(WebError, match=r"allowed are float32.* of fixed shapes"):
        web.load(identity(onnx.TensorProto.FLOAT, ["n", 3]), wasm).visit(0.001)


@needs_node
def test_a_killed_worker_is_told_and_replaced(wasm: Device) -> None:
    session, killed = web.load(layer(SMALL), wasm), web.worker_of(wasm)
    os.kill(killed.pid, signal.SIGKILL)
    with pytest.raises(WebError, match="Node ended with status -9"):
        session.visit(0.001)
    with pytest.raises(WebError, match="load the model again"):
        session.visit(0.001)
    assert web.load(layer(SMALL), wasm).visit(0.001) > 0
    assert web.worker_of(wasm).pid != killed.pid


@needs_node
def test_threads_use_one_worker_together(wasm: Device) -> None:
    model = layer(SMALL)
    feeds = feeds_of(model)
    session, outputs = web.load(model, wasm), []
    threads = [threading.Thread(target=lambda: outputs.append(session.run(feeds))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outputs) == 8
    for output in outputs:
        np.testing.assert_array_equal(output, outputs[0])


@pytest.mark.parametrize(
    ("answer", "said"),
    [(b"{", "broken JSON"), (b"\xff", "broken JSON"), (b"[]", "something else than an object"), (b'{"error": "a\\nb"}', "a b")],
)
def test_an_answer_that_is_none_ends_the_worker(answer: bytes, said: str) -> None:
    class Channel:
        pid, closed = 0, False

        def exchange(self, frame: bytes) -> tuple[bytes, bytes]:
            return answer, b""

        def close(self) -> None:
            self.closed = True

    channel = Channel()
    with pytest.raises(WebError, match=said):
        Worker(channel)
    assert channel.closed


@pytest.mark.parametrize(("provider", "missing"), [("wasm", "node is not on the PATH"), ("wasm-chromium", "no Chromium found")])
def test_a_missing_program_is_told_in_one_line(
    provider: str, missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CHROME_BIN", raising=False)
    monkeypatch.setattr(chromium, "MACOS", str(tmp_path / "none"))
    device = Device("wasm", runtime="onnxruntime_web", provider=provider)
    with pytest.raises(UserError, match=missing) as caught:
        device.describe()
    assert "install" in str(caught.value)
    assert "\n" not in str(caught.value)


# -- setting up ---------------------------------------------------------------------------------------------------------------


def test_the_lock_file_pins_everything_and_names_no_registry() -> None:
    text = (package.FOLDER / "package-lock.json").read_text()
    locked = json.loads(text)["packages"]
    assert locked["node_modules/onnxruntime-web"]["version"] == package.version()
    assert all(entry["integrity"].startswith("sha512-") for name, entry in locked.items() if name)
    assert "://" not in text


@needs_node
def test_it_is_set_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = package.installed()
    assert f"setting up onnxruntime-web {package.version()} in {folder}" in capfd.readouterr().err
    assert package.installed() == folder
    assert capfd.readouterr().err == ""
    assert [path.name for path in folder.parent.iterdir()] == [f"onnxruntime-web-{package.version()}"]
    said = json.loads((folder / "node_modules/onnxruntime-web/package.json").read_text())["version"]
    assert said == package.version()


@needs_node
def test_without_a_network_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9/")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    with pytest.raises(UserError, match=r"npm ci of onnxruntime-web .* failed") as caught:
        package.installed()
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache" / "netwright").iterdir()) == []


@needs_node
def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set XDG_CACHE_HOME"):
        package.installed()


@needs_node
def test_a_number_says_which_node_ran_it(wasm: Device) -> None:
    said = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    described = wasm.describe()
    assert described["host"] == f"Node {said.removeprefix('v')}"
    assert described["runtime_version"] == package.version() == web.worker_of(wasm).facts["version"]
    assert "host" not in X86.describe()


# -- Chromium -----------------------------------------------------------------------------------------------------------------


@needs_chromium
def test_chromium_computes_and_times_a_model(in_browser: Device) -> None:
    for spec, name in ((LARGE, "fp32"), (INTEGER, "qdq_u8")):
        model = layer(spec, name)
        feeds = feeds_of(model)
        session = web.load(model, in_browser)
        assert_equal(session.run(feeds), native.load(model, X86).run(feeds))
    small, large = web.load(layer(SMALL), in_browser), web.load(layer(LARGE), in_browser)
    assert 1 < small.visit(0.002) < large.visit(0.002) < 1e5
    facts = web.worker_of(in_browser).facts
    assert facts["clock_step_us"] < 20  # the page is isolated; without, the clock has steps of 100 us
    assert web.optimized_operators(layer(INTEGER, "qdq_u8"), in_browser) == ["QLinearConv"]
    with pytest.raises(WebError, match="onnxruntime-web: ") as caught:
        web.load(b"no ONNX", in_browser)
    assert "\n" not in str(caught.value)
    assert in_browser.describe()["host"] == chromium.browser()[1]


@needs_chromium
def test_only_the_page_is_answered(in_browser: Device) -> None:
    web.load(layer(SMALL), in_browser)
    url = web.worker_of(in_browser).channel.url
    assert b"page.mjs" in urllib.request.urlopen(url, timeout=10).read()
    root = url.rsplit("/", 2)[0]
    for path in (f"{root}/", f"{root}/other/page.mjs", f"{url}../page.mjs", f"{url}package.json"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(path, timeout=10)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{root}/socket", timeout=10)


@needs_chromium
@pytest.mark.parametrize("elements", [1, 5_000, 100_000])
def test_messages_of_every_size_pass_unchanged(in_browser: Device, elements: int) -> None:
    x = np.random.default_rng(0).standard_normal((1, elements), dtype=np.float32)
    session = web.load(identity(onnx.TensorProto.FLOAT, [1, elements]), in_browser)
    np.testing.assert_array_equal(session.run({"x": x}), x)


def masked(head: bytes, data: bytes) -> bytes:
    return head + bytes([1, 2, 3, 4]) + bytes(value ^ (index % 4 + 1) for index, value in enumerate(data))


def test_a_message_is_put_together_from_its_frames() -> None:
    data = bytes(range(200)) * 2
    frames = masked(b"\x02\x83", data[:3]) + masked(b"\x00\xfe\x00\xc8", data[3:203])
    frames += masked(b"\x80\xff" + (197).to_bytes(8, "big"), data[203:])
    assert chromium.read_message(io.BytesIO(frames)) == data
    huge = b"\x82\xff" + (2**40).to_bytes(8, "big")
    for broken in (b"", frames[:100], frames[:-1], b"\x88\x80" + bytes(4), b"\x82\x03abc", huge + bytes(4)):
        with pytest.raises(EOFError):
            chromium.read_message(io.BytesIO(broken))


@needs_chromium
def test_a_closed_page_is_told(in_browser: Device) -> None:
    session = web.load(layer(SMALL), in_browser)
    browser = psutil.Process(web.worker_of(in_browser).pid)
    processes = [browser, *browser.children(recursive=True)]  # the page's own process may outlive the browser for a moment
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)
    with pytest.raises(WebError, match="Chromium"):
        session.visit(0.001)


LOAD_AND_WAIT = """
import sys, time
sys.path.insert(0, sys.argv[1])
from latency_lut.device import Device
from latency_lut.runtimes import onnxruntime_web as web
worker = web.worker_of(Device("wasm", runtime="onnxruntime_web", provider=sys.argv[2]))
print(worker.pid, flush=True)
time.sleep(120)
"""


@pytest.mark.parametrize(
    "provider", [pytest.param("wasm", marks=needs_node), pytest.param("wasm-chromium", marks=needs_chromium)]
)
def test_no_process_outlives_a_killed_python(provider: str) -> None:
    command = [sys.executable, "-c", LOAD_AND_WAIT, str(ROOT), provider]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as python:
        assert python.stdout is not None
        worker = psutil.Process(int(python.stdout.readline()))
        python.kill()
    end = time.monotonic() + 30
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE and time.monotonic() < end:
        time.sleep(0.1)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
