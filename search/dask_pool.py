"""Workers of dask.distributed: processes on this machine, or a cluster that already runs.

What all pieces of some work need (weights, images) goes to every worker once; after that only the items and their results
travel. A worker that dies is replaced by Dask, where Dask started it, and what it was at is given to another. Results do not
depend on who did what: a worker process does one piece at a time, as torch has one random generator and one number of threads.
"""

from __future__ import annotations

import os
import pickle
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from itertools import islice
from typing import Any, TypeVar

from search.dask_cluster import connected, dask, reason
from search.dask_worker import ADVICE, Done, Failed, own_versions
from search.pool import Pool, last
from spaces.errors import UserError

ATTEMPTS = 5
AHEAD = 2  # pieces of large items for each thread of the workers: one that it does, one that waits
GROUP_S = 0.1
LOOK_S = 1.0
PATIENCE_S = 600.0
OWN_PATIENCE_S = 120.0  # for worker processes that were started here; Dask tries for ever to start them again
# A function's name would be looked up while a worker reads a message, and one without this package would break off there, again
# and again. This fails in the task, and is told.
DO = "__import__('importlib').import_module('search.dask_worker').do(items, content, versions, threads)"

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
        self.threads, self._distributed = threads, dask()
        self._client, self._cluster = connected(workers or max(1, (os.cpu_count() or 2) // 2), address)
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
            texts = [pickle.dumps([items[index] for index in group]) for group in groups]
            known = {"content": sent, "versions": own_versions(), "threads": self.threads}
            futures = self._client.map(eval, [DO] * count, [{"items": text, **known} for text in texts], pure=False)
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
            self._sent = self._scattered(content)
            self._work, self._pieces, self._pieces_s = work, 0, 0.0
        return self._sent

    def _scattered(self, content: bytes) -> Any:
        """Give every worker the same; tried again where a worker died meanwhile, or its memory filled."""
        attempts = 0
        while True:
            self._wait_for_workers()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # that it is large
                    return self._client.scatter(content, broadcast=True, hash=False)
            except (OSError, TimeoutError, CancelledError, ValueError) as error:
                attempts += 1
                if attempts == ATTEMPTS:
                    full = isinstance(error, ValueError)  # that no worker is left that takes a copy
                    raise (UserError(self._full()) if full else self._gone(error)) from error

    def _come(self, done: Any) -> list[tuple[Any, Any]]:
        """Futures that are done, with what came of them; at least one."""
        while not self._ready(done):
            self._wait_for_workers(done.has_ready)
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
        if isinstance(answer, Failed):
            raise RuntimeError(f"a piece of work failed on a Dask worker:\n{answer.trace}")
        error = answer[1] if isinstance(answer, tuple) else answer
        if isinstance(error, (CancelledError, self._distributed.scheduler.KilledWorker)):
            return None
        if isinstance(error, UserError):
            raise error
        raise UserError(f"a Dask worker cannot do the work ({reason(error)}); {ADVICE}") from error

    @staticmethod
    def _check_lost(lost: Counter[int]) -> None:
        if max(lost.values()) >= ATTEMPTS:
            raise UserError(
                f"a piece of work was lost {ATTEMPTS} times, as the Dask workers that were at it died; give them more memory"
            )

    def _threads_there(self) -> int:
        """Threads of the workers that take work; a worker whose memory is nearly full takes none."""
        try:
            return sum(self._client.sync(self._client.scheduler.ncores_running, workers=None).values())
        except (OSError, TimeoutError, CancelledError) as error:
            raise self._gone(error) from error

    def _wait_for_workers(self, until: Callable[[], bool] = lambda: False) -> None:
        """Return when there is a worker that takes work, or a condition is true.

        Raises:
            UserError: none came for long, or the scheduler is gone.
        """
        begin, told = time.monotonic(), False
        while not self._threads_there() and not until():
            waited_s = time.monotonic() - begin
            absent = self._who_is_missing()
            if waited_s > (PATIENCE_S if self._cluster is None else OWN_PATIENCE_S):
                raise UserError(absent)
            if not told and waited_s > LOOK_S and self._cluster is None:  # those that were started here are on their way
                self.say(f"  waiting: {absent}")
                told = True
            time.sleep(LOOK_S / 4)

    def _who_is_missing(self) -> str:
        """Why nobody works."""
        try:
            any_there = bool(self._client.nthreads())
        except (OSError, TimeoutError, CancelledError) as error:
            raise self._gone(error) from error
        if any_there:
            return self._full()
        if self._cluster is None:
            return f"no Dask worker at {self._where}; start some: dask worker {self._where} --nthreads 1"
        return (
            "the Dask workers of this search ended and do not start again, as happens without memory or room in "
            "the folder for temporary files; the same command goes on when there is some, or with evaluator=local"
        )

    def _full(self) -> str:
        return f"the Dask workers at {self._where} take no work, as their memory is full; start some with more: --memory-limit"

    def _gone(self, error: BaseException) -> UserError:
        return UserError(f"the Dask scheduler {self._where} is gone ({reason(error)}); start it and run the same command")

    def close(self) -> None:
        self._client.close()
        if self._cluster is not None:
            self._cluster.close()
