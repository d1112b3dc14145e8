"""The search: rounds in which a strategy judges candidates, has some evaluated with the supernet, and learns from them.

How candidates are found and which of them are evaluated is a strategy's affair (`search.strategies`). The result is the front
of what was *evaluated*; a predicted accuracy never stands on it. Where each device has a study of its own, one follows another:
each begins with all that was evaluated before it, and its front is that of everything evaluated in the end. Everything follows
from the seed and the evaluations, so a study that is killed goes through the same rounds again and finds its evaluations made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from optuna.samplers import BaseSampler

from predictors.accuracy import AccuracyPredictor
from search.candidates import Candidate, Values
from search.evaluations import INITIAL, RANDOM, Evaluated, Evaluations
from search.fronts import as_candidates, evaluated_front, nearest_miss, normalizer
from search.left_out import NOTHING, LeftOut
from search.objectives import Goal, hypervolume
from search.predicted import PredictedValues
from search.strategies.guided import Guided
from search.strategies.strategy import Round, Scores, SearchStrategy
from search.workers import MeasureAll
from spaces.choice import Architecture

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class StudySettings:
    """How a study goes.

    Args:
        candidates: predicted candidates of all rounds together.
        rounds: times that the predictors are asked, the best evaluated and the accuracy predictor refitted.
        evaluations: networks evaluated per round.
        seed: of samplers and the random baseline.
        leave_out_what_does_not_pay: propose no options that are nowhere faster, see `search.left_out`.
    """

    candidates: int
    rounds: int
    evaluations: int
    seed: int
    leave_out_what_does_not_pay: bool = True


@dataclass
class StudyResult:
    """What a study found.

    Args:
        candidates: all predicted candidates with their round.
        front: evaluated by any study, feasible and not dominated, fastest first.
        candidate_s: seconds spent on candidates (sampler and predictors), without evaluations.
        hypervolumes: of the front after the initial evaluations and after each round of any study, by what was evaluated.
        hypervolume_random: of random architectures, as many evaluations.
        hypervolume_relaxed: of what a gradient search found, alone, and of as many random architectures; `None` without one.
        reference: reference point by objective.
        files: what the strategy leaves for other runs, by file name.
        nearest_miss: when nothing is feasible, the constraint that binds and by how much.
    """

    candidates: list[tuple[Candidate, int]] = field(default_factory=list)
    front: list[Candidate] = field(default_factory=list)
    candidate_s: float = 0.0
    hypervolumes: dict[str, float] = field(default_factory=dict)
    hypervolume_random: float = 0.0
    hypervolume_relaxed: tuple[float, float] | None = None
    reference: Values = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    nearest_miss: dict[str, object] | None = None


def no_scores(names: Sequence[str], architectures: Sequence[Architecture], on_progress: object = None) -> np.ndarray:
    """Where nobody scores networks.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"no scores of {', '.join(names)}")


def run_studies(
    goals: Mapping[Goal, PredictedValues],
    evaluations: Evaluations,
    new_predictor: Callable[[], AccuracyPredictor],
    new_sampler: Callable[[int], BaseSampler],
    measure_all: MeasureAll,
    settings: StudySettings,
    on_progress: Progress = lambda what, done, total: None,
    left_out: Mapping[Goal, LeftOut] | None = None,
    relaxed: tuple[str, Sequence[Architecture]] = ("", ()),
    new_strategy: Callable[[], SearchStrategy] = Guided,
    scores: Scores = no_scores,
) -> dict[Goal, StudyResult]:
    """Search, one study after the other.

    Args:
        goals: what each study looks for, with the costs of architectures that it needs.
        evaluations: the initial ones; what is evaluated is added.
        new_predictor: makes an accuracy predictor to fit.
        new_sampler: makes an Optuna sampler from a seed.
        measure_all: evaluates architectures with the supernet.
        settings: rounds and numbers, of each study.
        on_progress: called with what is done, how many are done, and of how many.
        left_out: options that no round of a goal proposes.
        relaxed: a gradient strategy and what it found, evaluated already; the studies go on from there.
        new_strategy: makes what searches, for each study.
        scores: zero-cost proxies of architectures, for strategies that ask for them.
    """
    seen = evaluations.of(INITIAL)
    results, counts = {goal: StudyResult() for goal in goals}, {INITIAL: len(seen)}
    strategy, found = relaxed[0], set(relaxed[1])
    if found:
        new = found - {e.architecture for e in seen}
        seen += [e for e in evaluations if e.architecture in new]
        counts[strategy] = len(seen)
    for place, (goal, predicted) in enumerate(goals.items()):
        whose, result, search = f"{goal.name} " if len(goals) > 1 else "", results[goal], new_strategy()
        for number in range(1, settings.rounds + 1):
            source, before = f"{whose}round {number}", len(result.candidates)
            round_ = Round(
                goal=goal,
                predicted=predicted,
                number=number,
                rounds=settings.rounds,
                seed=settings.seed * 1000 + place * settings.rounds + number,
                candidates=settings.candidates * number // settings.rounds
                - settings.candidates * (number - 1) // settings.rounds,
                left=settings.evaluations,
                seen=seen,
                left_out=(left_out or {}).get(goal, NOTHING),
                new_predictor=new_predictor,
                new_sampler=partial(new_sampler, settings.seed * 1000 + place * settings.rounds + number),
                scores=scores,
                measured=partial(_measured, evaluations, source, measure_all, on_progress),
                on_progress=partial(_told, on_progress, whose, before, settings.candidates),
            )
            begin = time.perf_counter()
            result.candidates += [(candidate, number) for candidate in search.search(round_)]
            result.candidate_s += time.perf_counter() - begin - round_.evaluation_s
            counts[source] = len(seen)
        result.files = search.files()
    drawn = settings.rounds * settings.evaluations * len(goals) + len(found)
    sample = next(iter(goals.values())).space.sample_spread
    baseline = random_baseline(evaluations, drawn, settings.seed, sample, measure_all, on_progress)
    for goal, predicted in goals.items():
        by_source = {source: seen[:count] for source, count in counts.items()}
        judge(results[goal], goal, predicted, by_source, baseline, [e for e in seen if e.architecture in found])
    return results


