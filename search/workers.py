"""Who evaluates networks: a pool with the supernet's weights (`search.pool`), or processes that share a study in a database
(`search.shared_study`). Where there is no supernet, `search.one_by_one` trains what it evaluates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from search.evaluation import Evaluation, Evaluator, Weights
from search.pool import Pool
from spaces.choice import Architecture

Measure = Callable[[Architecture], Evaluation]
MeasureAll = Callable[[Sequence[Architecture]], Iterator[tuple[Architecture, Evaluation]]]


class Workers(ABC):
    """Evaluate architectures, each once."""

    @abstractmethod
    def evaluate(self, architectures: Sequence[Architecture]) -> Iterator[tuple[Architecture, Evaluation]]:
        """Evaluations as they come, in any order.

        Raises:
            UserError: the workers cannot be reached, or an evaluation was lost again and again.
        """


@dataclass(frozen=True)
class WithWeights:
    """Evaluates an architecture with weights that it holds.

    Args:
        evaluator: measures networks.
        weights: of the networks.
    """

    evaluator: Evaluator
    weights: Weights

    def __call__(self, architecture: Architecture) -> Evaluation:
        return self.evaluator.evaluate(self.weights, architecture)


class PoolWorkers(Workers):
    """A pool evaluates.

    Args:
        pool: does it.
        measure: evaluates one network.
    """

    def __init__(self, pool: Pool, measure: Measure) -> None:
        self.pool, self.measure = pool, measure

    def evaluate(self, architectures: Sequence[Architecture]) -> Iterator[tuple[Architecture, Evaluation]]:
        return ((architectures[index], evaluation) for index, evaluation in self.pool.each(self.measure, architectures))


def one_by_one(measure: Measure) -> MeasureAll:
    """What measures many architectures, from what measures one."""
    return lambda architectures: ((architecture, measure(architecture)) for architecture in architectures)
