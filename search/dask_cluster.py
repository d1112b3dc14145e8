"""A cluster of dask.distributed to work on: worker processes started on this machine, or a scheduler that runs already.

Whatever can go wrong at the start is told in one line: no Dask here, workers that end at once, an address of something else.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import warnings
from typing import Any

from spaces.errors import UserError

CONNECT_S = 30
START_S = 300  # a worker process that is not there by then will not come
SETTINGS = {
    "distributed.worker.daemon": False,  # a data module may have processes of its own
    "distributed.worker.profile.enabled": False,  # it looks at every stack a hundred times a second, and nobody looks at that
    "distributed.scheduler.active-memory-manager.start": False,  # it takes back what all workers were given
    "distributed.admin.tick.interval": "1s",  # every process looks at itself so often, by default fifty times a second
    "distributed.admin.tick.limit": "30s",
    "distributed.admin.system-monitor.interval": "5s",
    "distributed.worker.memory.monitor-interval": "1s",
}
LOGGERS = ("distributed", "distributed.client", "tornado.application")  # with tracebacks of what is told here in a line


def dask() -> Any:
    """The package `distributed`.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("distributed")
    except ImportError as error:
        raise UserError("evaluator=dask: dask.distributed is not installed; run: pip install -e '.[cluster]'") from error


def connected(workers: int, address: str | None) -> tuple[Any, Any]:
    """A client, and the cluster where it was started here.

    Args:
        workers: processes to start, where there is no address.
        address: of a scheduler that runs already.

    Raises:
        UserError: a worker process does not start, or no scheduler answers at the address.
    """
    distributed = dask()
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if address is None:
        cluster = _started(distributed, workers)
    else:
        _check_scheduler(distributed, address)
        cluster = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", distributed.versions.VersionMismatchWarning)  # workers compare what matters
            return distributed.Client(cluster or address, timeout=CONNECT_S, set_as_default=False), cluster
    except Exception as error:
        if cluster is not None:
            cluster.close()
        where = address or "that was started here"
        raise UserError(f"evaluator=dask: no connection to the scheduler {where} ({reason(error)})") from error


def _started(distributed: Any, workers: int) -> Any:
    """A scheduler in this process, and worker processes on this machine."""
    importlib.import_module("dask.config").set(SETTINGS)
    try:
        return distributed.LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            scheduler_kwargs={"dashboard": False, "dashboard_address": "127.0.0.1:0"},  # any free port, for nobody
            silence_logs=logging.CRITICAL,
            death_timeout=START_S,
        )
    except Exception as error:
        raise UserError(
            f"evaluator=dask: worker processes cannot be started on this machine ({reason(error)}); "
            "allowed are fewer (evaluator.workers=1), and evaluator=local"
        ) from error


def _check_scheduler(distributed: Any, address: str) -> None:
    """Ask who answers at an address: a client would wait for ever for what listens and is not Dask."""

    async def identity() -> dict[str, Any]:
        own = distributed.Security().get_connection_args("client")
        async with distributed.core.rpc(address, timeout=CONNECT_S, connection_args=own) as server:
            answer: dict[str, Any] = await asyncio.wait_for(server.identity(), CONNECT_S)
            return answer

    try:
        kind = str(asyncio.run(identity())["type"])
    except Exception as error:  # anything may answer
        raise UserError(
            f"evaluator.address: no scheduler answers at {address} ({reason(error)}); start one: dask scheduler"
        ) from error
    if kind != "Scheduler":
        raise UserError(f"evaluator.address: {address} is a Dask {kind}; allowed is the address that dask scheduler tells")


def reason(error: BaseException) -> str:
    """What began an error, in a line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())[:160].rstrip(": ")
