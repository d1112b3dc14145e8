"""Bundles that are run elsewhere, really: over a real sshd whose connections are killed, cut and silenced in the middle."""

import json
import os
import sys
import threading

import pytest

from latency_lut.bundle import write_bundle
from latency_lut.device import Device
from latency_lut.measuring import MeasuringSettings
from latency_lut.remote import RemoteRun, Watch
from latency_lut.transports import Ssh, ssh
from spaces.errors import UserError
from spaces.mobile import MobileSpace
from tests.latency_lut import loopback_sshd

pytestmark = pytest.mark.skipif(bool(loopback_sshd.missing()), reason=loopback_sshd.missing())

STAGES = [{"widths": [8, 16], "depths": [1], "stride": 2}]
SPACE = MobileSpace(1, 4, [8], [8], STAGES, [2], [3, 5], [16], ["w8a8", "fp32"], ["dense", "group@1/2"])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A bundle of 28 pairs, 10 of them anchors, in three batches."""
    path = tmp_path_factory.mktemp("bundle") / "pi-bundle.zip"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("latency_lut.bundle.BATCH_PAIRS", 6)
        device = Device("pi", reach=Ssh("pi"))
        manifest = write_bundle(
            SPACE, device, path.with_name("no table"), path, MeasuringSettings(0, 28, networks=0, rounds=10, visit_s=0.002)
        )
    return path, set(manifest.models)


@pytest.fixture
def far(sshd, bundle, tmp_path, monkeypatch):
    """A function that runs the bundle by a host; what it said, and the folder there."""
    monkeypatch.setenv("PATH", sshd.path)
    monkeypatch.setattr("latency_lut.remote.LONGEST_PAUSE_S", 0.1)
    said = []

    def run(host="pi", on_models=lambda done: None, **how):
        def on_progress(what, done, total):
            assert total == len(bundle[1])
            if what == "models":
                on_models(done)

        transport = how.pop("transport", Ssh(host, str(tmp_path / "there"), sys.executable))
        watch = Watch(on_progress, said.append, **how)
        job = RemoteRun("pi", transport, bundle[0], tmp_path / "results.jsonl", len(bundle[1]), watch)
        job.run()
        return job

    run.said, run.there = said, tmp_path / "there"
    return run


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def measured_once(path, names):
    """Whether every model is in the results, and none but the anchors more than once."""
    head, *rest, end = lines(path)
    assert (head["kind"], end["kind"], end["complete"]) == ("head", "end", True)
    ids = [line["id"] for line in rest]
    assert set(ids) == names
    anchors = {line["id"] for line in rest if line["batch"] == 0} & {line["id"] for line in rest if line["batch"] == 1}
    others = [name for name in ids if name not in anchors]
    return len(others) == len(set(others))


def once(action, after):
    """Do something as soon as more than so many models are there."""
    done = []

    def watch(models):
        if models > after and not done:
            done.append(action())

    return watch


def test_results_come_back_as_the_device_wrote_them(far, bundle, tmp_path):
    seen = []
    far(on_models=seen.append).clean_up()
    assert measured_once(tmp_path / "results.jsonl", bundle[1])
    assert seen == sorted(seen)
    assert len(set(seen)) > 10  # they came one after the other
    assert far.said == []
    assert list(far.there.iterdir()) == []


@pytest.mark.parametrize("how", ["killed", "cut"])
def test_a_link_that_breaks_in_the_middle_is_taken_up_again(far, bundle, sshd, tmp_path, how):
    broken = {"killed": sshd.kill_sessions, "cut": sshd.link.cut}[how]
    far("cut", once(broken, 12))
    assert measured_once(tmp_path / "results.jsonl", bundle[1])
    (there,) = far.there.iterdir()
    assert (there / "results.jsonl").read_bytes() == (tmp_path / "results.jsonl").read_bytes()
    assert "pi: the connection broke (" in far.said[0]
    assert " of 28 models are here; attempt 1 of 8 in " in far.said[0]


def test_a_link_that_falls_silent_is_left_and_its_runner_followed(far, bundle, sshd, tmp_path, monkeypatch):
    monkeypatch.setitem(ssh.OPTIONS, "ServerAliveInterval", "1")
    monkeypatch.setitem(ssh.OPTIONS, "ServerAliveCountMax", "1")
    far("cut", once(sshd.link.silence, 5))
    assert measured_once(tmp_path / "results.jsonl", bundle[1])
    assert "not responding" in far.said[0]


def test_another_call_goes_on_and_measures_nothing_again(far, bundle, tmp_path):
    stopped = threading.Event()
    far(on_models=once(stopped.set, 12), stopped=stopped)
    before = (tmp_path / "results.jsonl").read_bytes()
    assert 12 < len(before.splitlines()) < 39
    with (tmp_path / "results.jsonl").open("ab") as file:
        file.write(b'{"kind":"vis')  # torn by a power cut
    seen = []
    far(on_models=seen.append)
    assert seen[0] >= 12
    assert (tmp_path / "results.jsonl").read_bytes().startswith(before)
    assert measured_once(tmp_path / "results.jsonl", bundle[1])
    there = os.stat(next(far.there.glob("*/results.jsonl"))).st_mtime_ns
    far(transport=Ssh("nowhere.invalid"))  # all is here: nobody is asked
    assert os.stat(next(far.there.glob("*/results.jsonl"))).st_mtime_ns == there


def test_a_device_that_lost_its_files_goes_on_from_what_is_here(far, bundle, tmp_path):
    stopped = threading.Event()
    far(on_models=once(stopped.set, 12), stopped=stopped)
    before = (tmp_path / "results.jsonl").read_bytes()
    for path in far.there.rglob("*.*"):
        path.unlink()
    far()
    assert (tmp_path / "results.jsonl").read_bytes().startswith(before)
    assert measured_once(tmp_path / "results.jsonl", bundle[1])


def test_results_here_that_are_not_those_there_are_left(far, bundle, tmp_path):
    far()
    whole = (tmp_path / "results.jsonl").read_bytes()
    (tmp_path / "results.jsonl").write_bytes(b'{"kind":"head"}\n')
    far()
    assert (tmp_path / "results.jsonl").read_bytes() == whole


def test_a_copy_that_broke_goes_on_and_a_wrong_one_begins_anew(far, bundle, monkeypatch):
    stopped = threading.Event()
    far(on_models=once(stopped.set, 0), stopped=stopped)
    (there,) = far.there.glob("*/bundle.zip")
    content, sent = bundle[0].read_bytes(), []
    send = Ssh.send
    monkeypatch.setattr(Ssh, "send", lambda *given, **how: (sent.append(given[3]), send(*given, **how)))
    for torn, offset in ((content[:1000], 1000), (b"other" + content[5:2000], 0), (content + b"more", 0)):
        there.write_bytes(torn)
        stopped = threading.Event()
        far(on_models=once(stopped.set, -1), stopped=stopped)
        assert there.read_bytes() == content
        assert sent.pop() == offset


def test_a_device_that_cannot_be_reached_fails_with_what_has_to_work(far):
    mend = "this has to work: ssh -o BatchMode=yes stranger"
    with pytest.raises(UserError, match=rf"device pi: no way to ssh host stranger \(.*\); {mend}"):
        far("stranger")
    assert far.said == []


def test_a_device_that_is_gone_for_good_is_given_up(far, sshd, monkeypatch):
    monkeypatch.setattr("latency_lut.remote.LONGEST_PAUSE_S", 0.01)
    closed = loopback_sshd.Link(sshd.port)
    monkeypatch.setattr(sshd, "link", closed)
    config = sshd.folder / "ssh_config"
    text = config.read_text()
    config.write_text(f"Host gone\n  Port {closed.port}\n  HostKeyAlias real\n{text}")
    try:
        with pytest.raises(
            UserError, match=r"device pi: ssh host gone is gone \(.*\); \d+ of 28 models are here, the same command"
        ):
            far("gone", once(closed.close, 5))
    finally:
        config.write_text(text)
    assert len(far.said) == 8


@pytest.mark.parametrize(
    ("python", "said"),
    [
        ("/no/such/python", "/no/such/python does not run on ssh host pi .*; name another with "),
        ("/bin/echo", "Python answers .*, not the state of a file"),
    ],
)
def test_a_python_that_is_none_is_told(far, python, said):
    with pytest.raises(UserError, match=f"device pi: .*{said}"):
        far(transport=Ssh("pi", str(far.there), python))


def test_a_python_without_onnxruntime_is_told_with_what_to_install(far, tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(UserError, match=r"has no (numpy|onnxruntime); run there: .* -m pip install numpy onnxruntime"):
        far(transport=Ssh("pi", str(far.there), str(bare)))
