"""Evaluations on Dask: the same figures as in one process, and nothing lost with a worker that is killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from search.dask_workers import DaskWorkers
from search.evaluation import Evaluation
from spaces.choice import Architecture
from spaces.errors import UserError

pytest.importorskip("distributed", reason="dask.distributed is not installed (extra `cluster`)")

Call = Callable[..., Any]
Job = tuple[str, ...]


class Anything:
    """A space in which every combination is an architecture."""

    @property
    def space(self) -> Anything:
        return self

    def architecture(self, values: dict[str, int]) -> Architecture:
        return Architecture(values)


class Slow:
    """An evaluator that leaves a line for everything that it evaluates."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def evaluate(self, supernet: Anything, architecture: Architecture) -> Evaluation:
        time.sleep(0.02)
        with (self.folder / str(os.getpid())).open("a") as file:
            file.write(f"{architecture['number']}\n")
        return Evaluation(int(architecture["number"]) / 1000, 0.5)


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[DaskWorkers]:
    (tmp_path / "done").mkdir()
    workers = DaskWorkers(Slow(tmp_path / "done"), Anything(), workers=4)  # type: ignore[arg-type]
    yield workers
    workers.close()


def done(folder: Path) -> Counter[int]:
    return Counter(int(line) for file in (folder / "done").iterdir() for line in file.read_text().splitlines())


def test_a_killed_worker_loses_nothing(workers: DaskWorkers, tmp_path: Path) -> None:
    def kill_one() -> None:
        while done(tmp_path).total() < 60:
            time.sleep(0.02)
        os.kill(int(next((tmp_path / "done").iterdir()).name), signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    asked = [Architecture({"number": number}) for number in range(200)]
    result = list(workers.evaluate(asked))
    killer.join()
    assert len(result) == 200
    assert dict(result) == {a: Evaluation(int(a["number"]) / 1000, 0.5) for a in asked}
    assert len(list((tmp_path / "done").iterdir())) >= 4


def test_a_run_on_dask_is_the_run_of_one_process(call: Call, finished: Path, tmp_path: Path, tiny_job: Job) -> None:
    ended = call(tmp_path, *tiny_job, "run=run", "evaluator=dask", "evaluator.workers=2")
    assert ended.status == 0, ended.err
    assert ended.err == ""
    assert (tmp_path / "run" / "front.csv").read_bytes() == (finished / "front.csv").read_bytes()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"workers": 0}, "evaluator.workers is 0"),
        ({"threads": "many"}, "evaluator.threads is 'many'"),
        ({"workers": 2, "address": "tcp://127.0.0.1:9"}, "both given"),
    ],
)
def test_mistakes(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        DaskWorkers(None, None, **values)  # type: ignore[arg-type]


def test_nobody_at_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search.dask_workers.CONNECT_S", 1)
    with pytest.raises(UserError, match=r"no scheduler answers at tcp://127\.0\.0\.1:9"):
        DaskWorkers(None, None, address="tcp://127.0.0.1:9")  # type: ignore[arg-type]
