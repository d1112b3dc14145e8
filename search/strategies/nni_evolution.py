"""Strategy `nni_evolution`: NNI's RegularizedEvolution, as a baseline on spaces of NNI.

It looks for one number: accuracy, less the share by which a network misses its constraints. It knows neither predictors nor
what was evaluated before the first round, and asks for one network at a time, so each is trained to the end.
"""

from __future__ import annotations

from typing import Any, ClassVar

from search.candidates import Candidate
from search.fronts import as_candidates
from search.strategies.strategy import Round, SearchStrategy
from spaces.choice import Architecture
from spaces.errors import UserError
from spaces.nni import NniSpace
from spaces.nni_evolution import evolve
from spaces.space import Space


class NniEvolution(SearchStrategy):
    """NNI's strategy, continued from round to round.

    Args:
        population_size: networks that live at the same time.
        sample_size: of them, that take part in a tournament.
        mutation_prob: that a choice is drawn anew.
        crossover: whether a child has two parents.

    Raises:
        UserError: sizes that are not possible.
    """

    name: ClassVar[str] = "nni_evolution"

    def __init__(
        self, population_size: int = 8, sample_size: int = 4, mutation_prob: float = 0.1, crossover: bool = False
    ) -> None:
        if not 1 <= sample_size <= population_size or not 0.0 < mutation_prob <= 1.0:
            found = (
                f"study.strategy.population_size is {population_size}, sample_size {sample_size}, mutation_prob {mutation_prob}"
            )
            raise UserError(f"{found}; allowed are a sample from 1 up to the population, and a probability above 0 up to 1")
        self.settings = {
            "population_size": population_size,
            "sample_size": sample_size,
            "mutation_prob": mutation_prob,
            "crossover": crossover,
        }
        self._state: dict[str, Any] | None = None

    def check(self, space: Space) -> None:
        if not isinstance(space, NniSpace):
            raise UserError(f"strategy {self.name} needs a space of NNI, {space.name} is none; give space=nni or another study")

    def search(self, round_: Round) -> list[Candidate]:
        """As many networks as the round may evaluate; those that are known already cost nothing."""
        space = round_.predicted.space
        if not isinstance(space, NniSpace):
            raise TypeError(f"{space.name} is no space of NNI")
        asked: list[Candidate] = []
        total = round_.left

        def measure(architecture: Architecture) -> float:
            round_.evaluate([architecture])
            evaluated = [e for e in round_.seen if e.architecture == architecture]
            asked.extend(as_candidates(evaluated, round_.predicted, round_.goal.constraints))
            round_.on_progress("networks", total - round_.left, total)
            return asked[-1].values["accuracy"] - max(0.0, asked[-1].violation)

        settings = {**self.settings, "seed": round_.seed}
        self._state = evolve(space, settings, measure, lambda: round_.left > 0, self._state)
        return asked
