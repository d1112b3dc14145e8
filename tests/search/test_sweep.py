"""A sweep's folder: one run for each job, what became of every job, and one page of them all."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.sweep import DONE, FAILED, STOPPED, read_jobs, with_folder
from search.sweep_report import spread_of
from spaces.errors import UserError

Call = Callable[..., Any]
Job = tuple[str, ...]


def only_sweep(folder: Path) -> Path:
    (sweep,) = (folder / "runs").glob("sweep-*")
    return sweep


@pytest.fixture(scope="module")
def swept(call: Call, tiny_job: Job, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Two seeds that finish, under a budget, and what was said."""
    folder = tmp_path_factory.mktemp("swept")
    ended = call(folder, "-m", *tiny_job, "seed=0,1", 'constraints=["latency@x86<=1ms"]')
    assert (ended.status, ended.err) == (0, "")
    return only_sweep(folder), ended


def test_every_job_has_its_run_and_is_told(swept: tuple[Path, Any]) -> None:
    sweep, ended = swept
    jobs = read_jobs(sweep)
    assert [job.state for job in jobs] == [DONE, DONE]
    assert all((sweep / job.run / "summary.json").is_file() for job in jobs)
    assert "2 jobs: 2 done" in ended.out
    page = (sweep / "report.html").read_text()
    assert all(f'href="{job.run}/report.html"' in page for job in jobs)
    assert "latency@x86\\u003c=1ms" in page or "latency@x86&lt;=1ms" in page
    assert "between 2 seeds" in page
    assert "http://" not in page.split("</script>", 1)[1].replace("http://www.w3.org", "")


def test_a_sweep_that_was_moved_is_reported_all_the_same(swept: tuple[Path, Any], tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    subprocess.run(["cp", "-r", swept[0], moved], check=True)
    (moved / "report.html").unlink()
    told = subprocess.run([sys.executable, "-m", "search.report", moved], capture_output=True, text=True, check=True)
    assert "2 jobs: 2 done" in told.stdout
    assert (moved / "report.html").is_file()


def test_mistakes_do_not_stop_the_other_jobs_and_are_named(call: Call, tmp_path: Path, tiny_job: Job) -> None:
    ended = call(tmp_path, "-m", *tiny_job, "stages=[space]", "seed=2,3", "space.head=[0],[32]")
    assert ended.status == 2
    assert len(ended.err.splitlines()) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]
    jobs = read_jobs(only_sweep(tmp_path))
    assert sorted(job.state for job in jobs) == [DONE, DONE, FAILED, FAILED]
    assert all(("head" in job.line) == (job.state == FAILED) for job in jobs)
    assert "4 jobs: 2 done, 2 failed" in ended.out.replace("\n", " ")
    page = unescape((only_sweep(tmp_path) / "report.html").read_text())
    assert all(job.line in page for job in jobs if job.state == FAILED)


def test_a_job_that_was_killed_is_named_and_done_by_the_same_command(call: Call, tmp_path: Path, tiny_job: Job) -> None:
    arguments = ("-m", *tiny_job, "stages=[space]", "seed=0,1")
    killed = call(tmp_path, *arguments, kill_before=["stages.json", 1])
    assert killed.status == -signal.SIGKILL
    (job,) = read_jobs(only_sweep(tmp_path))
    assert job.state == STOPPED
    assert "killed" in job.line
    ended = call(tmp_path, *arguments)
    assert ended.status == 0, ended.err
    assert [job.state for job in read_jobs(only_sweep(tmp_path))] == [DONE, DONE]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"overrides": 3}'])
def test_a_damaged_job_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "a.json").write_text(content)
    with pytest.raises(UserError, match="is damaged"):
        read_jobs(tmp_path)


def test_a_job_cannot_point_out_of_the_sweep(swept: tuple[Path, Any], tmp_path: Path) -> None:
    values = json.loads(next((swept[0] / "jobs").iterdir()).read_text())
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "a.json").write_text(json.dumps({**values, "run": "/etc"}))
    with pytest.raises(UserError, match="is damaged"):
        read_jobs(tmp_path)


def test_a_folder_that_is_neither_run_nor_sweep(tmp_path: Path) -> None:
    told = subprocess.run([sys.executable, "-m", "search.report", tmp_path], capture_output=True, text=True)
    assert told.returncode == 2
    assert len(told.stderr.splitlines()) == 1
    assert "neither a finished run nor a sweep" in told.stderr


def test_the_folder_follows_from_the_settings_alone() -> None:
    one = with_folder(["-m", "seed=0,1", "device=x86"])[1]
    assert one is not None
    assert one == with_folder(["--multirun", "device=x86", "seed=0,1", "hydra/launcher=joblib", "threads=1"])[1]
    assert one != with_folder(["-m", "seed=0,2", "device=x86"])[1]
    assert with_folder(["-m", "seed=0,1", "sweep=mine"]) == (["-m", "seed=0,1", "sweep=mine"], Path("mine"))
    assert with_folder(["seed=0"]) == (["seed=0"], None)


@given(st.lists(st.dictionaries(st.integers(1, 20), st.integers(0, 9), min_size=1), min_size=1, max_size=4))
def test_the_spread_encloses_every_front(fronts: list[dict[int, int]]) -> None:
    steps = [sorted((float(x), float(y)) for x, y in front.items()) for front in fronts]
    xs, low, high = spread_of(steps, 30.0)
    assert xs[0] == max(points[0][0] for points in steps)
    for x, least, most in zip(xs, low, high, strict=True):
        reached = [max(y for at, y in points if at <= x) for points in steps]
        assert (least, most) == (min(reached), max(reached))
