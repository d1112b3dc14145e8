"""Claims: one holder at a time, taken over from the dead, on file systems without locks and clocks."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from search import claims
from search.claims import FOLDER, Holder, claimed, process_ended
from spaces.errors import UserError


def wait_quietly(holder: Holder) -> None:
    pass


def never(holder: Holder) -> None:
    raise AssertionError(f"waited for {holder}")


def test_it_is_free_again_when_given_back(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        with claimed(tmp_path, "here", never) as held:
            assert held is not None
            claim, before = held
            assert before is None
            assert claim.holder.number == number
            assert not claim.lost


def _count_up(folder: str, times: int) -> None:
    path = Path(folder)
    for _ in range(times):
        with claimed(path, "counting", wait_quietly):
            counter = path / "counter"
            value = int(counter.read_text())
            time.sleep(0.005)  # without exclusion others would read the same value
            counter.write_text(str(value + 1))


def test_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "POLL_S", 0.002)
    (tmp_path / "counter").write_text("0")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_count_up, args=(str(tmp_path), 10)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert (tmp_path / "counter").read_text() == "40"


HOLD = """
import socket, sys, time
from pathlib import Path
from search import claims
claims.BEAT_S = 0.1
if sys.argv[2:]:  # on another machine, whose clock is ahead
    ahead, now = float(sys.argv[2]), time.time
    time.time = lambda: now() + ahead
    socket.gethostname = lambda: "far"
with claims.claimed(Path(sys.argv[1]), "elsewhere", lambda holder: None):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_holder_of_this_machine_is_gone_at_once(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.readline()
    waited: list[Holder] = []

    def kill(holder: Holder) -> None:
        waited.append(holder)
        os.kill(holder.pid, signal.SIGKILL)
        other.wait(10)

    begin = time.monotonic()
    with claimed(tmp_path, "here", kill) as held:
        assert held is not None
        assert held[1] == waited[0]
    assert waited[0].work == "elsewhere"
    assert time.monotonic() - begin < claims.PATIENCE_S / 2
    other.stdout.close()


def test_a_clock_that_is_set_does_not_end_a_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with claimed(tmp_path, "here", never) as held:
        assert held is not None
        holder = held[0].holder
        boot_time = psutil.boot_time()
        monkeypatch.setattr("psutil._psplatform.boot_time", lambda: boot_time - 600)  # as the clock was ten minutes ahead
        assert abs(psutil.Process().create_time() - boot_time - holder.started + 600) < 2
        assert not process_ended(holder)
        assert process_ended(replace(holder, started=holder.started + 100))
        assert not process_ended(replace(holder, started=holder.started + 100, boot="of another machine of that name"))


@pytest.mark.parametrize("ahead_s", [-600, 600])
def test_a_machine_whose_clock_differs_is_waited_for_and_followed(tmp_path: Path, ahead_s: int) -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path), str(ahead_s)], stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.readline()
    begin = time.monotonic()

    def waited_enough() -> bool:
        if time.monotonic() - begin > 3:
            other.kill()
        return False

    waited: list[Holder] = []
    with claimed(tmp_path, "here", waited.append, waited_enough, patience_s=1.5) as held:
        took_s = time.monotonic() - begin
        assert held is not None
    other.wait(10)
    other.stdout.close()
    assert [holder.host for holder in waited] == ["far"]
    assert 4 < took_s < 20  # it lived for 3 s, twice the patience, and then the count stood still


def foreign(folder: Path, number: int) -> None:
    """A claim of a machine that nothing is known about."""
    (folder / FOLDER).mkdir(exist_ok=True)
    values = {"host": "far", "boot": "", "pid": 1, "started": 0.0, "user": "u", "work": "there"}
    (folder / FOLDER / f"{number}.json").write_text(json.dumps(values))


def test_a_foreign_holder_is_gone_when_its_count_stands_still_whatever_the_clocks_say(tmp_path: Path) -> None:
    foreign(tmp_path, 1)
    for name in ("1.json", "1.beat"):
        (tmp_path / FOLDER / name).touch()
        os.utime(tmp_path / FOLDER / name, (time.time() + 3600,) * 2)  # a clock an hour ahead
    begin = time.monotonic()
    with claimed(tmp_path, "here", wait_quietly, patience_s=1.0) as held:
        assert held is not None
        assert held[1] is not None
        assert held[1].host == "far"
    assert 0.9 < time.monotonic() - begin < 20


def test_a_foreign_holder_that_counts_is_waited_for(tmp_path: Path) -> None:
    foreign(tmp_path, 1)
    polls = 0

    def until() -> bool:
        nonlocal polls
        polls += 1
        (tmp_path / FOLDER / "1.beat").write_text(str(polls))
        return polls > 5

    with claimed(tmp_path, "here", wait_quietly, until, patience_s=0.6) as held:
        assert held is None  # 2.5 s of waiting, four times the patience


def test_a_holder_that_was_taken_over_notices(tmp_path: Path) -> None:
    with claimed(tmp_path, "here", never) as held:
        assert held is not None
        foreign(tmp_path, 2)
        assert held[0].lost


def test_a_claim_that_is_just_being_written_is_somebody_s(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "1.json").touch()
    begin = time.monotonic()
    with claimed(tmp_path, "here", wait_quietly, patience_s=0.6) as held:
        assert held is not None
    assert time.monotonic() - begin > 0.5


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot make"), claimed(tmp_path / "file", "here", never):
        pass
