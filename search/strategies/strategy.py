"""What a search strategy is: in every round of a study it judges candidates and has some of them evaluated.

Rounds, budgets, the random baseline, fronts and the archive belong to `search.study`, so that strategies compare. A strategy
draws from the round's seeds alone and knows only what its study evaluated: a study that is killed goes through the same
rounds again, finds its evaluations already made, and ends the same.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from optuna.samplers import BaseSampler

from predictors.accuracy import AccuracyPredictor
from search.candidates import Candidate
from search.evaluations import Evaluated
from search.left_out import LeftOut
from search.objectives import Goal
from search.predicted import PredictedValues
from spaces.choice import Architecture

Evaluate = Callable[[Sequence[Architecture]], list[Evaluated]]
Scores = Callable[[Sequence[str], Sequence[Architecture], Callable[[int, int], None]], np.ndarray]


@dataclass
class Round:
    """One round of a study, as a strategy sees it.

    Args:
        goal: what is looked for.
        predicted: costs of architectures, and what the accuracy predictor sees of them.
        number: of the round, from 1.
        rounds: of the study.
        seed: of everything that the strategy draws in this round.
        candidates: that may be judged without evaluating them, in this round.
        left: networks that may still be evaluated in this round.
        seen: everything evaluated before, in order; `evaluate` adds to it.
        left_out: options that are not to be proposed.
        new_predictor: makes an accuracy predictor to fit.
        new_sampler: makes the round's Optuna sampler.
        scores: zero-cost proxies of architectures, `(n, names)`, see `search.proxies`.
        measured: evaluates architectures that are not in `seen`.
        on_progress: called with what is done, how many are done, and of how many.
        evaluation_s: seconds that evaluating took.
    """

    goal: Goal
    predicted: PredictedValues
    number: int
    rounds: int
    seed: int
    candidates: int
    left: int
    seen: list[Evaluated]
    left_out: LeftOut
    new_predictor: Callable[[], AccuracyPredictor]
    new_sampler: Callable[[], BaseSampler]
    scores: Scores
    measured: Evaluate
    on_progress: Callable[[str, int, int], None]
    evaluation_s: float = field(default=0.0, init=False)

    def evaluate(self, architectures: Sequence[Architecture]) -> list[Evaluated]:
        """Evaluate the first of the architectures that are not known yet, as many as the round has left."""
        known = {e.architecture for e in self.seen}
        new = [a for a in dict.fromkeys(architectures) if a not in known][: self.left]
        begin = time.perf_counter()
        evaluated = self.measured(new)
        self.evaluation_s += time.perf_counter() - begin
        self.left -= len(new)
        self.seen += evaluated
        return evaluated


class SearchStrategy(ABC):
    """How a study searches: one object for each study, asked round after round. Chosen by `_target_` in `conf/study/`."""

    name: ClassVar[str]

    @property
    def key(self) -> str:
        """Fingerprint of what the strategy reads from files; its settings are known without it."""
        return ""

    def files(self) -> dict[str, bytes]:
        """What it leaves for other runs after the last round, by file name."""
        return {}

    @abstractmethod
    def search(self, round_: Round) -> list[Candidate]:
        """Do a round: have architectures evaluated by `round_.evaluate`.

        Returns:
            What was judged on the way, with predicted values, in the order in which it was thought of.
        """
