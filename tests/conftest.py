"""Parts that several tests share: a small space with a trained supernet, and the command line on a tiny job."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from latency_lut.device import Device
from latency_lut.measuring import MeasuringSettings
from latency_lut.profile import profile
from latency_lut.table import LatencyTable
from search.data import Digits
from search.evaluation import Evaluator, calibration_batches, collect
from search.training import SupernetTraining, train
from search.training.sandwich import Sandwich
from spaces.mobile import MobileSpace
from spaces.supernet import Supernet
from tests.latency_lut import loopback_sshd

ROOT = Path(__file__).resolve().parents[1]
TINY_SPACE = (
    "space.stem=[8]",
    "space.stages=[{widths:[8],depths:[1],stride:2}]",
    "space.expansions=[2]",
    "space.kernels=[3]",
    "space.head=[16]",
    "space.precisions=[w8a8,fp32]",
    "data.resolutions=[8]",
)
TINY_JOB = (
    *TINY_SPACE,
    "threads=1",
    "profile.max_pairs=60",
    "profile.networks=10",
    "profile.rounds=3",
    "profile.visit_s=0.00005",
    "data.module.batch_size=256",
    "supernet.epochs=3",
    "supernet.curve_points=2",
    "evaluation.initial=12",
    "evaluation.held_out=4",
    "evaluation.calibration_images=64",
    "study.candidates=80",
    "study.rounds=2",
    "study.evaluations=3",
    "export.winners=2",
    "export.random_winners=1",
    "focus.share=0",
)

# The same machine with two samples per run.
TWO = "+devices.two={_target_: latency_lut.device.Device, name: two, batch: 2}"

# Whole networks are visited for a fraction of the usual time: latencies are noisier, and a job takes seconds.
QUICK_TIMING = {"latency_lut.session.NETWORK_VISIT_S": 0.0002}


@pytest.fixture(scope="session")
def x86() -> Device:
    return Device("x86")


@pytest.fixture(scope="session")
def small_space() -> MobileSpace:
    """Everything that a space can have, in its smallest form."""
    return MobileSpace(
        channels=1,
        classes=10,
        resolutions=[8, 12],
        stem=[8, 16],
        stages=[{"widths": [8, 16], "depths": [1, 2], "stride": 2}],
        expansions=[1, 2],
        kernels=[3, 5],
        head=[16, 24],
        precisions=["w8a8", "fp32"],
        sparsities=["dense", "group@1/2", "group@1/4"],
    )


@pytest.fixture(scope="session")
def digits() -> Digits:
    data = Digits(batch_size=64, seed=0)
    data.setup()
    return data


@pytest.fixture(scope="session")
def evaluator(digits: Digits) -> Evaluator:
    return Evaluator(calibration_batches(digits, 128, 0), collect(digits, "validation"))


@pytest.fixture(scope="session")
def trained(
    small_space: MobileSpace, digits: Digits, evaluator: Evaluator, tmp_path_factory: pytest.TempPathFactory
) -> Supernet:
    """A supernet of the small space after two epochs; do not change its weights."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    supernet = Supernet(small_space)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        training = SupernetTraining(supernet, Sandwich(1), 2, 0.02, 0.0, 0, evaluator, curve_points=1)
        train(training, digits, tmp_path_factory.mktemp("supernet"))
    torch.set_num_threads(threads)
    return supernet


# -- the command line ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How a call of the command line ended; a negative status is a signal."""

    status: int
    out: str
    err: str


Call = Callable[..., Ended]


@pytest.fixture(scope="session")
def fork_server() -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "fork_server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    yield server
    assert server.stdin is not None
    server.stdin.close()
    server.wait(60)
    assert server.stdout is not None
    server.stdout.close()


