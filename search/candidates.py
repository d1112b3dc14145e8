"""Asking an Optuna sampler for thousands of candidates that cost a fraction of a millisecond to judge.

`Study.ask` and `suggest_*` book every parameter of every trial one by one, which costs 5 to 20 ms for the sixty choices of a
space, far more than the predictors. Here the sampler, any of Optuna's, is asked for all choices of a trial at once through
the interface that it has for samplers inside samplers, and a trial's parameters are booked together.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseGASampler, BaseSampler
from optuna.storages import InMemoryStorage, JournalStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from search.left_out import NOTHING, LeftOut
from search.objectives import Constraint, Objective
from spaces.choice import Architecture, Option
from spaces.space import Space

Values = dict[str, float]


@dataclass(frozen=True)
class Candidate:
    """An architecture with its predicted values by name of objective, and how much it violates the constraints (<= 0: none)."""

    architecture: Architecture
    values: Values
    violation: float

    @property
    def feasible(self) -> bool:
        return self.violation <= 0


class _WholeTrialStorage(InMemoryStorage):
    """In-memory storage that books all parameters of a trial at once."""

    def set_trial_params(self, trial_id: int, params: dict[str, Any], distributions: dict[str, BaseDistribution]) -> None:
        with self._lock:
            trial = copy.copy(self._get_trial(trial_id))
            trial.params, trial.distributions = params, distributions
            self._set_trial(trial_id, trial)


class _WholeTrialSampler(BaseSampler):
    """Asks another sampler for every choice of a fixed space when a trial begins; the answer is in `latest`."""

    def __init__(self, inner: BaseSampler, space: dict[str, BaseDistribution], storage: InMemoryStorage) -> None:
        self.inner, self.space, self.storage = inner, space, storage
        self.latest: dict[str, Any] = {}
        self._generation, self._members = 0, 0

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.space

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        several = {name: d for name, d in search_space.items() if not d.single()}
        if isinstance(self.inner, BaseGASampler):
            # Otherwise the sampler counts the generations of all trials before each: a quarter of the speed at 5,000.
            trial_id = self.storage.get_trial_id_from_study_id_trial_number(study._study_id, trial.number)
            self.storage.set_trial_system_attr(trial_id, self.inner._get_generation_key(), self._generation)
            trial = self.storage.get_trial(trial_id)
        related = self.inner.sample_relative(study, trial, several)
        independent = self.inner.sample_independent
        self.latest = {n: related[n] if n in related else independent(study, trial, n, d) for n, d in search_space.items()}
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self.inner.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self.inner.before_trial(study, trial)

    def after_trial(self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self.inner.after_trial(study, trial, state, values)
        if isinstance(self.inner, BaseGASampler) and trial.system_attrs[self.inner._get_generation_key()] == self._generation:
            self._members += 1
            if self._members >= (self.inner.population_size or 1):
                self._generation, self._members = self._generation + 1, 0


def distributions_of(space: Space, left_out: LeftOut = NOTHING) -> dict[str, BaseDistribution]:
    """Optuna's view of a space: every choice, active or not, so that samplers see one fixed set of parameters."""
    return {choice.name: CategoricalDistribution(left_out.options(choice)) for choice in space.choices}


