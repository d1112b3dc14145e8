"""Who does work that falls into independent pieces: this process, or workers of Dask (`search.dask_pool`).

Predicted candidates are never handed out, they cost less than to send them anywhere; nor is anything that is timed on a device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def last(index: int, result: object) -> None:
    """Says that nothing goes on from a result."""


class Pool(ABC):
    """Does pieces of work.

    Args:
        say: tells a line.

    Attributes:
        is_here: whether this process does them, in its own folders and one after the other.
    """

    is_here: bool

    def __init__(self, say: Callable[[str], None] = lambda line: None) -> None:
        self.say = say

    @abstractmethod
    def each(
        self,
        work: Callable[[Item], Result],
        items: Iterable[Item],
        then: Callable[[int, Result], Item | None] = last,
        sparingly: bool = False,
    ) -> Iterator[tuple[int, Result]]:
        """Results with the number of their item, as they come.

        Args:
            work: does a piece. It goes to every worker once, with all that it holds, as long as it stays the same object.
            items: what is to be done.
            then: told the number of an item and a result; gives what goes on from there, `None` where the result is the last.
            sparingly: take items only as workers become free, because they are large.

        Raises:
            UserError: the workers cannot be reached, or a piece was lost again and again.
        """

    def close(self) -> None:  # noqa: B027 - most have nothing to give back
        """Give back what was started."""


class ThisProcess(Pool):
    """This process, one piece after the other."""

    is_here = True

    def each(
        self,
        work: Callable[[Item], Result],
        items: Iterable[Item],
        then: Callable[[int, Result], Item | None] = last,
        sparingly: bool = False,
    ) -> Iterator[tuple[int, Result]]:
        for index, item in enumerate(items):
            result = work(item)
            while (following := then(index, result)) is not None:
                result = work(following)
            yield index, result
