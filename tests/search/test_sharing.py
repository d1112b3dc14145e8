"""Sweeps: stages that jobs have in common are done once, dead jobs are followed by others, nothing is done twice."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., Any]
Job = tuple[str, ...]
WEIGHTS = "supernet/supernet.safetensors"
STAGES = "stages=[tables,supernet,predictors]"


def facts(run: Path, stage: str) -> dict[str, Any]:
    return dict(json.loads((run / "stages.json").read_text())[stage]["facts"])


def runs_of(folder: Path) -> list[Path]:
    (sweep,) = (folder / "runs").glob("sweep-*")
    return sorted(path.parent for path in sweep.glob("*/config.yaml"))


@pytest.fixture(scope="module")
def sweep(call: Call, tiny_job: Job, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Two jobs that differ in what they search for."""
    folder = tmp_path_factory.mktemp("sweep")
    ended = call(folder, "-m", *tiny_job, "stages=[tables,supernet,predictors,study]", "study.candidates=60,70")
    assert ended.status == 0, ended.err
    return folder, ended


def test_a_sweep_trains_one_supernet(sweep: tuple[Path, Any]) -> None:
    folder, ended = sweep
    runs = runs_of(folder)
    assert len(runs) == 2
    assert ended.out.count("taken from") == 3
    taken = [[facts(run, stage).get("taken_from") for run in runs] for stage in ("tables", "supernet", "predictors")]
    for one, other in taken:
        assert {one, other} == {None, runs[0].name} or {one, other} == {None, runs[1].name}
    assert len({(run / WEIGHTS).read_bytes() for run in runs}) == 1
    assert all((run / "front.csv").exists() for run in runs)


def test_a_run_is_whole_without_the_others(call: Call, sweep: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = sweep
    taker = next(path for path in runs_of(folder) if "taken_from" in facts(path, "supernet"))
    shutil.copytree(taker, tmp_path / "moved")
    ended = call(tmp_path, "run=moved", "stages=[tables,supernet,predictors,study,export,report]")
    assert ended.status == 0, ended.err
    assert ended.out.count("done before") == 4


def test_a_dead_run_is_followed_from_where_it_was(call: Call, tiny_job: Job, tmp_path: Path) -> None:
    common = (*tiny_job, "share=shared", STAGES)
    killed = call(tmp_path, *common, "run=dead", kill_before=["supernet/last.ckpt", 3])
    assert killed.status == -signal.SIGKILL
    ended = call(tmp_path, *common, "run=next", "study.candidates=70")
    assert ended.status == 0, ended.err
    assert "going on from supernet/last.ckpt of dead" in ended.out
    assert "taken from dead" in ended.out  # the table
    alone = call(tmp_path, *tiny_job, STAGES, "run=alone")
    assert alone.status == 0, alone.err
    assert (tmp_path / "next" / WEIGHTS).read_bytes() == (tmp_path / "alone" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("damage", ["checksum", "record", "escape"])
def test_a_damaged_entry_is_one_line(call: Call, tiny_job: Job, sweep: tuple[Path, Any], tmp_path: Path, damage: str) -> None:
    shutil.copytree(sweep[0] / "runs" / "shared", tmp_path / "shared")
    entry = next((tmp_path / "shared").glob("supernet-*"))
    record = entry / "record.json"
    if damage == "checksum":
        (entry / WEIGHTS).write_bytes(b"x" + (entry / WEIGHTS).read_bytes()[1:])
    elif damage == "record":
        record.write_text(record.read_text()[:50])
    else:
        values = json.loads(record.read_text())
        values["sha256"] = {"../../outside": "0"}
        record.write_text(json.dumps(values))
        (entry.parent.parent / "outside").write_text("secret")
    ended = call(tmp_path, *tiny_job, STAGES, "run=run", "share=shared")
    assert ended.status == 2
    assert len(ended.err.splitlines()) == 1
    assert "is damaged" in ended.err


def test_a_sweep_again_runs_only_what_is_missing(call: Call, tiny_job: Job, sweep: tuple[Path, Any], tmp_path: Path) -> None:
    shutil.copytree(sweep[0] / "runs", tmp_path / "runs")
    removed = runs_of(tmp_path)[0]
    shutil.rmtree(removed)
    ended = call(tmp_path, "-m", *tiny_job, "stages=[tables,supernet,predictors,study]", "study.candidates=60,70")
    assert ended.status == 0, ended.err
    assert ended.out.count("done before") == 4
    assert ended.out.count("taken from") == 3
