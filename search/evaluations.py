"""The networks that were evaluated: one Parquet file, written after every few evaluations."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from search.workers import MeasureAll
from spaces.choice import Architecture
from spaces.errors import UserError
from spaces.files import write_atomically
from spaces.space import Space

INITIAL = "initial"
RANDOM = "random"
SAVE_EVERY = 8

_SCHEMA = pa.schema(
    [("architecture", pa.string()), ("accuracy", pa.float64()), ("loss", pa.float64()), ("source", pa.string())]
)


@dataclass(frozen=True)
class Evaluated:
    """An architecture with its validation accuracy. `source`: `initial`, `round N` of the study, `random` for the baseline."""

    architecture: Architecture
    accuracy: float
    loss: float
    source: str


class Evaluations:
    """Evaluated architectures in the order in which they were evaluated, each once.

    Args:
        path: the file; read if it is there.
        space: the architectures' space.
        key: fingerprint of supernet and data; a file with another key counts as empty.

    Raises:
        UserError: the file is damaged.
    """

    def __init__(self, path: Path, space: Space, key: str) -> None:
        self.path, self.space, self.key = path, space, key
        self._known: dict[Architecture, Evaluated] = {}
        if path.exists():
            try:
                self._load()
            except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
                reason = " ".join(str(error).split())[:160]
                raise UserError(f"{path} is damaged ({reason}); delete it and run again") from error

    def _load(self) -> None:
        table = pq.read_table(self.path)
        if (table.schema.metadata or {}).get(b"key") != self.key.encode():
            return  # of another supernet: nothing of it is known about this one
        for row in table.select(_SCHEMA.names).cast(_SCHEMA).to_pylist():
            architecture = self.space.architecture(Architecture.from_json(row["architecture"]))
            if not 0.0 <= row["accuracy"] <= 1.0 or not math.isfinite(row["loss"]):
                raise ValueError(f"accuracy {row['accuracy']} and loss {row['loss']}")
            self._known[architecture] = Evaluated(architecture, row["accuracy"], row["loss"], row["source"])

    def __len__(self) -> int:
        return len(self._known)

    def __iter__(self) -> Iterator[Evaluated]:
        return iter(self._known.values())

    def __contains__(self, architecture: object) -> bool:
        return architecture in self._known

    def of(self, *sources: str) -> list[Evaluated]:
        """Those of the given sources."""
        return [e for e in self if e.source in sources]

    def evaluate(
        self,
        architectures: Sequence[Architecture],
        source: str,
        measure_all: MeasureAll,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Evaluate what is not known yet, and save; in the end they stand in the order that was asked for, whoever did what."""
        asked = list(dict.fromkeys(architectures))
        missing = [a for a in asked if a not in self._known]
        for index, (architecture, result) in enumerate(measure_all(missing), 1):
            self._known[architecture] = Evaluated(architecture, result.accuracy, result.loss, source)
            if index % SAVE_EVERY == 0:
                self.save()
            on_progress(index, len(missing))
        if missing:
            self._known |= {a: self._known.pop(a) for a in asked if self._known[a].source == source}
            self.save()

    def save(self) -> None:
        """Write the file, whole or not at all."""
        rows = [
            {"architecture": e.architecture.to_json(), "accuracy": e.accuracy, "loss": e.loss, "source": e.source} for e in self
        ]
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA.with_metadata({"key": self.key})), buffer)
        write_atomically(self.path, buffer.getvalue())
