"""Strategy `guided`: a sampler asks an accuracy predictor for candidates, and the best are evaluated and teach it.

This is the loop of DyNAS-T and SimQ-NAS (arXiv:2312.13301).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

from search.candidates import Candidate, propose
from search.fronts import as_candidates, evaluated_front, nearest
from search.strategies.acquisition import CHOOSERS
from search.strategies.strategy import Round, SearchStrategy
from spaces.choice import Architecture
from spaces.errors import UserError
from spaces.space import Space

RUN_PARTS = 6


class Guided(SearchStrategy):
    """Predict, evaluate, refit.

    Args:
        choose: which candidates are evaluated, one of `search.strategies.acquisition.CHOOSERS`.

    Raises:
        UserError: there is no such way to choose.
    """

    name: ClassVar[str] = "guided"

    def __init__(self, choose: str = "front") -> None:
        if choose not in CHOOSERS:
            raise UserError(f"study.strategy.choose is {choose!r}; allowed are {', '.join(CHOOSERS)}")
        self.choose = choose

    def search(self, round_: Round) -> list[Candidate]:
        """A sampler, starting from the front of what was evaluated, asks a predictor that was fitted to all of it."""
        goal, predicted, predictor = round_.goal, round_.predicted, round_.new_predictor()
        predictor.fit(predicted.features([e.architecture for e in round_.seen]), [e.accuracy for e in round_.seen])
        candidates = propose(
            predicted.space,
            partial(predicted.predict, accuracy=predictor),
            goal.objectives,
            goal.constraints,
            round_.new_sampler(),
            round_.candidates,
            starts(round_),
            on_progress=lambda done: round_.on_progress("candidates", done, round_.candidates),
            left_out=round_.left_out,
        )
        known = {e.architecture for e in round_.seen}
        new = [c for c in candidates if c.architecture not in known]
        round_.evaluate(CHOOSERS[self.choose](new, round_, predictor))
        return candidates


def starts(round_: Round) -> Sequence[Architecture]:
    """Where a sampler begins: the front of what was evaluated, or what misses the constraints least, and variants of it."""
    space, goal = round_.predicted.space, round_.goal
    front = evaluated_front(round_.seen, round_.predicted, goal.objectives, goal.constraints)
    begins = front or nearest(as_candidates(round_.seen, round_.predicted, goal.constraints))
    runs = with_precision_runs(space, [c.architecture for c in begins])
    return list(dict.fromkeys(space.completed(round_.left_out.replaced(a)) for a in runs))


def with_precision_runs(space: Space, architectures: Sequence[Architecture]) -> list[Architecture]:
    """Networks, each followed by its `precision_runs`."""
    return list(dict.fromkeys(a for own in architectures for a in (own, *precision_runs(space, own))))


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
