"""Measurements of several processes on one machine follow each other."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from pathlib import Path

import pytest

from latency_lut.alone import alone_on_this_machine, lock_path
from latency_lut.timing import interleaved


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


class Slow:
    """A model each visit of which takes a twentieth of a second."""

    def visit(self, seconds: float) -> float:
        time.sleep(0.05)
        return 1.0


def measure(folder: str, name: str) -> None:
    tempfile.tempdir = folder
    with alone_on_this_machine():
        begin = time.monotonic()
        interleaved([Slow()] * 2, 2, 0.0)  # type: ignore[list-item]
        (Path(folder) / name).write_text(f"{begin} {time.monotonic()}")


def test_two_processes_measure_one_after_the_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=measure, args=(str(tmp_path), f"times{i}")) for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    spans = sorted(tuple(map(float, file.read_text().split())) for file in tmp_path.glob("times*"))
    assert len(spans) == 3
    assert all(end <= begin for (_, end), (begin, _) in zip(spans, spans[1:], strict=False))


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
