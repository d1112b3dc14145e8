"""One measurement at a time on a machine, whoever starts it.

Two processes that time models side by side slow each other, and neither would know. So whoever measures holds a lock that all
processes of the machine see. It is a file lock of the kernel: a process that dies gives it back. It is a courtesy, not a
condition: where the file cannot be opened, as another user's in a strict folder, or the holder is suspended, measuring goes on.

Needs the standard library only: it is part of a bundle's runner, so the same holds on a device elsewhere.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

POLL_S = 0.05
PATIENCE_S = 600.0  # a batch of models takes seconds

_held = threading.RLock()  # the kernel's lock is the process's: its threads wait for each other here
_depth = 0


def lock_path() -> Path:
    """The file that is locked, the same for all users of the machine."""
    return Path(tempfile.gettempdir()) / "netwright-measuring.lock"


@contextmanager
def alone_on_this_machine() -> Iterator[None]:
    """Nobody else who asks for this measures meanwhile; waits for its turn. The thread that is inside may enter again."""
    global _depth
    with _held:
        descriptor = _opened() if _depth == 0 else None
        _depth += 1
        try:
            if descriptor is not None:
                _wait(descriptor)
            yield
        finally:
            _depth -= 1
            if descriptor is not None:
                os.close(descriptor)


def _wait(descriptor: int) -> None:
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        if try_lock(descriptor):
            return
        time.sleep(POLL_S)
    warnings.warn(f"another process has held {lock_path()} for {PATIENCE_S:.0f} s; measuring beside it", stacklevel=4)


def try_lock(descriptor: int) -> bool:
    """Lock an open file for this process; whether it has it now. Where the file cannot be locked, everybody has it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # such as a network file system
    return True


def _opened() -> int | None:
    if fcntl is None:
        return None
    # First without creating: in a folder for all, Linux forbids to create over another user's file, though not to open it.
    for flags in (0, os.O_CREAT):
        try:
            return os.open(lock_path(), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o666)
        except OSError:
            continue
    return None
