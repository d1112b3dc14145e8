"""Evaluations on several workers, and where each way to share them saturates; JSON on the last line.

`python -m benchmarks.scale_out [key=value ...]`; needs `pip install -e '.[cluster]'`.

* `dask_speedup`: evaluations per second of real networks of the default space (extracted, recalibrated, measured on
  the digits) by two workers of Dask over one; `repeats` times in turn, medians. `machine_speedup`: the same by two plain
  processes over one, which is what the machine gives. `dask_overhead_ms`: what is left per evaluation when the evaluation
  itself takes no time, by one worker.
* `storages`: trials per second of a shared study (`search.shared_study`) whose evaluations take no time, with 1, 2, 4 and
  8 processes: SQLite, and PostgreSQL where one is installed. What a storage does at most is its limit.
* `workers_at_90_percent`: a simulation from these figures. Workers evaluate for a time drawn from the measured times of real
  evaluations, stretched to a mean of 1, 10 or 60 s, and then wait for their turn at the storage (or at Dask's scheduler),
  which serves one after the other in the measured time. Given is the largest of the simulated numbers of workers
  (`simulated`) that are busy evaluating for at least 90 % of the time.
"""

from __future__ import annotations

import heapq
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from itertools import product
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import optuna
import torch

from benchmarks.defaults import device_and_space, options
from search import dask_pool
from search.dask_pool import DaskPool
from search.data.digits import Digits
from search.evaluation import Evaluation, Evaluator, Weights, calibration_batches, collect
from search.shared_study import SharedStudy
from search.workers import PoolWorkers, WithWeights
from spaces.choice import Architecture
from spaces.errors import UserError
from spaces.space import Space
from spaces.supernet import Supernet

PROCESSES = (1, 2, 4, 8)
SIMULATED = (10, 20, 50, 100, 200, 500, 1000)
MEANS_S = (1.0, 10.0, 60.0)
EVALUATIONS_EACH = 30  # simulated, per worker
BUSY = 0.9
CALIBRATION_IMAGES = 256  # as a search does by default


class Instant(Evaluator):
    """Answers at once: what is left is the price of handing out."""

    def evaluate(self, weights: Weights, architecture: Architecture) -> Evaluation:
        return Evaluation(0.5, 1.0)


# -- Dask ---------------------------------------------------------------------------------------------------------------------


def rate_by_dask(workers: PoolWorkers, architectures: Sequence[Architecture]) -> float:
    """Evaluations per second."""
    begin = time.perf_counter()
    count = sum(1 for _ in workers.evaluate(architectures))
    return count / (time.perf_counter() - begin)


def alone_s(measure: WithWeights, architectures: Sequence[Architecture]) -> float:
    """Seconds that a process takes for evaluations."""
    torch.set_num_threads(1)
    begin = time.perf_counter()
    for architecture in architectures:
        measure(architecture)
    return time.perf_counter() - begin


def machine_speedup(measure: WithWeights, architectures: Sequence[Architecture], repeats: int) -> float:
    """Evaluations per second by two processes that know nothing of each other, over those of one."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as processes:

        def seconds(count: int) -> float:
            return max(f.result() for f in [processes.submit(alone_s, measure, architectures) for _ in range(count)])

        seconds(2)  # imports
        return statistics.median(2 * seconds(1) / seconds(2) for _ in range(repeats))


def by_dask(evaluator: Evaluator, supernet: Supernet, architectures: Sequence[Architecture], repeats: int) -> dict[str, float]:
    """Rates with one and two workers, and the overhead of an evaluation."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    with closing(DaskPool(1)) as first, closing(DaskPool(2)) as second:
        one, two = (PoolWorkers(pool, WithWeights(evaluator, supernet)) for pool in (first, second))
        for workers in (one, two):
            rate_by_dask(workers, architectures[:4])  # imports, weights
        for _ in range(repeats):
            rates[1].append(rate_by_dask(one, architectures))
            rates[2].append(rate_by_dask(two, architectures))
    with closing(DaskPool(1)) as pool:
        instant = PoolWorkers(pool, WithWeights(Instant([], evaluator.split), supernet))
        many = [*architectures] * 5
        rate_by_dask(instant, many[:4])
        dask_pool.GROUP_S = 0.0  # one by one, as evaluations are handed out that do take their time
        overhead_s = statistics.median(1.0 / rate_by_dask(instant, many) for _ in range(repeats))
    return {
        "dask_evaluations_per_s_1": round(statistics.median(rates[1]), 2),
        "dask_evaluations_per_s_2": round(statistics.median(rates[2]), 2),
        "machine_speedup": round(machine_speedup(WithWeights(evaluator, supernet), architectures, repeats), 3),
        "dask_speedup": round(statistics.median(b / a for a, b in zip(rates[1], rates[2], strict=True)), 3),
        "dask_overhead_ms": round(1e3 * overhead_s, 2),
    }


# -- a study in a database ----------------------------------------------------------------------------------------------------


def instantly(architecture: Architecture) -> Evaluation:
    """As `Instant`, of a shared study."""
    return Evaluation(0.5, 1.0)


