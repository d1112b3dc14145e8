"""A job that is killed at any point, started again with the same command, ends as if nothing had happened.

The kills are real (SIGKILL); they hit just before a file is brought to its
place, which is where a stage has done its work and nothing tells so yet.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from latency_lut.table import LatencyTable

Call = Callable[..., Any]
Job = tuple[str, ...]

ORDER = ["space", "tables", "supernet", "predictors", "study", "export", "report"]
WEIGHTS = "supernet/supernet.safetensors"


def record(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "stages.json").read_text()))


def same_result(run: Path, finished: Path, stages: Sequence[str] = ORDER) -> None:
    """What must not depend on whether a run was killed."""
    weights, trained = load_file(run / WEIGHTS), load_file(finished / WEIGHTS)
    assert weights.keys() == trained.keys()
    assert all(torch.equal(weights[name], trained[name]) for name in weights)
    assert (run / "front.csv").read_text() == (finished / "front.csv").read_text()
    ended, wanted = record(run), record(finished)
    for stage in stages:
        assert ended[stage]["done"]
        assert ended[stage]["output"] == wanted[stage]["output"], stage
    for fact in ("curve", "steps"):
        assert ended["supernet"]["facts"][fact] == wanted["supernet"]["facts"][fact]
    found, expected = ended["study"]["facts"], wanted["study"]["facts"]
    assert found["evaluations"] == expected["evaluations"]
    assert found["studies"].keys() == expected["studies"].keys()
    for name, study in found["studies"].items():
        assert study["hypervolume_by_round"] == expected["studies"][name]["hypervolume_by_round"]
    if "export" in stages:
        made = [p.relative_to(run) for p in sorted((run / "winners").rglob("model.onnx"))]
        assert made == [p.relative_to(finished) for p in sorted((finished / "winners").rglob("model.onnx"))]
        assert {path.parent.name for path in made} == {"1", "2"}
        for path in made:
            assert (run / path).read_bytes() == (finished / path).read_bytes()
    if "report" in stages:
        assert (run / "report.html").exists()
        assert (run / "summary.json").exists()


@pytest.mark.parametrize(
    ("killed_in", "before", "number"),
    [
        ("tables", "stages.json", 4),
        ("supernet", "supernet/last.ckpt", 3),
        ("supernet", WEIGHTS, 1),
        ("predictors", "evaluations.parquet", 2),
        ("study", "evaluations.parquet", 2),
        ("study", "study.log", 1),
        ("export", "winners/x86/2/card.json", 1),
        ("export", "tables/x86.parquet", 1),
        ("report", "summary.json", 1),
    ],
)
def test_killed_and_started_again(
    call: Call,
    tiny_job: Job,
    finished: Path,
    tiny_tables: Path,
    tmp_path: Path,
    killed_in: str,
    before: str,
    number: int,
) -> None:
    # What earlier stages leave is as good when it is copied; so each kill costs its own stage and those after it.
    run = tmp_path / "run"
    if killed_in != "tables":
        begun_before(killed_in, finished, tiny_tables, run)
    stages = ORDER if killed_in in ORDER[5:] else ORDER[:5]
    job = (*tiny_job, "run=run", f"stages=[{','.join(stages)}]")
    killed = call(tmp_path, *job, kill_before=[before, number])
    assert killed.status == -signal.SIGKILL, killed.err
    after = record(run)
    assert after[killed_in]["done"] is False
    again = call(tmp_path, *job)
    assert again.status == 0, again.err
    for stage in ORDER[1 : ORDER.index(killed_in)]:
        assert f"{stage}: done before" in again.out
        assert record(run)[stage] == after[stage]
    same_result(run, finished, stages)


@pytest.mark.parametrize(
    ("killed_in", "before", "number"),
    [("study", "evaluations.parquet", 4), ("export", "winners/two/1/card.json", 1)],
)
def test_killed_at_the_second_device_and_started_again(
    call: Call,
    both_job: Job,
    both_finished: Path,
    both_tables: Path,
    tmp_path: Path,
    killed_in: str,
    before: str,
    number: int,
) -> None:
    run = tmp_path / "run"
    begun_before(killed_in, both_finished, both_tables, run)
    stages = ORDER[:-1] if killed_in == "export" else ORDER[:5]
    job = (*both_job, "run=run", f"stages=[{','.join(stages)}]")
    killed = call(tmp_path, *job, kill_before=[before, number])
    assert killed.status == -signal.SIGKILL, killed.err
    if killed_in == "study":
        sources = pq.read_table(run / "evaluations.parquet")["source"].to_pylist()
        assert (sources.count("x86 round 2"), sources.count("two round 1"), sources.count("two round 2")) == (3, 3, 0)
    again = call(tmp_path, *job)
    assert (again.status, again.err) == (0, "")
    same_result(run, both_finished, stages)
    expected = pq.read_table(both_finished / "evaluations.parquet").to_pylist()
    assert pq.read_table(run / "evaluations.parquet").to_pylist() == expected


def test_killed_in_a_gradient_search_and_started_again(
    call: Call, tiny_job: Job, finished: Path, tiny_tables: Path, tmp_path: Path
) -> None:
    """Killed in the first search, in the second, and while what they found is evaluated."""
    relax = ("relaxation.cost_weights=[0.05,1.0]", "relaxation.cost_samples=64", "stages=[relax,study]")
    for name in ("run", "whole"):
        begun_before("study", finished, tiny_tables, tmp_path / name)
    whole = call(tmp_path, *tiny_job, "run=whole", *relax)
    assert (whole.status, whole.err) == (0, "")
    for before, number in (("relaxed/", 2), ("relaxed/", 2), ("evaluations.parquet", 1)):
        killed = call(tmp_path, *tiny_job, "run=run", *relax, kill_before=[before, number])
        assert killed.status == -signal.SIGKILL, killed.err
        assert record(tmp_path / "run")["relax"]["done"] is False
    again = call(tmp_path, *tiny_job, "run=run", *relax)
    assert (again.status, again.err) == (0, "")
    run, undisturbed = record(tmp_path / "run"), record(tmp_path / "whole")
    assert run["relax"]["output"] == undisturbed["relax"]["output"]
    found, expected = run["relax"]["facts"], undisturbed["relax"]["facts"]
    timeless = [{k: v for k, v in member.items() if k != "seconds"} for member in found["members"]]
    assert timeless == [{k: v for k, v in member.items() if k != "seconds"} for member in expected["members"]]
    assert (tmp_path / "run" / "front.csv").read_text() == (tmp_path / "whole" / "front.csv").read_text()
    study = run["study"]["facts"]["studies"]["x86"]
    assert study["hypervolume_after"][:2] == ["initial", "proxyless"]
    assert study == {**undisturbed["study"]["facts"]["studies"]["x86"], "candidates_per_s": study["candidates_per_s"]}
    assert 0.0 <= study["hypervolume_relaxed"][0] <= study["hypervolume"]


@pytest.mark.parametrize(
    "strategy",
    [
        (
            "study=training_free",
            "study.candidates=24",
            "study.strategy.proxies=[synflow,snip]",
            "study.strategy.networks=2",
            "proxies.images=8",
        ),
        ("study.strategy.choose=hypervolume",),
        ("study=reinforce", "study.strategy.batch=8", "study.candidates=160"),
    ],
    ids=["training_free", "guided", "reinforce"],
)
def test_killed_in_a_search_strategy_and_started_again(
    call: Call, tiny_job: Job, finished: Path, tiny_tables: Path, tmp_path: Path, strategy: Job
) -> None:
    for name in ("run", "whole"):
        begun_before("study", finished, tiny_tables, tmp_path / name)
    job = (*tiny_job, *strategy, "stages=[predictors,study]")
    whole = call(tmp_path, *job, "run=whole")
    assert (whole.status, whole.err) == (0, "")
    for before, number in (("evaluations.parquet", 1), ("evaluations.parquet", 2), ("study.log", 1)):
        killed = call(tmp_path, *job, "run=run", kill_before=[before, number])
        assert killed.status == -signal.SIGKILL, killed.err
        assert record(tmp_path / "run")["study"]["done"] is False
    again = call(tmp_path, *job, "run=run")
    assert (again.status, again.err) == (0, "")
    assert (tmp_path / "run" / "front.csv").read_text() == (tmp_path / "whole" / "front.csv").read_text()
    run, undisturbed = (record(tmp_path / name)["study"]["facts"] for name in ("run", "whole"))
    study = run["studies"]["x86"]
    assert study == {**undisturbed["studies"]["x86"], "candidates_per_s": study["candidates_per_s"]}
    name = run["strategy"]
    assert name == (strategy[0].partition("study=")[2] or "guided")
    beaten = study["hypervolume"] > study["hypervolume_random"]
    assert (f"{name} does not beat random search" in again.out) is not beaten
    left = [(tmp_path / run / "strategy/x86/policy.safetensors") for run in ("run", "whole")]
    assert [path.exists() for path in left] == 2 * [name == "reinforce"]
    if name == "reinforce":  # and what is left begins another run
        assert left[0].read_bytes() == left[1].read_bytes()
        ended = call(tmp_path, *job, f"study.strategy.policy={left[1]}", "run=run")
        assert (ended.status, ended.err) == (0, "")
        assert left[0].read_bytes() != left[1].read_bytes()


def begun_before(stage: str, finished: Path, tables: Path, run: Path) -> None:
    """A run that was stopped when `stage` was about to begin."""
    run.mkdir()
    kept = record(finished)
    for later in ORDER[ORDER.index(stage) :]:
        del kept[later]
    (run / "stages.json").write_text(json.dumps(kept))
    shutil.copyfile(finished / "overrides.json", run / "overrides.json")
    # An export gives its winners back to the table.
    shutil.copytree(finished / "tables" if stage == "report" else tables, run / "tables")
    leaves = {
        "export": ["winners", "baselines"],
        "supernet": ["supernet"],
        "predictors": ["predictors"],
        "study": ["study.log", "front.csv", "points.json"],
    }
    for name in [leaf for earlier in kept for leaf in leaves.get(earlier, [])]:
        (shutil.copytree if (finished / name).is_dir() else shutil.copyfile)(finished / name, run / name)
    if "predictors" in kept:
        shutil.copyfile(finished / "evaluations.parquet", run / "evaluations.parquet")
        if "study" not in kept:
            keep_initial(run / "evaluations.parquet")


def keep_initial(path: Path) -> None:
    table = pq.read_table(path)
    pq.write_table(table.filter(pc.equal(table["source"], "initial")), path)


def test_killed_again_and_again_it_ends_all_the_same(call: Call, tiny_job: Job, finished: Path, tmp_path: Path) -> None:
    """Every attempt is killed after a few more files; none repeats a stage that is done."""
    done: set[str] = set()
    kills = 0
    while (ended := call(tmp_path, *tiny_job, "run=run", kill_before=["run/", 18])).status:
        kills += 1
        assert kills < 8, "it never ends"
        assert ended.status == -signal.SIGKILL, ended.err
        now = {stage for stage, value in record(tmp_path / "run").items() if value["done"]} - {"space"}
        assert done <= now
        done = now
    assert kills >= 2
    same_result(tmp_path / "run", finished)


def test_stopped_while_a_finished_table_is_taken_over(call: Call, tiny_job: Job, tiny_tables: Path, tmp_path: Path) -> None:
    """Half a table must not stand where a whole one is expected, whatever stopped the copy; here it is a full disk."""
    whole = (tiny_tables / "x86.parquet").stat().st_size
    call(tmp_path, *tiny_job, "run=run", "stages=[tables]", file_bytes=whole - 100)
    assert record(tmp_path / "run")["tables"]["done"] is False
    again = call(tmp_path, *tiny_job, "run=run", "stages=[tables]")
    assert (again.status, again.err) == (0, "")


def test_killed_while_measuring_what_was_measured_is_kept(
    call: Call, tiny_job: Job, tiny_table: LatencyTable, tmp_path: Path
) -> None:
    job = [a for a in tiny_job if not a.startswith("profile.tables")]
    batches = {"latency_lut.profile.BATCH_PAIRS": 12}
    killed = call(tmp_path, *job, "run=run", "stages=[tables]", kill_before=["x86.parquet", 4], constants=batches)
    assert killed.status == -signal.SIGKILL, killed.err
    path = tmp_path / "run" / "tables" / "x86.parquet"
    before = LatencyTable.load(path).entries
    assert 24 <= len(before) < 45
    again = call(tmp_path, *job, "run=run", "stages=[tables]", constants=batches)
    assert (again.status, again.err) == (0, "")
    table = LatencyTable.load(path)
    assert {pair: table.entries[pair] for pair in before} == before
    assert len(table.entries) > len(before)
    assert len(table.networks) == len(tiny_table.networks)
    facts = record(tmp_path / "run")["tables"]["facts"]["devices"]["x86"]
    assert facts["measured"] == len(table.entries) - len(before)


def test_what_a_killed_study_evaluated_is_not_evaluated_again(
    call: Call, tiny_job: Job, finished: Path, tiny_tables: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    begun_before("study", finished, tiny_tables, run)
    killed = call(tmp_path, *tiny_job, "run=run", kill_before=["study.log", 1])
    assert killed.status == -signal.SIGKILL
    content = (run / "evaluations.parquet").read_bytes()
    again = call(tmp_path, *tiny_job, "run=run", "stages=[study]", kill_before=["evaluations.parquet", 1])
    assert again.status == 0, "the evaluations were written again"
    assert (run / "evaluations.parquet").read_bytes() == content
    assert (run / "front.csv").read_text() == (finished / "front.csv").read_text()
