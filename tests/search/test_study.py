"""The search loop: rounds, and what it says when nothing is feasible."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.samplers import NSGAIISampler, RandomSampler

from latency_lut.table import LatencyTable
from predictors.accuracy import Ridge
from predictors.latency import LatencyPredictor
from predictors.size import model_bytes
from search.evaluation import Evaluation
from search.evaluations import INITIAL, RANDOM, Evaluated, Evaluations
from search.fronts import evaluated_front, nondominated
from search.left_out import NOTHING, LeftOut
from search.objectives import Constraint, Goal, goals_of, parse_constraint, parse_objectives
from search.predicted import PredictedValues
from search.study import StudyResult, StudySettings, run_studies
from search.workers import one_by_one
from spaces.choice import Architecture
from spaces.mobile import MobileSpace
from tests.search.interrupted import interrupted

Measure = Callable[[Architecture], Evaluation]

OBJECTIVES = parse_objectives(["accuracy", "size"], ["x86"])


# -- rounds -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def latency(tiny_table: LatencyTable, tiny_space: MobileSpace) -> LatencyPredictor:
    return LatencyPredictor.fit(tiny_table, tiny_space, held_out=4)


@pytest.fixture(scope="module")
def measure(tiny_space: MobileSpace) -> Measure:
    """Accuracy made up of the weights' bytes and a few choices; takes no time."""

    def evaluate(architecture: Architecture) -> Evaluation:
        network = tiny_space.network(architecture)
        value = 0.2 + 0.1 * np.log(network.weight_bytes / 500) + 0.1 * (architecture["stem.precision"] == "w8a8")
        return Evaluation(float(np.clip(value, 0, 1)), 1.0)

    return evaluate


SETTINGS = StudySettings(candidates=120, rounds=3, evaluations=4, seed=2)


def started(space: MobileSpace, path: Path, measure: Measure) -> Evaluations:
    rng = np.random.default_rng(0)
    evaluations = Evaluations(path, space, "key")
    evaluations.evaluate([space.largest(), *(space.sample_spread(rng) for _ in range(13))], INITIAL, one_by_one(measure))
    return evaluations


def search(
    space: MobileSpace,
    latency: LatencyPredictor,
    evaluations: Evaluations,
    measure: Measure,
    constraints: Sequence[Constraint] = (),
    names: Sequence[str] = ("accuracy", "latency@x86"),
    sampler: Callable[[int], RandomSampler | NSGAIISampler] = lambda seed: RandomSampler(seed=seed),
    left_out: LeftOut = NOTHING,
) -> StudyResult:
    (goal,) = goals_of(parse_objectives(names, ["x86"]), constraints, ["x86"])
    goals = {goal: PredictedValues(space, goal.values, {"x86": latency})}
    return run_studies(goals, evaluations, lambda: Ridge(), sampler, one_by_one(measure), SETTINGS, left_out={goal: left_out})[
        goal
    ]


@pytest.mark.parametrize(
    "names",
    [
        ("accuracy", "latency@x86"),
        ("latency@x86", "size", "accuracy"),
        ("accuracy",),
        ("macs", "memory"),
        ("accuracy", "parameters"),
    ],
)
def test_the_front_is_what_was_evaluated_and_not_dominated(
    tiny_space: MobileSpace, latency: LatencyPredictor, measure: Measure, tmp_path: Path, names: tuple[str, ...]
) -> None:
    evaluations = started(tiny_space, tmp_path / "e.parquet", measure)
    result = search(tiny_space, latency, evaluations, measure, names=names)
    objectives = parse_objectives(names, ["x86"])
    assert result.front
    for point in result.front:
        assert point.architecture in evaluations
        assert point.values["accuracy"] == measure(point.architecture).accuracy
    assert nondominated(result.front, objectives) == result.front
    last = objectives[-1]
    costs = [last.loss(c.values[last.name]) for c in result.front]
    assert costs == sorted(costs)
    assert len(result.candidates) == SETTINGS.candidates
    assert {n for _, n in result.candidates} == {1, 2, 3}
    assert list(result.hypervolumes) == [INITIAL, "round 1", "round 2", "round 3"]
    volumes = list(result.hypervolumes.values())
    assert volumes == sorted(volumes)  # more evaluations never lose volume
    assert all(0 <= v <= 1 for v in [*volumes, result.hypervolume_random])
    assert set(result.reference) == set(names)
    assert result.nearest_miss is None
    in_rounds = evaluations.of("round 1", "round 2", "round 3")
    assert len(in_rounds) == 12
    assert len(evaluations.of(RANDOM)) <= 12


