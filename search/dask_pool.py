"""Workers of dask.distributed: processes on this machine, or a cluster that already runs.

What all pieces of some work need (weights, images) goes to every worker once; after that only the items and their results
travel. A worker that dies is replaced by Dask, where Dask started it, and what it was at is given to another. Results do not
depend on who did what: a worker process does one piece at a time, as torch has one random generator and one number of threads.
"""

from __future__ import annotations

import importlib
import logging
import os
import pickle
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Any, TypeVar
from uuid import uuid4

import torch

from search.heap import keep_freed_memory
from search.pool import Pool, last
from search.training.fit import quiet_lightning
from spaces.errors import UserError

ATTEMPTS = 5
AHEAD = 2  # pieces of large items for each thread of the workers: one that it does, one that waits
GROUP_S = 0.1
CONNECT_S = 30
LOOK_S = 1.0
PATIENCE_S = 600.0
SETTINGS = {
    "distributed.worker.daemon": False,  # a data module may have processes of its own
    "distributed.worker.profile.enabled": False,  # it looks at every stack a hundred times a second, and nobody looks at that
    "distributed.scheduler.active-memory-manager.start": False,  # it takes back what all workers were given
    "distributed.admin.tick.interval": "1s",  # every process looks at itself so often, by default fifty times a second
    "distributed.admin.tick.limit": "30s",
    "distributed.admin.system-monitor.interval": "5s",
    "distributed.worker.memory.monitor-interval": "1s",
}

Item = TypeVar("Item")
Result = TypeVar("Result")


