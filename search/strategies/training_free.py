"""Strategy `training_free`: zero-cost proxies, combined so that what they rank first does well when it is evaluated.

RoBoT, Robustifying Training-Free NAS (arXiv:2403.07591). The rankings of a pool of random networks by several proxies are
combined by weights. Weights are searched by Bayesian optimization, whose objective is what the few networks that a
combination puts first reach when they are evaluated; then what is left of the budget goes to the networks that the best
combination puts first. No accuracy predictor is asked.

Where the paper has one objective, here a combination is judged by its front: combined rankings beside the costs. A front is
worth its hypervolume, which for one objective is the accuracy of its network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler

from search.candidates import Candidate, Values, propose
from search.evaluations import Evaluated
from search.fronts import choose, evaluated_front, normalizer
from search.objectives import Constraint, hypervolume
from search.proxies import check_names
from search.strategies.guided import starts
from search.strategies.strategy import Round, SearchStrategy
from spaces.choice import Architecture
from spaces.errors import UserError

MOST_TRIALS = 2  # for each evaluation of a round: combinations that put known networks first cost no evaluation
LEAST_SLOPE = 1e-3


class TrainingFree(SearchStrategy):
    """Combined rankings of zero-cost proxies.

    Args:
        proxies: names of those that are combined, at least one.
        networks: evaluated for each combination that is tried.
        exploring: share of the rounds that try combinations; at least one does, and one is left for the best combination where
            there are several.
        pool: share of a study's candidates that are drawn at random and ranked; a sampler asks for the others.
        weights: makes the Optuna sampler of combinations from a seed.

    Raises:
        UserError: an unknown proxy, or a number that is not allowed.
    """

    name: ClassVar[str] = "training_free"

    def __init__(
        self,
        proxies: Sequence[str],
        weights: Callable[..., BaseSampler],
        networks: int = 4,
        exploring: float = 0.5,
        pool: float = 0.5,
    ) -> None:
        self.proxies, self.weights = check_names("study.strategy.proxies", proxies), weights
        if not self.proxies:
            raise UserError("study.strategy.proxies is empty; allowed is one or more")
        if type(networks) is not int or networks < 1:
            raise UserError(f"study.strategy.networks is {networks!r}; allowed are integers from 1")
        for name, share in (("exploring", exploring), ("pool", pool)):
            if not isinstance(share, (int, float)) or not 0.0 < share < 1.0:
                raise UserError(f"study.strategy.{name} is {share!r}; allowed are shares between 0 and 1")
        self.networks, self.exploring, self.pool_share = networks, exploring, pool
        self._pool: list[Architecture] = []
        self._tried: list[tuple[np.ndarray, float]] = []
        self._mine: list[Evaluated] = []

    def search(self, round_: Round) -> list[Candidate]:
        """Rank a pool in the first round; try combinations in the first rounds, use the best one in the others."""
        first = not self._pool
        if first:
            self._rank_pool(round_)
        explores = min(max(1, round(self.exploring * round_.rounds)), max(1, round_.rounds - 1))
        if round_.number <= explores:
            self._explore(round_)
            self._evaluate_first(round_, self._judged(round_, self._pool, self._ranks))
            # Where no combination was tried to its end, the proxies count alike.
            return self._judged(round_, self._pool, self._ranks) if first else []
        return self._exploit(round_)

    @property
    def combination(self) -> np.ndarray:
        """Weights `(proxies,)` of the best combination so far; equal ones before any was tried."""
        equal = np.ones(len(self.proxies)), -math.inf
        return max([equal, *self._tried], key=lambda trial: trial[1])[0]

    def ranks(self, scores: np.ndarray) -> np.ndarray:
        """Normalised rankings `(n, proxies)`: the share of the pool that a score exceeds, by halves where they are equal."""
        columns = [
            (np.searchsorted(known, own, "left") + np.searchsorted(known, own, "right")) / (2.0 * len(known))
            for known, own in zip(self._sorted.T, scores.T, strict=True)
        ]
        return np.transpose(columns)

    # -- parts of a round -----------------------------------------------------------------------------------------------------

    def _rank_pool(self, round_: Round) -> None:
        space, rng = round_.predicted.space, np.random.default_rng([round_.seed, 53])
        count = max(self.networks, round(self.pool_share * round_.candidates * round_.rounds))
        drawn = (space.completed(round_.left_out.replaced(space.sample_spread(rng))) for _ in range(count))
        self._pool = list(dict.fromkeys(drawn))
        scores = self._scores(round_, self._pool)
        self._sorted = np.sort(scores, axis=0)
        self._ranks = self.ranks(scores)

    def _explore(self, round_: Round) -> None:
        """Try combinations until the evaluations of the round are made."""
        study = optuna.create_study(direction="maximize", sampler=self.weights(seed=round_.seed))
        axes: dict[str, BaseDistribution] = {name: FloatDistribution(-1.0, 1.0) for name in self.proxies}
        for weights, value in self._tried:
            params = dict(zip(self.proxies, map(float, weights), strict=True))
            study.add_trial(optuna.trial.create_trial(params=params, distributions=axes, value=value))
        if not self._tried:
            study.enqueue_trial(dict.fromkeys(self.proxies, 1.0))
        _, normalize = normalizer(round_.seen, round_.predicted, round_.goal.objectives)
        costs_only = [c for c in round_.goal.constraints if c.objective.quantity != "accuracy"]  # a rank is no accuracy
        for _ in range(MOST_TRIALS * round_.left):
            trial = study.ask(axes)
            weights = np.array([trial.params[name] for name in self.proxies])
            values = [self._values(round_, a, float(rank)) for a, rank in zip(self._pool, self._ranks @ weights, strict=True)]
            candidates = [_candidate(costs_only, a, v) for a, v in zip(self._pool, values, strict=True)]
            chosen = choose(candidates, round_.goal.objectives, self.networks)
            self._evaluate(round_, chosen)
            known = {e.architecture: e for e in round_.seen}
            if any(a not in known for a in chosen):
                return  # the budget ended in the middle: nothing is known of this combination
            value = self._worth(round_, [known[a] for a in chosen], normalize)
            study.tell(trial, value)
            self._tried.append((weights, value))
            if not round_.left:
                return

    def _exploit(self, round_: Round) -> list[Candidate]:
        """Evaluate what the best combination puts first, of the pool and of what a sampler asks for."""
        goal = round_.goal
        asked = propose(
            round_.predicted.space,
            lambda architectures: self._predict(round_, architectures),
            goal.objectives,
            goal.constraints,
            round_.new_sampler(),
            max(1, round((1.0 - self.pool_share) * round_.candidates)),
            starts(round_),
            on_progress=lambda done: round_.on_progress("candidates", done, round_.candidates),
            left_out=round_.left_out,
        )
        self._evaluate_first(round_, [*asked, *self._judged(round_, self._pool, self._ranks)])
        return asked

    def _evaluate_first(self, round_: Round, candidates: Sequence[Candidate]) -> None:
        """Spend what is left of the round on what comes first of the candidates that are not known."""
        known = {e.architecture for e in round_.seen}
        new = [c for c in candidates if c.architecture not in known]
        self._evaluate(round_, choose(new, round_.goal.objectives, round_.left))

    # -- judging --------------------------------------------------------------------------------------------------------------

    def _scores(self, round_: Round, architectures: Sequence[Architecture]) -> np.ndarray:
        def told(done: int, total: int) -> None:
            round_.on_progress("networks scored", done, total)

        return round_.scores(self.proxies, architectures, told)

    def _evaluate(self, round_: Round, architectures: Sequence[Architecture]) -> None:
        self._mine += round_.evaluate(architectures)

    def _worth(self, round_: Round, evaluated: Sequence[Evaluated], normalize: Callable[[Values], list[float]]) -> float:
        """Hypervolume of the front of evaluated networks."""
        objectives = round_.goal.objectives
        front = evaluated_front(evaluated, round_.predicted, objectives, round_.goal.constraints)
        return hypervolume([normalize(c.values) for c in front], [1.0] * len(objectives))

    def _values(self, round_: Round, architecture: Architecture, accuracy: float) -> Values:
        return {**round_.predicted.costs(architecture), "accuracy": accuracy}

    def _predict(self, round_: Round, architectures: Sequence[Architecture]) -> list[Values]:
        if not architectures:
            return []
        ranks = self.ranks(self._scores(round_, architectures))
        return [self._values(round_, a, x) for a, x in zip(architectures, self._accuracies(ranks), strict=True)]

    def _judged(self, round_: Round, architectures: Sequence[Architecture], ranks: np.ndarray) -> list[Candidate]:
        accuracies = self._accuracies(ranks)
        return [
            _candidate(round_.goal.constraints, a, self._values(round_, a, x))
            for a, x in zip(architectures, accuracies, strict=True)
        ]

    def _accuracies(self, ranks: np.ndarray) -> list[float]:
        """Accuracies in the order of the combined rankings: a line on the logit scale through what was evaluated."""
        places = {a: i for i, a in enumerate(self._pool)}
        mine = [e for e in self._mine if e.architecture in places]
        combined = self._ranks[[places[e.architecture] for e in mine]] @ self.combination
        slope, offset = LEAST_SLOPE, 0.0
        if mine:
            clipped = np.clip([e.accuracy for e in mine], 0.005, 0.995)
            logits = np.log(clipped / (1.0 - clipped))
            spread = combined - combined.mean()
            # A combination is used as it ranks, so the line always rises.
            slope = max(LEAST_SLOPE, float(spread @ logits) / max(float(spread @ spread), 1e-12))
            offset = float(logits.mean()) - slope * float(combined.mean())
        return [float(x) for x in 1.0 / (1.0 + np.exp(-(offset + slope * (ranks @ self.combination))))]


def _candidate(constraints: Sequence[Constraint], architecture: Architecture, values: Values) -> Candidate:
    violation = max((c.violation(values[c.objective.name]) for c in constraints), default=0.0)
    return Candidate(architecture, values, violation)
