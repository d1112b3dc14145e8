"""The contract of every search strategy: budget, what is left out, seeds, and that a killed study ends the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from optuna.samplers import TPESampler

from search.evaluation import Evaluation
from search.evaluations import INITIAL, RANDOM
from search.left_out import LeftOut
from search.objectives import Goal
from search.strategies import Guided, Reinforce, SearchStrategy, TrainingFree
from spaces.choice import Architecture
from spaces.errors import UserError
from spaces.mobile import MobileSpace
from tests.search.interrupted import interrupted


def combined() -> TrainingFree:
    return TrainingFree(["zen", "snip", "naswot", "synflow"], TPESampler, networks=2)


STRATEGIES: dict[str, Callable[[], SearchStrategy]] = {
    "front": Guided,
    "upper_confidence": lambda: Guided("upper_confidence"),
    "hypervolume": lambda: Guided("hypervolume"),
    "training_free": combined,
    "reinforce": lambda: Reinforce(batch=8),
}
Search = Callable[..., Any]


@pytest.mark.parametrize("name", STRATEGIES)
def test_it_keeps_to_its_budget_and_to_what_is_not_left_out(name: str, search: Search, tiny_space: MobileSpace) -> None:
    unpaid = LeftOut({c.name: {"w8a8": "fp32"} for c in tiny_space.choices if c.kind == "precision"})
    result, evaluations = search(STRATEGIES[name], left_out=unpaid)
    rounds = [evaluations.of(f"round {n}") for n in (1, 2, 3)]
    assert all(0 < len(evaluated) <= 5 for evaluated in rounds)
    assert sum(map(len, rounds)) >= 12
    assert len(evaluations.of(RANDOM)) <= 15
    assert 0 < len(result.candidates) <= 120
    made = [c.architecture for c, _ in result.candidates] + [e.architecture for evaluated in rounds for e in evaluated]
    assert not any("w8a8" in a.values() for a in made)
    assert {n for _, n in result.candidates} <= {1, 2, 3}
    for c, _ in result.candidates:
        assert c.values["macs"] == tiny_space.network(c.architecture).macs
        assert 0.0 <= c.values["accuracy"] <= 1.0
    assert list(result.hypervolumes) == [INITIAL, "round 1", "round 2", "round 3"]
    assert all(c.architecture in evaluations for c in result.front)


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_seed_decides_and_a_killed_study_ends_the_same(
    name: str, search: Search, measure: Callable[[Architecture], Evaluation]
) -> None:
    expected, undisturbed = search(STRATEGIES[name], path="whole")
    for stop_after in (2, 7, 14):
        with pytest.raises(KeyboardInterrupt):
            search(STRATEGIES[name], measured=interrupted(measure, stop_after), path=str(stop_after))
        result, evaluations = search(STRATEGIES[name], path=str(stop_after))
        assert result.front == expected.front
        assert result.candidates == expected.candidates
        assert result.hypervolumes == expected.hypervolumes
        assert list(evaluations) == list(undisturbed)
    other, _ = search(STRATEGIES[name], path="other", seed=3)
    assert other.candidates != expected.candidates


@pytest.mark.parametrize("name", STRATEGIES)
def test_constraints_keep_the_front(name: str, search: Search, goal_with: Callable[..., Goal], tiny_space: MobileSpace) -> None:
    middle = (tiny_space.network(tiny_space.largest()).macs + tiny_space.network(tiny_space.smallest()).macs) // 2
    result, _ = search(STRATEGIES[name], goal_with(constraints=[f"macs<={middle}", "accuracy>=30%"]))
    assert result.front
    assert all(c.values["macs"] <= middle and c.values["accuracy"] >= 0.3 for c in result.front)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("names", [("accuracy",), ("macs", "accuracy", "parameters"), ("macs", "parameters")])
def test_any_objectives_do(name: str, names: tuple[str, ...], search: Search, goal_with: Callable[..., Goal]) -> None:
    result, _ = search(STRATEGIES[name], goal_with(names))
    assert result.front
    volumes = list(result.hypervolumes.values())
    assert volumes == sorted(volumes)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Guided("best"), "study.strategy.choose is 'best'; allowed are front, upper_confidence, hypervolume"),
        (lambda: TrainingFree(["zero"], TPESampler), r"study.strategy.proxies is \['zero'\]; allowed is a list of"),
        (lambda: TrainingFree([], TPESampler), "proxies is empty"),
        (lambda: TrainingFree(["zen"], TPESampler, networks=0), "networks is 0; allowed are integers from 1"),
        (lambda: Reinforce([]), r"powers is \[\]; allowed is a list of numbers from 1"),
        (lambda: Reinforce(batch=1), "batch is 1; allowed are integers from the number of powers, 3"),
        (lambda: Reinforce(removing=1.0), "removing is 1.0"),
        (lambda: Reinforce(learning_rate=0.0), "learning_rate is 0.0"),
        (lambda: Reinforce(policy="nowhere"), "study.strategy.policy=nowhere is no policy of a run"),
        (lambda: TrainingFree(["zen"], TPESampler, pool=1.0), "pool is 1.0; allowed are shares between 0 and 1"),
    ],
)
def test_settings_that_are_not_allowed_are_told(make: Callable[[], SearchStrategy], told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        make()
    assert "\n" not in str(caught.value)