class DaskPool(Pool):
    """Workers of Dask.

    Args:
        workers: processes to start on this machine; `null` for half of its cores. Not with an address.
        threads: of torch in each worker.
        address: of the scheduler of a cluster that runs already, such as `tcp://head:8786`.
        say: tells a line.

    Raises:
        UserError: Dask is not installed, the numbers are not allowed, or nobody answers at the address.
    """

    is_here = False

    def __init__(
        self,
        workers: int | None = None,
        threads: int = 1,
        address: str | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        super().__init__(say)
        for name, value in (("workers", workers), ("threads", threads)):
            if value is not None and (type(value) is not int or value < 1):
                raise UserError(f"evaluator.{name} is {value!r}; allowed are integers from 1")
        if address is not None and workers is not None:
            raise UserError("evaluator.workers and evaluator.address are both given; allowed is one of them")
        distributed = self._distributed = _dask()
        self.threads, self._cluster = threads, None
        if address is None:
            importlib.import_module("dask.config").set(SETTINGS)
            self._cluster = distributed.LocalCluster(
                n_workers=workers or max(1, (os.cpu_count() or 2) // 2),
                threads_per_worker=1,
                processes=True,
                scheduler_kwargs={"dashboard": False, "dashboard_address": "127.0.0.1:0"},  # any free port, for nobody
                silence_logs=logging.CRITICAL,
            )
        try:
            self._client = distributed.Client(self._cluster or address, timeout=CONNECT_S, set_as_default=False)
        except (OSError, ValueError) as error:
            raise UserError(
                f"evaluator.address: no scheduler answers at {address} ({error}); start one: dask scheduler"
            ) from error
        self._where = self._client.scheduler.address
        self._work: object = None
        self._sent: Any = None
        self._pieces, self._pieces_s = 0, 0.0

    def each(
        self,
        work: Callable[[Item], Result],
        items: Iterable[Item],
        then: Callable[[int, Result], Item | None] = last,
        sparingly: bool = False,
    ) -> Iterator[tuple[int, Result]]:
        coming = enumerate(items)
        open_: dict[int, Item] = {}
        lost: Counter[int] = Counter()
        asked: dict[Any, list[int]] = {}
        done = self._distributed.as_completed(loop=self._client.loop, with_results=True, raise_errors=False)
        again: list[int] = []
        while True:
            room = max(0, max(1, AHEAD * self._threads_there()) - len(open_)) if sparingly else None
            new = dict(islice(coming, room))
            open_ |= new
            futures = self._submit(work, open_, [*again, *new], sparingly)
            asked |= futures
            done.update(futures)
            if not asked:
                return
            again, results = [], []
            for future, answer in self._come(done):
                indices, values = asked.pop(future), self._values(answer)
                if values is None:
                    again += indices
                    lost.update(indices)
                    self._check_lost(lost)
                    continue
                for index, value in zip(indices, values, strict=True):
                    following = then(index, value)
                    if following is None:
                        results.append((index, value))
                        del open_[index]
                    else:
                        open_[index] = following
                        again.append(index)
                        del lost[index]
            yield from results

    def _submit(
        self, work: Callable[[Item], Result], items: dict[int, Item], indices: list[int], alone: bool
    ) -> dict[Any, list[int]]:
        """Hand out some of the items; futures with the numbers of theirs."""
        if not indices:
            return {}
        sent = self._send(work)
        groups = [[index] for index in indices] if alone else self._groups(indices)
        count = len(groups)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that items are large
            theirs = [[items[index] for index in group] for group in groups]
            futures = self._client.map(_do, theirs, [sent] * count, [self.threads] * count, pure=False)
        return dict(zip(futures, groups, strict=True))

    def _groups(self, indices: list[int]) -> list[list[int]]:
        """Numbers of items in groups that take about `GROUP_S`, towards the end fewer, so that all workers end together."""
        most = int(GROUP_S * self._pieces / self._pieces_s) if self._pieces else 1
        if most < 2:
            return [[index] for index in indices]
        rounds = 3 * max(1, self._threads_there())
        groups, at = [], 0
        while at < len(indices):
            size = max(1, min(most, (len(indices) - at) // rounds))
            groups.append(indices[at : at + size])
            at += size
        return groups

    def _send(self, work: object) -> Any:
        """What all pieces need, at the workers; sent again where it was lost with the last one that had it."""
        if self._work is not work or self._sent.status != "finished":
            try:
                content = pickle.dumps(work)  # for Dask's connection, which pickles itself; nothing of it is read from disk
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise UserError(
                    f"evaluator=dask: data module or space cannot be sent to workers ({error}); allowed is evaluator=local"
                ) from error
            self._wait_for_workers()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # that the weights are large
                    self._sent = self._client.scatter(Sent(uuid4().hex, content), broadcast=True, hash=False)
            except (OSError, TimeoutError) as error:
                raise self._gone(error) from error
            self._work, self._pieces, self._pieces_s = work, 0, 0.0
        return self._sent

    def _come(self, done: Any) -> list[tuple[Any, Any]]:
        """Futures that are done, with what came of them; at least one."""
        while not self._ready(done):
            self._wait_for_workers()
        return list(done.next_batch(block=False))

    @staticmethod
    def _ready(done: Any) -> bool:
        """Whether a future is done, within `LOOK_S`; woken up, as asking again and again takes the workers' time here."""
        with done.thread_condition:
            return bool(done.has_ready() or done.thread_condition.wait(LOOK_S) or done.has_ready())

    def _values(self, answer: Any) -> list[Any] | None:
        """What came of a group; `None` where it was lost with a worker or with what that held."""
        if isinstance(answer, Done):
            self._pieces, self._pieces_s = self._pieces + len(answer.values), self._pieces_s + answer.seconds
            return answer.values
        error = answer[1] if isinstance(answer, tuple) else answer
        if isinstance(error, (CancelledError, self._distributed.scheduler.KilledWorker)):
            return None
        raise error

    @staticmethod
    def _check_lost(lost: Counter[int]) -> None:
        if max(lost.values()) >= ATTEMPTS:
            raise UserError(
                f"a piece of work was lost {ATTEMPTS} times, as the Dask workers that were at it died; give them more memory"
            )

    def _threads_there(self) -> int:
        try:
            return sum(self._client.nthreads().values())
        except (OSError, TimeoutError, CancelledError) as error:
            raise self._gone(error) from error

    def _wait_for_workers(self) -> None:
        """Return when there is a worker.

        Raises:
            UserError: none came for `PATIENCE_S` seconds, or the scheduler is gone.
        """
        begin, told = time.monotonic(), self._cluster is not None  # those that were started here are on their way
        while not self._threads_there():
            waited_s = time.monotonic() - begin
            if waited_s > PATIENCE_S:
                raise UserError(f"no Dask worker came to {self._where}; start some: dask worker {self._where} --nthreads 1")
            if not told and waited_s > LOOK_S:
                self.say(f"  no Dask worker at {self._where}; waiting for: dask worker {self._where} --nthreads 1")
                told = True
            time.sleep(LOOK_S / 4)

    def _gone(self, error: BaseException) -> UserError:
        reason = " ".join(str(error).split())[:160]
        return UserError(f"the Dask scheduler {self._where} is gone ({reason}); start it and run the same command")

    def close(self) -> None:
        self._client.close()
        if self._cluster is not None:
            self._cluster.close()


def _dask() -> Any:
    try:
        return importlib.import_module("distributed")
    except ImportError as error:
        raise UserError("evaluator=dask: dask.distributed is not installed; run: pip install -e '.[cluster]'") from error


# -- in a worker --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sent:
    """What all pieces need, pickled; equal to others by its name."""

    name: str
    content: bytes = field(compare=False, repr=False)


@dataclass(frozen=True)
class Done:
    """Results of a group, and the seconds that they took."""

    values: list[Any]
    seconds: float


_ONE_AT_A_TIME = threading.Lock()


@lru_cache(maxsize=2)
def _loaded(sent: Sent) -> Callable[[Any], Any]:
    quiet_lightning()
    keep_freed_memory()
    try:
        work: Callable[[Any], Any] = pickle.loads(sent.content)  # of the process that asks, over Dask's connection
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"a Dask worker cannot load the work ({error}); start workers in the same checkout, with the same packages"
        ) from error
    return work


def _do(items: list[Any], sent: Sent, threads: int) -> Done:
    with _ONE_AT_A_TIME:
        torch.set_num_threads(threads)
        work = _loaded(sent)
        begin = time.perf_counter()
        values = [work(item) for item in items]
        return Done(values, time.perf_counter() - begin)
