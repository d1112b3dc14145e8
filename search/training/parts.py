"""Trainings that do not depend on each other, by a pool: in this process one after the other, on workers side by side in parts.

A part begins with the last checkpoint, lasts about half a minute (or one epoch), and gives its checkpoint back to the process
that asks, which keeps it in the run. So no file system need be shared, a part that was lost with a worker is done again from
there by another one, and a search that was killed goes on from there too. Where a training is cut does not change its weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Generic, Protocol, TypeVar

from search.pool import Pool
from search.training.fit import CHECKPOINT, PausedError, readable_checkpoint
from spaces.files import write_atomically

PART_S = 30.0

Item = TypeVar("Item")
ItemIn = TypeVar("ItemIn", contravariant=True)
Result = TypeVar("Result")
ResultOut = TypeVar("ResultOut", covariant=True)


class Trainer(Protocol[ItemIn, ResultOut]):
    """Trains one of several networks; goes to workers with all that it holds."""

    def __call__(self, item: ItemIn, folder: Path, on_epoch: Callable[[int], None], limit_s: float) -> ResultOut:
        """Train from the last checkpoint in a folder on.

        Args:
            item: what to train.
            folder: receives the checkpoint.
            on_epoch: called after each epoch with the epochs done.
            limit_s: see `search.training.fit.train`.

        Returns:
            What came of it.

        Raises:
            PausedError: the limit was reached before the end.
        """


@dataclass(frozen=True)
class _Begun(Generic[Item]):
    """A training to go on with, and its checkpoint."""

    item: Item
    checkpoint: bytes | None


@dataclass(frozen=True)
class _Part(Generic[Result]):
    """What a part left: its checkpoint, the epochs done, and the result of the last one."""

    checkpoint: bytes
    epochs: int
    result: Result | None


class _Parts(Generic[Item, Result]):
    """Done by workers: one part of a training, in a folder that is there for as long.

    Args:
        trainer: trains.
        part_s: seconds that a part takes.
    """

    def __init__(self, trainer: Trainer[Item, Result], part_s: float) -> None:
        self.trainer, self.part_s = trainer, part_s

    def __call__(self, begun: _Begun[Item]) -> _Part[Result]:
        epochs = 0

        def on_epoch(done: int) -> None:
            nonlocal epochs
            epochs = done

        with TemporaryDirectory(prefix="training-") as name:
            checkpoint = Path(name) / CHECKPOINT
            if begun.checkpoint is not None:
                checkpoint.write_bytes(begun.checkpoint)
            result: Result | None = None
            with suppress(PausedError):
                result = self.trainer(begun.item, Path(name), on_epoch, self.part_s)
            return _Part(checkpoint.read_bytes(), epochs, result)


class Trainings(Generic[Item, Result]):
    """Has networks trained.

    Args:
        pool: does it.
        trainer: trains one.
    """

    def __init__(self, pool: Pool, trainer: Trainer[Item, Result]) -> None:
        self.pool, self.trainer = pool, trainer
        self._parts: _Parts[Item, Result] = _Parts(trainer, PART_S)

    def run(
        self, wanted: Sequence[tuple[Item, Path]], on_epoch: Callable[[int, int], None] = lambda index, done: None
    ) -> Iterator[tuple[int, Result]]:
        """Train to the end; results with the numbers of what was asked for, as they come.

        Args:
            wanted: what to train, and a folder of the run that has its checkpoint, or will have it.
            on_epoch: called with the number of a training and its epochs done.

        Raises:
            UserError: a checkpoint is damaged, a training failed, or the workers cannot be reached.
        """
        if self.pool.is_here:
            for index, (item, folder) in enumerate(wanted):
                yield index, self.trainer(item, folder, partial(on_epoch, index), math.inf)
            return

        def then(index: int, part: _Part[Result]) -> _Begun[Item] | None:
            item, folder = wanted[index]
            write_atomically(folder / CHECKPOINT, part.checkpoint)
            if part.epochs:
                on_epoch(index, part.epochs)
            return _Begun(item, part.checkpoint) if part.result is None else None

        begun = (_Begun(item, _read(folder)) for item, folder in wanted)
        for index, part in self.pool.each(self._parts, begun, then, sparingly=True):
            if part.result is None:
                raise RuntimeError("a training ended without a result")
            yield index, part.result


def _read(folder: Path) -> bytes | None:
    path = readable_checkpoint(folder / CHECKPOINT)
    return None if path is None else path.read_bytes()