def propose(
    space: Space,
    predict: Callable[[Sequence[Architecture]], list[Values]],
    objectives: Sequence[Objective],
    constraints: Sequence[Constraint],
    sampler: BaseSampler,
    count: int,
    seeds: Sequence[Architecture] = (),
    batch: int = 50,
    on_progress: Callable[[int], None] = lambda done: None,
    left_out: LeftOut = NOTHING,
) -> list[Candidate]:
    """Candidates of one optimization, in the order in which the sampler asked for them.

    Args:
        space: what can be asked for.
        predict: values by name for architectures, of every objective and constraint.
        objectives: what the sampler optimizes.
        constraints: what it is told to respect.
        sampler: any of Optuna's, fresh.
        count: trials.
        seeds: good architectures that are tried first, with what remains in place of what is left out.
        batch: candidates predicted together; a generation of an evolutionary sampler is a good number.
        on_progress: called with the number of trials done.
        left_out: options that are not asked for.

    Returns:
        `count` candidates; an architecture that was asked for twice stands there twice.
    """
    distributions = distributions_of(space, left_out)
    storage = _WholeTrialStorage()
    whole = _WholeTrialSampler(sampler, distributions, storage)
    study = optuna.create_study(storage=storage, sampler=whole, directions=[o.direction for o in objectives])
    study_id = storage.get_study_id_from_name(study.study_name)
    waiting = [left_out.replaced(_fill(space, architecture)) for architecture in seeds]
    known: dict[Architecture, Values] = {}
    candidates: list[Candidate] = []
    while len(candidates) < count:
        asked: list[tuple[optuna.Trial, int, Architecture]] = []
        for _ in range(min(batch, count - len(candidates))):
            trial = study.ask()
            _ = trial.relative_params  # makes the sampler sample
            params = waiting.pop(0) if waiting else whole.latest
            trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, trial.number)
            storage.set_trial_params(trial_id, params, distributions)
            asked.append((trial, trial_id, space.architecture(params)))
        new = list(dict.fromkeys(a for _, _, a in asked if a not in known))
        known.update(zip(new, predict(new), strict=True))
        for trial, trial_id, architecture in asked:
            values = known[architecture]
            violations = {c.text: c.violation(values[c.objective.name]) for c in constraints}
            for text, violation in violations.items():
                trial.set_constraint(text, violation)
            losses = [values[o.name] for o in objectives]
            whole.after_trial(study, storage.get_trial(trial_id), TrialState.COMPLETE, losses)
            storage.set_trial_state_values(trial_id, TrialState.COMPLETE, losses)
            candidates.append(Candidate(architecture, values, max(violations.values(), default=0.0)))
        on_progress(len(candidates))
    return candidates


def _fill(space: Space, architecture: Architecture) -> dict[str, Option]:
    return {choice.name: architecture.get(choice.name, choice.options[0]) for choice in space.choices}


class _JournalBuffer(BaseJournalBackend):
    """A journal in memory: thousands of trials reach the file in one write instead of one lock and fsync each."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        return self.logs[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self.logs += logs


@dataclass(frozen=True)
class FinishedStudy:
    """What is archived of a study: its candidates, each with user attributes to show beside it, and its objectives in order."""

    candidates: Sequence[tuple[Candidate, Mapping[str, Any]]]
    objectives: Sequence[Objective]


def archive(path: Path, space: Space, studies: Mapping[str, FinishedStudy]) -> None:
    """Write studies by name into a journal file of Optuna, which `optuna-dashboard` opens.

    Args:
        path: the journal; replaced.
        space: of the candidates; inactive choices are not written.
        studies: by name.
    """
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    buffer = _JournalBuffer()
    distributions = distributions_of(space)
    for name, finished in studies.items():
        study = optuna.create_study(
            storage=JournalStorage(buffer),
            study_name=name,
            directions=[o.direction for o in finished.objectives],
            sampler=optuna.samplers.RandomSampler(),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([o.name for o in finished.objectives])
        study.add_trials(
            optuna.trial.create_trial(
                params=dict(candidate.architecture),
                distributions={choice: distributions[choice] for choice in candidate.architecture},
                values=[candidate.values[o.name] for o in finished.objectives],
                system_attrs={"constraints:violation": candidate.violation},  # where Optuna keeps `Trial.set_constraint`
                user_attrs={**candidate.values, "violation": candidate.violation, **attributes},
            )
            for candidate, attributes in finished.candidates
        )
    # Optuna's default lock needs links, which not every file system has.
    JournalFileBackend(str(partial), JournalFileOpenLock(str(partial))).append_logs(buffer.logs)
    partial.replace(path)
