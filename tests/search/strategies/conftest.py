"""A study without supernet and tables: accuracies are made up, costs are counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from optuna.samplers import NSGAIISampler

from predictors.accuracy import Ridge
from search.evaluation import Evaluation
from search.evaluations import INITIAL, Evaluations
from search.left_out import NOTHING, LeftOut
from search.objectives import Goal, parse_constraint, parse_objectives
from search.predicted import PredictedValues
from search.strategies import SearchStrategy
from search.study import StudyResult, StudySettings, run_studies
from search.workers import one_by_one
from spaces.choice import Architecture
from spaces.mobile import MobileSpace

Measure = Callable[[Architecture], Evaluation]
SETTINGS = StudySettings(candidates=120, rounds=3, evaluations=5, seed=2)


def quality(space: MobileSpace, architecture: Architecture) -> float:
    """What makes up the accuracies: bytes of weights, and precision where it counts, between 0 and 1."""
    network = space.network(architecture)
    value = 0.2 + 0.1 * np.log(network.weight_bytes / 500) + 0.15 * (architecture["stem.precision"] == "w8a8")
    return float(np.clip(value, 0.0, 1.0))


def goal_of(names: Sequence[str] = ("accuracy", "macs"), constraints: Sequence[str] = ()) -> Goal:
    """A goal without a device."""
    return Goal((), tuple(parse_objectives(names, [])), tuple(parse_constraint(text, ["x86"]) for text in constraints))


def scores_of(space: MobileSpace) -> Callable[..., np.ndarray]:
    """Proxies of which two tell the opposite of the truth, one nothing, and one the truth."""

    def scores(names: Sequence[str], architectures: Sequence[Architecture], on_progress: object = None) -> np.ndarray:
        rows = []
        for a in architectures:
            true, noise = quality(space, a), float(len(a.to_json()) % 7)
            found = {"zen": -true, "snip": -true, "naswot": noise, "synflow": true, "macs": float(space.network(a).macs)}
            rows.append([found[name] for name in names])
        return np.array(rows).reshape(len(architectures), len(names))

    return scores


@pytest.fixture
def measure(tiny_space: MobileSpace) -> Measure:
    return lambda architecture: Evaluation(quality(tiny_space, architecture), 1.0)


Search = Callable[..., tuple[StudyResult, Evaluations]]


@pytest.fixture
def search(tiny_space: MobileSpace, measure: Measure, tmp_path: Path) -> Search:
    """Run a study with a strategy; returns its result and all evaluations."""

    def run(
        new_strategy: Callable[[], SearchStrategy],
        goal: Goal | None = None,
        measured: Measure | None = None,
        path: str = "evaluations",
        seed: int = 2,
        left_out: LeftOut = NOTHING,
        settings: StudySettings = SETTINGS,
    ) -> tuple[StudyResult, Evaluations]:
        rng, goal = np.random.default_rng(0), goal or goal_of()
        evaluations = Evaluations(tmp_path / f"{path}.parquet", tiny_space, "key")
        first = [tiny_space.largest(), *(tiny_space.sample_spread(rng) for _ in range(9))]
        evaluations.evaluate(first, INITIAL, one_by_one(measure))
        results = run_studies(
            {goal: PredictedValues(tiny_space, goal.values, {}, device="x86")},
            evaluations,
            Ridge,
            lambda s: NSGAIISampler(population_size=10, seed=s),
            one_by_one(measured or measure),
            StudySettings(settings.candidates, settings.rounds, settings.evaluations, seed),
            left_out={goal: left_out},
            new_strategy=new_strategy,
            scores=scores_of(tiny_space),
        )
        return results[goal], evaluations

    return run


@pytest.fixture
def goal_with() -> Callable[..., Goal]:
    """Makes a goal from names of objectives and texts of constraints."""
    return goal_of
