"""Evaluations on the workers of dask.distributed: processes on this machine, or a cluster that already runs.

Every worker gets the supernet's weights and the validation images once. A worker that dies is replaced by Dask, and what it
was at is given to another. Workers only measure accuracy; latency is never measured there.
"""

from __future__ import annotations

import importlib
import logging
import os
import pickle
import warnings
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch

from search.evaluation import Evaluation, Evaluator
from search.workers import Workers
from spaces.choice import Architecture, Option
from spaces.errors import UserError
from spaces.supernet import Supernet

ATTEMPTS = 5
CONNECT_S = 30


class DaskWorkers(Workers):
    """Evaluate on Dask.

    Args:
        evaluator: measures networks.
        supernet: their weights.
        workers: processes to start on this machine; `null` for half of its cores. Not with an address.
        threads: of torch in each worker.
        address: of the scheduler of a cluster that runs already, such as `tcp://head:8786`.

    Raises:
        UserError: Dask is not installed, the numbers are not allowed, or nobody answers at the address.
    """

    def __init__(
        self, evaluator: Evaluator, supernet: Supernet, workers: int | None = None, threads: int = 1, address: str | None = None
    ) -> None:
        distributed = self._distributed = _dask()
        for name, value in (("workers", workers), ("threads", threads)):
            if value is not None and (type(value) is not int or value < 1):
                raise UserError(f"evaluator.{name} is {value!r}; allowed are integers from 1")
        if address is not None and workers is not None:
            raise UserError("evaluator.workers and evaluator.address are both given; allowed is one of them")
        self._cluster = None
        if address is None:
            count = workers or max(1, (os.cpu_count() or 2) // 2)
            self._cluster = distributed.LocalCluster(
                n_workers=count, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=logging.CRITICAL
            )
        try:
            self._client = distributed.Client(self._cluster or address, timeout=CONNECT_S, set_as_default=False)
        except (OSError, ValueError) as error:
            raise UserError(
                f"evaluator.address: no scheduler answers at {address} ({error}); start one: dask scheduler"
            ) from error
        self._work = pickle.dumps((evaluator, supernet, threads))  # Dask would take a module apart into its attributes

    def evaluate(self, architectures: Sequence[Architecture]) -> Iterator[tuple[Architecture, Evaluation]]:
        missing = list(architectures)
        for _ in range(ATTEMPTS):
            lost: list[Architecture] = []
            for architecture, evaluation in self._attempt(missing):
                if evaluation is None:
                    lost.append(architecture)
                else:
                    yield architecture, evaluation
            if not lost:
                return
            missing = lost
        raise UserError(
            f"{len(missing)} evaluations were lost {ATTEMPTS} times, as their Dask workers died; give the workers more memory"
        )

    def _attempt(self, architectures: Sequence[Architecture]) -> Iterator[tuple[Architecture, Evaluation | None]]:
        """Evaluations, `None` for those that were lost with a worker or with what it held."""
        dask = self._distributed
        gone = (dask.scheduler.KilledWorker, dask.client.FutureCancelledError, dask.client.FuturesCancelledError)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that the weights are large
                work = self._client.scatter(self._work, broadcast=True, hash=False)
        except (OSError, TimeoutError) as error:
            raise UserError(f"no Dask worker took the supernet ({error}); start workers: dask worker SCHEDULER") from error
        futures = {self._client.submit(_evaluate, work, dict(a), pure=False): a for a in architectures}
        for future in dask.as_completed(futures, loop=self._client.loop):
            try:
                yield futures[future], Evaluation(*future.result())
            except gone:
                yield futures[future], None

    def close(self) -> None:
        self._client.close()
        if self._cluster is not None:
            self._cluster.close()


def _dask() -> Any:
    try:
        return importlib.import_module("distributed")
    except ImportError as error:
        raise UserError("evaluator=dask: dask.distributed is not installed; run: pip install -e '.[cluster]'") from error


@lru_cache(maxsize=1)
def _unpacked(work: bytes) -> tuple[Evaluator, Supernet]:
    evaluator, supernet, threads = pickle.loads(work)  # of the process that asks, over Dask's connection, which pickles itself
    torch.set_num_threads(threads)
    return evaluator, supernet


def _evaluate(work: bytes, architecture: dict[str, Option]) -> tuple[float, float]:
    """In a worker: accuracy and loss of an architecture."""
    evaluator, supernet = _unpacked(work)
    measured = evaluator.evaluate(supernet, supernet.space.architecture(architecture))
    return measured.accuracy, measured.loss
