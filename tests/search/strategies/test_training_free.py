"""Combined rankings: what they are, and that evaluations find the proxies that tell the truth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from optuna.samplers import GPSampler, TPESampler
from scipy.stats import rankdata

from search.objectives import Goal
from search.strategies import TrainingFree
from search.study import StudySettings
from spaces.mobile import MobileSpace

NAMES = ["zen", "snip", "naswot", "synflow"]  # two tell the opposite of the truth, one nothing, one the truth


def test_rankings_are_shares_of_the_pool_and_hold_for_others() -> None:
    strategy = TrainingFree(["zen", "macs"], GPSampler)
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, (20, 2)).astype(float)
    strategy._sorted = np.sort(scores, axis=0)
    expected = (np.transpose([rankdata(column) for column in scores.T]) - 0.5) / 20
    assert strategy.ranks(scores) == pytest.approx(expected)
    assert strategy.ranks(np.array([[-1.0, 9.0]])).tolist() == [[0.0, 1.0]]


def test_evaluations_find_which_proxies_to_trust(search: Callable[..., Any], goal_with: Callable[..., Goal]) -> None:
    made: list[TrainingFree] = []

    def new() -> TrainingFree:
        made.append(TrainingFree(NAMES, GPSampler, networks=2))
        return made[-1]

    settings = StudySettings(candidates=200, rounds=4, evaluations=8, seed=0)
    _, evaluations = search(new, goal_with(("accuracy",)), settings=settings)
    (strategy,) = made
    zen, snip, _, synflow = strategy.combination
    assert synflow > zen + snip  # in sum the truth; with equal weights the opposite
    assert strategy._tried[0][0].tolist() == [1.0] * 4
    assert strategy._tried[0][1] < max(value for _, value in strategy._tried)
    trusted = [e.accuracy for n in (3, 4) for e in evaluations.of(f"round {n}")]
    drawn = [e.accuracy for e in evaluations.of("random")]
    assert np.mean(trusted) > np.quantile(drawn, 0.9)


def test_candidates_have_accuracies_in_the_order_of_the_combination(
    search: Callable[..., Any], tiny_space: MobileSpace
) -> None:
    made: list[TrainingFree] = []

    def new() -> TrainingFree:
        made.append(TrainingFree(["synflow"], TPESampler, networks=2))
        return made[-1]

    search(new)
    strategy = made[0]
    ranks = np.linspace(0, 1, 11)[:, None]
    accuracies = strategy._accuracies(ranks)
    assert accuracies == sorted(accuracies, reverse=bool(strategy.combination[0] < 0))
    assert all(0.0 < a < 1.0 for a in accuracies)
