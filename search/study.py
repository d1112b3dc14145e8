"""The search: rounds of predicting thousands of candidates, evaluating the best with the supernet, and learning from them.

This is the loop of DyNAS-T and SimQ-NAS (arXiv:2312.13301). Its result is the front of what was *evaluated*; a predicted
accuracy never stands on it. Where each device has a study of its own, one follows the other: each begins with all that was
evaluated before it, and its front is that of everything evaluated in the end. Everything follows from the seed and the
evaluations, so a study that is killed goes through the same rounds again and finds its evaluations already made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from optuna.samplers import BaseSampler

from predictors.accuracy import AccuracyPredictor
from search.candidates import Candidate, Values, propose
from search.evaluations import INITIAL, RANDOM, Evaluated, Evaluations
from search.left_out import NOTHING, LeftOut
from search.objectives import Constraint, Goal, Objective, hypervolume
from search.predicted import PredictedValues
from search.workers import MeasureAll
from spaces.choice import Architecture
from spaces.space import Space

Progress = Callable[[str, int, int], None]
RUN_PARTS = 6
NEAREST = 4


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
        nearest_miss: when nothing is feasible, the constraint that binds and by how much.
    """

    candidates: list[tuple[Candidate, int]] = field(default_factory=list)
    front: list[Candidate] = field(default_factory=list)
    candidate_s: float = 0.0
    hypervolumes: dict[str, float] = field(default_factory=dict)
    hypervolume_random: float = 0.0
    hypervolume_relaxed: tuple[float, float] | None = None
    reference: Values = field(default_factory=dict)
    nearest_miss: dict[str, object] | None = None


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
    """
    seen = evaluations.of(INITIAL)
    results, counts = {goal: StudyResult() for goal in goals}, {INITIAL: len(seen)}
    strategy, found = relaxed[0], set(relaxed[1])
    if found:
        new = found - {e.architecture for e in seen}
        seen += [e for e in evaluations if e.architecture in new]
        counts[strategy] = len(seen)
    for place, (goal, predicted) in enumerate(goals.items()):
        whose, result = f"{goal.name} " if len(goals) > 1 else "", results[goal]
        for number in range(1, settings.rounds + 1):
            begin = time.perf_counter()
            count = settings.candidates * number // settings.rounds - settings.candidates * (number - 1) // settings.rounds
            asking = partial(_candidates_done, on_progress, f"{whose}candidates", len(result.candidates), settings.candidates)
            sampler = new_sampler(settings.seed * 1000 + place * settings.rounds + number)
            unpaid = (left_out or {}).get(goal, NOTHING)
            candidates = predicted_candidates(seen, goal, predicted, new_predictor(), sampler, count, unpaid, asking)
            result.candidates += [(candidate, number) for candidate in candidates]
            result.candidate_s += time.perf_counter() - begin
            # What an earlier attempt at this round evaluated is chosen again; what later ones did must not disturb it.
            known, source = {e.architecture for e in seen}, f"{whose}round {number}"
            chosen = choose([c for c in candidates if c.architecture not in known], goal.objectives, settings.evaluations)
            evaluations.evaluate(chosen, source, measure_all, partial(on_progress, f"evaluations, {source}"))
            wanted = set(chosen)
            seen += [e for e in evaluations if e.architecture in wanted]
            counts[source] = len(seen)
    drawn = settings.rounds * settings.evaluations * len(goals) + len(found)
    sample = next(iter(goals.values())).space.sample_spread
    baseline = random_baseline(evaluations, drawn, settings.seed, sample, measure_all, on_progress)
    for goal, predicted in goals.items():
        by_source = {source: seen[:count] for source, count in counts.items()}
        judge(results[goal], goal, predicted, by_source, baseline, [e for e in seen if e.architecture in found])
    return results


def predicted_candidates(
    seen: Sequence[Evaluated],
    goal: Goal,
    predicted: PredictedValues,
    predictor: AccuracyPredictor,
    sampler: BaseSampler,
    count: int,
    left_out: LeftOut,
    on_progress: Callable[[int], None],
) -> list[Candidate]:
    """What a sampler asks for that begins at the front of what was evaluated, judged by a predictor that learns from it."""
    space = predicted.space
    predictor.fit(predicted.features([e.architecture for e in seen]), [e.accuracy for e in seen])
    front = evaluated_front(seen, predicted, goal.objectives, goal.constraints)
    starts = front or nearest(as_candidates(seen, predicted, goal.constraints))
    runs = (a for c in starts for a in (c.architecture, *precision_runs(space, c.architecture)))
    seeds = list(dict.fromkeys(space.completed(left_out.replaced(a)) for a in runs))
    predict = partial(predicted.predict, accuracy=predictor)
    return propose(
        space, predict, goal.objectives, goal.constraints, sampler, count, seeds, on_progress=on_progress, left_out=left_out
    )


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
    result.reference, normalize = _normalizer([*everything, *baseline], predicted, goal.objectives)
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


def precision_runs(space: Space, architecture: Architecture) -> list[Architecture]:
    """The same network with its first layers in the highest and its last layers in the lowest precision, or the other way.

    A single layer in another precision than its neighbours pays for two borders, so such networks are worse at every step on
    the way from one precision to another; a sampler that changes one layer at a time does not get there by itself.
    """
    names = [c.name for c in space.choices if c.kind == "precision" and c.name in architecture]
    options = {c.name: c.options for c in space.choices}
    variants = []
    for part in range(RUN_PARTS + 1):
        change = round(part * len(names) / RUN_PARTS)
        for first, second in ((-1, 0), (0, -1)):
            values = {name: options[name][first if i < change else second] for i, name in enumerate(names)}
            variants.append(space.architecture({**architecture, **values}))
    return variants


def _candidates_done(on_progress: Progress, what: str, before: int, total: int, done: int) -> None:
    on_progress(what, before + done, total)


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


def choose(candidates: Sequence[Candidate], objectives: Sequence[Objective], count: int) -> list[Architecture]:
    """The candidates worth evaluating: front after front, feasible ones first, the last front thinned out evenly.

    Args:
        candidates: predicted; repetitions count once.
        objectives: what the fronts are made of.
        count: how many.
    """
    unique = list({c.architecture: c for c in candidates}.values())
    pool = [c for c in unique if c.feasible] or sorted(unique, key=lambda c: c.violation)[: 4 * count]
    chosen: list[Candidate] = []
    while pool and len(chosen) < count:
        front = nondominated(pool, objectives)
        front = _along(front, objectives)
        room = count - len(chosen)
        if len(front) > room:
            front = [front[i] for i in np.unique(np.linspace(0, len(front) - 1, room).round().astype(int))]
            chosen += front
            break
        chosen += front
        taken = {c.architecture for c in front}
        pool = [c for c in pool if c.architecture not in taken]
    return [c.architecture for c in chosen]


def nondominated(candidates: Sequence[Candidate], objectives: Sequence[Objective]) -> list[Candidate]:
    """Candidates that no other dominates, in their order."""
    losses = np.array([[o.loss(c.values[o.name]) for o in objectives] for c in candidates])
    keep = []
    for index, row in enumerate(losses):
        better = (losses <= row).all(axis=1) & (losses < row).any(axis=1)
        if not better.any():
            keep.append(candidates[index])
    return keep


def evaluated_front(
    evaluated: Sequence[Evaluated],
    predicted: PredictedValues,
    objectives: Sequence[Objective],
    constraints: Sequence[Constraint],
) -> list[Candidate]:
    """The feasible front of evaluated architectures: accuracy measured on validation data, costs predicted or counted."""
    candidates = as_candidates(evaluated, predicted, constraints)
    front = nondominated([c for c in candidates if c.feasible], objectives) if any(c.feasible for c in candidates) else []
    distinct = {tuple(c.values[o.name] for o in objectives): c for c in reversed(front)}
    return _along(list(distinct.values()), objectives)


def _along(front: Sequence[Candidate], objectives: Sequence[Objective]) -> list[Candidate]:
    """A front from its cheap to its expensive end, always in the same order."""
    last = objectives[-1]
    return sorted(front, key=lambda c: (last.loss(c.values[last.name]), c.architecture.to_json()))


def as_candidates(
    evaluated: Sequence[Evaluated], predicted: PredictedValues, constraints: Sequence[Constraint]
) -> list[Candidate]:
    """Evaluated architectures with all their values."""
    candidates = []
    for e in evaluated:
        values = {**predicted.costs(e.architecture), "accuracy": e.accuracy}
        violation = max((c.violation(values[c.objective.name]) for c in constraints), default=0.0)
        candidates.append(Candidate(e.architecture, values, violation))
    return candidates


def nearest(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The few candidates that violate the constraints least: where a search goes on while nothing is feasible."""
    return sorted(candidates, key=lambda c: (c.violation, c.architecture.to_json()))[:NEAREST]


