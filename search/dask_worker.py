"""What a worker process of Dask does: look whether it has the code of the search, load the work once, do pieces of it.

What is unpickled here comes from the process that asks, over Dask's connection, by which workers can be told to run anything;
nothing of it is read from disk. One piece at a time, as torch has one random generator and one number of threads. Only
`UserError` is raised here, so that whatever else comes from a worker is Dask's own failure, such as a worker without this
package.
"""

from __future__ import annotations

import hashlib
import pickle
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from latency_lut.command import mistake
from search.heap import keep_freed_memory
from search.training.fit import quiet_lightning
from spaces.errors import UserError

PACKAGES = ("torch", "numpy", "pytorch-lightning")
FOLDERS = ("spaces", "latency_lut", "predictors", "search")
ADVICE = "start workers in the same checkout, with the same packages"


@dataclass(frozen=True)
class Done:
    """Results of a group, and the seconds that they took."""

    values: list[Any]
    seconds: float


@dataclass(frozen=True)
class Failed:
    """A piece met a bug; `trace` is its traceback."""

    trace: str


_ONE_AT_A_TIME = threading.Lock()


def do(items: bytes, content: bytes, versions: Mapping[str, str], threads: int) -> Done | Failed:
    """Do pieces of work, one after the other.

    Args:
        items: what is to be done, a list, pickled.
        content: the work, pickled.
        versions: of the process that asks, see `own_versions`.
        threads: of torch.

    Raises:
        UserError: this process has other code, cannot load the work, or the work says what the user can mend.
    """
    with _ONE_AT_A_TIME:
        own = own_versions()
        for name, wanted in versions.items():
            if own[name] != wanted:
                where = socket.gethostname()
                raise UserError(f"a Dask worker on {where} has {name} {own[name]}, and the search {wanted}; {ADVICE}")
        torch.set_num_threads(threads)
        work = _loaded(content)
        begin = time.perf_counter()
        try:
            values = [work(item) for item in pickle.loads(items)]
        except UserError:
            raise
        except Exception as error:
            line = mistake(error)
            if line is not None:
                raise UserError(f"on a Dask worker on {socket.gethostname()}: {line}") from None
            return Failed(traceback.format_exc())
        return Done(values, time.perf_counter() - begin)


@lru_cache(maxsize=2)
def _loaded(content: bytes) -> Callable[[Any], Any]:
    quiet_lightning()
    keep_freed_memory()
    try:
        work: Callable[[Any], Any] = pickle.loads(content)
    except (ImportError, AttributeError) as error:
        raise UserError(f"a Dask worker on {socket.gethostname()} cannot load the work ({error}); {ADVICE}") from error
    return work


@cache
def own_versions() -> dict[str, str]:
    """Versions of what the results depend on; of the code here it is a fingerprint."""
    root, code = Path(__file__).resolve().parent.parent, hashlib.sha256()
    for path in sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py")):
        code.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    packages = {name: version(name).partition("+")[0] for name in PACKAGES}  # the same with and without CUDA
    return {"Netwright": code.hexdigest()[:12], "Python": "{}.{}".format(*sys.version_info), **packages}
