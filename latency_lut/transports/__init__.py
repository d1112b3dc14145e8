"""Ways to a device elsewhere: files go there, commands run there, what they write comes back line by line.

A transport is a client that the user has, called with lists of arguments. What a device's file says about it is held against
lists of allowed characters, so that a host or a path can be neither an option nor a command; what comes from the device is
bytes and is believed by nobody here. The device needs a POSIX shell.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Event
from typing import BinaryIO, Protocol

from latency_lut.transports.adb import Adb
from latency_lut.transports.client import LinkError, RemoteError
from latency_lut.transports.ssh import Ssh

__all__ = ["Adb", "LinkError", "RemoteError", "Ssh", "Transport"]


class Transport(Protocol):
    """A way to a device. Its methods raise `LinkError` when the way is closed and `RemoteError` when a command fails there."""

    @property
    def folder(self) -> str:
        """The folder for Netwright's files there."""

    @property
    def python(self) -> str:
        """The Python there that has numpy and onnxruntime."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def place(self) -> str:
        """Which machine it reaches: equal for two ways to one machine, as far as that can be told from here."""

    @property
    def trial(self) -> str:
        """A command for a terminal that tells whether the way is open."""

    def run(self, words: Sequence[str], *, stdin: BinaryIO | None = None, stopped: Event | None = None) -> Iterator[bytes]:
        """Run a command there; the lines that it writes, each as soon as it is written.

        Args:
            words: of the command; they reach it as they are.
            stdin: what it reads, from where the file stands; nothing by default.
            stopped: when set, the command is left and nothing more comes.
        """

    def send(self, source: Path, path: str, offset: int, *, stopped: Event | None = None) -> None:
        """Copy a file there; its folder is made.

        Args:
            source: the file.
            path: of the copy.
            offset: bytes that are there already; a transport may send them again.
            stopped: as for `run`.
        """
