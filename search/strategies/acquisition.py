"""Which of many predicted candidates are evaluated.

`front` takes what is predicted to be best. The other two also count how unsure the predictor is: `upper_confidence` takes the
front of what is plausible, `hypervolume` what is expected to enlarge the front of what was evaluated most.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np
from scipy.stats import norm

from predictors.accuracy import AccuracyPredictor
from search.candidates import Candidate
from search.fronts import choose, evaluated_front, normalizer
from search.objectives import hypervolume
from search.strategies.strategy import Round
from spaces.choice import Architecture

Choose = Callable[[Sequence[Candidate], Round, AccuracyPredictor], list[Architecture]]
ACCURACY = "accuracy"
STEADY = 1e-9  # least standard deviation; a prediction that is certain is one with next to no doubt


def predicted_front(candidates: Sequence[Candidate], round_: Round, predictor: AccuracyPredictor) -> list[Architecture]:
    """Front after front of the predicted values."""
    return choose(candidates, round_.goal.objectives, round_.left)


def upper_confidence(candidates: Sequence[Candidate], round_: Round, predictor: AccuracyPredictor) -> list[Architecture]:
    """Front after front with accuracies one standard deviation above what is predicted (GP-UCB, arXiv:0912.3995)."""
    unique = _distinct(candidates)
    spread = _spread(unique, round_, predictor)
    hopeful = [
        replace(c, values={**c.values, ACCURACY: min(1.0, c.values[ACCURACY] + std)})
        for c, std in zip(unique, spread, strict=True)
    ]
    return choose(hopeful, round_.goal.objectives, round_.left)


def hypervolume_improvement(candidates: Sequence[Candidate], round_: Round, predictor: AccuracyPredictor) -> list[Architecture]:
    """One after the other, what is expected to add most hypervolume to the evaluated front and to those chosen before.

    Accuracy is uncertain, costs are not, so the expectation is exact (Emmerich et al. 2006). Those chosen before count with the
    accuracy that is predicted (Kriging believer, Ginsbourger et al. 2010). Where no candidate is feasible, or accuracy is no
    objective, the predicted front decides.
    """
    objectives = round_.goal.objectives
    pool = [c for c in _distinct(candidates) if c.feasible]
    if not pool or all(o.name != ACCURACY for o in objectives):
        return predicted_front(candidates, round_, predictor)
    _, normalize = normalizer(round_.seen, round_.predicted, objectives)
    place = [o.name for o in objectives].index(ACCURACY)

    def point(values: Mapping[str, float]) -> tuple[float, tuple[float, ...]]:
        losses = normalize(dict(values))
        return 1.0 - losses[place], tuple(x for i, x in enumerate(losses) if i != place)

    scale = point({**pool[0].values, ACCURACY: 1.0})[0] - point({**pool[0].values, ACCURACY: 0.0})[0]
    points = [point(c.values) for c in pool]
    stds = np.maximum(scale * _spread(pool, round_, predictor), STEADY)
    front = [point(c.values) for c in evaluated_front(round_.seen, round_.predicted, objectives, round_.goal.constraints)]

    def gain(index: int) -> float:
        (mean, costs), std = points[index], float(stds[index])
        return expected_improvement(mean, std, costs, front)

    # The gain never grows when the front does, so an old value is a bound: only those at the top are computed anew.
    bounds = [(-gain(index), index) for index in range(len(pool))]
    heapq.heapify(bounds)
    chosen: list[Architecture] = []
    while bounds and len(chosen) < round_.left:
        _, index = heapq.heappop(bounds)
        now = -gain(index)
        if bounds and now > bounds[0][0]:
            heapq.heappush(bounds, (now, index))
            continue
        chosen.append(pool[index].architecture)
        front.append(points[index])
    return chosen


def expected_improvement(
    mean: float, std: float, costs: Sequence[float], front: Sequence[tuple[float, Sequence[float]]]
) -> float:
    """Expected growth of the hypervolume by a point whose value is normally distributed.

    Args:
        mean: of the value, which is to be maximized, above the reference 0.
        std: of the value, above 0.
        costs: of the point, to be minimized, up to the reference 1 each; may be none.
        front: `(value, costs)` of what is there.

    Between two neighbouring values of the front, growing in value adds as much as the costs dominate that no point of a higher
    value does; so the expectation is a sum over these steps.
    """
    levels = sorted({0.0, *(value for value, _ in front if value > 0.0)})
    z = (mean - np.array(levels)) / std
    above = std * (norm.pdf(z) + z * norm.cdf(z))  # expected excess over each level
    steps = above - np.append(above[1:], 0.0)
    free = [_free(costs, [other for value, other in front if value > level]) for level in levels]
    return float(np.dot(steps, free))


def _free(costs: Sequence[float], others: Sequence[Sequence[float]]) -> float:
    """What costs dominate of the unit cube and others do not."""
    if not costs:
        return 0.0 if others else 1.0
    if max(costs) >= 1.0:
        return 0.0
    behind = [[max(x, y) for x, y in zip(costs, other, strict=True)] for other in others]
    unit = [1.0] * len(costs)
    return float(np.prod(1.0 - np.array(costs))) - hypervolume(behind, unit)


def _distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    return list({c.architecture: c for c in candidates}.values())


def _spread(candidates: Sequence[Candidate], round_: Round, predictor: AccuracyPredictor) -> np.ndarray:
    """Standard deviations of the predicted accuracies `(n,)`."""
    if not candidates:
        return np.zeros(0)
    return predictor.predict(round_.predicted.features([c.architecture for c in candidates]))[1]


CHOOSERS: Mapping[str, Choose] = MappingProxyType(
    {"front": predicted_front, "upper_confidence": upper_confidence, "hypervolume": hypervolume_improvement}
)
