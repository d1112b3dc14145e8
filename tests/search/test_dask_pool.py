"""Work on Dask: the same results as in one process, and nothing lost with a worker that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from search.dask_pool import DaskPool
from search.evaluation import Evaluation
from search.pool import Pool, ThisProcess
from search.workers import PoolWorkers
from spaces.choice import Architecture
from spaces.errors import UserError
from tests.cluster import dask

pytest.importorskip("distributed", reason="dask.distributed is not installed (extra `cluster`)")

Call = Callable[..., Any]
Job = tuple[str, ...]


class Slow:
    """Evaluates, and leaves a line for everything that it evaluates in a file of its process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, architecture: Architecture) -> Evaluation:
        time.sleep(0.02)
        with (self.folder / str(os.getpid())).open("a") as file:
            file.write(f"{architecture['number']}\n")
        return Evaluation(int(architecture["number"]) / 1000, 0.5)


class Countdown:
    """Counts down by one."""

    def __call__(self, number: int) -> int:
        return number - 1


class Fails:
    """Tells a user's mistake."""

    def __call__(self, number: int) -> int:
        raise UserError(f"{number} is not allowed")


class Dies:
    """Takes its process with it."""

    def __call__(self, number: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return number


class StaysHere:
    """Cannot be sent anywhere."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __call__(self, number: int) -> int:
        return number


@pytest.fixture(scope="module")
def pool() -> Iterator[DaskPool]:
    with closing(DaskPool(workers=4)) as pool:
        yield pool


def done(folder: Path) -> Counter[int]:
    return Counter(int(line) for file in (folder / "done").iterdir() for line in file.read_text().splitlines())


def test_a_killed_worker_loses_nothing(pool: DaskPool, tmp_path: Path) -> None:
    (tmp_path / "done").mkdir()

    def kill_one() -> None:
        while done(tmp_path).total() < 60:
            time.sleep(0.02)
        os.kill(int(next((tmp_path / "done").iterdir()).name), signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    asked = [Architecture({"number": number}) for number in range(200)]
    result = list(PoolWorkers(pool, Slow(tmp_path / "done")).evaluate(asked))
    killer.join()
    assert len(result) == 200
    assert dict(result) == {a: Evaluation(int(a["number"]) / 1000, 0.5) for a in asked}
    assert len(list((tmp_path / "done").iterdir())) >= 4


@pytest.mark.parametrize("sparingly", [False, True])
def test_what_goes_on_from_a_result_is_done_too(pool: DaskPool, sparingly: bool) -> None:
    def counted(pool: Pool) -> tuple[dict[int, int], Counter[int]]:
        steps: Counter[int] = Counter()

        def then(index: int, number: int) -> int | None:
            steps[index] += 1
            return number if number else None

        return dict(pool.each(Countdown(), (number for number in range(1, 8)), then, sparingly)), steps

    results, steps = counted(pool)
    assert results == dict.fromkeys(range(7), 0)
    assert steps == {index: index + 1 for index in range(7)}
    assert counted(ThisProcess()) == (results, steps)


def test_nothing_is_nothing(pool: DaskPool) -> None:
    assert list(pool.each(Countdown(), [])) == []


def test_mistakes_of_a_piece_are_told(pool: DaskPool) -> None:
    with pytest.raises(UserError, match="3 is not allowed"):
        list(pool.each(Fails(), [3]))
    assert list(pool.each(Countdown(), [3])) == [(0, 2)]


def test_what_cannot_be_sent_is_told(pool: DaskPool) -> None:
    with pytest.raises(UserError, match="cannot be sent to workers"):
        list(pool.each(StaysHere(), [1]))


def test_what_kills_every_worker_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search.dask_pool.ATTEMPTS", 1)
    with closing(DaskPool(workers=1)) as pool, pytest.raises(UserError, match="was lost 1 times"):
        list(pool.each(Dies(), [1]))


def test_a_run_on_dask_is_the_run_of_one_process(call: Call, finished: Path, tmp_path: Path, tiny_job: Job) -> None:
    ended = call(tmp_path, *tiny_job, "run=run", "evaluator=dask", "evaluator.workers=2")
    assert ended.status == 0, ended.err
    assert ended.err == ""
    assert (tmp_path / "run" / "front.csv").read_bytes() == (finished / "front.csv").read_bytes()


# -- a cluster that runs already ----------------------------------------------------------------------------------------------


@pytest.fixture
def scheduler() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    with dask.scheduler() as started:
        yield started


def test_workers_are_waited_for(scheduler: tuple[str, subprocess.Popen[str]]) -> None:
    said: list[str] = []
    address = scheduler[0]
    with ExitStack() as started:

        def say(line: str) -> None:
            said.append(line)
            started.enter_context(dask.worker(address, "--nthreads", "4"))

        with closing(DaskPool(address=address, say=say)) as pool:
            assert dict(pool.each(Countdown(), range(10))) == {number: number - 1 for number in range(10)}
    assert said == [f"  waiting: no Dask worker at {address}; start some: dask worker {address} --nthreads 1"]


def test_workers_that_do_not_come_are_told(
    scheduler: tuple[str, subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.dask_pool.PATIENCE_S", 0.5)
    address = scheduler[0]
    with closing(DaskPool(address=address)) as pool, pytest.raises(UserError, match=f"no Dask worker at {address}"):
        list(pool.each(Countdown(), [1]))


def test_a_scheduler_that_goes_away_is_told(scheduler: tuple[str, subprocess.Popen[str]]) -> None:
    address, process = scheduler
    gone = pytest.raises(UserError, match=f"the Dask scheduler {address} is gone")
    with closing(DaskPool(address=address, say=lambda line: process.kill())) as pool, gone:
        list(pool.each(Countdown(), [1]))


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
        DaskPool(**values)
