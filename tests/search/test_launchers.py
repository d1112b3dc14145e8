"""Sweeps by launchers: several processes, submitit, and a real Slurm; a killed job is told, and done again alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from search.dask_pool import DaskPool
from search.sweep import DONE, STOPPED, read_jobs
from tests.cluster import slurm

Job = tuple[str, ...]
ROOT = Path(__file__).parents[2]
PATIENCE_S = 240


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "search", "-m", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def only_sweep(folder: Path) -> Path:
    (sweep,) = (folder / "runs").glob("sweep-*")
    return sweep


def killed_once(
    folder: Path, arguments: list[str], jobs: int, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a sweep, and kill one of its jobs when all have begun; the first that trains goes on."""
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        process = subprocess.Popen(arguments, cwd=folder, env=environment, stdout=out, stderr=err)
    try:
        end, killed = time.monotonic() + PATIENCE_S, False
        while process.poll() is None:
            assert time.monotonic() < end
            files = list(folder.glob("runs/sweep-*/jobs/*.json"))
            told = [json.loads(file.read_text()) for file in files] if len(files) == jobs and not killed else []
            running = [job for job in told if job["state"] == "running" and "seed=1" in job["overrides"]]
            if running:
                os.kill(running[0]["pid"], signal.SIGKILL)
                killed = True
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    assert killed
    return subprocess.CompletedProcess(
        arguments, process.returncode, (folder / "out").read_text(), (folder / "err").read_text()
    )


def check(folder: Path, arguments: list[str], jobs: int, environment: Mapping[str, str]) -> None:
    ended = killed_once(folder, arguments, jobs, environment)
    assert ended.returncode == 2, ended.stderr
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, ended.stderr
    assert "ended without a result" in lines[0]
    assert "Traceback" not in ended.stderr
    sweep = only_sweep(folder)
    end = time.monotonic() + PATIENCE_S
    while any(job.state == "running" for job in read_jobs(sweep)):  # a launcher may end before its jobs do
        assert time.monotonic() < end
        time.sleep(0.5)
    states = [job.state for job in read_jobs(sweep)]
    assert sorted(states) == [DONE] * (jobs - 1) + [STOPPED]
    finished = {job.run: (sweep / job.run / "summary.json").stat().st_mtime_ns for job in read_jobs(sweep) if job.state == DONE}
    again = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert again.returncode == 0, again.stderr
    assert [job.state for job in read_jobs(sweep)] == [DONE] * jobs
    records = {job.run: json.loads((sweep / job.run / "stages.json").read_text()) for job in read_jobs(sweep)}
    trained = [run for run, record in records.items() if "taken_from" not in record["supernet"]["facts"]]
    assert len(trained) == 2  # one for each seed
    assert len(list((folder / "runs" / "shared").glob("supernet-*"))) == 2
    assert finished.keys() < records.keys()


def test_several_processes(tiny_job: Job, tmp_path: Path) -> None:
    arguments = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "seed=0,1", "stages=[space]")
    ended = subprocess.run(command(*tiny_job, *arguments), cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert [job.state for job in read_jobs(only_sweep(tmp_path))] == [DONE, DONE]


def test_submitit_on_this_machine(tiny_job: Job, tmp_path: Path) -> None:
    check(tmp_path, command(*tiny_job, "hydra/launcher=submitit_local", "seed=0,1"), 2, environment())


@pytest.fixture
def ray_starts() -> None:
    """Ray needs shared memory and free ports, which not every machine gives."""
    program = "import ray; ray.init(include_dashboard=False, num_cpus=1); ray.get(ray.remote(lambda: 1).remote())"
    try:
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=120)
    except subprocess.SubprocessError as error:
        pytest.skip(f"Ray does not start here: {error}")


@pytest.mark.usefixtures("ray_starts")
def test_ray(tiny_job: Job, tmp_path: Path) -> None:
    check(tmp_path, command(*tiny_job, "hydra/launcher=ray", "seed=0,1"), 2, environment())


