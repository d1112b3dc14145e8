"""How fast candidates are found: `python -m benchmarks.study [tables=FOLDER] [key=value ...]`; JSON on the last line.

One optimization of the default space by NSGA-II with the objectives accuracy and latency, as a round of the study does it
(`search.candidates.propose`), with a real latency predictor and a Gaussian process for accuracy that is fitted to made-up
accuracies (its speed does not depend on them). The table is measured first, or read from FOLDER/x86.parquet.

* `candidates_per_s`: sampler, storage and predictors over `candidates` trials of one optimization. In a study these are spread
  over rounds with a fresh sampler each (`candidates_per_s_in_rounds`), which is quicker because NSGA-II looks through all
  trials again and again. `accuracy_fit_s` comes on top once a round.
* `optuna_share`: share of that time inside Optuna: the sampler, asking, storing. The clock runs from entering Optuna to
  leaving it, so what Optuna calls of itself counts once. `predictor_share` is the part of the predictors; what is left builds
  architectures.
* `plain_ask_candidates_per_s`: the same sampler and the same predictors through `study.ask(fixed_distributions)` and
  `study.tell`, over `plain_trials` trials. `speedup` compares it with `propose` over as many trials, since the time per trial
  grows with their number.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import optuna
from optuna.samplers import NSGAIISampler
from optuna.storages import InMemoryStorage

from benchmarks.defaults import device_and_space, options
from latency_lut.measuring import MeasuringSettings
from latency_lut.profile import profile
from latency_lut.table import LatencyTable
from predictors.accuracy import AccuracyPredictor, GaussianProcess, accuracy_features
from predictors.latency import LatencyPredictor
from search.candidates import Values, distributions_of, propose
from search.objectives import Objective, parse_objectives
from search.predicted import PredictedValues
from spaces.choice import Architecture
from spaces.errors import UserError
from spaces.space import Space

BATCH = 50  # candidates predicted together, and NSGA-II's population
Predict = Callable[[Sequence[Architecture]], list[Values]]


class Clock:
    """Adds up the time inside the functions that it wraps; nested calls count once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            self._depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.perf_counter() - begin

        return wrapper


@contextmanager
def inside_optuna(clock: Clock, sampler: NSGAIISampler) -> Iterator[None]:
    """Let a clock run in the calls that enter Optuna."""
    entered: list[tuple[object, str]] = [(sampler, name) for name in ("sample_relative", "before_trial", "after_trial")]
    entered += [(sampler, "sample_independent"), (optuna.Study, "ask"), (optuna.Trial, "set_constraint")]
    entered += [(InMemoryStorage, name) for name in ("get_trial", "set_trial_state_values", "_set_trial")]
    with ExitStack() as stack:
        for owner, name in entered:
            stack.enter_context(patch.object(owner, name, clock.timed(getattr(owner, name))))
        yield


def latency_predictor(values: dict[str, int], folder: str | None) -> tuple[Space, LatencyPredictor]:
    """Fitted to the table in a folder, or to one that is measured now."""
    device, space = device_and_space()
    if folder is not None:
        table = LatencyTable.load(Path(folder) / f"{device.name}.parquet")
        table.check(space, device)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / f"{device.name}.parquet"
            pairs, networks, seed = values["pairs"], values["networks"], values["seed"]
            table, _ = profile(space, device, path, MeasuringSettings(seed, pairs, networks))
    return space, LatencyPredictor.fit(table, space, seed=values["seed"])


def accuracy_predictor(space: Space, evaluations: int, seed: int) -> tuple[AccuracyPredictor, float]:
    """Fitted to accuracies that rise with the logarithm of the MACs; and the seconds that the fit took."""
    rng = np.random.default_rng(seed)
    architectures = [space.sample_spread(rng) for _ in range(evaluations)]
    networks = [space.network(architecture) for architecture in architectures]
    size = np.log([network.macs for network in networks])
    score = 3.0 + (size - size.mean()) / size.std() + 0.3 * rng.standard_normal(evaluations)
    predictor = GaussianProcess(seed)
    begin = time.perf_counter()
    predictor.fit(accuracy_features(space, architectures, networks), (1.0 / (1.0 + np.exp(-score))).tolist())
    return predictor, time.perf_counter() - begin