def test_the_seed_decides_and_a_killed_study_goes_the_same_way(
    tiny_space: MobileSpace, latency: LatencyPredictor, measure: Measure, tmp_path: Path
) -> None:
    undisturbed = started(tiny_space, tmp_path / "a.parquet", measure)
    expected = search(tiny_space, latency, undisturbed, measure)
    for stop_after in (1, 5, 9, 14):
        path = tmp_path / f"{stop_after}.parquet"
        with pytest.raises(KeyboardInterrupt):
            search(tiny_space, latency, started(tiny_space, path, measure), interrupted(measure, stop_after))
        evaluations = Evaluations(path, tiny_space, "key")
        result = search(tiny_space, latency, evaluations, measure)
        assert result.front == expected.front
        assert result.hypervolumes == expected.hypervolumes
        assert list(evaluations) == list(undisturbed)


def test_evaluations_of_another_study_do_not_disturb(
    tiny_space: MobileSpace, latency: LatencyPredictor, measure: Measure, tmp_path: Path
) -> None:
    expected = search(tiny_space, latency, started(tiny_space, tmp_path / "a.parquet", measure), measure)
    evaluations = started(tiny_space, tmp_path / "b.parquet", measure)
    search(tiny_space, latency, evaluations, measure, sampler=lambda seed: RandomSampler(seed=seed + 500))
    result = search(tiny_space, latency, evaluations, measure)
    assert {c.architecture for c in result.front} == {c.architecture for c in expected.front}


def test_constraints_keep_the_front(
    tiny_space: MobileSpace, latency: LatencyPredictor, measure: Measure, tmp_path: Path
) -> None:
    evaluations = started(tiny_space, tmp_path / "e.parquet", measure)
    middle = float(np.median([tiny_space.network(e.architecture).parameters for e in evaluations]))
    constraint = parse_constraint(f"parameters<={middle:.0f}", ["x86"])
    result = search(tiny_space, latency, evaluations, measure, [constraint])
    assert result.front
    assert all(tiny_space.network(c.architecture).parameters <= middle for c in result.front)


def test_rounds_leave_out_what_they_are_told_and_the_baselines_do_not(
    tiny_space: MobileSpace, latency: LatencyPredictor, measure: Measure, tmp_path: Path
) -> None:
    what = LeftOut({choice.name: {"w8a8": "fp32"} for choice in tiny_space.choices if choice.kind == "precision"})
    evaluations = started(tiny_space, tmp_path / "e.parquet", measure)
    result = search(tiny_space, latency, evaluations, measure, left_out=what)

    def has_integers(architecture: Architecture) -> bool:
        return any(name.endswith(".precision") and value == "w8a8" for name, value in architecture.items())

    rounds = evaluations.of("round 1", "round 2", "round 3")
    assert rounds
    assert not any(has_integers(c.architecture) for c, _ in result.candidates)
    assert not any(has_integers(e.architecture) for e in rounds)
    assert any(has_integers(e.architecture) for e in evaluations.of(INITIAL))
    assert any(has_integers(e.architecture) for e in evaluations.of(RANDOM))


def test_a_constraint_that_nothing_meets_is_told(
    tiny_space: MobileSpace, latency: LatencyPredictor, measure: Measure, tmp_path: Path
) -> None:
    evaluations = started(tiny_space, tmp_path / "e.parquet", measure)
    result = search(tiny_space, latency, evaluations, measure, [parse_constraint("latency@x86<=0.001us", ["x86"])])
    assert result.front == []
    assert result.nearest_miss is not None
    # The sampler need not ask again for what was evaluated before the first round, which may be the fastest of all.
    evaluated = [latency.predict(tiny_space.network(e.architecture))[0] for e in evaluations if e.source != RANDOM]
    assert result.nearest_miss["value"] == min(evaluated)
    assert min(evaluated) <= min(c.values["latency@x86"] for c, _ in result.candidates)
    assert list(result.hypervolumes.values()) == [0.0] * 4


