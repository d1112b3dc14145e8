"""Stages that several runs have in common are done once: the first run does it, the others wait and take over what it made.

A folder beside the runs has an entry for each such stage, named by its fingerprint. An entry holds copies of the files and the
record of the stage, so a run stays whole when it or the shared folder is moved or removed. A run that dies while it works on an
entry is followed by one of those that wait, which goes on from the files that the dead one left in its own folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from search.claims import PATIENCE_S, Holder, claimed
from search.run import Record, Run
from spaces.errors import UserError
from spaces.files import write_atomically

RECORD_FILE = "record.json"


class SharedStages:
    """The entries of one folder.

    Args:
        folder: on a file system that all runs see.
        say: tells a line.
        patience_s: after so long without a sign of life the run that works on an entry is called dead.
    """

    def __init__(self, folder: Path, say: Callable[[str], None], patience_s: float = PATIENCE_S) -> None:
        self.folder, self.say, self.patience_s = folder, say, patience_s

    def do(
        self,
        run: Run,
        stage: str,
        fingerprint: str,
        leaves: Sequence[str],
        makes: Sequence[str],
        unfinished: Sequence[str],
        action: Callable[[], object],
    ) -> None:
        """Have a stage done in a run: by taking it over, or by doing it.

        Args:
            run: where it is needed.
            stage: its name.
            fingerprint: of everything that it depends on.
            leaves: files and folders of the run that are removed when it begins with another fingerprint.
            makes: files that it makes, relative to the run.
            unfinished: files from which it goes on when it was interrupted.
            action: does it in this run and records it there.

        Raises:
            UserError: an entry is damaged, or the folder cannot be written.
        """
        entry = self.folder / f"{stage}-{fingerprint}"
        record_file = entry / RECORD_FILE

        def on_wait(holder: Holder) -> None:
            self.say(f"  waiting for {holder}, which does the same")

        with claimed(entry, os.path.relpath(run.path, self.folder), on_wait, record_file.exists, self.patience_s) as held:
            if record_file.exists():
                self._take_over(run, stage, fingerprint, leaves, entry)
                return
            if held is None:
                raise RuntimeError("neither held nor done")
            if held[1] is not None and held[1].work:
                self._go_on_from(run, self.folder / held[1].work, stage, fingerprint, leaves, unfinished)
            action()
            record = run.record(stage)
            if record is not None and record.done:
                self._publish(run, record, makes, entry)

    def _take_over(self, run: Run, stage: str, fingerprint: str, leaves: Sequence[str], entry: Path) -> None:
        try:
            values = json.loads((entry / RECORD_FILE).read_text())
            record, sums = Record(**values["record"]), dict(values["sha256"])
            files = {name: (entry / name).read_bytes() for name in sums}
            if record.fingerprint != fingerprint or not record.done:
                raise ValueError("it is of another stage")
            for name, content in files.items():
                if not (run.path / name).resolve().is_relative_to(run.path.resolve()):
                    raise ValueError(f"{name} is outside of a run")
                if hashlib.sha256(content).hexdigest() != sums[name]:
                    raise ValueError(f"{name} has another checksum")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"shared stage {entry} is damaged ({error}); delete that folder and run again") from error

        def bring() -> None:
            for name, content in files.items():
                write_atomically(run.path / name, content)

        source = str(values.get("run", "another run"))
        run.adopt(stage, replace(record, facts={**record.facts, "taken_from": source}), leaves, bring)
        self.say(f"  taken from {source}, which took {record.seconds:.0f} s")

    def _go_on_from(
        self, run: Run, dead: Path, stage: str, fingerprint: str, leaves: Sequence[str], unfinished: Sequence[str]
    ) -> None:
        """Copy what a dead run left of the stage, where this one has nothing of its own."""
        known = Run(dead).record(stage) if dead.is_dir() else None
        if known is None or known.fingerprint != fingerprint:
            return
        run.begin(stage, fingerprint, leaves)
        for name in unfinished:
            source, target = dead / name, run.path / name
            if source.is_file() and not target.exists() and source.resolve() != target.resolve():
                try:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source, target.with_name(f".{target.name}.part"))
                    os.replace(target.with_name(f".{target.name}.part"), target)
                except OSError:
                    continue  # then from the beginning
                self.say(f"  going on from {name} of {dead.name}, which ended")

    def _publish(self, run: Run, record: Record, makes: Sequence[str], entry: Path) -> None:
        files = {name: (run.path / name).read_bytes() for name in makes}
        for name, content in files.items():
            write_atomically(entry / name, content)
        sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        values = {"run": run.path.name, "record": asdict(record), "sha256": sums}
        write_atomically(entry / RECORD_FILE, json.dumps(values, indent=1))  # last: from now on it is done
