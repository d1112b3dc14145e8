"""Models timed, and run, on a device that ssh reaches: over a real sshd on loopback, cut in the middle."""

import sys
from dataclasses import replace

import numpy as np
import pytest

from latency_lut.device import Device
from latency_lut.drift import check
from latency_lut.lowering import applicable
from latency_lut.remote import Watch
from latency_lut.session import build_random
from latency_lut.there import Sent, retime_elsewhere, time_pairs_elsewhere
from latency_lut.timing import Timing
from latency_lut.transports import Adb, Ssh
from spaces.errors import UserError
from tests.latency_lut import loopback_sshd, stand_in_adb

pytestmark = pytest.mark.skipif(bool(loopback_sshd.missing()), reason=loopback_sshd.missing())

SAMPLES = 900  # of 10 values each: outputs of two lines


@pytest.fixture
def pi(sshd, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", sshd.path)
    monkeypatch.setattr("latency_lut.there.NETWORK_VISIT_S", 0.0002)
    return Device("pi", reach=Ssh("pi", str(tmp_path / "there"), sys.executable))


@pytest.fixture
def sent(tiny_space):
    """Three networks; two of them with samples, the same for both."""
    rng, x86 = np.random.default_rng(0), Device("x86")
    samples = rng.standard_normal((SAMPLES, 1, 8, 8)).astype(np.float32)
    networks = []
    for index in range(3):
        architecture = tiny_space.sample_spread(rng)
        network = tiny_space.network(architecture)
        lowerings = tuple(str(rng.choice(applicable(spec, x86.describe()))) for spec in network.layers)
        model = build_random(network, lowerings, rng, x86)
        networks.append(Sent(f"{index}", (architecture, lowerings), model, samples if index else None, 10))
    return networks


def answers(network):
    """What onnxruntime answers here."""
    loaded = Device("x86").load_runtime().load(network.model, Device("x86"))
    return np.concatenate([loaded.run({"input": sample[None]}).reshape(1, -1) for sample in network.samples])


def left(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_networks_are_timed_there_and_answer_as_here(pi, sent, tiny_table, tmp_path):
    measured = retime_elsewhere(sent, tiny_table, pi, tmp_path / "here")
    assert [timing.count for timing in measured.timings] == [25, 25, 25]
    assert all(timing.us > 0 for timing in measured.timings)
    assert 0.1 < measured.speed < 10
    assert measured.outputs[0] is None
    for network, outputs in zip(sent[1:], measured.outputs[1:], strict=True):
        assert outputs.shape == (SAMPLES, 10)
        np.testing.assert_array_equal(outputs, answers(network))
    assert left(tmp_path / "here") == left(tmp_path / "there") == []


@pytest.mark.parametrize("lines", [5, 14])
def test_a_link_that_is_cut_in_the_middle_is_taken_up_again(sshd, pi, sent, tiny_table, tmp_path, monkeypatch, lines):
    """In the middle of what was timed, and of what was answered."""
    monkeypatch.setattr("latency_lut.remote.LONGEST_PAUSE_S", 0.1)
    device = replace(pi, reach=Ssh("cut", str(tmp_path / "there"), sys.executable))
    said, came = [], []

    def watch(what, done, total):
        came.append(what)
        if came.count("models") == lines:
            sshd.link.cut()

    measured = retime_elsewhere(sent, tiny_table, device, tmp_path / "here", watch=Watch(watch, said.append))
    assert any("the connection broke" in sentence for sentence in said)
    for network, outputs in zip(sent[1:], measured.outputs[1:], strict=True):
        np.testing.assert_array_equal(outputs, answers(network))
    assert len(measured.timings) == 3


def test_a_call_that_was_killed_goes_on_from_what_came(pi, sent, tiny_table, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    came = []

    def watch(what, done, total):
        came.append(what)
        if came.count("models") == 14:
            raise Killed

    with pytest.raises(Killed):
        retime_elsewhere(sent, tiny_table, pi, tmp_path / "here", watch=Watch(watch))
    (results,) = (tmp_path / "here").glob("pi-*-results.jsonl")
    kept = results.read_bytes()
    kept_lines, shown = kept[: kept.rfind(b"\n") + 1].count(b"\n"), []
    assert kept_lines > 10
    measured = retime_elsewhere(sent, tiny_table, pi, tmp_path / "here", watch=Watch(lambda *what: shown.append(what)))
    assert next(done for what, done, _ in shown if what == "models") >= 10
    assert len(measured.timings) == 3
    assert left(tmp_path / "here") == []


def test_a_model_that_the_device_does_not_take_is_told(pi, sent, tiny_table, tmp_path):
    broken = replace(sent[0], name="winners/pi/1/model.onnx", model=sent[0].model[:100])
    with pytest.raises(UserError, match=r"device pi does not take winners/pi/1/model\.onnx \(.*install a newer onnxruntime"):
        retime_elsewhere([broken, sent[1]], tiny_table, pi, tmp_path / "here")


def test_a_device_that_became_another_is_told(pi, sent, tiny_table, tmp_path):
    other = replace(tiny_table)
    other.device = {**tiny_table.device, "cpu": "another"}
    other.device_fingerprint = "another"
    with pytest.raises(UserError, match=r"device pi is not what its table says .cpu 'another' -> .*delete its table and run"):
        retime_elsewhere(sent[:1], other, pi, tmp_path / "here")


@pytest.mark.parametrize(
    ("was", "becomes"), [('"values":"', '"values":"AAAA'), ('"first":0', '"first":1'), ('"us":[', '"us":[-1,')]
)
def test_answers_that_are_made_up_are_refused(pi, sent, tiny_table, tmp_path, was, becomes):
    forger = tmp_path / "python"
    forger.write_text(f"#!/bin/sh\n{sys.executable} \"$@\" | sed 's/{was.replace('[', '.')}/{becomes}/'\n")
    forger.chmod(0o755)
    forging = replace(pi, reach=Ssh("pi", str(tmp_path / "there"), str(forger)))
    with pytest.raises(UserError, match=r"results of device pi are refused: line \d+: .*; they are kept as .*pi-refused"):
        retime_elsewhere(sent, tiny_table, forging, tmp_path / "here")


def test_pairs_are_timed_by_the_clock(pi, tiny_table, tmp_path):
    pairs = list(tiny_table.entries)[:12]
    timings, device = time_pairs_elsewhere(pairs, tiny_table, pi, tmp_path / "here", 5, 0.0002)
    assert [timing.count for timing in timings] == [5] * 12
    assert device == Device("x86").describe()
    assert all(isinstance(timing, Timing) and timing.us > 0 for timing in timings)


def test_a_table_is_checked_over_the_transport(pi, tiny_table, tmp_path, monkeypatch):
    monkeypatch.setattr("latency_lut.drift.ROUNDS", 5)
    monkeypatch.setattr("latency_lut.drift.VISIT_S", 0.0002)
    drift = check(tiny_table, pi, pairs=9, tolerance=9.0, folder=tmp_path / "here")
    assert len(drift.checked) == 9
    assert not drift.changed
    assert not drift.drifted
    slow = replace(tiny_table)
    slow.entries = {pair: replace(entry, us=entry.us / 100) for pair, entry in tiny_table.entries.items()}
    slow.device = {**tiny_table.device, "runtime_version": "1.2.3"}
    drift = check(slow, pi, pairs=9, folder=tmp_path / "here")
    assert drift.speed_changed
    assert list(drift.changed) == ["runtime_version"]
    assert left(tmp_path / "here") == left(tmp_path / "there") == []


def test_what_nothing_reaches_is_not_checked(tiny_table, tmp_path):
    with pytest.raises(UserError, match="device far is elsewhere and has no transport; run: python -m latency_lut bundle"):
        check(tiny_table, Device("far", reach="bundle"), folder=tmp_path)


def test_adb_does_the_same(sent, tiny_table, tmp_path, monkeypatch):
    asked = stand_in_adb.install(tmp_path, monkeypatch)
    monkeypatch.setattr("latency_lut.there.NETWORK_VISIT_S", 0.0002)
    phone = Device("phone", reach=Adb("phone-1", str(tmp_path / "there"), sys.executable))
    measured = retime_elsewhere(sent[1:], tiny_table, phone, tmp_path / "here")
    np.testing.assert_array_equal(measured.outputs[0], answers(sent[1]))
    assert [call[2] for call in asked()].count("push") == 1
    assert left(tmp_path / "here") == left(tmp_path / "there") == []
