"""Fronts: which of many candidates nothing dominates, which are worth evaluating, and what was reached."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from search.candidates import Candidate, Values
from search.evaluations import Evaluated
from search.objectives import Constraint, Objective
from search.predicted import PredictedValues
from spaces.choice import Architecture

NEAREST = 4
LEAST_COST = 1e-9  # of which there is a logarithm


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
        front = along(front, objectives)
        room = count - len(chosen)
        if len(front) > room:
            front = [front[i] for i in np.unique(np.linspace(0, len(front) - 1, room).round().astype(int))]
            chosen += front
            break
        chosen += front
        taken = {c.architecture for c in front}
        pool = [c for c in pool if c.architecture not in taken]
    return [c.architecture for c in chosen]


def evenly(candidates: Sequence[Candidate], objectives: Sequence[Objective], count: int) -> list[Architecture]:
    """What `choose` chooses, taken evenly along the logarithm of each cost.

    Candidates crowd where a sampler found many; here one that stands for a long part of a front alone is there as many times as
    a crowd of as much width together.

    Args:
        candidates: predicted; repetitions count once.
        objectives: what the fronts are made of.
        count: how many, with repetitions; fewer where nothing costs.
    """
    chosen, values = choose(candidates, objectives, count), {c.architecture: c.values for c in candidates}
    costs = [o.name for o in objectives if not o.maximize]
    taken = [] if costs else chosen
    for number, name in enumerate(costs):
        at = np.log(np.maximum([values[a][name] for a in chosen], LEAST_COST))
        places = np.linspace(at.min(), at.max(), len(range(number, count, len(costs))))
        taken += [chosen[i] for i in np.abs(at - places[:, None]).argmin(axis=1)]
    return taken


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
    return along(list(distinct.values()), objectives)


def along(front: Sequence[Candidate], objectives: Sequence[Objective]) -> list[Candidate]:
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


def normalizer(
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
