"""Workers of Dask that cannot start or cannot work, and addresses of something else: each is one clear line."""

from __future__ import annotations

import importlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from search.dask_pool import DaskPool
from spaces.errors import UserError
from tests.cluster import dask

pytest.importorskip("distributed", reason="dask.distributed is not installed (extra `cluster`)")

Job = tuple[str, ...]


class Square:
    """Squares."""

    def __call__(self, number: int) -> int:
        return number * number


class NeedsMemory:
    """Takes more memory than there is."""

    def __call__(self, number: int) -> int:
        return len(bytearray(1 << 50))


class HasABug:
    """Divides by zero."""

    def __call__(self, number: int) -> float:
        return number / 0


def preloaded(program: str) -> Any:
    """Settings with which every worker process that starts here runs a program first."""
    return importlib.import_module("dask.config").set({"distributed.worker.preload": [program]})


# -- on this machine ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import os; os._exit(3)", r"worker processes cannot be started on this machine \(.*; allowed are fewer"),
        ("import no_such_package", "No module named 'no_such_package'"),
        ("raise MemoryError('no room')", "MemoryError: no room"),
    ],
)
def test_a_worker_that_ends_at_its_start(program: str, words: str) -> None:
    with preloaded(program), pytest.raises(UserError, match=words):
        DaskPool(workers=2)


def test_a_search_whose_workers_do_not_start_is_one_line(tiny_job: Job, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    command = [sys.executable, "-m", "search", *tiny_job, "run=run", "evaluator=dask", "evaluation.initial=14"]
    own = {**os.environ, "PYTHONPATH": str(dask.ROOT), "DASK_DISTRIBUTED__WORKER__PRELOAD": "import os; os._exit(3)"}
    ended = subprocess.run(command, cwd=tmp_path, env=own, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert "error: evaluator=dask: worker processes cannot be started" in ended.stderr


def test_workers_that_do_not_start_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search.dask_pool.OWN_PATIENCE_S", 1.0)
    program = f"import os, pathlib\nif pathlib.Path({str(tmp_path / 'full')!r}).exists(): os._exit(3)"
    with preloaded(program), closing(DaskPool(workers=1)) as pool:
        assert dict(pool.each(Square(), [2])) == {0: 4}
        (tmp_path / "full").touch()
        (worker,) = [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
        worker.kill()
        while pool._threads_there():  # until the scheduler knows
            time.sleep(0.05)
        with pytest.raises(UserError, match="ended and do not start again"):
            list(pool.each(Square(), [3]))


def test_no_memory_and_bugs_in_a_worker() -> None:
    with closing(DaskPool(workers=1)) as pool:
        with pytest.raises(UserError, match=r"on a Dask worker on .* not enough memory"):
            list(pool.each(NeedsMemory(), [1]))
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):  # with its traceback
            list(pool.each(HasABug(), [1]))
        assert dict(pool.each(Square(), [2])) == {0: 4}


# -- on a cluster -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with dask.scheduler() as (address, _):
        yield address


WITHOUT_THE_PACKAGE = f"""
import sys  # run at the start of each process, after what an editable installation has put in
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
sys.path[:] = [path for path in sys.path if path != {str(dask.ROOT)!r}]
"""


def test_a_worker_without_the_package(address: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_THE_PACKAGE)
    cannot = pytest.raises(UserError, match=r"No module named 'search'\); start workers in the same checkout")
    with dask.worker(address, "--nthreads", "1", path=tmp_path), closing(DaskPool(address=address)) as pool, cannot:
        list(pool.each(Square(), [1]))


def test_a_worker_with_other_code(address: str, tmp_path: Path) -> None:
    for folder in ("spaces", "latency_lut", "predictors", "search", "conf"):
        shutil.copytree(dask.ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "node_modules"))
    with (tmp_path / "spaces" / "choice.py").open("a") as file:
        file.write("# changed\n")
    refuses = pytest.raises(UserError, match=r"has Netwright \w+, and the search \w+; start workers in the same checkout")
    with dask.worker(address, "--nthreads", "1", path=tmp_path), closing(DaskPool(address=address)) as pool, refuses:
        list(pool.each(Square(), [1]))


FULL = r"the Dask workers at .* take no work, as their memory is full"


def test_workers_whose_memory_is_full(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search.dask_pool.PATIENCE_S", 1.0)
    said: list[str] = []
    full = {"DASK_DISTRIBUTED__WORKER__MEMORY__TERMINATE": "false"}
    with (
        dask.worker(address, "--nthreads", "1", "--memory-limit", "20MB", environment=full),
        closing(DaskPool(address=address, say=said.append)) as pool,
    ):
        pool._client.wait_for_workers(1)
        while pool._threads_there():  # until the worker has looked at its memory
            time.sleep(0.05)
        with pytest.raises(UserError, match=FULL):
            list(pool.each(Square(), [1]))


def test_workers_whose_memory_fills_with_what_is_sent(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with dask.worker(address, "--nthreads", "1"), closing(DaskPool(address=address)) as pool:
        scatter, attempts = pool._client.scatter, []

        def fills(*arguments: Any, **options: Any) -> Any:
            attempts.append(1)
            if len(attempts) == 2:
                return scatter(*arguments, **options)
            raise ValueError("Can not use replicate to delete data")  # what Dask says where the last worker stops taking work

        monkeypatch.setattr(pool._client, "scatter", fills)
        assert dict(pool.each(Square(), [2])) == {0: 4}
        with pytest.raises(UserError, match=FULL):
            list(pool.each(Square(), [1]))


# -- addresses ----------------------------------------------------------------------------------------------------------------


@contextmanager
def web_server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"tcp://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextmanager
def silent() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("what", [web_server, silent])
def test_what_listens_is_no_scheduler(what: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search.dask_cluster.CONNECT_S", 1)
    with what() as address, pytest.raises(UserError, match=f"no scheduler answers at {address}"):
        DaskPool(address=address)


@pytest.mark.parametrize(
    "address", ["tcp://127.0.0.1:9", "127.0.0.1", "nowhere", "http://127.0.0.1:80", "tls://127.0.0.1:9", 8786]
)
def test_nobody_at_the_address(address: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search.dask_cluster.CONNECT_S", 1)
    with pytest.raises(UserError, match=f"no scheduler answers at {address}.*; start one: dask scheduler"):
        DaskPool(address=address)


def test_the_address_of_a_worker(address: str) -> None:
    with dask.worker(address, "--nthreads", "1", "--no-nanny"), closing(DaskPool(address=address)) as pool:
        pool._client.wait_for_workers(1)
        (worker,) = pool._client.nthreads()
        with pytest.raises(UserError, match=f"{worker} is a Dask Worker; allowed is the address that dask scheduler tells"):
            DaskPool(address=worker)
