"""Training on two processes: equal weights on both, the curve of one process with twice the batch, resumed on one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from search.training.parallel import Processes
from spaces.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = Path(__file__).with_name("one_of_several.py")
# Normalised by the statistics of half a batch each, which differ from those of the whole.
LOSS_TOLERANCE = 0.05


def together(folder: Path, count: int, *arguments: object) -> list[int]:
    """Run `count` processes of one training to their end; returns their statuses."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    group |= {"PYTHONPATH": str(ROOT), "GROUP_RANK": "0", "OMP_NUM_THREADS": "1"} | (
        {"TORCHELASTIC_RUN_ID": "t"} if count > 1 else {}
    )
    command = [sys.executable, str(SCRIPT), str(folder), *map(str, arguments)]
    started = [
        subprocess.Popen(
            command, env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.DEVNULL
        )
        for rank in range(count)
    ]
    return [process.wait(240) for process in started]


def result(folder: Path, rank: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return load_file(folder / f"{rank}.safetensors"), json.loads((folder / f"{rank}.json").read_text())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    two, one = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    assert together(two, 2, 128, 3) == [0, 0]
    assert together(one, 1, 256, 3) == [0]
    return two, one


def test_weights_are_identical_on_both(folders: tuple[Path, Path]) -> None:
    first, second = (result(folders[0], rank)[0] for rank in (0, 1))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_curve_is_that_of_one_process_with_twice_the_batch(folders: tuple[Path, Path]) -> None:
    two, one = (result(folder, 0)[1] for folder in folders)
    for kind in ("largest_loss", "smallest_loss"):
        ours, theirs = ([point[kind] for point in facts["curve"]] for facts in (two, one))
        np.testing.assert_allclose(ours, theirs, atol=LOSS_TOLERANCE)
    curve = two["curve"]
    assert curve[-1]["largest_loss"] < curve[0]["largest_loss"] - LOSS_TOLERANCE
    assert two["macs"] == pytest.approx(one["macs"], rel=0.01)


def test_it_resumes_on_another_number_of_processes(folders: tuple[Path, Path], tmp_path: Path) -> None:
    statuses = together(tmp_path / "run", 2, 128, 3, 1)
    assert statuses[0] == 9
    assert 0 not in statuses  # nobody waits for ever for one that is gone
    assert together(tmp_path / "run", 1, 256, 3) == [0]
    resumed, whole = result(tmp_path / "run", 0)[1], result(folders[1], 0)[1]
    assert len(resumed["curve"]) == 3
    for ours, theirs in zip(resumed["curve"], whole["curve"], strict=True):
        assert ours["largest_loss"] == pytest.approx(theirs["largest_loss"], abs=LOSS_TOLERANCE)


def test_the_command_line_starts_the_others(tmp_path: Path, tiny_job: tuple[str, ...]) -> None:
    stages = ("stages=[space,tables,supernet,predictors,focus]", "focus.share=3", "focus.candidates=40")
    command = [sys.executable, "-m", "search", *tiny_job, f"run={tmp_path / 'run'}", *stages]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*command, "trainer.devices=2"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    records = json.loads((tmp_path / "run" / "stages.json").read_text())
    assert [records[stage]["facts"]["processes"] for stage in ("supernet", "focus")] == [2, 2]
    assert len(records["focus"]["facts"]["fronts"]) == 6  # predicted by the first process, between epochs too
    assert (tmp_path / "run" / "focus" / "supernet.safetensors").exists()
    assert "trainer" not in (tmp_path / "run" / "overrides.json").read_text()


@pytest.mark.parametrize(
    ("values", "word"),
    [({"devices": 0}, "devices is 0"), ({"num_nodes": -1}, "num_nodes"), ({"accelerator": "tpu"}, "'tpu'")],
)
def test_values_that_are_not_allowed(values: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        Processes(**values)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(UserError, match="torch sees 0 GPUs"):
        Processes(accelerator="gpu")


def test_several_nodes_have_to_be_started_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="srun --nodes=2"), Processes(num_nodes=2).started([]):
        pass