def test_a_promise_that_no_evaluation_keeps_is_no_near_miss(
    tiny_space: MobileSpace, latency: LatencyPredictor, measure: Measure, tmp_path: Path
) -> None:
    """Predicted accuracies may meet a constraint that no evaluated one meets; a near miss must be a miss."""

    class Optimist(Ridge):
        def predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return np.full(len(features), 0.99), np.full(len(features), 0.01)

    constraint = parse_constraint("accuracy>=98%", ["x86"])
    (goal,) = goals_of(OBJECTIVES, [constraint], ["x86"])
    goals = {goal: PredictedValues(tiny_space, goal.values, {"x86": latency})}
    evaluations = started(tiny_space, tmp_path / "e.parquet", measure)
    result = run_studies(goals, evaluations, Optimist, lambda seed: RandomSampler(seed=seed), one_by_one(measure), SETTINGS)[
        goal
    ]
    assert result.front == []
    assert result.nearest_miss is not None
    assert constraint.violation(float(str(result.nearest_miss["value"]))) > 0


def test_equal_points_stand_on_the_front_once(tiny_space: MobileSpace, latency: LatencyPredictor) -> None:
    predicted = PredictedValues(tiny_space, OBJECTIVES, {"x86": latency})
    rng = np.random.default_rng(0)
    evaluated = [Evaluated(a, 0.5, 1.0, INITIAL) for a in dict.fromkeys(tiny_space.sample(rng) for _ in range(200))]
    front = evaluated_front(evaluated, predicted, OBJECTIVES, [])
    assert len(front) == 1
    assert evaluated_front([], predicted, OBJECTIVES, []) == []


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_costs_are_those_of_the_layers(tiny_space: MobileSpace, latency: LatencyPredictor, seed: int) -> None:
    predicted = PredictedValues(
        tiny_space, parse_objectives(["macs", "parameters", "memory", "latency@x86"], ["x86"]), {"x86": latency}
    )
    architecture = tiny_space.sample(np.random.default_rng(seed))
    network = tiny_space.network(architecture)
    assert predicted.costs(architecture) == {
        "macs": network.macs,
        "parameters": network.parameters,
        "memory": network.peak_activation_bytes,
        "latency@x86": latency.predict(network)[0],
    }


# -- a study for each device --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def latencies(latency: LatencyPredictor, both_tables: Path, tiny_space: MobileSpace) -> dict[str, LatencyPredictor]:
    return {"x86": latency, "two": LatencyPredictor.fit(LatencyTable.load(both_tables / "two.parquet"), tiny_space, held_out=4)}


