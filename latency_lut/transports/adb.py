"""An Android device that `adb` reaches, by cable or by network."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from threading import Event
from typing import BinaryIO

from latency_lut.transports.client import check_path, check_word, lines_of

LOST_STATUS = 255  # of a shell that was cut off; adb's own complaints have status 1
LOST_LINE = re.compile(r"(adb|error): ")


@dataclass(frozen=True)
class Adb:
    """A device that is reached by adb.

    Args:
        serial: as `adb devices` lists it.
        folder: for files there.
        python: the Python there that has numpy and onnxruntime.

    Raises:
        UserError: one of them has characters that it must not have.
    """

    serial: str
    folder: str = "/data/local/tmp/netwright"
    python: str = "python3"

    def __post_init__(self) -> None:
        check_word("serial", self.serial, r"[A-Za-z0-9][A-Za-z0-9._:-]*", "emulator-5554 or 192.168.0.7:5555, see: adb devices")
        check_path("folder", self.folder, "/data/local/tmp/netwright")
        check_path("python", self.python, "/data/local/tmp/python/bin/python3")

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"adb device {self.serial}"

    @property
    def place(self) -> str:
        """See `Transport.place`: the serial number."""
        return f"adb {self.serial}"

    @property
    def trial(self) -> str:
        """A command for a terminal that tells whether the way is open."""
        return f"adb -s {self.serial} shell {self.python} -V"

    def run(self, words: Sequence[str], *, stdin: BinaryIO | None = None, stopped: Event | None = None) -> Iterator[bytes]:
        """See `Transport.run`."""
        return self._call("shell", " ".join(shlex.quote(word) for word in words), stdin=stdin, stopped=stopped)

    def send(self, source: Path, path: str, offset: int, *, stopped: Event | None = None) -> None:
        """See `Transport.send`; adb sends all of the file, whatever the offset."""
        for arguments in (
            ("shell", f"mkdir -p {shlex.quote(str(PurePosixPath(path).parent))}"),
            ("push", str(source.resolve()), path),
        ):
            for _ in self._call(*arguments, stopped=stopped):
                pass

    def _call(self, *arguments: str, stdin: BinaryIO | None = None, stopped: Event | None = None) -> Iterator[bytes]:
        return lines_of(["adb", "-s", self.serial, *arguments], _lost, stdin=stdin, stopped=stopped)


def _lost(status: int, said: str) -> bool:
    return status == LOST_STATUS or (status == 1 and LOST_LINE.match(said) is not None)
