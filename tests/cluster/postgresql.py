"""A PostgreSQL of a test's own: in a folder of its own, on loopback, as the present user or, for root, as `postgres`."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

FOLDERS = ("/usr/lib/postgresql", "/usr/pgsql", "/opt/homebrew/opt/postgresql")


def missing() -> str:
    """Why there can be no server here; empty where there can."""
    if _program("initdb") is None:
        return "PostgreSQL is not installed (tests/cluster/install)"
    if os.geteuid() == 0:
        try:
            pwd.getpwnam("postgres")
        except KeyError:
            return "PostgreSQL does not run as root, and there is no user postgres"
    return ""


def _program(name: str) -> str | None:
    found = [path for folder in FOLDERS for path in sorted(Path(folder).glob(f"*/bin/{name}"), reverse=True)]
    return shutil.which(name) or (str(found[0]) if found else None)


class Server:
    """A server with an empty database `netwright` and a user of that name; stopped and removed in the end.

    Args:
        password: of that user; without one everybody on loopback is trusted.
    """

    def __init__(self, password: str = "") -> None:
        self._password = password
        self._root = Path(tempfile.mkdtemp(prefix="postgresql-"))  # pytest's own folders are closed to other users
        self.folder = self._root / "data"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        if os.geteuid() == 0:
            shutil.chown(self._root, "postgres")
        file = self._root / "password"
        file.write_text(password or "none")
        if os.geteuid() == 0:
            shutil.chown(file, "postgres")
        auth = "--auth=scram-sha-256" if password else "--auth=trust"
        self._run("initdb", "--pgdata", str(self.folder), auth, f"--pwfile={file}", "--username=netwright", "--no-sync")
        self.start()
        self._run("createdb", "--host=127.0.0.1", f"--port={self.port}", "--username=netwright", "netwright")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        shutil.rmtree(self._root)

    @property
    def url(self) -> str:
        return f"postgresql://netwright@127.0.0.1:{self.port}/netwright"

    def start(self) -> None:
        options = f"-c listen_addresses=127.0.0.1 -c port={self.port} -c unix_socket_directories='' -c fsync=off"
        log = str(self.folder / "server.log")
        self._run("pg_ctl", "--pgdata", str(self.folder), "--options", options, "--log", log, "--wait", "start")

    def stop(self, mode: str = "immediate") -> None:
        self._run("pg_ctl", "--pgdata", str(self.folder), "--mode", mode, "--wait", "stop")

    def _run(self, name: str, *arguments: str) -> None:
        program = _program(name)
        assert program is not None
        as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        own = {**os.environ, "PGPASSWORD": self._password}
        done = subprocess.run([*as_user, program, *arguments], capture_output=True, text=True, cwd="/", env=own, timeout=120)
        assert done.returncode == 0, done.stderr
