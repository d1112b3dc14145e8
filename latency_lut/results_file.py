"""The file of a runner's results: lines of JSON that are only ever appended, so that whoever was interrupted goes on from it.

Needs the standard library only: it is part of a bundle's runner, which works where Netwright is not installed.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from latency_lut.alone import try_lock

FOLLOW_S = 0.5

Line = dict[str, Any]


class RunnerError(Exception):
    """What whoever runs this can mend, in one line."""


class Results:
    """The file of results: read once, then only appended to.

    Args:
        path: of the file; made when it is not there.
        head: its first line.

    Raises:
        RunnerError: it cannot be written, is being written by another process, or holds results of something else.
    """

    def __init__(self, path: Path, head: Line) -> None:
        self.path, self._streams, self._sum = path, False, hashlib.sha256()
        self.unread = False  # nobody reads stdout any more
        self.measured: set[str] = set()
        self.failed: set[str] = set()
        self.answered: set[tuple[str, int]] = set()
        self.batches, self.complete = 0, False
        mend = "delete it or name another file"
        try:
            self._file = path.open("a+b")
            _lock(self._file.fileno(), path)
            self._file.seek(0)
            content = self._file.read()
            content = content[: content.rfind(b"\n") + 1]  # without a line that was being written when the machine stopped
            self._file.truncate(len(content))
            lines = [(line, json.loads(line)) for line in content.splitlines(keepends=True)]
            for line, known in lines:
                self._take(line, known)
        except OSError as error:
            raise RunnerError(f"cannot write {path}: {error.strerror or error}; name another file") from error
        except (ValueError, KeyError, TypeError) as error:
            raise RunnerError(f"{path} is damaged; {mend}") from error
        if lines and lines[0][1] != head:
            differs = [name for name in ("bundle", "device") if lines[0][1].get(name) != head[name]]
            raise RunnerError(f"{path} holds results of another {' and '.join(differs) or 'version'}; {mend}")
        if not lines:
            self.append(head)

    def _take(self, content: bytes, line: Line) -> None:
        """Know what a line says."""
        self._sum.update(content)
        kind = line["kind"]
        if kind == "visits":
            self.measured.add(line["id"])
            self.batches = max(self.batches, line["batch"] + 1)
        elif kind == "failed":
            self.failed.add(line["id"])
        elif kind == "outputs":
            self.answered.add((line["id"], line["first"]))
        self.complete = kind == "end"

    def append(self, line: Line) -> None:
        """Write a line."""
        content = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        self._file.write(content)
        self._file.flush()
        self._take(content, line)
        if self._streams:
            try:
                sys.stdout.buffer.write(content)
                sys.stdout.buffer.flush()
            except BrokenPipeError:  # told when the batch is in the file
                self._streams, self.unread = False, True

    def append_end(self, fingerprint: str) -> None:
        """Write the last line."""
        counts = {"measured": len(self.measured), "failed": len(self.failed)}
        self.append({"kind": "end", "complete": True, **counts, "fingerprint": fingerprint, "sha256": self._sum.hexdigest()})
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file, and let others write it."""
        self._file.close()

    def stream_from(self, offset: int) -> None:
        """Write what the file holds from a byte on to stdout, and from now on every line that is appended.

        Raises:
            RunnerError: the file is shorter.
        """
        size = self._file.seek(0, os.SEEK_END)
        if offset > size:
            raise RunnerError(
                f"{self.path} has {size} bytes, fewer than the {offset} that are known; begin anew with --stream 0"
            )
        self._file.seek(offset)
        sys.stdout.buffer.write(self._file.read())
        sys.stdout.buffer.flush()
        self._streams = True


def follow(path: Path, offset: int) -> int:
    """Stream what another runner still writes to a file: one that a broken connection left behind.

    Returns:
        The byte behind what was streamed.
    """
    while _locked(path):
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read()
        content = content[: content.rfind(b"\n") + 1]
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
        offset += len(content)
        time.sleep(FOLLOW_S)
    return offset


def _locked(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return not try_lock(file.fileno())
    except FileNotFoundError:
        return False


def _lock(descriptor: int, path: Path) -> None:
    if not try_lock(descriptor):
        raise RunnerError(f"{path} is being written by another process; wait for it or end it")
