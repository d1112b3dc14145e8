"""Who evaluates networks: this process, one after the other, or several.

Several are workers of Dask (`search.dask_workers`) or processes that share a study in a database (`search.shared_study`).
Where there is no supernet, `search.one_by_one` trains what it evaluates. Only evaluations are handed out: predicted candidates
cost less than to send them anywhere.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

from search.evaluation import Evaluation, Evaluator
from spaces.choice import Architecture
from spaces.supernet import Supernet

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

    def close(self) -> None:  # noqa: B027 - most have nothing to give back
        """Give back what was started for the workers."""


class OneByOne(Workers):
    """This process evaluates, one network after the other.

    Args:
        evaluator: measures networks.
        supernet: their weights.
    """

    def __init__(self, evaluator: Evaluator, supernet: Supernet) -> None:
        self.evaluator, self.supernet = evaluator, supernet

    def evaluate(self, architectures: Sequence[Architecture]) -> Iterator[tuple[Architecture, Evaluation]]:
        return one_by_one(lambda architecture: self.evaluator.evaluate(self.supernet, architecture))(architectures)


def one_by_one(measure: Measure) -> MeasureAll:
    """What measures many architectures, from what measures one."""
    return lambda architectures: ((architecture, measure(architecture)) for architecture in architectures)
