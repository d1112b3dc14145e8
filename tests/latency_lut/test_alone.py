"""Measurements of several processes on one machine follow each other."""

from __future__ import annotations

import fcntl
import multiprocessing
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import pytest

from latency_lut.alone import alone_on_this_machine, lock_path
from latency_lut.timing import Stopwatch


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


class Slow:
    """A model each visit of which takes a twentieth of a second; it remembers when."""

    def __init__(self) -> None:
        self.visits: list[float] = []

    def visit(self, seconds: float) -> float:
        time.sleep(0.05)
        self.visits.append(time.monotonic())
        return 1.0


def measure(folder: str, name: str) -> None:
    tempfile.tempdir = folder
    slow = Slow()
    Stopwatch([slow]).time([slow], 4, 0.0)
    (Path(folder) / name).write_text(f"{slow.visits[0]} {slow.visits[-1]}")


def test_two_processes_measure_one_after_the_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=measure, args=(str(tmp_path), f"times{i}")) for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    spans = sorted(tuple(map(float, file.read_text().split())) for file in tmp_path.glob("times*"))
    assert len(spans) == 3
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))


def test_a_process_that_is_suspended_is_told_and_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latency_lut.alone.PATIENCE_S", 0.2)
    slow = Slow()
    with lock_path().open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.warns(UserWarning, match="held"):
            Stopwatch([slow]).time([slow], 4, 0.0)
    assert len(slow.visits) == 8


def test_a_process_that_is_killed_gives_the_lock_back(tmp_path: Path) -> None:
    def hold() -> None:
        with alone_on_this_machine():
            (tmp_path / "held").touch()
            time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=hold)
    process.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    process.kill()
    process.join()
    with alone_on_this_machine():
        pass


def test_a_lock_that_cannot_be_opened_stops_nobody(tmp_path: Path) -> None:
    lock_path().symlink_to(tmp_path / "elsewhere")
    with alone_on_this_machine():
        assert not (tmp_path / "elsewhere").exists()
