"""Expected hypervolume improvement against drawing, and what each way of choosing prefers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.candidates import Candidate
from search.evaluations import Evaluated
from search.left_out import NOTHING
from search.objectives import Goal, hypervolume
from search.predicted import PredictedValues
from search.strategies import Round
from search.strategies.acquisition import expected_improvement, hypervolume_improvement, predicted_front, upper_confidence
from spaces.choice import Architecture
from spaces.mobile import MobileSpace

UNIT = st.floats(0.0, 1.0)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(UNIT, UNIT, UNIT), max_size=6),
    st.tuples(st.floats(-0.2, 1.3), st.floats(0.01, 0.5), UNIT, UNIT),
    st.integers(0, 2),
)
def test_the_expected_improvement_is_the_mean_of_drawn_ones(
    front: list[tuple[float, float, float]], point: tuple[float, float, float, float], costs: int
) -> None:
    mean, std, *own = point
    others = [(value, tuple(rest[:costs])) for value, *rest in front]
    unit = [1.0] * (costs + 1)
    before = hypervolume([(1.0 - value, *rest) for value, rest in others], unit)
    # Every quantile once: far less noise than drawing.
    draws = mean + std * np.array([_QUANTILES]).ravel()
    after = [hypervolume([*((1.0 - v, *rest) for v, rest in others), (1.0 - d, *own[:costs])], unit) for d in draws]
    found = expected_improvement(mean, std, own[:costs], others)
    assert found == pytest.approx(np.mean(after) - before, abs=0.004)
    assert found >= -1e-12


_QUANTILES = np.sort(np.random.default_rng(0).normal(size=20000))[10::20]


class Unsure:
    """A predictor that is unsure of the networks whose stem is narrow in bits only."""

    def __init__(self, doubt: float) -> None:
        self.doubt = doubt

    def predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.full(len(features), 0.5), np.where(features[:, 2] < 0.5, self.doubt, 0.001)


@pytest.fixture
def round_(tiny_space: MobileSpace, goal_with: Callable[..., Goal]) -> Round:
    goal = goal_with(("accuracy", "macs"))
    rng = np.random.default_rng(0)
    drawn = list(dict.fromkeys(tiny_space.sample(rng) for _ in range(12)))
    seen = [Evaluated(a, 0.3 + 0.02 * i, 1.0, "initial") for i, a in enumerate(drawn)]
    predicted = PredictedValues(tiny_space, goal.values, {}, device="x86")
    nobody = pytest.fail
    return Round(goal, predicted, 1, 1, 0, 10, 4, seen, NOTHING, nobody, nobody, nobody, nobody, nobody)


def candidates_of(round_: Round, accuracy: Callable[[Architecture], float]) -> list[Candidate]:
    rng, space = np.random.default_rng(1), round_.predicted.space
    known = {e.architecture for e in round_.seen}
    drawn = [a for a in dict.fromkeys(space.sample(rng) for _ in range(60)) if a not in known]
    return [Candidate(a, {**round_.predicted.costs(a), "accuracy": accuracy(a)}, 0.0) for a in drawn]


def unsure_of(architecture: Architecture) -> bool:
    return architecture["stem.precision"] == "w8a8"


@pytest.mark.parametrize("choose", [upper_confidence, hypervolume_improvement])
def test_what_is_unsure_is_evaluated_sooner(choose: Callable[..., list[Architecture]], round_: Round) -> None:
    """All are predicted alike; the predicted front looks at costs alone."""
    candidates = candidates_of(round_, lambda a: 0.3)
    assert 0 < sum(unsure_of(c.architecture) for c in candidates) < len(candidates)
    chosen = choose(candidates, round_, Unsure(0.3))
    without = predicted_front(candidates, round_, Unsure(0.3))
    assert len(set(chosen)) == len(set(without)) == 4
    assert sum(map(unsure_of, chosen)) > max(1, sum(map(unsure_of, without)))
    assert without == predicted_front(candidates, round_, Unsure(0.0))


def test_without_doubt_the_first_is_what_enlarges_the_front_most(round_: Round) -> None:
    candidates = candidates_of(round_, lambda a: 0.2 + 0.5 * (len(a.to_json()) % 5) / 5)
    macs = [round_.predicted.costs(e.architecture)["macs"] for e in round_.seen]
    accuracies = [e.accuracy for e in round_.seen]

    def point(accuracy: float, cost: float) -> tuple[float, float]:
        return (max(accuracies) - accuracy) / np.ptp(accuracies), (cost - min(macs)) / np.ptp(macs)

    points = [point(a, m) for a, m in zip(accuracies, macs, strict=True)]
    gains = [hypervolume([*points, point(c.values["accuracy"], c.values["macs"])], [1.0, 1.0]) for c in candidates]
    chosen = hypervolume_improvement(candidates, round_, Unsure(0.0))
    gain = {c.architecture: g for c, g in zip(candidates, gains, strict=True)}
    assert gain[chosen[0]] == pytest.approx(max(gains), rel=1e-6)
    assert max(gains) > min(gains)


def test_where_nothing_is_feasible_the_nearest_are_chosen(round_: Round) -> None:
    candidates = [Candidate(c.architecture, c.values, 1.0 + i) for i, c in enumerate(candidates_of(round_, lambda a: 0.5))]
    assert hypervolume_improvement(candidates, round_, Unsure(0.1)) == predicted_front(candidates, round_, Unsure(0.1))
    assert hypervolume_improvement([], round_, Unsure(0.1)) == upper_confidence([], round_, Unsure(0.1)) == []
