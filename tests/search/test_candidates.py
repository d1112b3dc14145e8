"""Asking Optuna for candidates: what is asked for, what the sampler is told, and what is archived."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import optuna
import pytest
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from search.candidates import Candidate, FinishedStudy, Values, archive, distributions_of, propose
from search.objectives import Constraint, Objective, parse_constraint, parse_objectives
from spaces.choice import Architecture
from spaces.mobile import MobileSpace

MakeSampler = Callable[[int], BaseSampler]
Predict = Callable[[Sequence[Architecture]], list[Values]]

SAMPLERS: dict[str, MakeSampler] = {
    "nsga2": lambda seed: NSGAIISampler(seed=seed, population_size=20),
    "tpe": lambda seed: TPESampler(seed=seed),
    "random": lambda seed: RandomSampler(seed=seed),
}
OBJECTIVES = parse_objectives(["accuracy", "macs"], ["x86"])
SMALL_ENOUGH = parse_constraint("macs<=60k", ["x86"])


@pytest.fixture(params=sorted(SAMPLERS))
def sampler(request: pytest.FixtureRequest) -> Callable[[int], BaseSampler]:
    return SAMPLERS[str(request.param)]


@pytest.fixture
def predict(small_space: MobileSpace) -> Callable[[Sequence[Architecture]], list[Values]]:
    """More weights are better, at the price of more work."""

    def values_of(architecture: Architecture) -> Values:
        network = small_space.network(architecture)
        return {"accuracy": 1 - 1 / math.log(network.weight_bytes), "macs": float(network.macs)}

    return lambda architectures: [values_of(a) for a in architectures]


def ask(
    space: MobileSpace,
    predict: Callable[[Sequence[Architecture]], list[Values]],
    sampler: BaseSampler,
    count: int = 75,
    constraints: Sequence[Constraint] = (),
    seeds: Sequence[Architecture] = (),
    objectives: Sequence[Objective] = OBJECTIVES,
) -> list[Candidate]:
    return propose(space, predict, objectives, constraints, sampler, count, seeds, batch=20)


def test_as_many_as_wanted_all_of_the_space(small_space: MobileSpace, predict: Predict, sampler: MakeSampler) -> None:
    for count in (0, 1, 20, 75):
        candidates = ask(small_space, predict, sampler(0), count)
        assert len(candidates) == count
        for candidate in candidates:
            assert small_space.architecture(candidate.architecture) == candidate.architecture
            assert candidate.values == predict([candidate.architecture])[0]
            assert candidate.feasible
            assert candidate.violation <= 0


def test_the_seed_decides(small_space: MobileSpace, predict: Predict, sampler: MakeSampler) -> None:
    first, again, other = (
        [c.architecture for c in ask(small_space, predict, sampler(seed), constraints=[SMALL_ENOUGH])] for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    assert len(set(first)) > 30


def test_seeds_are_tried_first(small_space: MobileSpace, predict: Predict, sampler: MakeSampler) -> None:
    seeds = [small_space.smallest(), small_space.largest(), small_space.smallest()]
    candidates = ask(small_space, predict, sampler(0), seeds=seeds)
    assert [c.architecture for c in candidates[:3]] == seeds
    many = [small_space.largest()] * 10
    assert [c.architecture for c in ask(small_space, predict, sampler(0), 4, seeds=many)] == many[:4]


def test_constraints_are_told_and_kept(small_space: MobileSpace, predict: Predict, sampler: MakeSampler) -> None:
    impossible = parse_constraint("macs<=1", ["x86"])
    candidates = ask(small_space, predict, sampler(0), constraints=[SMALL_ENOUGH, impossible])
    assert not any(c.feasible for c in candidates)
    for c in candidates:
        assert c.violation == pytest.approx(max(SMALL_ENOUGH.violation(c.values["macs"]), c.values["macs"] - 1))


def test_an_evolution_moves_into_the_feasible_region(small_space: MobileSpace, predict: Predict) -> None:
    constraint = parse_constraint("macs<=30k", ["x86"])
    candidates = ask(small_space, predict, SAMPLERS["nsga2"](0), 400, [constraint])
    feasible = [c.feasible for c in candidates]
    assert sum(feasible[-100:]) > sum(feasible[:100])
    assert sum(feasible[-100:]) > 60
    unconstrained = ask(small_space, predict, SAMPLERS["nsga2"](0), 400)
    assert sum(c.values["macs"] <= 30e3 for c in unconstrained[-100:]) < sum(feasible[-100:])


def test_an_evolution_beats_chance(small_space: MobileSpace, predict: Predict) -> None:
    single = parse_objectives(["macs"], ["x86"])
    means = {
        name: sum(c.values["macs"] for c in ask(small_space, predict, SAMPLERS[name](0), 300, objectives=single)[-100:])
        for name in ("nsga2", "random")
    }
    assert means["nsga2"] < 0.7 * means["random"]


def test_each_architecture_is_predicted_once(small_space: MobileSpace, predict: Predict, sampler: MakeSampler) -> None:
    asked: list[Architecture] = []

    def counting(architectures: Sequence[Architecture]) -> list[Values]:
        asked.extend(architectures)
        return predict(architectures)

    seeds = [small_space.largest()] * 3
    candidates = ask(small_space, counting, sampler(0), 90, seeds=seeds)
    assert len(asked) == len(set(asked)) == len({c.architecture for c in candidates})


def test_progress_ends_at_the_count(small_space: MobileSpace, predict: Predict) -> None:
    told: list[int] = []
    propose(small_space, predict, OBJECTIVES, [], RandomSampler(seed=0), 45, batch=20, on_progress=told.append)
    assert told == [20, 40, 45]


def test_samplers_see_every_trial_with_all_its_parameters(small_space: MobileSpace, predict: Predict) -> None:
    seen: list[FrozenTrial] = []

    class Watching(RandomSampler):
        def after_trial(
            self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
        ) -> None:
            assert values is not None
            seen.append(trial)
            assert (state, len(values)) == (TrialState.COMPLETE, 2)
            super().after_trial(study, trial, state, values)

    candidates = ask(small_space, predict, Watching(seed=0), 30, [SMALL_ENOUGH])
    names = {choice.name for choice in small_space.choices}
    assert [t.number for t in seen] == list(range(30))
    for trial, candidate in zip(seen, candidates, strict=True):
        assert set(trial.params) == names
        assert small_space.architecture(trial.params) == candidate.architecture
        assert trial.constraints == {SMALL_ENOUGH.text: SMALL_ENOUGH.violation(candidate.values["macs"])}


def test_the_archive_opens_in_optuna(small_space: MobileSpace, predict: Predict, tmp_path: Path) -> None:
    candidates = ask(small_space, predict, RandomSampler(seed=0), 40, [SMALL_ENOUGH])
    path = tmp_path / "study.log"
    for _ in range(2):  # the second replaces the first
        archive(path, small_space, {"the run": FinishedStudy([(c, {"round": 1}) for c in candidates], OBJECTIVES)})
    assert [p.name for p in tmp_path.iterdir()] == ["study.log"]
    study = optuna.load_study(storage=JournalStorage(JournalFileBackend(str(path))), study_name="the run")
    assert [d.name for d in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert study.metric_names == ["accuracy", "macs"]
    assert len(study.trials) == 40
    for trial, candidate in zip(study.trials, candidates, strict=True):
        assert trial.state == TrialState.COMPLETE
        assert small_space.architecture(trial.params) == candidate.architecture
        assert trial.params == dict(candidate.architecture)
        assert trial.values == [candidate.values["accuracy"], candidate.values["macs"]]
        assert trial.user_attrs == {**candidate.values, "violation": candidate.violation, "round": 1}
        assert all(trial.distributions[n] == distributions_of(small_space)[n] for n in trial.params)


def test_the_archive_holds_several_studies(small_space: MobileSpace, predict: Predict, tmp_path: Path) -> None:
    candidates, macs = ask(small_space, predict, RandomSampler(seed=0), 12), parse_objectives(["macs"], ["x86"])
    studies = {
        "run-x86": FinishedStudy([(c, {}) for c in candidates], OBJECTIVES),
        "run-two": FinishedStudy([(c, {}) for c in candidates[:5]], macs),
    }
    archive(tmp_path / "study.log", small_space, studies)
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "study.log")))
    assert [(s.study_name, s.n_trials) for s in optuna.get_all_study_summaries(storage)] == [("run-x86", 12), ("run-two", 5)]
    two = optuna.load_study(storage=storage, study_name="run-two")
    assert two.metric_names == ["macs"]
    assert [t.values for t in two.trials] == [[c.values["macs"]] for c in candidates[:5]]


def test_the_archive_knows_what_is_feasible(small_space: MobileSpace, predict: Predict, tmp_path: Path) -> None:
    """Whoever opens the study asks it for its best trials; those must respect the constraints."""
    candidates = ask(small_space, predict, RandomSampler(seed=0), 60, [SMALL_ENOUGH])
    infeasible = {c.architecture for c in candidates if not c.feasible}
    assert 0 < len(infeasible) < 60
    path = tmp_path / "study.log"
    archive(path, small_space, {"run": FinishedStudy([(c, {}) for c in candidates], OBJECTIVES)})
    study = optuna.load_study(storage=JournalStorage(JournalFileBackend(str(path))), study_name="run")
    assert study.best_trials
    assert not {small_space.architecture(t.params) for t in study.best_trials} & infeasible
