"""Who works on a folder: a claim on a shared file system, kept by a heartbeat, taken over when its holder is gone.

No file locks and no clocks are relied on, because network file systems have no reliable ones and clocks differ. What is
relied on is that a file can be created exclusively (`O_EXCL`), which NFS does from version 3 on. Claims are numbered: a new one
is made by creating the file of the next number, which one process alone can; whoever finds a higher number than its own has
lost its claim. A holder counts up in a file of its own, and a watcher calls it gone when the count has stood still for a while
by the watcher's own clock. On the same machine a holder whose process has ended is gone at once.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from spaces.errors import UserError
from spaces.files import not_written, write_atomically

BEAT_S = 2.0
PATIENCE_S = 60.0
POLL_S = 0.5
FOLDER = ".claims"


@dataclass(frozen=True)
class Holder:
    """Who holds a claim.

    Args:
        number: of the claim.
        host: name of the machine.
        boot: the machine since it was started, as `this_boot` has it; machines may have the same name.
        pid: process there.
        started: see `started_s`; tells it from a later process with the same number.
        user: who runs it.
        work: where it works, as a watcher is told.
    """

    number: int
    host: str
    boot: str
    pid: int
    started: float
    user: str
    work: str

    def __str__(self) -> str:
        return f"{self.work or 'a job'} (process {self.pid} of {self.user} on {self.host})"


class Claim:
    """A claim that this process holds; made by `claimed`."""

    def __init__(self, folder: Path, holder: Holder) -> None:
        self.folder, self.holder = folder, holder
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        """Whether another process took it over, because this one did not beat for too long."""
        return max(_numbers(self.folder), default=0) > self.holder.number

    def _beat(self) -> None:
        count = 0
        while not self._ended.wait(BEAT_S):
            count += 1
            with contextlib.suppress(UserError):  # a full disk: the work itself will tell
                write_atomically(_file(self.folder, self.holder.number, "beat"), str(count))

    def end(self) -> None:
        """Give it back."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(UserError):
            write_atomically(_file(self.folder, self.holder.number, "ended"), "")


@contextmanager
def claimed(
    path: Path,
    work: str,
    on_wait: Callable[[Holder], None],
    until: Callable[[], bool] = lambda: False,
    patience_s: float = PATIENCE_S,
    meanwhile: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Claim, Holder | None] | None]:
    """Hold the claim on a folder while the body runs; wait for it as long as somebody else does.

    Args:
        path: the folder; made if it is not there.
        work: where this process works, for those who wait for it.
        on_wait: called once for every other holder that is waited for. May raise, not to wait.
        until: asked while waiting; true when there is nothing left to wait for.
        patience_s: after so long without a sign of life a holder is called gone.
        meanwhile: called while waiting, and at once again as long as it returns true.

    Yields:
        The claim, and who held it last without giving it back; `None` when `until` became true.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = path / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {folder}: {error.strerror or error}; choose a folder that you may write") from error
    taken = _wait(folder, work, on_wait, until, patience_s, meanwhile)
    if taken is None:
        yield None
        return
    claim = Claim(folder, taken[0])
    try:
        yield claim, taken[1]
    finally:
        claim.end()


def _wait(
    folder: Path,
    work: str,
    on_wait: Callable[[Holder], None],
    until: Callable[[], bool],
    patience_s: float,
    meanwhile: Callable[[], bool],
) -> tuple[Holder, Holder | None] | None:
    told = seen_number = -1
    seen_beat, since = "", time.monotonic()
    while not until():
        numbers = _numbers(folder)
        last = numbers[-1] if numbers else 0
        gone: Holder | None = None
        if last and not _file(folder, last, "ended").exists():
            holder = _read(folder, last)
            beat = _text(_file(folder, last, "beat"))
            if last != seen_number or beat != seen_beat:
                seen_number, seen_beat, since = last, beat, time.monotonic()
            if not process_ended(holder) and time.monotonic() - since < patience_s:
                if told != last:
                    told = last
                    on_wait(holder)
                if not meanwhile():
                    time.sleep(POLL_S)
                continue
            gone = holder
        own = _create(folder, last + 1, work)
        if own is not None:
            return own, gone
    return None


def _create(folder: Path, number: int, work: str) -> Holder | None:
    """The next claim; `None` when somebody else was first."""
    process = psutil.Process()
    here = socket.gethostname(), this_boot(), process.pid, started_s(process)
    own = Holder(number, *here, getpass.getuser(), work)
    path = _file(folder, number, "json")
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return None
    except OSError as error:
        raise UserError(not_written(path, error)) from error
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump(asdict(own), file)
    except OSError as error:
        path.unlink()
        raise UserError(not_written(path, error)) from error
    # Old claims are removed, so one that was waited with for long may have made an old number anew.
    if _numbers(folder)[-1] > number:
        path.unlink(missing_ok=True)
        return None
    for old in folder.iterdir():
        if old.stem.isdigit() and int(old.stem) < number - 1:
            with contextlib.suppress(OSError):  # it is gone already, or another user's in a strict folder
                old.unlink()
    return own


def _numbers(folder: Path) -> list[int]:
    return sorted(int(path.stem) for path in folder.glob("*.json") if path.stem.isdigit())


def _file(folder: Path, number: int, kind: str) -> Path:
    return folder / f"{number}.{kind}"


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _read(folder: Path, number: int) -> Holder:
    """Who made a claim; unknown while the file is being written or when it is damaged."""
    try:
        values = json.loads(_text(_file(folder, number, "json")))
        texts = {name: str(values[name])[:200] for name in ("host", "boot", "user", "work")}
        return Holder(number=number, pid=int(values["pid"]), started=float(values["started"]), **texts)
    except (ValueError, TypeError, KeyError):
        return Holder(number, "unknown", "", -1, 0.0, "unknown", "")


def beating(paths: Sequence[Path], watch_s: float = 3 * BEAT_S) -> set[Path]:
    """Those of some folders whose last claim beats while they are watched, for `watch_s` seconds if there are any."""
    before = {path: _last_beat(path / FOLDER) for path in paths}
    if before:
        time.sleep(watch_s)
    return {path for path, beat in before.items() if _last_beat(path / FOLDER) != beat}


def _last_beat(folder: Path) -> tuple[int, str]:
    last = max(_numbers(folder), default=0)
    return last, _text(_file(folder, last, "beat"))


def this_boot() -> str:
    """Tells this machine, since its start and with the processes that are seen here, from others; empty where nothing does."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def started_s(process: psutil.Process) -> float:
    """When a process started, in seconds since the machine did, which stays when its clock is set."""
    return float(process.create_time() - psutil.boot_time())


def process_ended(holder: Holder) -> bool:
    """Whether the holder is known to be gone: its process was on this machine and is no more."""
    if holder.host != socket.gethostname() or holder.boot != this_boot() or holder.pid < 0:
        return False
    try:
        process = psutil.Process(holder.pid)
        return bool(abs(started_s(process) - holder.started) > 2.0 or process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False