def search_both(
    space: MobileSpace,
    latencies: Mapping[str, LatencyPredictor],
    evaluations: Evaluations,
    measure: Measure,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[Goal, StudyResult]:
    """Accuracy against each device's latency."""
    goals = goals_of(parse_objectives(["accuracy", "latency"], list(latencies)), [], list(latencies))
    predicted = {goal: PredictedValues(space, goal.values, latencies, goal.devices[0]) for goal in goals}
    return run_studies(
        predicted,
        evaluations,
        lambda: Ridge(),
        lambda seed: RandomSampler(seed=seed),
        one_by_one(measure),
        SETTINGS,
        on_progress,
    )


ROUNDS = [f"{device} round {number}" for device in ("x86", "two") for number in (1, 2, 3)]


def test_each_device_has_the_front_of_everything_that_was_searched(
    tiny_space: MobileSpace, latencies: dict[str, LatencyPredictor], measure: Measure, tmp_path: Path
) -> None:
    evaluations, told = started(tiny_space, tmp_path / "e.parquet", measure), []
    results = search_both(tiny_space, latencies, evaluations, measure, lambda what, done, total: told.append(what))
    assert [len(evaluations.of(source)) for source in ROUNDS] == [4] * 6
    assert [goal.name for goal in results] == ["x86", "two"]
    for goal, result in results.items():
        (device,) = goal.devices
        predicted = PredictedValues(tiny_space, goal.values, latencies)
        searched = evaluations.of(INITIAL, *ROUNDS)
        assert result.front == evaluated_front(searched, predicted, goal.objectives, [])
        assert {c.values[f"latency@{device}"] for c in result.front} == {
            latencies[device].predict(tiny_space.network(c.architecture))[0] for c in result.front
        }
        volumes = list(result.hypervolumes.values())
        assert list(result.hypervolumes) == [INITIAL, *ROUNDS]
        assert volumes == sorted(volumes)
        assert {n for _, n in result.candidates} == {1, 2, 3}
        assert len(result.candidates) == SETTINGS.candidates
    whose = [f"{device} candidates" for device in ("x86", "two")]
    assert {*told} == {*whose, *(f"evaluations, {source}" for source in ROUNDS), "evaluations, random baseline"}


def test_random_search_has_the_evaluations_of_all_studies(
    tiny_space: MobileSpace, latencies: dict[str, LatencyPredictor], measure: Measure, tmp_path: Path
) -> None:
    alone, both = (started(tiny_space, tmp_path / name, measure) for name in ("alone", "both"))
    search(tiny_space, latencies["x86"], alone, measure)
    results = search_both(tiny_space, latencies, both, measure)
    drawn = [e.architecture for e in both.of(RANDOM)]
    searched = {e.architecture for e in both.of(*ROUNDS)}
    assert {e.architecture for e in alone.of(RANDOM)} <= {*drawn, *searched}
    assert 12 < len(drawn) <= 24
    assert all(0 < result.hypervolume_random <= 1 for result in results.values())


def test_the_first_study_does_not_depend_on_the_second_and_the_second_begins_where_the_first_ended(
    tiny_space: MobileSpace, latencies: dict[str, LatencyPredictor], measure: Measure, tmp_path: Path
) -> None:
    alone, both = (started(tiny_space, tmp_path / name, measure) for name in ("alone", "both"))
    expected = search(tiny_space, latencies["x86"], alone, measure)
    x86, two = search_both(tiny_space, latencies, both, measure).values()
    assert x86.candidates == expected.candidates
    assert [e.architecture for e in both.of(*ROUNDS[:3])] == [e.architecture for e in alone.of("round 1", "round 2", "round 3")]
    begins = [c.architecture for c, _ in two.candidates]
    goal = goals_of(parse_objectives(["accuracy", "latency@two"], ["two"]), [], ["two"])[0]
    predicted = PredictedValues(tiny_space, goal.values, {"two": latencies["two"]})
    front = evaluated_front(both.of(INITIAL, *ROUNDS[:3]), predicted, goal.objectives, [])
    assert begins[0] == front[0].architecture
    assert {c.architecture for c in front[:2]} <= set(begins)  # as many as surely fit among the candidates of a round
    assert not any(e.architecture in {f.architecture for f in both.of(INITIAL, *ROUNDS[:3])} for e in both.of(*ROUNDS[3:]))


@pytest.mark.parametrize("stop_after", [18, 26])
def test_a_study_of_any_device_that_is_killed_goes_the_same_way(
    tiny_space: MobileSpace, latencies: dict[str, LatencyPredictor], measure: Measure, tmp_path: Path, stop_after: int
) -> None:
    undisturbed = started(tiny_space, tmp_path / "a.parquet", measure)
    expected = search_both(tiny_space, latencies, undisturbed, measure)
    with pytest.raises(KeyboardInterrupt):
        search_both(
            tiny_space, latencies, started(tiny_space, tmp_path / "b.parquet", measure), interrupted(measure, stop_after)
        )
    evaluations = Evaluations(tmp_path / "b.parquet", tiny_space, "key")
    results = search_both(tiny_space, latencies, evaluations, measure)
    assert [(r.front, r.hypervolumes) for r in results.values()] == [(r.front, r.hypervolumes) for r in expected.values()]
    assert list(evaluations) == list(undisturbed)


def test_a_size_is_that_of_the_file_for_the_device(tiny_space: MobileSpace, latencies: dict[str, LatencyPredictor]) -> None:
    network = tiny_space.network(tiny_space.smallest())
    for device in latencies:
        predicted = PredictedValues(tiny_space, parse_objectives(["size"], ["x86"]), latencies, device)
        assert predicted.costs(tiny_space.smallest()) == {"size": model_bytes(network, latencies[device].plan(network))}
