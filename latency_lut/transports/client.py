"""Calling a transport's client: the lines that it writes, its end, and what it may be called with."""

from __future__ import annotations

import re
import select
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from threading import Event
from typing import BinaryIO

from spaces.errors import UserError

LONGEST_LINE_BYTES = 2**20
SILENCE_S = 900.0  # without a byte: longer than any batch takes, shorter than for ever
POLL_S = 0.2  # how late a stop may be noticed

Lost = Callable[[int, str], bool]  # by the exit status and the last line of stderr: whether the way to the device was closed


class LinkError(UserError):
    """The way to the device is closed, or was while a command ran; it may open again."""


class RemoteError(UserError):
    """A command failed on the device.

    Args:
        status: its exit status.
        said: the last line that it wrote to stderr.
    """

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"{said or 'no message'} (status {status})")
        self.status, self.said = status, said


def check_word(what: str, value: object, allowed: str, example: str) -> None:
    """Make sure that a value can be neither an option nor a part of a command.

    Args:
        what: its name.
        value: as it was configured.
        allowed: regular expression that all of it matches.
        example: of an allowed value.

    Raises:
        UserError: it is not allowed.
    """
    if not isinstance(value, str) or len(value) > 255 or not re.fullmatch(allowed, value, re.ASCII):
        raise UserError(f"transport: {what} is {value!r}; allowed are values such as {example}")


def check_path(what: str, value: object, example: str) -> None:
    """Make sure of a path on a device: letters, digits and `. _ + - /`, no `..`, no leading `-`.

    Raises:
        UserError: it is not allowed.
    """
    check_word(what, value, r"/?(?!\.\./|\.\.$|-)[A-Za-z0-9._+-]+(?:/(?!\.\./|\.\.$|-)[A-Za-z0-9._+-]+)*", example)


def printable(text: str | bytes) -> str:
    """One line of what a device wrote, without what would move a terminal's cursor; 200 characters at most."""
    text = text.decode(errors="replace") if isinstance(text, bytes) else text
    return "".join(letter if letter.isprintable() else " " for letter in text)[:200].strip()


def lines_of(
    arguments: Sequence[str], lost: Lost, *, stdin: BinaryIO | None = None, stopped: Event | None = None
) -> Iterator[bytes]:
    """Run a client; the lines of its stdout, with their ends, as they come. A last line without an end is left out.

    Args:
        arguments: program and arguments; no shell reads them here.
        lost: tells how it ended when the way was closed.
        stdin: what it reads; nothing by default.
        stopped: when set, the client is ended and nothing more comes.

    Raises:
        UserError: there is no such program.
        LinkError: the way to the device is closed, or was while the command ran, or nothing came for `SILENCE_S`.
        RemoteError: another exit status than 0, or a line longer than `LONGEST_LINE_BYTES`.
    """
    try:
        process = subprocess.Popen(
            arguments, stdin=stdin or subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
        )
    except OSError as error:
        raise UserError(f"cannot run {arguments[0]} ({error.strerror or error}); install it or put it on the PATH") from error
    complaint = _Tail()
    try:
        yield from _lines(process, complaint, stopped)
    finally:
        _end(process, complaint)
    status = process.returncode
    if stopped is not None and stopped.is_set():
        return
    if status < 0 or lost(status, complaint.last_line):
        raise LinkError(complaint.last_line or f"{arguments[0]} ended with status {status}")
    if status:
        raise RemoteError(status, complaint.last_line)


class _Tail:
    """The end of what is written to a stream."""

    BYTES = 4096

    def __init__(self) -> None:
        self._kept = b""

    def add(self, data: bytes) -> None:
        self._kept = (self._kept + data)[-self.BYTES :]

    @property
    def last_line(self) -> str:
        """The last line that says something."""
        return next((line for text in reversed(self._kept.splitlines()) if (line := printable(text))), "")


def _lines(process: subprocess.Popen[bytes], complaint: _Tail, stopped: Event | None) -> Iterator[bytes]:
    streams = [stream for stream in (process.stdout, process.stderr) if stream is not None]
    rest, heard_s = b"", time.monotonic()
    # A client may close its stdout some time before it ends, and must not be stuck with what it complains about meanwhile.
    while process.stdout in streams or process.poll() is None:
        if stopped is not None and stopped.is_set():
            return
        ready = select.select(streams, [], [], POLL_S if process.stdout in streams else 0.005)[0]
        if not ready and time.monotonic() - heard_s > SILENCE_S:
            raise LinkError(f"nothing came for {SILENCE_S:.0f} s")
        for stream in ready:
            data, heard_s = stream.read(2**16), time.monotonic()
            if not data:
                streams.remove(stream)
            elif stream is process.stderr:
                complaint.add(data)
            else:
                *lines, rest = (rest + data).split(b"\n")
                yield from (line + b"\n" for line in lines)
        if len(rest) > LONGEST_LINE_BYTES:
            raise RemoteError(0, f"a line of more than {LONGEST_LINE_BYTES} bytes")


def _end(process: subprocess.Popen[bytes], complaint: _Tail) -> None:
    """End a client that still runs, and take what it complained about; a connection that is shared and kept open
    (ControlPersist) keeps its stderr open too, so nobody waits for the end of that."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.stderr is not None and process.stdout is not None:
        if select.select([process.stderr], [], [], 0)[0]:
            complaint.add(process.stderr.read(2**16))
        process.stderr.close()
        process.stdout.close()