def test_nobody_at_the_address_of_ray(tiny_job: Job, tmp_path: Path) -> None:
    arguments = ("hydra/launcher=ray", "hydra.launcher.address=127.0.0.1:9", "seed=0,1")
    ended = subprocess.run(command(*tiny_job, *arguments), cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert ended.returncode == 2
    assert "error: hydra.launcher.address: no Ray answers at 127.0.0.1:9" in ended.stderr


@pytest.fixture(scope="module")
def cluster() -> Iterator[slurm.Cluster]:
    if slurm.missing():
        pytest.skip(slurm.missing())
    with slurm.Cluster() as cluster:
        yield cluster


def test_slurm(cluster: slurm.Cluster, tiny_job: Job, tmp_path: Path) -> None:
    launcher = ("hydra/launcher=submitit_slurm", "hydra.launcher.partition=debug", "hydra.launcher.timeout_min=10")
    sweep = ("seed=0,1", 'constraints=[],["latency@x86<=1ms"]')
    check(tmp_path, command(*tiny_job, *launcher, *sweep), 4, {**cluster.environment, **environment()})


JOBQUEUE = """
import sys
from dask_jobqueue import SLURMCluster
with SLURMCluster(
    queue="debug", cores=1, processes=1, memory="1GB", walltime="00:10:00", interface="lo", log_directory="logs"
) as cluster:
    cluster.scale(jobs=2)
    print(cluster.scheduler_address, flush=True)
    sys.stdin.read()
"""


class Square:
    """Takes a moment."""

    def __call__(self, number: int) -> int:
        time.sleep(0.05)
        return number * number


def test_dask_workers_of_slurm(cluster: slurm.Cluster, tmp_path: Path) -> None:
    """Workers that dask-jobqueue starts as jobs; one job is cancelled in the middle."""
    pytest.importorskip("dask_jobqueue", reason="dask-jobqueue is not installed (extra `cluster`)")
    script = [sys.executable, "-c", JOBQUEUE]
    own = {**cluster.environment, **environment()}
    head = subprocess.Popen(
        script, cwd=tmp_path, env=own, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert head.stdout is not None
        address = head.stdout.readline().strip()
        end = time.monotonic() + PATIENCE_S
        jobs: list[str] = []
        while len(jobs) < 2:
            assert time.monotonic() < end
            time.sleep(0.5)
            jobs = cluster.run("squeue", "--noheader", "--states=RUNNING", "--format=%i").split()
        with closing(DaskPool(address=address)) as pool:
            results = {}
            for index, value in pool.each(Square(), range(100)):
                results[index] = value
                if len(results) == 20:
                    cluster.run("scancel", jobs[0])
        assert results == {number: number * number for number in range(100)}
    finally:
        head.communicate()  # its input ends, and with it the jobs


def searched_with_srun(
    cluster: slurm.Cluster, folder: Path, *options: str, settings: Sequence[str]
) -> subprocess.CompletedProcess[str]:
    job = [sys.executable, "-m", "search", *settings, "run=run", "trainer.devices=2"]
    arguments = ["srun", "--overcommit", "--nodes=1", *options, "--partition=debug", *job]
    own = {**cluster.environment, **environment()}
    return subprocess.run(arguments, cwd=folder, env=own, capture_output=True, text=True, timeout=PATIENCE_S)


def test_srun_ends_the_processes_that_wait_for_one_that_failed(cluster: slurm.Cluster, tiny_job: Job, tmp_path: Path) -> None:
    options = ("--ntasks-per-node=2", "--kill-on-bad-exit")
    ended = searched_with_srun(cluster, tmp_path, *options, settings=(*tiny_job, "profile.tables=nowhere"))
    assert ended.returncode != 0
    assert "nowhere" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_srun_trains_and_focuses_one_supernet_with_two_processes(cluster: slurm.Cluster, tiny_job: Job, tmp_path: Path) -> None:
    focused = ("stages=[space,tables,supernet,predictors,focus,study]", "focus.share=1", "focus.candidates=40")
    srun = partial(searched_with_srun, cluster, tmp_path, settings=(*tiny_job, *focused))
    refused = srun("--ntasks=2")
    assert "allowed is --nodes=1 --ntasks-per-node=2" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "run").exists()
    ended = srun("--ntasks-per-node=2", "--kill-on-bad-exit")
    assert ended.returncode == 0, ended.stderr
    records = json.loads((tmp_path / "run" / "stages.json").read_text())
    assert records["study"]["done"]
    assert [records[stage]["facts"]["processes"] for stage in ("supernet", "focus")] == [2, 2]