def by_propose(space: Space, predict: Predict, objectives: Sequence[Objective], count: int, seed: int) -> tuple[float, float]:
    """Seconds for `count` candidates, and how many of them inside Optuna."""
    clock, sampler = Clock(), NSGAIISampler(population_size=BATCH, seed=seed)
    begin = time.perf_counter()
    with inside_optuna(clock, sampler):
        propose(space, predict, objectives, [], sampler, count, batch=BATCH)
    return time.perf_counter() - begin, clock.seconds


def by_plain_ask(space: Space, predict: Predict, objectives: Sequence[Objective], count: int, seed: int) -> float:
    """Seconds for `count` candidates through Optuna's usual interface."""
    begin = time.perf_counter()
    sampler = NSGAIISampler(population_size=BATCH, seed=seed)
    study = optuna.create_study(sampler=sampler, directions=[o.direction for o in objectives])
    distributions = distributions_of(space)
    for first in range(0, count, BATCH):
        trials = [study.ask(distributions) for _ in range(min(BATCH, count - first))]
        found = predict([space.architecture(trial.params) for trial in trials])
        for trial, values in zip(trials, found, strict=True):
            study.tell(trial, [values[o.name] for o in objectives])
    return time.perf_counter() - begin


def main() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folders = [argument.partition("=")[2] for argument in sys.argv[1:] if argument.startswith("tables=")]
    rest = [argument for argument in sys.argv[1:] if not argument.startswith("tables=")]
    defaults = {
        "candidates": 5000,
        "rounds": 4,
        "plain_trials": 300,
        "evaluations": 260,
        "pairs": 600,
        "networks": 40,
        "seed": 0,
    }
    values = options(rest, defaults)
    seed = values["seed"]
    try:
        space, latency = latency_predictor(values, folders[-1] if folders else None)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    accuracy, fit_s = accuracy_predictor(space, values["evaluations"], seed)
    objectives = parse_objectives(["accuracy", "latency@x86"], ["x86"])

    def predicting(clock: Clock) -> Predict:
        predicted = PredictedValues(space, objectives, {"x86": latency})  # its own memory: nothing is known from before
        return clock.timed(lambda architectures: predicted.predict(architectures, accuracy))

    predicting(Clock())([space.sample(np.random.default_rng(seed))])
    plain_s = by_plain_ask(space, predicting(Clock()), objectives, values["plain_trials"], seed)
    same_s, _ = by_propose(space, predicting(Clock()), objectives, values["plain_trials"], seed)
    predictors = Clock()
    total_s, optuna_s = by_propose(space, predicting(predictors), objectives, values["candidates"], seed)
    in_rounds = predicting(Clock())
    share = values["candidates"] // values["rounds"]
    rounds_s = sum(by_propose(space, in_rounds, objectives, share, seed + r)[0] for r in range(1, values["rounds"] + 1))
    result = {
        "candidates_per_s": round(values["candidates"] / total_s, 1),
        "optuna_share": round(optuna_s / total_s, 4),
        "predictor_share": round(predictors.seconds / total_s, 4),
        "candidates_per_s_in_rounds": round(share * values["rounds"] / rounds_s, 1),
        "rounds": values["rounds"],
        "plain_ask_candidates_per_s": round(values["plain_trials"] / plain_s, 1),
        "speedup": round(plain_s / same_s, 2),
        "candidates": values["candidates"],
        "plain_trials": values["plain_trials"],
        "choices": len(space.choices),
        "accuracy_fit_s": round(fit_s, 3),
        "seconds": round(total_s, 2),
        "pairs": len(latency.table.entries),
        "device": latency.table.device,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
