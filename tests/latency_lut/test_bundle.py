"""Bundles and their runner, really: built, run as a program of its own, stopped in the middle, gone on."""

import ast
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace

import pytest

from latency_lut.bundle import runner_source, write_bundle
from latency_lut.device import Device
from latency_lut.manifest import Manifest
from latency_lut.measuring import MeasuringSettings
from spaces.errors import UserError
from spaces.mobile import MobileSpace

FAR = Device("far", reach="bundle")
STAGES = [{"widths": [8, 16], "depths": [1], "stride": 2}]
SPACE = MobileSpace(1, 4, [8], [8], STAGES, [2], [3, 5], [16], ["w8a8", "fp32"], ["dense", "group@1/2"])
QUICK = MeasuringSettings(max_pairs=40, networks=8, rounds=3, visit_s=0.00005)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A small bundle whose networks are visited shortly."""
    folder = tmp_path_factory.mktemp("bundle")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("latency_lut.bundle.NETWORK_VISIT_S", 0.0002)
        patch.setattr("latency_lut.bundle.BATCH_PAIRS", 10)
        write_bundle(SPACE, FAR, folder / "far.parquet", folder / "far.zip", QUICK)
    return folder / "far.zip"


def run(*arguments, **how):
    """A program in an environment without Netwright."""
    command = [sys.executable, "-I", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd="/", **how)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def manifest_of(path):
    with zipfile.ZipFile(path) as archive:
        return Manifest.from_json(archive.read("manifest.json"))


def test_the_same_input_gives_the_same_bytes(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("latency_lut.bundle.NETWORK_VISIT_S", 0.0002)
    monkeypatch.setattr("latency_lut.bundle.BATCH_PAIRS", 10)
    written = write_bundle(SPACE, FAR, tmp_path / "far.parquet", tmp_path / "again.zip", QUICK)
    assert (tmp_path / "again.zip").read_bytes() == bundle.read_bytes()
    assert manifest_of(bundle) == written
    assert len(written.pairs) == 40
    assert {source for _, source in written.networks.values()} == {"random", "graded"}


def test_the_runner_is_one_file_for_python_3_9_with_numpy_and_onnxruntime_alone():
    tree = ast.parse(runner_source(), feature_version=(3, 9))
    modules = {alias.name.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module).partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules - sys.stdlib_module_names == {"numpy", "onnxruntime"}
    defined = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert len(defined) == len(set(defined))  # of several files none hides another's


def test_a_bundle_runs_where_there_is_nothing_else(bundle, tmp_path):
    shutil.copy(bundle, tmp_path / "far.zip")
    ended = run(tmp_path / "far.zip")
    assert ended.returncode == 0, ended.stderr
    head, *lines, end = read(tmp_path / "results.jsonl")
    manifest, x86 = manifest_of(bundle), Device("x86")
    assert head["device"] == x86.describe()
    assert head["fingerprint"] == end["fingerprint"] == x86.fingerprint
    assert {line["id"] for line in lines} == set(manifest.models)
    assert end["complete"]
    assert (end["measured"], end["failed"]) == (len(manifest.models), 0)
    by_batch = {batch: [line["id"] for line in lines if line["batch"] == batch] for batch in range(lines[-1]["batch"] + 1)}
    assert len(by_batch) == 4
    for names in by_batch.values():
        assert tuple(names[: len(manifest.anchors)]) == manifest.anchors
    for line in lines:
        assert len(line["us"]) == len(line["position"]) == (3 if line["id"].startswith("p") and line["batch"] < 3 else 25)
        assert min(line["us"]) > 0


def test_a_stopped_runner_goes_on_and_streams_only_what_is_new(bundle, tmp_path):
    with zipfile.ZipFile(bundle) as archive:
        archive.extractall(tmp_path / "far")
    command = [sys.executable, "-I", str(tmp_path / "far" / "runner.py"), "--stream", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/") as process:
        known = b"".join(process.stdout.readline() for _ in range(25))
        os.kill(process.pid, signal.SIGKILL)
    path = tmp_path / "far" / "results.jsonl"
    before = path.read_bytes()
    assert before.startswith(known)
    with path.open("ab") as file:
        file.write(b'{"kind":"visits","id":"p0')  # the line that a power cut tore
    ended = run(tmp_path / "far" / "runner.py", "--stream", len(known))
    assert ended.returncode == 0, ended.stderr
    assert known + ended.stdout.encode() == path.read_bytes()
    manifest, lines = manifest_of(bundle), read(path)
    others = [line["id"] for line in lines[1:-1] if line["id"] not in manifest.anchors]
    assert sorted(others) == sorted(set(manifest.models) - set(manifest.anchors))
    again = run(tmp_path / "far" / "runner.py", "--stream", len(path.read_bytes()))
    assert (again.returncode, again.stdout) == (0, "")


def test_two_runners_do_not_write_one_file(bundle, tmp_path):
    command = [sys.executable, "-I", str(bundle), str(bundle), str(tmp_path / "r"), "--stream", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/") as process:
        process.stdout.readline()
        ended = run(bundle, bundle, tmp_path / "r")
        process.kill()
    assert ended.returncode == 2
    assert "being written by another process" in ended.stderr


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "models" / "p00003.onnx").write_bytes(b"abc"), "another checksum"),
        (lambda folder: (folder / "models" / "p00003.onnx").unlink(), "cannot read models/p00003.onnx"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (
            lambda folder: (folder / "results.jsonl").write_text('{"kind":"head"}\n'),
            "holds results of another bundle and device",
        ),
        (lambda folder: (folder / "results.jsonl").write_text("[1]\n"), "is damaged"),
    ],
)
def test_the_runner_tells_in_one_line_what_is_wrong(bundle, tmp_path, change, said):
    with zipfile.ZipFile(bundle) as archive:
        archive.extractall(tmp_path)
    change(tmp_path)
    ended = run(tmp_path / "runner.py")
    assert ended.returncode == 2
    assert said in ended.stderr.splitlines()[-1]
    assert ended.stderr.count("error:") == 1


def test_a_bundle_for_more_threads_than_there_are_is_refused_there(tmp_path):
    many = Device("many", threads=5000, reach="bundle")
    write_bundle(SPACE, many, tmp_path / "many.parquet", tmp_path / "many.zip", replace(QUICK, networks=0))
    ended = run(tmp_path / "many.zip")
    assert ended.returncode == 2
    assert "for 5000 threads" in ended.stderr


def test_a_model_that_does_not_load_is_told_and_left_out(bundle, tmp_path):
    with zipfile.ZipFile(bundle) as archive:
        archive.extractall(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    content = b"not a model"
    (tmp_path / "models" / "p00020.onnx").write_bytes(content)
    model = next(model for model in manifest["models"] if model["id"] == "p00020")
    model |= {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert run(tmp_path / "runner.py").returncode == 0
    lines = read(tmp_path / "results.jsonl")
    failed = [line for line in lines if line["kind"] == "failed"]
    assert [line["id"] for line in failed] == ["p00020"]
    assert failed[0]["reason"]
    assert lines[-1]["failed"] == 1


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ({"runtime": "torch", "provider": "cpu"}, "torch cannot be sent elsewhere"),
        ({"provider": "wasm"}, "allowed elsewhere are"),
        ({"reach": "carrier pigeon"}, "allowed are here, bundle"),
    ],
)
def test_a_device_that_cannot_be_elsewhere_is_refused(device, said):
    with pytest.raises(UserError, match=said):
        Device("far", **{"reach": "bundle", **device})
