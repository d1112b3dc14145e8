"""A Slurm of a test's own on this machine: munge, MariaDB, slurmdbd, slurmctld, slurmd, all on loopback, in one folder.

Without accounting (slurmdbd) a job that is killed leaves its launcher waiting for ever; with it, the job is soon FAILED.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

PROGRAMS = ("munged", "mariadbd", "mariadb-install-db", "mariadb", "slurmdbd", "slurmctld", "slurmd", "sbatch", "sacct")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def missing() -> str:
    """Why there can be no cluster here; empty where there can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if absent:
        return f"Slurm: {', '.join(absent)} not installed (tests/cluster/install)"
    return "" if os.geteuid() == 0 else "Slurm starts jobs as their users, which needs root"


class Cluster:
    """A cluster of one node; stopped and removed in the end."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o755)
        self._processes: list[subprocess.Popen[bytes]] = []
        self.environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(self.folder / "slurm.conf")}
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *error: object) -> None:
        for process in reversed(self._processes):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pid in self._left():
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _left(self) -> list[int]:
        """What jobs of this cluster left: their step daemons and all that these started."""
        left = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"] and process.pid != os.getpid():
                    left.append(process.pid)
        return left

    def _start(self) -> None:
        ports = _free_ports(4)
        self._configure(ports)
        key, munge = self.folder / "munge.key", self.folder / "munge"
        munge.mkdir(mode=0o755)
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = [f"--{name}-file={munge / name}" for name in ("pid", "log", "seed")]
        self._daemon("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={munge / 'socket'}", *files)
        self._until(lambda: (munge / "socket").exists(), "munged")
        data = self.folder / "mariadb"
        self._run("mariadb-install-db", f"--datadir={data}", "--user=root", "--auth-root-authentication-method=normal")
        sql = self.folder / "accounting.sql"
        sql.write_text(
            "CREATE DATABASE slurm;\n"
            "CREATE USER slurm@'127.0.0.1' IDENTIFIED BY 'slurm';\n"
            "GRANT ALL ON slurm.* TO slurm@'127.0.0.1';\n"
        )
        where = [f"--datadir={data}", f"--socket={self.folder / 'sql'}", f"--port={ports[0]}", "--bind-address=127.0.0.1"]
        self._daemon(
            "mariadbd", "--no-defaults", "--user=root", *where, f"--init-file={sql}", f"--pid-file={self.folder / 'sql.pid'}"
        )
        self._until(lambda: _answers(ports[0]), "mariadbd")
        self._daemon("slurmdbd", "-D")
        self._until(lambda: _answers(ports[1]), "slurmdbd")
        self._daemon("slurmctld", "-D", "-i", "-c")
        self._until(lambda: _answers(ports[2]), "slurmctld")
        self._daemon("slurmd", "-D", "-c")
        self._until(lambda: "idle" in self.run("sinfo", "--noheader", "--format=%T"), "slurmd")

    def _configure(self, ports: Sequence[int]) -> None:
        host, folder = socket.gethostname().partition(".")[0], self.folder
        cpus, memory = os.cpu_count() or 1, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
        socket_ = f"AuthInfo=socket={folder / 'munge' / 'socket'}"
        (folder / "slurm.conf").write_text(
            f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[2]}
SlurmdPort={ports[3]}
SlurmUser=root
AuthType=auth/munge
{socket_}
CredType=cred/munge
MpiDefault=none
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation={folder / "state"}
SlurmdSpoolDir={folder / "spool"}
SlurmctldPidFile={folder / "slurmctld.pid"}
SlurmdPidFile={folder / "slurmd.pid"}
SlurmctldLogFile={folder / "slurmctld.log"}
SlurmdLogFile={folder / "slurmd.log"}
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={ports[1]}
AccountingStoragePass={folder / "munge" / "socket"}
JobAcctGatherType=jobacct_gather/none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory - 500} State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=60 State=UP OverSubscribe=FORCE:4
"""
        )
        (folder / "slurmdbd.conf").write_text(
            f"""
AuthType=auth/munge
{socket_}
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={ports[1]}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={ports[0]}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm
LogFile={folder / "slurmdbd.log"}
PidFile={folder / "slurmdbd.pid"}
"""
        )
        (folder / "slurmdbd.conf").chmod(0o600)
        for name in ("state", "spool"):
            (folder / name).mkdir()

    def run(self, *command: str) -> str:
        """The output of a Slurm command."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60).stdout

    def _run(self, *command: str) -> None:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120, cwd=self.folder)
        assert done.returncode == 0, done.stderr

    def _daemon(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("wb") as out:
            process = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=self.folder
            )
        self._processes.append(process)

    def _until(self, ready: object, name: str) -> None:
        end = time.monotonic() + 60
        while not ready():  # type: ignore[operator]
            ended = [process for process in self._processes if process.poll() is not None]
            if time.monotonic() > end or ended:
                logs = "".join(path.read_text(errors="replace")[-2000:] for path in self.folder.glob(f"{name}.*"))
                raise RuntimeError(f"{name} did not start: {logs}")
            time.sleep(0.1)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