def judge(
    result: StudyResult,
    goal: Goal,
    predicted: PredictedValues,
    seen: Mapping[str, Sequence[Evaluated]],
    baseline: Sequence[Evaluated],
    relaxed: Sequence[Evaluated] = (),
) -> None:
    """Complete a result: its front and how it grew, beside that of random search.

    Args:
        result: receives front, hypervolumes, reference and nearest miss.
        goal: what was looked for.
        predicted: costs of architectures.
        seen: everything evaluated after the initial evaluations and after each round, by what was evaluated last.
        baseline: random search.
        relaxed: what a gradient search found.
    """
    fronts = {
        source: evaluated_front(known, predicted, goal.objectives, goal.constraints)
        for source, known in {**seen, RANDOM: baseline}.items()
    }
    everything = list(seen.values())[-1]
    result.reference, normalize = normalizer([*everything, *baseline], predicted, goal.objectives)
    unit = [1.0] * len(goal.objectives)
    volumes = {source: hypervolume([normalize(c.values) for c in front], unit) for source, front in fronts.items()}
    result.hypervolume_random = volumes.pop(RANDOM)
    result.hypervolumes = volumes
    if relaxed:
        drawn = [e for e in baseline if e.source != INITIAL][: len(relaxed)]
        alone = [evaluated_front(known, predicted, goal.objectives, goal.constraints) for known in (relaxed, drawn)]
        found, by_random = (hypervolume([normalize(c.values) for c in front], unit) for front in alone)
        result.hypervolume_relaxed = found, by_random
    result.front = fronts[list(seen)[-1]]
    if not result.front:
        result.nearest_miss = nearest_miss(as_candidates(everything, predicted, goal.constraints), goal.constraints)


def _measured(
    evaluations: Evaluations, source: str, measure_all: MeasureAll, on_progress: Progress, architectures: Sequence[Architecture]
) -> list[Evaluated]:
    # What an earlier attempt at this round evaluated is asked for again; what later ones did must not disturb it.
    evaluations.evaluate(architectures, source, measure_all, partial(on_progress, f"evaluations, {source}"))
    known = {e.architecture: e for e in evaluations}
    return [known[a] for a in architectures]


def _told(on_progress: Progress, whose: str, before: int, of_all: int, what: str, done: int, total: int) -> None:
    """Candidates count over all rounds; what else a strategy does counts for itself."""
    if what == "candidates":
        done, total = before + done, of_all
    on_progress(f"{whose}{what}", done, total)


def random_baseline(
    evaluations: Evaluations,
    count: int,
    seed: int,
    sample: Callable[[np.random.Generator], Architecture],
    measure_all: MeasureAll,
    on_progress: Progress,
) -> list[Evaluated]:
    """Random search at the budget of all studies: the initial evaluations, and as many random ones as all rounds evaluated."""
    rng = np.random.default_rng([seed, 77])
    drawn = [sample(rng) for _ in range(count)]
    evaluations.evaluate(drawn, RANDOM, measure_all, partial(on_progress, "evaluations, random baseline"))
    known = {e.architecture: e for e in evaluations}
    return evaluations.of(INITIAL) + [known[a] for a in dict.fromkeys(drawn) if known[a].source != INITIAL]
