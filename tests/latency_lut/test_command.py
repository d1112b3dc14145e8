"""The command line: one line and status 2 for what a user can mend, and no file beside the work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from latency_lut.__main__ import main
from latency_lut.command import mistake, run_hydra
from latency_lut.device import load_runtime
from latency_lut.table import LatencyTable
from latency_lut.web import chromium
from spaces.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "space.stem=[8]",
    "space.stages=[{widths:[8],depths:[1],stride:2}]",
    "space.expansions=[2]",
    "space.kernels=[3]",
    "space.head=[16]",
    "data.resolutions=[8]",
    "max_pairs=60",
    "rounds=3",
    "visit_s=0.00005",
    "networks=8",
]

DEVICES = "Available options in 'device': arm browser cuda ort_cuda ort_tensorrt phone pi torch_cpu wasm wasm_chromium x86"


def lacks(runtime, provider):
    """Skips a test of what is said where a provider is missing, where it is not."""
    return pytest.mark.skipif(provider in load_runtime(runtime).providers(), reason=f"{runtime} has {provider} here")


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run the command line in an empty folder; status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def run(*arguments, function=main):
        monkeypatch.setattr(sys, "argv", ["latency_lut", *arguments])
        status = 0
        try:
            run_hydra(function, "latency_lut")
        except SystemExit as stop:
            status = stop.code or 0
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["max_pair=3"], "max_pair"),
        (["gadget=x86"], "gadget"),
        (["device=toaster"], DEVICES),
        pytest.param(["device=cuda"], "(pytorch.org/get-started), or take device=torch_cpu", marks=lacks("torch", "cuda")),
        pytest.param(["device=ort_cuda"], "pip install onnxruntime-gpu", marks=lacks("onnxruntime", "CUDAExecutionProvider")),
        pytest.param(["device=ort_tensorrt"], "onnxruntime-gpu", marks=lacks("onnxruntime", "TensorrtExecutionProvider")),
        (["device=[]"], "no device"),
        (["data=nowhere"], "data/nowhere"),
        (["max_pairs=[1"], "[1"),
        (["max_pairs=many"], "max_pairs is 'many'"),
        (["--nonsense"], "--nonsense"),
        (["devices.x86.threads=0"], "threads is 0"),
        (["devices.x86.runtime=tvm"], "allowed are onnxruntime"),
        (["space.stem=[0]"], "stem are [0]"),
        (['space.sparsities=["3:7"]'], "stem are [8, 16]: 3:7 sparsity needs input channels divisible by 7, got 8; change"),
        (["space.sparsities=[block5x1@1/2]"], "output channels divisible by 5, got 8; change that width or leave it dense"),
        (["space.precisions=[w5a8]"], "precision 'w5a8'; allowed are fp32, fp8, w8a8 w7a8 w4a8"),
        (["space.ranks=['3/2']"], "rank '3/2'; allowed are full and shares of the smaller side between 0 and 1"),
        (["space.ranks=['200']"], "rank '200'; allowed are full and shares of the smaller side between 0 and 1"),
        (["+space.colour=3"], "colour"),
        (["space._target_=spaces.nowhere.Space"], "spaces.nowhere.Space"),
        (["data=custom"], "Missing mandatory value"),
        (
            ["-m", "device=toaster"],
            DEVICES,
        ),
        (["-m", "space.max_width=2,3"], "max_width=2"),
        (["target_error=2"], "target_error is 2"),
        (["device=pi", "devices.pi.reach.host='-oProxyCommand=id'"], "host is '-oProxyCommand=id'; allowed are values such"),
        (["device=pi", "devices.pi.reach.folder=../x"], "transport: folder is '../x'; allowed are values such as netwright"),
        (["device=phone"], "Missing mandatory value: devices.phone.reach.serial"),
        (["device=pi", "budget_s=3"], "device pi is elsewhere; target_error and budget_s choose here, leave them away"),
    ],
)
def test_mistakes_take_one_line_each_and_status_2(command, tmp_path, arguments, said):
    status, _, err = command(*arguments)
    assert status == 2
    lines = err.splitlines()
    assert len(lines) == (2 if "space.max_width=2,3" in arguments else 1)
    assert lines[0].startswith("error: ")
    assert said in lines[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("precision", "runtime"), [("fp8", "onnxruntime"), ("w4d8@32", "onnxruntime"), ("w4d8@32", "torch")])
def test_a_bit_width_that_the_device_lacks_is_told_before_anything_is_timed(command, tmp_path, precision, runtime):
    device = {"onnxruntime": "x86", "torch": "torch_cpu"}[runtime]
    status, _, err = command(f"device={device}", f"space.precisions=['{precision}',fp32]", "max_pairs=4")
    assert (status, len(err.splitlines())) == (2, 1)
    assert err.startswith(f"error: precision {precision} of layer ")
    assert f"does not run in {runtime} here; leave {precision} out of the space, or take a device that has it" in err
    assert not LatencyTable.load(tmp_path / "tables" / f"{device}.parquet").entries


@pytest.mark.parametrize(
    ("device", "missing", "mend"),
    [
        ("wasm", "node is not on the PATH", "install Node.js with npm, for example: apt-get install nodejs npm"),
        ("wasm_chromium", "no Chromium found", "install one (for example: apt-get install chromium) or name it in"),
    ],
)
def test_a_missing_program_of_a_device_is_told_with_what_to_install(command, tmp_path, monkeypatch, device, missing, mend):
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setenv("PATH", str(empty))
    monkeypatch.delenv("CHROME_BIN", raising=False)
    monkeypatch.setattr(chromium, "MACOS", str(empty / "none"))
    status, _, err = command(f"device={device}", "max_pairs=4")
    assert (status, len(err.splitlines())) == (2, 1)
    assert err.startswith(f"error: {missing}")
    assert mend in err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_bug_keeps_its_traceback(command):
    def broken(config):
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError):
        command(function=broken)


def test_of_a_group_mistakes_are_told_and_bugs_keep_their_traceback(command, capsys):
    def broken(config):
        raise ExceptionGroup("devices failed", [UserError("the width is 3"), ZeroDivisionError("a bug"), UserError("no way")])

    with pytest.raises(ZeroDivisionError):
        command(function=broken)
    assert capsys.readouterr().err.startswith("error: the width is 3\nerror: no way\n")


def test_bugs_inside_a_constructor_are_no_mistakes(command):
    from hydra.utils import instantiate

    def broken(config):
        instantiate({"_target_": "fractions.Fraction", "_args_": [1, 0]})

    with pytest.raises(Exception, match="ZeroDivisionError"):
        command(function=broken)


def test_a_mistake_under_other_errors_is_found():
    outer = RuntimeError("wrapped")
    outer.__cause__ = UserError("the width is 3")
    assert mistake(outer) == "the width is 3"
    assert mistake(RuntimeError("no cause")) is None


def test_device_options_can_be_overridden(command):
    seen = []
    status, _, _ = command("device=x86", "devices.x86.threads=2", function=lambda c: seen.append(dict(c.devices.x86)))
    assert status == 0
    assert seen[0]["threads"] == 2
    assert seen[0]["name"] == "x86"


def test_a_sweep_runs_every_combination_and_leaves_nothing(command, tmp_path):
    seen = []
    status, _, _ = command("-m", "seed=0,1,2", function=lambda config: seen.append(config.seed))
    assert (status, seen) == (0, [0, 1, 2])
    assert not list(tmp_path.iterdir())


def test_help_explains(command):
    status, out, _ = command("--help")
    assert status == 0
    for text in (
        "python -m latency_lut device=x86",
        "device: arm, browser, cuda, ort_cuda, ort_tensorrt, phone, pi, torch_cpu, wasm, wasm_chromium, x86",
        "max_pairs",
    ):
        assert text in out


def test_profiling_prints_a_summary_and_writes_only_the_table(command, tmp_path):
    status, out, err = command("device=x86", *SMALL)
    assert (status, err) == (0, "")
    for text in ("pairs/min", "held-out networks", "Spearman", "tables/x86.parquet"):
        assert text in out
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()] == ["tables/x86.parquet"]
    networks = LatencyTable.load(tmp_path / "tables" / "x86.parquet").networks
    assert sum(network.source == "random" for network in networks) == 8

    status, out, err = command(*SMALL, "target_error=0.9")
    assert (status, err) == (0, "")
    path = tmp_path / "tables" / "x86.parquet"
    (point,) = LatencyTable.load(path).curve
    assert f"{point.error:.2%}" in out

    content = path.read_bytes()
    status, _, err = command(*SMALL, "devices.x86.batch=2")
    assert status == 2
    assert "batch 1 -> 2" in err
    assert path.read_bytes() == content
    path.write_bytes(content[:1000])
    status, _, err = command(*SMALL)
    assert status == 2
    assert "is damaged" in err
    assert len(err.splitlines()) == 1


def test_as_a_program(tmp_path):
    (tmp_path / "tables").write_text("a file where the folder should be")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "latency_lut", "max_pairs=12", "networks=0", *SMALL[:6], *SMALL[7:9]]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["tables"]
