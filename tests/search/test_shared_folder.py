"""Run folders on file systems as clusters have them: full, without locks, another user's, moved."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., Any]
Job = tuple[str, ...]
ROOT = Path(__file__).parents[2]
SETTINGS = "stages=[tables,supernet,predictors,study]"
HOLD = """
import sys, time
from pathlib import Path
from search.claims import claimed
def wait(holder):
    print(holder, flush=True)
with claimed(Path(sys.argv[1]), "there", wait):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few pages."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(
    call: Call, tiny_job: Job, finished: Path, small_disk: Path
) -> None:
    stopped_in = set()
    for size_kb in (64, 256, 1024, 32768):
        subprocess.run(["mount", "-o", f"remount,size={size_kb}k", str(small_disk)], check=True)
        ended = call(small_disk, *tiny_job, "run=run", "stages=[space,tables,supernet,predictors,study,export,report]")
        if ended.status == 0:
            break
        assert ended.status == 2, ended.err
        assert len(ended.err.splitlines()) == 1
        assert "No space left on device; make room and run the same command" in ended.err
        stopped_in.add(ended.out.split("\n")[-3 if ended.out.endswith("\n") else -2])
    assert ended.status == 0
    assert len(stopped_in) > 1
    assert (small_disk / "run" / "front.csv").read_bytes() == (finished / "front.csv").read_bytes()
    assert not list((small_disk / "run").rglob("*.tmp"))


def test_a_file_system_without_locks_is_good_enough(call: Call, tiny_job: Job, finished: Path, tmp_path: Path) -> None:
    ended = call(tmp_path, *tiny_job, "run=run", SETTINGS, "share=shared", no_locks=True)
    assert (ended.status, ended.err) == (0, "")
    assert (tmp_path / "run" / "front.csv").read_bytes() == (finished / "front.csv").read_bytes()


# -- two users ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def guest() -> list[str]:
    """What runs a command as a user who may read everything, which the checkout may need, and write what all may write."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("becoming another user needs root and setpriv")
    ids = ["--reuid=65534", "--regid=65534", "--clear-groups"]
    return ["setpriv", *ids, "--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"]


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder in which everybody may write; those of pytest are closed."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """With a home of the guest's own: libraries tell of one that they cannot write to."""
    with tempfile.TemporaryDirectory() as home:
        Path(home).chmod(0o777)
        yield {**os.environ, "HOME": home, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LOGNAME": "guest"}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_another_user_s_run_is_left_alone(
    guest: list[str], finished: Path, open_folder: Path, environment: dict[str, str]
) -> None:
    shutil.copytree(finished, open_folder / "run")
    before = content(open_folder)
    command = [sys.executable, "-m", "search", "run=run", "seed=1"]
    ended = subprocess.run([*guest, *command], cwd=open_folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert "Permission denied; choose a folder that you may write" in ended.stderr
    assert content(open_folder) == before


@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_another_user_is_waited_for_and_followed(
    guest: list[str], open_folder: Path, environment: dict[str, str], mode: int
) -> None:
    (open_folder / ".claims").mkdir()
    (open_folder / ".claims").chmod(mode)
    for seconds in ("0", "0"):  # claims of this user to be cleared away, or left, by the other one
        subprocess.run([sys.executable, "-c", HOLD, open_folder, seconds], env=environment, check=True, capture_output=True)
    first = subprocess.Popen([sys.executable, "-c", HOLD, open_folder, "3"], env=environment, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    begin = time.monotonic()
    second = [*guest, sys.executable, "-c", HOLD, str(open_folder), "0"]
    ended = subprocess.run(second, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert f"process {first.pid} of guest" in ended.stdout.splitlines()[0]
    assert ended.stdout.splitlines()[-1] == "held"
    assert time.monotonic() - begin > 1
    first.wait(30)
    first.stdout.close()


# -- moved --------------------------------------------------------------------------------------------------------------------


def test_a_run_is_moved_in_the_middle_and_names_no_place(
    call: Call, tiny_job: Job, tiny_tables: Path, finished: Path, tmp_path: Path
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(tiny_tables, here / "measured")
    job = (*(text for text in tiny_job if not text.startswith("profile.tables")), "profile.tables=measured")
    killed = call(here, *job, "run=runs/one", SETTINGS, kill_before=["supernet/last.ckpt", 2])
    assert killed.status == -signal.SIGKILL
    assert (here / "runs" / "one" / "supernet" / "last.ckpt").is_file()
    there.mkdir()
    (here / "runs" / "one").rename(there / "moved")
    shutil.rmtree(here)
    ended = call(there, "run=moved", SETTINGS, "threads=1")  # a run does not remember the machine's threads
    assert (ended.status, ended.err) == (0, "")
    assert "tables: done before" in ended.out
    assert (there / "moved" / "front.csv").read_bytes() == (finished / "front.csv").read_bytes()
    assert [path for path, text in content(there / "moved").items() if str(tmp_path).encode() in text] == []
