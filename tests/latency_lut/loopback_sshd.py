"""An sshd of a test's own on loopback, with a configuration of the client that knows it, and links that can be cut."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
PROGRAMS = ("sshd", "ssh", "ssh-keygen")


def missing() -> str:
    """Why there can be no sshd here; empty where there can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    return f"ssh: {', '.join(absent)} not installed (tests/cluster/install)" if absent else ""


class Sshd:
    """An sshd that lets this user in with a key that is made for it; ended in the end.

    The client on `path` is the real one, with `ssh_config` in place of `~/.ssh/config`. It knows the hosts `pi`; `cut`, the
    same behind `link`; and `stranger`, the same with another key than is known.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, _free_port()
        self.link = Link(self.port)
        for name in ("host_key", "user_key", "other_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
        shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
        known = [("real", "host_key"), ("false", "other_key")]
        lines = [f"{name} {(folder / key).with_suffix('.pub').read_text()}" for name, key in known]
        (folder / "known_hosts").write_text("".join(lines))
        (folder / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {folder}/host_key\nPidFile none\nUsePAM no\nStrictModes no\n"
            f"AuthorizedKeysFile {folder}/authorized_keys\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            "PermitRootLogin prohibit-password\nPermitUserRC no\nMaxStartups 100\n"
            f"SetEnv TMPDIR={folder}\n"  # another machine: what measures here does not hold its lock
        )
        hosts = [("pi", self.port, "real"), ("cut", self.link.port, "real"), ("stranger", self.port, "false")]
        (folder / "ssh_config").write_text(
            "".join(f"Host {host}\n  Port {port}\n  HostKeyAlias {alias}\n" for host, port, alias in hosts)
            + f"Host *\n  HostName 127.0.0.1\n  User {getpass.getuser()}\n  IdentityFile {folder}/user_key\n"
            f"  IdentitiesOnly yes\n  UserKnownHostsFile {folder}/known_hosts\n  GlobalKnownHostsFile /dev/null\n"
            "  StrictHostKeyChecking yes\n"
        )
        (folder / "bin").mkdir()
        client = folder / "bin" / "ssh"
        client.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
        client.chmod(0o755)
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        command = [str(shutil.which("sshd", path=PATH)), "-D", "-e", "-f", str(folder / "sshd_config")]
        with (folder / "log").open("wb") as log:
            self._server = subprocess.Popen(command, stdout=log, stderr=log)
        self._wait()

    def _wait(self) -> None:
        for _ in range(200):
            with socket.socket() as tried:
                if tried.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            if self._server.poll() is not None:
                break
            time.sleep(0.05)
        raise RuntimeError(f"sshd does not start: {(self.folder / 'log').read_text()}")

    @property
    def path(self) -> str:
        """A PATH with the client that knows this sshd."""
        return f"{self.folder}/bin:{os.environ['PATH']}"

    def kill_sessions(self) -> int:
        """Kill the processes of all connections; how many there were."""
        killed = 0
        for process in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            if parent == self._server.pid:
                os.kill(int(process.name), signal.SIGKILL)
                killed += 1
        return killed

    def close(self) -> None:
        """End sshd, its connections and the link."""
        self.kill_sessions()
        self._server.terminate()
        self._server.wait(20)
        self.link.close()


class Link:
    """A TCP connection between the client and a server's port that can be cut, or fall silent.

    Args:
        to_port: of the server on loopback.
    """

    def __init__(self, to_port: int) -> None:
        self._to_port, self._pairs = to_port, []
        self._silent = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            server = socket.create_connection(("127.0.0.1", self._to_port))
            self._pairs.append((client, server))
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._carry, args=(source, target), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        try:
            silent = self._silent
            while data := source.recv(2**16):
                if not silent.is_set():
                    target.sendall(data)
        except OSError:
            pass
        finally:
            if not silent.is_set():
                for end in (source, target):
                    _shut(end)

    def cut(self) -> None:
        """Break the connections that there are."""
        for pair in self._pairs:
            for end in pair:
                _shut(end)
        self._pairs.clear()

    def silence(self) -> None:
        """Let the connections that there are carry nothing any more, without either end being told."""
        self._silent.set()
        self._silent = threading.Event()

    def close(self) -> None:
        """Break all, take no more."""
        self._listener.close()
        self.cut()


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
