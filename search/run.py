"""A run's folder: its configuration, and which stages are done with what.

A stage is known by a fingerprint of everything that it depends on. Done with the same fingerprint, it is skipped; begun with
another one, what it left is removed first. The record is written atomically, so a killed run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spaces.errors import UserError
from spaces.files import write_atomically

Facts = dict[str, Any]


def digest(*parts: object) -> str:
    """Hex digest of JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Record:
    """What the folder knows about a stage.

    Args:
        fingerprint: of what the stage depended on.
        done: whether it finished.
        seconds: how long it took, over all attempts that were not killed outright.
        output: fingerprint of what it made, for the stages after it.
        facts: figures for the summary.
    """

    fingerprint: str
    done: bool
    seconds: float
    output: str
    facts: Facts


class Run:
    """A run's folder.

    Args:
        path: made when it is not there.

    Raises:
        UserError: the folder cannot be made or written, or its record is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot make the run folder {path}: {error.strerror or error}; choose another: run=FOLDER"
            ) from error
        self._record_path = path / "stages.json"
        self._records = self._read()

    def reload(self) -> None:
        """Read the record again.

        Raises:
            UserError: it is damaged.
        """
        self._records = self._read()

    def _read(self) -> dict[str, Record]:
        if not self._record_path.exists():
            return {}
        try:
            values = json.loads(self._record_path.read_text())
            return {name: Record(**record) for name, record in values.items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{self._record_path} is damaged ({error}); delete it to run every stage again") from error

    def record(self, stage: str) -> Record | None:
        """What is known about a stage, `None` when it never began."""
        return self._records.get(stage)

    def output(self, stage: str) -> str:
        """Fingerprint of what a finished stage made.

        Raises:
            UserError: the stage has not finished.
        """
        record = self._records.get(stage)
        if record is None or not record.done:
            raise UserError(f"stage {stage} has not finished in {self.path}; run: python -m search run={self.path}")
        return record.output

    def facts(self, stage: str) -> Facts:
        """Figures of a stage, empty when it has not finished."""
        record = self._records.get(stage)
        return record.facts if record is not None and record.done else {}

    def finished(self, stage: str, fingerprint: str, makes: Sequence[str]) -> bool:
        """Whether a stage is done with this fingerprint, and everything that it makes is there."""
        known = self._records.get(stage)
        return (
            known is not None
            and known.done
            and known.fingerprint == fingerprint
            and all((self.path / name).exists() for name in makes)
        )

    def do(
        self,
        stage: str,
        fingerprint: str,
        leaves: Sequence[str],
        action: Callable[[], Mapping[str, Any]],
        makes: Sequence[str] = (),
        always: bool = False,
    ) -> bool:
        """Do a stage, or skip it when it is done with this fingerprint.

        Args:
            stage: its name.
            fingerprint: of everything that it depends on.
            leaves: files and folders, relative to the run, that are removed when it begins with another fingerprint.
            action: does it; returns its facts, with `output` as a fingerprint of what it made where that is not the
                stage's own fingerprint.
            makes: files and folders without which it is not done.
            always: do it also when it is done.

        Returns:
            Whether it was done now.
        """
        if self.finished(stage, fingerprint, makes) and not always:
            return False
        before = self.begin(stage, fingerprint, leaves)
        begin = time.perf_counter()
        try:
            facts = dict(action())
        except BaseException:
            self._write(stage, Record(fingerprint, False, before + time.perf_counter() - begin, "", {}))
            raise
        output = str(facts.pop("output", fingerprint))
        self._write(stage, Record(fingerprint, True, before + time.perf_counter() - begin, output, facts))
        return True

    def begin(self, stage: str, fingerprint: str, leaves: Sequence[str]) -> float:
        """Record that a stage has begun, and remove what it left with another fingerprint; returns seconds spent before."""
        known, before = self._records.get(stage), 0.0
        if known is None or known.fingerprint != fingerprint:
            for name in leaves:
                self._remove(self.path / name)
        else:
            before = 0.0 if known.done else known.seconds
        self._write(stage, Record(fingerprint, False, before, "", {}))
        return before

    def adopt(self, stage: str, record: Record, leaves: Sequence[str], bring: Callable[[], None]) -> None:
        """Take over a stage that another run has done.

        Args:
            stage: its name.
            record: of the other run.
            leaves: as in `do`.
            bring: brings what the stage makes.
        """
        for name in leaves:
            self._remove(self.path / name)
        bring()
        self._write(stage, record)

    def _remove(self, path: Path) -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def _write(self, stage: str, record: Record) -> None:
        self._records[stage] = record
        values = {name: vars(r) for name, r in self._records.items()}
        write_atomically(self._record_path, json.dumps(values, indent=1))
