"""A sweep (`python -m search -m ...`): a folder with one run per combination, and what became of each job.

    runs/SWEEP/jobs/KEY.json      a job: its settings, its run, its state and last line; written by the job itself
    runs/SWEEP/RUN/               the run of a job
    runs/SWEEP/report.html        all jobs on one page, see `search.sweep_report`

Jobs may run on any machine that sees the folder; nothing is written by two of them. A job that was killed could not say so:
it is found out by its process or, from another machine, by the heartbeat of its run.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import psutil

from latency_lut.command import mistake
from search.claims import Holder, beating, process_ended, started_s, this_boot
from spaces.errors import UserError
from spaces.files import write_atomically

JOBS_FOLDER = "jobs"
RUNNING, DONE, FAILED, STOPPED = "running", "done", "failed", "stopped"
SILENT = "it ended without a word, as a process does that is killed; the same command goes on from what is saved"


@dataclass(frozen=True)
class SweepJob:
    """One job of a sweep.

    Args:
        overrides: its settings, as on the command line.
        state: `running`, `done`, `failed`, or `stopped` when it was killed.
        run: its folder, relative to the sweep's; empty while there is none.
        line: the last line of a job that failed.
        host: name of the machine that it runs on.
        boot: see `search.claims.this_boot`.
        pid: process there.
        started: see `search.claims.started_s`.
        at: when this was written, in UTC, to be read by people.
    """

    overrides: tuple[str, ...]
    state: str
    run: str
    line: str
    host: str
    boot: str
    pid: int
    started: float
    at: str


def with_folder(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """Arguments of the command line, with a name for the sweep where they ask for one and give none.

    The name follows from the settings, not from their order, nor from the launcher: the same sweep finds its folder again.

    Returns:
        The arguments, and the folder of the sweep; `None` where there is no sweep or the arguments cannot be read.
    """
    flags = [text for text in arguments if text.startswith("-")]
    if not any(flag in ("-m", "--multirun") for flag in flags) or any(
        flag in ("-h", "--help", "-c", "--cfg") for flag in flags
    ):
        return list(arguments), None
    overrides = [text for text in arguments if "=" in text and not text.startswith("-")]
    for text in overrides:
        name, _, value = text.partition("=")
        if name.lstrip("+") == "sweep" and value not in ("", "null"):
            return list(arguments), Path(value.strip("'\""))
    kept = sorted(text for text in overrides if not re.match(r"[+~]*(hydra[./]|sweep=|threads=|trainer\.)", text))
    folder = Path("runs") / f"sweep-{hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:8]}"
    return [*arguments, f"sweep={folder}"], folder


@contextmanager
def job_of(folder: Path, overrides: Sequence[str]) -> Iterator[SweepRecorder]:
    """Write down what becomes of a job while its body runs.

    Raises:
        UserError: the folder cannot be written.
    """
    recorder = SweepRecorder(folder, overrides)
    try:
        yield recorder
    except BaseException as error:
        recorder.write(FAILED, _last_line(error))
        raise
    recorder.write(DONE)


class SweepRecorder:
    """The file of one job; made by `job_of`."""

    def __init__(self, folder: Path, overrides: Sequence[str]) -> None:
        key = hashlib.sha256(json.dumps(sorted(overrides)).encode()).hexdigest()[:12]
        self._folder, self._path = folder, folder / JOBS_FOLDER / f"{key}.json"
        process = psutil.Process()
        here = socket.gethostname(), this_boot(), process.pid, started_s(process)
        self._job = SweepJob(tuple(overrides), RUNNING, "", "", *here, "")
        self.write(RUNNING)

    def runs_in(self, run: Path) -> None:
        """Tell where the job's run is."""
        self._job = replace(self._job, run=Path(os.path.relpath(run, self._folder)).as_posix())
        self.write(RUNNING)

    def write(self, state: str, line: str = "") -> None:
        """Write the state down.

        Raises:
            UserError: the folder cannot be written.
        """
        self._job = replace(self._job, state=state, line=line, at=datetime.now(UTC).isoformat(timespec="seconds"))
        write_atomically(self._path, json.dumps(asdict(self._job), indent=1))


def _last_line(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    told = mistake(error)
    lines = f"{type(error).__name__}: {error}".strip().splitlines()
    return (told or lines[-1])[:500]


def read_jobs(folder: Path) -> list[SweepJob]:
    """All jobs of a sweep that have begun, by their settings; those that ended without a word are `stopped`.

    Raises:
        UserError: the folder is no sweep's, or a file of it is damaged.
    """
    files = sorted((folder / JOBS_FOLDER).glob("*.json"))
    if not files:
        raise UserError(f"{folder} has no jobs of a sweep; allowed is the folder of one, made by python -m search -m ...")
    jobs = [_read(path) for path in files]
    silent = [job for job in jobs if job.state == RUNNING and _process_ended(job)]
    here = socket.gethostname(), this_boot()
    elsewhere = {folder / job.run: job for job in jobs if job.state == RUNNING and (job.host, job.boot) != here}
    alive = beating([run for run, job in elsewhere.items() if job.run])
    silent += [job for run, job in elsewhere.items() if job.run and run not in alive]
    told = [replace(job, state=STOPPED, line=SILENT) if job in silent else job for job in jobs]
    return sorted(told, key=lambda job: job.overrides)


def _process_ended(job: SweepJob) -> bool:
    return process_ended(Holder(0, job.host, job.boot, job.pid, job.started, getpass.getuser(), ""))


def _read(path: Path) -> SweepJob:
    try:
        values: dict[str, Any] = json.loads(path.read_text())
        job = SweepJob(**{"boot": "", **values, "overrides": tuple(map(str, values["overrides"]))})
        run = PurePosixPath(job.run)
        if not isinstance(job.pid, int) or not isinstance(job.started, float) or run.is_absolute():
            raise ValueError("a value is of another kind")
        if job.state not in (RUNNING, DONE, FAILED):
            raise ValueError(f"state {job.state!r}")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and run the sweep again") from error
    return job
