"""Devices elsewhere and several at once: the command line, over a real sshd on loopback and a stand-in of adb."""

import sys
import threading
import time
from dataclasses import asdict, replace

import pytest

from latency_lut.__main__ import main
from latency_lut.command import run_hydra
from latency_lut.device import Device
from latency_lut.elsewhere import profile_elsewhere
from latency_lut.measuring import MeasuringSettings
from latency_lut.profile import profile
from latency_lut.remote import Watch
from latency_lut.session import retime
from latency_lut.several import Turns, each
from latency_lut.table import LatencyTable
from latency_lut.transports import Adb, Ssh
from spaces.errors import UserError
from tests.latency_lut import loopback_sshd, stand_in_adb

ssh = pytest.mark.skipif(bool(loopback_sshd.missing()), reason=loopback_sshd.missing())

QUICK = MeasuringSettings(max_pairs=30, networks=8, rounds=3, visit_s=0.00005)


@pytest.fixture
def pi(sshd, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", sshd.path)
    monkeypatch.setattr("latency_lut.bundle.NETWORK_VISIT_S", 0.0002)
    monkeypatch.setattr("latency_lut.bundle.BATCH_PAIRS", 5)
    return Device("pi", reach=Ssh("pi", str(tmp_path / "there"), sys.executable))


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@ssh
def test_a_device_elsewhere_and_one_here_make_equal_tables_and_failing_ones_stop_neither(pi, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("latency_lut.session.NETWORK_VISIT_S", 0.0002)
    monkeypatch.chdir(tmp_path)
    there = f"folder: {tmp_path}/there, python: {sys.executable}"
    reach = "reach: {_target_: latency_lut.transports.Ssh, host: %s, " + there + "}"
    devices = {"pi": reach % "pi", "lost": reach % "stranger", "hostile": reach % "'pi;id'", "carried": "reach: bundle"}
    arguments = [
        f"+devices.{name}={{_target_: latency_lut.device.Device, name: {name}, {rest}}}" for name, rest in devices.items()
    ]
    space = ["space.stem=[8]", "space.stages=[{widths:[8],depths:[1],stride:2}]", "space.expansions=[2]", "space.kernels=[3]"]
    numbers = [f"{name}={value}" for name, value in asdict(replace(QUICK, max_pairs=60)).items()]
    monkeypatch.setattr(sys, "argv", ["latency_lut", "device=x86", *arguments, *space, "space.head=[16]", *numbers])
    with pytest.raises(SystemExit) as ended:
        run_hydra(main, "latency_lut")
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    hostile, lost, carried = err.splitlines()
    assert hostile.startswith("error: hostile: ")
    assert "transport: host is 'pi;id'; allowed are values such as pi" in hostile
    assert lost.startswith("error: device lost: no way to ssh host stranger (Host key verification failed.)")
    assert carried.startswith("error: device carried is elsewhere and has no transport; run: python -m latency_lut bundle")
    assert files(tmp_path / "tables") == ["pi.parquet", "x86.parquet"]
    assert files(tmp_path / "there") == []
    for name in ("pi", "x86"):
        assert f"table: tables/{name}.parquet" in out
    far, near = (LatencyTable.load(tmp_path / "tables" / f"{name}.parquet") for name in ("pi", "x86"))
    assert far.device == near.device
    assert far.entries.keys() == near.entries.keys()
    assert far.anchors == near.anchors
    assert len(far.networks) == len(near.networks) > 8
    assert [network.architecture for network in far.networks] == [network.architecture for network in near.networks]


@ssh
def test_a_profile_that_was_stopped_goes_on_and_measures_nothing_twice(pi, tiny_space, tmp_path):
    path, stopped, seen = tmp_path / "tables" / "pi.parquet", threading.Event(), []

    def watch(what, done, total):
        seen.append((what, done))
        if what == "models" and done > 12:
            stopped.set()

    assert profile_elsewhere(tiny_space, pi, path, QUICK, watch=Watch(watch, stopped=stopped)) is None
    assert not path.exists()
    (results,) = path.parent.glob("pi-*-results.jsonl")
    kept = len(results.read_text().splitlines()) - 1
    assert kept > 12
    seen.clear()
    table, stats = profile_elsewhere(tiny_space, pi, path, QUICK, watch=Watch(lambda *what: seen.append(what)))
    assert next(done for what, done, _ in seen if what == "models") > 12
    assert (stats.pairs, stats.measured, len(table.entries)) == (30, 30, 30)
    assert stats.networks == len(table.networks)
    assert sum(network.source == "random" for network in table.networks) == 8
    assert files(path.parent) == ["pi.parquet"]
    content = path.read_bytes()
    table, stats = profile_elsewhere(tiny_space, pi, path, QUICK)
    assert (stats.measured, stats.networks) == (0, 0)
    assert path.read_bytes() == content


@ssh
@pytest.mark.parametrize(
    ("was", "becomes"), [('"us":[', '"us":[0.5,'), ('"us":[', '"us":[NaN,'), ('"kind":"visits"', '"kind":"x"')]
)
def test_what_a_device_makes_up_is_refused_and_nothing_is_written(pi, tiny_space, tmp_path, was, becomes):
    forger = tmp_path / "python"
    forger.write_text(f"#!/bin/sh\n{sys.executable} \"$@\" | sed 's/{was.replace('[', '.')}/{becomes}/'\n")
    forger.chmod(0o755)
    path = tmp_path / "tables" / "pi.parquet"
    forging = Device("pi", reach=Ssh("pi", str(tmp_path / "there"), str(forger)))
    kept = r"they are kept as .*pi-refused\.jsonl, the same command measures anew"
    with pytest.raises(UserError, match=rf"results\.jsonl is refused: line \d+: .*; {kept}"):
        profile_elsewhere(tiny_space, forging, path, QUICK)
    assert files(path.parent) == ["pi-bundle.zip", "pi-refused.jsonl"]
    table, _ = profile_elsewhere(tiny_space, pi, path, QUICK)
    assert len(table.entries) == 30


def test_adb_measures_a_device_too(tiny_space, tmp_path, monkeypatch):
    asked = stand_in_adb.install(tmp_path, monkeypatch)
    monkeypatch.setattr("latency_lut.bundle.NETWORK_VISIT_S", 0.0002)
    phone = Device("phone", reach=Adb("phone-1", str(tmp_path / "there"), sys.executable))
    table, stats = profile_elsewhere(tiny_space, phone, tmp_path / "tables" / "phone.parquet", QUICK)
    assert (len(table.entries), stats.measured) == (30, 30)
    assert table.device == Device("x86").describe()
    calls = asked()
    assert all(call[:2] == ["-s", "phone-1"] for call in calls)
    assert [call[2] for call in calls].count("push") == 2  # the layers, then the networks
    assert sum("--stream 0" in call[3] for call in calls) == 2
    assert files(tmp_path / "there") == []


def test_devices_of_one_machine_are_taken_in_turn_and_machines_side_by_side():
    reaches = {"a": "here", "b": "here", "c": Ssh("one"), "d": Ssh("one", "other"), "e": Ssh("two")}
    devices = [Device(name, reach=reach) for name, reach in reaches.items()]
    together, lock, running, seen = threading.Barrier(3), threading.Lock(), set(), []

    def do(device, stopped):
        with lock:
            running.add(device.name)
            assert not {"a", "b"} <= running
            assert not {"c", "d"} <= running
        if device.name in "ace":
            together.wait(20)  # the three machines at the same time
        with lock:
            running.remove(device.name)
            seen.append(device.name)
        if device.name in "ae":
            raise UserError(device.name)

    failures = each(devices, do)
    assert sorted(seen) == sorted(reaches)
    assert [(name, str(error)) for name, error in failures.items()] == [("a", "a"), ("e", "e")]


@ssh
def test_two_names_of_one_machine_are_one_machine(sshd, tmp_path, monkeypatch):
    """An alias of the client's configuration, with a user or without, and the address that it stands for."""
    monkeypatch.setenv("PATH", sshd.path)
    with (sshd.folder / "ssh_config").open("a") as config:
        config.write(f"Host board 127.0.0.1\n  HostName 127.0.0.1\n  Port {sshd.port}\n")
    one = [Ssh(host) for host in ("board", "127.0.0.1", "someone@board", "pi")]
    assert {way.place for way in one} == {f"ssh 127.0.0.1 port {sshd.port}"}
    assert Ssh("cut").place == f"ssh 127.0.0.1 port {sshd.link.port}"
    assert Adb("phone-1", "a").place == Adb("phone-1", "b").place != Adb("phone-2").place
    busy = threading.Lock()

    def do(device, stopped):
        assert busy.acquire(blocking=False)
        time.sleep(0.05)
        busy.release()

    assert each([Device(f"d{index}", reach=way) for index, way in enumerate(one)], do) == {}


def test_a_way_whose_client_is_not_there_is_its_own_place(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Ssh("pi").place == "ssh host pi"


def test_an_interruption_stops_the_others(tmp_path):
    begun = threading.Event()

    def do(device, stopped):
        if device.name == "far":
            begun.set()
            assert stopped.wait(20)
            return
        assert begun.wait(20)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        each([Device("near"), Device("far", reach=Ssh("far"))], do)


def test_turns_are_for_one_at_a_time():
    turns, inside = Turns(), []

    def work():
        for _ in range(50):
            with turns.turn():
                inside.append(1)
                assert len(inside) == 1
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert inside == []


@pytest.mark.parametrize(
    ("device", "said"),
    [
        (Device("far", reach="bundle"), "has no transport; run: python -m latency_lut bundle device=far"),
        (
            Device("far", "onnxruntime_web", "wasm-browser", reach=Ssh("far")),
            "runtime is 'onnxruntime_web'; allowed by a transport",
        ),
    ],
)
def test_a_device_that_no_transport_measures_is_refused(tiny_space, tmp_path, device, said):
    with pytest.raises(UserError, match=said):
        profile_elsewhere(tiny_space, device, tmp_path / "far.parquet", QUICK)
    assert files(tmp_path) == []


def test_nothing_is_timed_here_in_the_name_of_a_device_elsewhere(tiny_space, tiny_table, tmp_path):
    far = Device("far", reach=Ssh("far"))
    for measure in (
        lambda: profile(tiny_space, far, tmp_path / "far.parquet", QUICK),
        lambda: retime([], tiny_space, tiny_table, far),
    ):
        with pytest.raises(UserError, match=r"device far is elsewhere; .* works on this machine's devices only"):
            measure()