@pytest.fixture(scope="session")
def call(fork_server: subprocess.Popen[str], tmp_path_factory: pytest.TempPathFactory) -> Call:
    """`python -m search` as a process of its own; see `fork_server.py` for what can be done to it."""
    streams = tmp_path_factory.mktemp("streams")

    def call_in(folder: Path, *arguments: str, **how: Any) -> Ended:
        how["constants"] = QUICK_TIMING | how.get("constants", {})
        job = {"arguments": arguments, "folder": str(folder), "out": f"{streams}/out", "err": f"{streams}/err", **how}
        assert fork_server.stdin is not None
        assert fork_server.stdout is not None
        fork_server.stdin.write(json.dumps(job) + "\n")
        fork_server.stdin.flush()
        status = int(fork_server.stdout.readline())
        return Ended(status, (streams / "out").read_text(), (streams / "err").read_text())

    return call_in


@pytest.fixture(scope="session")
def tiny_space() -> MobileSpace:
    """The space of `TINY_SPACE`."""
    return MobileSpace(
        channels=1,
        classes=10,
        resolutions=[8],
        stem=[8],
        stages=[{"widths": [8], "depths": [1], "stride": 2}],
        expansions=[2],
        kernels=[3],
        head=[16],
        precisions=["w8a8", "fp32"],
        sparsities=["dense", "group@1/2", "group@1/4"],
    )


@pytest.fixture(scope="session")
def tiny_tables(tiny_space: MobileSpace, x86: Device, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished table of the tiny space, measured once for all tests."""
    folder = tmp_path_factory.mktemp("tables")
    quickly_profiled(tiny_space, x86, folder)
    return folder


def quickly_profiled(space: MobileSpace, device: Device, folder: Path) -> None:
    """Measure a small table of a device into a folder."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUICK_TIMING.items():
            patch.setattr(name, value)
        profile(space, device, folder / f"{device.name}.parquet", MeasuringSettings(0, 60, 10, 3, 0.00005))


@pytest.fixture(scope="session")
def tiny_table(tiny_tables: Path) -> LatencyTable:
    return LatencyTable.load(tiny_tables / "x86.parquet")


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[loopback_sshd.Sshd]:
    """A real sshd on loopback, for every module that reaches a device over it."""
    server = loopback_sshd.Sshd(tmp_path_factory.mktemp("sshd"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def tiny_arguments() -> tuple[str, ...]:
    """Arguments of the tiny job that measures its own table."""
    return TINY_JOB


@pytest.fixture(scope="session")
def tiny_job(tiny_tables: Path) -> tuple[str, ...]:
    """Arguments of the tiny job that starts from the finished table; a few seconds without the imports."""
    return (*TINY_JOB, f"profile.tables={tiny_tables}")


@pytest.fixture(scope="session")
def finished(call: Call, tiny_job: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a tiny job that was never disturbed; copy it before you change it."""
    folder = tmp_path_factory.mktemp("finished")
    ended = call(folder, *tiny_job, "run=run")
    assert ended.status == 0, ended.err
    return folder / "run"


@pytest.fixture(scope="session")
def both_tables(tiny_space: MobileSpace, tiny_tables: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the finished tables of x86 and of the second device."""
    folder = tmp_path_factory.mktemp("both")
    shutil.copyfile(tiny_tables / "x86.parquet", folder / "x86.parquet")
    quickly_profiled(tiny_space, Device("two", batch=2), folder)
    return folder


@pytest.fixture(scope="session")
def second_device() -> str:
    """The argument that adds the second device."""
    return TWO


@pytest.fixture(scope="session")
def both_job(both_tables: Path) -> tuple[str, ...]:
    """Arguments of the tiny job on two devices."""
    return (*TINY_JOB, TWO, f"profile.tables={both_tables}")


@pytest.fixture(scope="session")
def both_finished(call: Call, both_job: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a tiny job on two devices; copy it before you change it. What it said is in `run.out` beside it."""
    folder = tmp_path_factory.mktemp("both_finished")
    ended = call(folder, *both_job, "run=run")
    assert (ended.status, ended.err) == (0, "")
    (folder / "run.out").write_text(ended.out)
    return folder / "run"


@pytest.fixture(scope="session")
def stages_of() -> Callable[[Path], Mapping[str, Any]]:
    """The record of a run."""
    return lambda run: dict(json.loads((run / "stages.json").read_text()))