def help_with(url: str, key: str, joined: Event, ended: Event) -> None:
    """A process that evaluates for the study until it is over."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with closing(SharedStudy(url, key, instantly)) as study:
        joined.set()
        leader = multiprocessing.parent_process()
        while not ended.is_set() and leader is not None and leader.is_alive():
            if not study.serve_some():
                time.sleep(0.01)


def rate_by_study(url: str, processes: int, trials: int) -> float:
    """Trials per second of a fresh study: one process leads, the others help."""
    context, key = multiprocessing.get_context("spawn"), f"{processes}-{time.time_ns()}"
    ended, joined = context.Event(), [context.Event() for _ in range(processes - 1)]
    with closing(SharedStudy(url, key, instantly)) as study:
        helpers = [context.Process(target=help_with, args=(url, key, event, ended)) for event in joined]
        for helper in helpers:
            helper.start()
        for event in joined:
            event.wait()
        begin = time.perf_counter()
        count = sum(1 for _ in study.evaluate([Architecture({"number": number}) for number in range(trials)]))
        seconds = time.perf_counter() - begin
        ended.set()
        for helper in helpers:
            helper.join()
    return count / seconds


@contextmanager
def databases() -> Iterator[dict[str, str]]:
    """Addresses of fresh databases by name."""
    from tests.cluster import postgresql  # a server of its own, which only the tests needed so far

    with tempfile.TemporaryDirectory() as folder:
        found = {"sqlite": f"sqlite:///{Path(folder) / 'study.db'}"}
        if postgresql.missing():
            print(f"postgresql: {postgresql.missing()}", file=sys.stderr)
            yield found
            return
        with postgresql.Server() as server:
            yield {**found, "postgresql": server.url}


# -- simulation ---------------------------------------------------------------------------------------------------------------


def busy_share(workers: int, service_s: float, evaluations_s: np.ndarray, rng: np.random.Generator) -> float:
    """Share of their time for which workers evaluate, when all of them share one server.

    Args:
        workers: how many; they begin at different moments.
        service_s: of the server, per evaluation.
        evaluations_s: what evaluations take, drawn from with repetition.
        rng: of the draws.
    """
    first = rng.uniform(0.0, evaluations_s.mean(), workers)
    arrivals = [(float(at), worker) for worker, at in enumerate(first)]  # at the server, with an evaluation done
    heapq.heapify(arrivals)
    free_at, evaluated_s = 0.0, 0.0
    for duration in rng.choice(evaluations_s, workers * EVALUATIONS_EACH):
        at, worker = heapq.heappop(arrivals)
        free_at = max(free_at, at) + service_s
        evaluated_s += duration
        heapq.heappush(arrivals, (free_at + float(duration), worker))
    span_s = float(np.mean([at for at, _ in arrivals])) - float(first.mean())
    return evaluated_s / (workers * span_s)


def saturation(rate: float, evaluations_s: np.ndarray, seed: int) -> dict[str, int]:
    """By mean seconds of an evaluation, the largest simulated number of workers that stay busy; 0 where the smallest do not."""
    found = {}
    for mean_s in MEANS_S:
        stretched = evaluations_s * mean_s / evaluations_s.mean()
        busy = [n for n in SIMULATED if busy_share(n, 1.0 / rate, stretched, np.random.default_rng(seed)) >= BUSY]
        found[f"{mean_s:g} s"] = max(busy, default=0)
    return found


def evaluator_and_networks(space: Space, count: int, seed: int) -> tuple[Evaluator, Supernet, list[Architecture]]:
    """As a search on the digits has them, with weights that are not trained, which costs the same."""
    data = Digits(seed=seed)
    data.setup("fit")
    evaluator = Evaluator(calibration_batches(data, CALIBRATION_IMAGES, seed), collect(data, "validation"))
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    return evaluator, Supernet(space), [space.sample_spread(rng) for _ in range(count)]


def main() -> None:
    values = options(sys.argv[1:], {"evaluations": 80, "repeats": 5, "trials": 200, "seed": 0})
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(1)
    device, space = device_and_space()
    evaluator, supernet, architectures = evaluator_and_networks(space, values["evaluations"], values["seed"])
    seconds = []
    for architecture in architectures:
        begin = time.perf_counter()
        evaluator.evaluate(supernet, architecture)
        seconds.append(time.perf_counter() - begin)
    try:
        dask = by_dask(evaluator, supernet, architectures, values["repeats"])
        print(dask, file=sys.stderr)
        with databases() as urls:
            rates: dict[str, dict[int, float]] = {name: {} for name in urls}
            for name, processes in product(urls, PROCESSES):
                rates[name][processes] = round(rate_by_study(urls[name], processes, values["trials"]), 1)
                print(f"{name}, {processes} processes: {rates[name][processes]} trials/s", file=sys.stderr)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    limits = {"dask": 1e3 / dask["dask_overhead_ms"], **{name: max(found.values()) for name, found in rates.items()}}
    result = {
        **dask,
        "evaluation_ms": round(1e3 * statistics.median(seconds), 1),
        "storages": rates,
        "limits_per_s": {name: round(limit, 1) for name, limit in limits.items()},
        "workers_at_90_percent": {n: saturation(limit, np.array(seconds), values["seed"]) for n, limit in limits.items()},
        "simulated": SIMULATED,
        "evaluations": values["evaluations"],
        "repeats": values["repeats"],
        "device": device.describe(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
