"""A device that OpenSSH's client reaches, as the user's `~/.ssh/config` says: names, keys, jump hosts, shared connections."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import BinaryIO

from latency_lut.transports.client import check_path, check_word, lines_of
from spaces.errors import UserError

OPTIONS = {
    "BatchMode": "yes",  # never asks: there may be nobody, and several devices at once
    "ConnectTimeout": "15",
    "ServerAliveInterval": "10",  # a dead link is noticed after 30 s
    "ServerAliveCountMax": "3",
    "ClearAllForwardings": "yes",  # the user's forwardings would be opened once more by each connection
    "RemoteCommand": "none",
}
LOST_STATUS = 255
# One line each: they are words of a command that the device's shell reads. Files are written from an offset on, so that a
# broken copy goes on.
WRITE = (
    "import os,shutil,sys; path,offset=sys.argv[1],int(sys.argv[2]); os.makedirs(os.path.dirname(path),exist_ok=True); "
    "file=open(path,'r+b' if offset else 'wb'); file.truncate(offset); file.seek(offset); "
    "shutil.copyfileobj(sys.stdin.buffer,file)"
)


@dataclass(frozen=True)
class Ssh:
    """A device that is reached by ssh.

    Args:
        host: as for `ssh HOST`: an alias of the configuration, a name or an address, or `USER@HOST`.
        folder: for files there, from the home folder unless it begins with `/`.
        python: the Python there that has numpy and onnxruntime.

    Raises:
        UserError: one of them has characters that it must not have.
    """

    host: str
    folder: str = "netwright"
    python: str = "python3"

    def __post_init__(self) -> None:
        check_word(
            "host", self.host, r"(?:[A-Za-z0-9_][A-Za-z0-9._-]*@)?[A-Za-z0-9:][A-Za-z0-9._:-]*", "pi or user@192.168.0.7"
        )
        check_path("folder", self.folder, "netwright or /tmp/netwright")
        check_path("python", self.python, "python3 or /opt/venv/bin/python")

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"ssh host {self.host}"

    @cached_property
    def place(self) -> str:
        """See `Transport.place`: host and port, to which the client's configuration resolves aliases."""
        try:
            words = [line.decode(errors="replace").split() for line in lines_of(["ssh", "-G", "--", self.host], _lost)]
        except UserError:  # told by the first command that is to run there
            return self.name
        resolved = {word[0]: word[1] for word in words if len(word) == 2}
        return f"ssh {resolved.get('hostname', self.host).casefold()} port {resolved.get('port', '22')}"

    @property
    def trial(self) -> str:
        """A command for a terminal that tells whether the way is open."""
        return f"ssh -o BatchMode=yes {self.host} {self.python} -V"

    def run(self, words: Sequence[str], *, stdin: BinaryIO | None = None, stopped: Event | None = None) -> Iterator[bytes]:
        """See `Transport.run`."""
        options = [part for name, value in OPTIONS.items() for part in ("-o", f"{name}={value}")]
        arguments = ["ssh", "-T", *options, "--", self.host, " ".join(shlex.quote(word) for word in words)]
        return lines_of(arguments, _lost, stdin=stdin, stopped=stopped)

    def send(self, source: Path, path: str, offset: int, *, stopped: Event | None = None) -> None:
        """See `Transport.send`."""
        with source.open("rb", buffering=0) as file:
            file.seek(offset)
            for _ in self.run([self.python, "-c", WRITE, path, str(offset)], stdin=file, stopped=stopped):
                pass


def _lost(status: int, said: str) -> bool:
    return status == LOST_STATUS