def nearest_miss(candidates: Sequence[Candidate], constraints: Sequence[Constraint]) -> dict[str, object]:
    """The evaluated network that misses the constraints least, and the constraint that binds it."""
    best = nearest(candidates)[0]
    binding = max(constraints, key=lambda c: c.violation(best.values[c.objective.name]))
    value, unit = best.values[binding.objective.name], binding.objective.unit
    text = f"nothing is feasible: {binding.text} binds; the nearest network has {value:.4g} {unit}".rstrip()
    return {"constraint": binding.text, "value": value, "unit": unit, "text": text}


def _normalizer(
    evaluated: Sequence[Evaluated], predicted: PredictedValues, objectives: Sequence[Objective]
) -> tuple[Values, Callable[[Values], list[float]]]:
    """Reference point (the worst of each objective) and the map of values to [0, 1], 0 the best that was evaluated."""
    rows = [c.values for c in as_candidates(evaluated, predicted, ())]
    losses = {o.name: [o.loss(row[o.name]) for row in rows] for o in objectives}
    best = {name: min(values) for name, values in losses.items()}
    width = {name: max(max(values) - best[name], 1e-12) for name, values in losses.items()}

    def normalize(values: Values) -> list[float]:
        return [(o.loss(values[o.name]) - best[o.name]) / width[o.name] for o in objectives]

    return {o.name: o.loss(max(losses[o.name])) for o in objectives}, normalize
