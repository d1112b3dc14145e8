"""A scheduler and workers of Dask as a cluster has them: processes started by `dask scheduler` and `dask worker`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def scheduler() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A scheduler without workers; its address, and its process."""
    arguments = ["-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    process = subprocess.Popen([sys.executable, *arguments], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        address = None
        while address is None:
            address = re.search(r"tcp://\S+", process.stderr.readline())
        yield address.group(), process
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@contextmanager
def worker(
    address: str, *arguments: str, path: Path = ROOT, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A worker; `path` is where it finds packages first."""
    command = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--no-dashboard", *arguments]
    own = {**os.environ, **(environment or {}), "PYTHONPATH": str(path)}
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=own, cwd=path)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()
