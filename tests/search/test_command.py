"""`python -m search`: one line and status 2 for what a user can mend, nothing lost, nothing said on stderr otherwise.

Most calls run in forks of a process that has imported everything (see `fork_server.py`); they are processes of their own.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from PIL import Image

from latency_lut.table import LatencyTable

ROOT = Path(__file__).resolve().parents[2]
Call = Callable[..., Any]
Job = tuple[str, ...]
Damage = Callable[[Path], object]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.parent.name != ".claims"
    }


def one_line(ended: Any, *words: str) -> None:
    assert ended.status == 2, ended.err
    lines = ended.err.splitlines()
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, called `run` in an empty folder."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


# -- mistakes in what is asked for --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("supernet.epoch=3", ["epoch"]),
        ("gadget=x86", ["gadget"]),
        ("study=annealing", ["annealing", "nsga2", "random", "tpe"]),
        ("device=toaster", ["'device'", "x86"]),
        ("device=[]", ["no device"]),
        ("--nonsense", ["--nonsense"]),
        ("stages=[party]", ["'party'", "space, tables, supernet, predictors, focus, relax, study, finish, export, report"]),
        ("stages=[]", ["stages is empty"]),
        ("objectives=[speed]", ["'speed'", "latency@x86"]),
        ("objectives=[accuracy,latency@phone]", ["'phone'", "latency, latency@x86"]),
        ("objectives=[latency,latency@x86]", ["each once"]),
        ("objectives=[5]", ["5"]),
        ('constraints=["latency@x86<=2kg"]', ["'kg'", "us, ms, s"]),
        ("supernet.epochs=0", ["supernet.epochs is 0"]),
        ("supernet=uniform supernet.distillation.labels=0.5", ["distillation.labels is 0.5", "SinglePath", "allowed is 0.0"]),
        ("stages=[supernet,relax]", ["resolution=8 cannot be relaxed", "+relaxation.held.resolution=16"]),
        ("relaxation=annealing", ["annealing", "dass once_for_both proxyless quantnas tangle"]),
        ("relaxation.strategy.gates=open", ["'open'", "between, binary"]),
        ("relaxation.cost_weights=[]", ["relaxation.cost_weights is []", "numbers from 0"]),
        ("+relaxation.held.resolution=9", ["resolution is held at 9", "8"]),
        ("study.candidates=many", ["'many'"]),
        ("study.leave_out_what_does_not_pay=5", ["leave_out_what_does_not_pay is 5", "true and false"]),
        ("data=custom", ["data.module._target_"]),
        ("data=nowhere", ["data/nowhere"]),
        ("space.stem=[0]", ["stem"]),
        ('space.sparsities=["3:7",dense]', ["3:7", "divisible by 7, got 8", "change that width or leave it dense"]),
        ("space.sparsities=[half]", ["'half'", "group@1/2, 2:4"]),
        ("space.precisions=[w5a8]", ["'w5a8'", "w8a8 w7a8 w4a8 w3a8 w2a8"]),
        ("space.ranks=['3/2',full]", ["'3/2'", "shares of the smaller side between 0 and 1"]),
        ("space.activations=[relu,selective] space.sparsities=[dense]", ["selective", "space.sparsities=[dense,group@1/2]"]),
        ("space.hidden=[wide]", ["hidden", "plain, iso_flop"]),
        ("+space.colour=3", ["colour"]),
        ("+profile.colour=3", ["colour"]),
        ("+supernet.colour=3", ["colour"]),
        ("+predictor.colour=3", ["colour"]),
        ("predictor.kind=forest", ["predictor: kind is 'forest'", "gaussian_process"]),
        ("proxies.features=[zero]", ["proxies.features is ['zero']", "naswot", "synflow"]),
        ("proxies.images=1", ["proxies.images is 1", "integers from 2"]),
        ("+proxies.colour=3", ["colour"]),
        ("study.strategy.choose=best", ["study.strategy.choose is 'best'", "front, upper_confidence, hypervolume"]),
        ("study.strategy._target_=optuna.samplers.NSGAIISampler ~study.strategy.choose", ["study.strategy is a NSGAIISampler"]),
        ("study=training_free study.strategy.proxies=[zero]", ["study.strategy.proxies is ['zero']", "naswot"]),
        ("+study.sampler.colour=3", ["colour"]),
        ("study.sampler._target_=optuna.samplers.GridSampler", ["sampler"]),
        ("study.sampler._target_=optuna.samplers.NoSampler", ["NoSampler"]),
        ("threads=-1", ["threads"]),
        ("devices.x86.threads=0", ["threads is 0"]),
        ("devices.x86.name=other", ["other"]),
    ],
)
def test_mistakes_take_one_line_before_anything_is_done(call: Call, tmp_path: Path, argument: str, words: list[str]) -> None:
    one_line(call(tmp_path, *argument.split(), "run=run", *([] if "stages=" in argument else ["stages=[space]"])), *words)


@pytest.mark.parametrize(
    ("argument", "word"), [("supernet.learning_rate=-1", "learning_rate"), ("seed=-1", "seed"), ("seed=one", "seed")]
)
def test_mistakes_that_a_stage_meets_take_one_line(call: Call, tmp_path: Path, tiny_job: Job, argument: str, word: str) -> None:
    one_line(call(tmp_path, *tiny_job, "run=run", argument, "stages=[space,tables,supernet]"), word)


@pytest.mark.parametrize("argument", ["objectives=[speed]", "constraints=[fast]", "space.stem=[0]", "study.rounds=0"])
def test_mistakes_leave_nothing_behind(call: Call, tmp_path: Path, argument: str) -> None:
    assert call(tmp_path, argument, "run=run", "stages=[space]").status == 2
    assert not list(tmp_path.iterdir())


def test_the_documented_way_to_another_sampler_works(call: Call, copy: Path, tmp_path: Path) -> None:
    """`study.sampler._target_=...` is what the comment in conf/study/nsga2.yaml recommends."""
    ended = call(tmp_path, "run=run", "study.sampler._target_=optuna.samplers.TPESampler", "stages=[study]")
    assert ended.status == 0, ended.err
    assert json.loads((copy / "stages.json").read_text())["study"]["facts"]["sampler"] == "TPESampler"


@pytest.mark.parametrize("run", ["file", "file/run", "/proc/nowhere", "file/a/b"])
def test_a_run_folder_that_cannot_be_written(call: Call, tmp_path: Path, run: str) -> None:
    (tmp_path / "file").write_text("in the way")
    one_line(call(tmp_path, f"run={run}", "stages=[space]"), "run folder", "run=FOLDER")
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_run_may_be_called_by_a_number(call: Call, tmp_path: Path) -> None:
    ended = call(tmp_path, "run=7", "stages=[space]")
    assert ended.status == 0, ended.err
    assert (tmp_path / "7" / "space.json").exists()


def test_a_stage_without_the_ones_before_it(call: Call, tmp_path: Path) -> None:
    for stage, before in (("export", "study"), ("study", "predictors"), ("report", "export"), ("predictors", "tables")):
        one_line(
            call(tmp_path, "run=run", f"stages=[{stage}]"), f"stage {before} has not finished", "run: python -m search run="
        )


def test_tables_of_another_space_or_device_are_refused_and_stay(
    call: Call, tmp_path: Path, tiny_tables: Path, tiny_job: Job
) -> None:
    before = contents(tiny_tables)
    one_line(call(tmp_path, *tiny_job, "run=a", "stages=[tables]", "space.head=[24]"), "the table is of space")
    one_line(call(tmp_path, *tiny_job, "run=b", "stages=[tables]", "devices.x86.batch=2"), "batch 1 -> 2")
    one_line(call(tmp_path, *tiny_job, "run=c", "stages=[tables]", "profile.tables=nowhere"), "no table nowhere/x86.parquet")
    assert contents(tiny_tables) == before


def test_a_table_that_is_old_is_checked_before_it_is_used(
    call: Call, tmp_path: Path, tiny_table: LatencyTable, tiny_job: Job
) -> None:
    job = [*(a for a in tiny_job if not a.startswith("profile.tables")), "profile.tables=old", "stages=[tables]"]
    entries = {pair: replace(entry, us=entry.us / 5, spread_us=0.0) for pair, entry in tiny_table.entries.items()}
    replace(tiny_table, entries=entries, created="2024-01-01T00:00:00+00:00").save(tmp_path / "old" / "x86.parquet")
    ended = call(tmp_path, *job, "run=a")
    assert (ended.status, ended.err) == (0, "")
    assert "days old and has drifted; delete a/tables/x86.parquet to measure again" in ended.out
    assert "20 of 20 pairs moved" in ended.out
    assert "days old" not in call(tmp_path, *job, "run=b", "profile.recheck_days=null").out
    one_line(call(tmp_path, *job, "run=c", "profile.recheck_days=-1"), "recheck_days is -1", "null for no check")


# -- peak memory --------------------------------------------------------------------------------------------------------------


def test_peak_memory_is_searched_for_and_stands_on_the_cards(call: Call, tmp_path: Path, tiny_job: Job) -> None:
    wanted = ("objectives=[accuracy,peak_memory]", "constraints=['peak_memory@x86<=1MB']", "export.random_winners=0")
    ended = call(tmp_path, *tiny_job, *wanted, "run=run")
    assert ended.status == 0, ended.err
    assert "x86: peak memory on" in ended.out
    rows = list(csv.DictReader(io.StringIO((tmp_path / "run" / "front.csv").read_text())))
    assert all(0 < float(row["peak_memory@x86"]) <= 1e6 for row in rows)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["memory_models"]["x86"]["mape"] < 0.3
    assert [o["unit"] for o in summary["study"]["objectives"]] == ["", "B"]
    cards = [json.loads(path.read_text()) for path in (tmp_path / "run" / "winners").rglob("card.json")]
    assert cards
    for card in cards:
        assert card["peak_bytes"] > 0
        assert card["predicted_peak_bytes"] == pytest.approx(card["peak_bytes"], rel=0.5)
        low, high = card["predicted_peak_bytes_90"]
        assert low <= card["predicted_peak_bytes"] <= high
    assert "peak memory, kB" in (tmp_path / "run" / "report.html").read_text()
    table = tmp_path / "run" / "tables" / "x86.memory.json"
    table.write_text("{")
    one_line(call(tmp_path, *wanted, "run=run", "stages=[export]", "export.winners=1"), "x86.memory.json is damaged")


def test_peak_memory_is_refused_where_nothing_measures_it(call: Call, tmp_path: Path, tiny_job: Job) -> None:
    where = [*tiny_job, "device=torch_cpu", "run=run"]
    one_line(call(tmp_path, *where, "objectives=[accuracy,peak_memory]"), "device torch_cpu", "does not tell how much memory")
    one_line(call(tmp_path, *where, "constraints=['peak_memory<=1MB']"), "does not tell how much memory")
    assert not (tmp_path / "run").exists()


# -- energy -------------------------------------------------------------------------------------------------------------------


def test_energy_is_searched_for_where_there_is_a_meter(call: Call, tmp_path: Path, tiny_job: Job) -> None:
    """With powercap's folder in another place, and a counter that goes up as the clock does: 10 W."""
    package, stop, begin = tmp_path / "powercap" / "intel-rapl:0", threading.Event(), time.perf_counter()
    package.mkdir(parents=True)
    for name, text in (("name", "package-0"), ("max_energy_range_uj", "262143328850"), ("energy_uj", "0")):
        (package / name).write_text(text)

    def count() -> None:
        while not stop.is_set():
            (package / "new").write_text(str(int(10e6 * (time.perf_counter() - begin))))
            (package / "new").replace(package / "energy_uj")
            time.sleep(0.001)

    counter = threading.Thread(target=count)
    counter.start()
    try:
        constants = {"latency_lut.energy.POWERCAP": str(package.parent), "latency_lut.energy.WINDOW_S": 0.08}
        wanted = ("objectives=[accuracy,energy]", "devices.x86.energy_meter=rapl", "export.random_winners=0")
        ended = call(tmp_path, *tiny_job, *wanted, "run=run", constants=constants)
    finally:
        stop.set()
        counter.join()
    assert ended.status == 0, ended.err
    assert "x86: energy on" in ended.out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [o["unit"] for o in summary["study"]["objectives"]] == ["", "uJ"]
    assert summary["energy_models"]["x86"]["n"] >= 10
    assert all(row["predicted_energy_uj"] > 0 for row in summary["front"])
    for card in summary["winners"]:
        assert card["energy_uj"] > 0
        assert card["predicted_energy_uj"] > 0
        assert card["energy_meter"] == "rapl"
    assert "energy, µJ" in (tmp_path / "run" / "report.html").read_text()


def test_energy_is_refused_without_a_meter(call: Call, tmp_path: Path, tiny_job: Job) -> None:
    job = [*tiny_job, "run=run"]
    mend = "devices.x86.energy_meter=rapl|nvml"
    one_line(call(tmp_path, *job, "objectives=[accuracy,energy]"), "device x86 has no energy meter", mend)
    one_line(call(tmp_path, *job, "constraints=['energy@x86<=1mJ']"), "device x86 has no energy meter", mend)
    one_line(call(tmp_path, *job, "devices.x86.energy_meter=wattmeter"), "energy_meter is 'wattmeter'; allowed are rapl, nvml")
    assert not (tmp_path / "run").exists()


# -- data ---------------------------------------------------------------------------------------------------------------------


def test_data_that_is_missing_or_wrong(call: Call, tmp_path: Path, tiny_job: Job) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(buffer, "PNG")
    pq.write_table(pa.table({"image": [buffer.getvalue()] * 40, "label": [i % 4 for i in range(40)]}), tmp_path / "x.parquet")
    job = [a for a in tiny_job if not a.startswith("profile.tables")]
    common = [*job, "run=run", "stages=[supernet]", "data=parquet", "data.size=8"]
    one_line(call(tmp_path, *common, "data.path=nowhere.parquet"), "nowhere.parquet")
    one_line(call(tmp_path, *common, "data.path=x.parquet", "data.classes=3"), "label 3 in row 3", "data.classes")
    wrong = [*common, "data.path=x.parquet", "data.classes=4", "data.channels=1", "data.module.channels=3"]
    one_line(call(tmp_path, *wrong), "channels")


def test_a_loss_that_is_not_finite(call: Call, tmp_path: Path, tiny_job: Job) -> None:
    ended = call(tmp_path, *tiny_job, "run=run", "stages=[supernet]", "supernet.learning_rate=1e18")
    one_line(ended, "lower the learning rate: supernet.learning_rate=")


# -- a run that was damaged ---------------------------------------------------------------------------------------------------


def cut(name: str, keep: int = 200) -> Damage:
    def truncate(run: Path) -> None:
        (run / name).write_bytes((run / name).read_bytes()[:keep])

    return truncate


def text(name: str, content: str) -> Damage:
    return lambda run: (run / name).write_text(content)


def redo(stage: str) -> Damage:
    def forget(run: Path) -> None:
        record = json.loads((run / "stages.json").read_text())
        record[stage]["done"] = False
        (run / "stages.json").write_text(json.dumps(record))

    return forget


@pytest.mark.parametrize(
    ("damage", "arguments", "words"),
    [
        (cut("tables/x86.parquet"), ["study.candidates=60"], ["x86.parquet is damaged"]),
        (cut("evaluations.parquet"), ["study.candidates=60"], ["evaluations.parquet is damaged"]),
        (cut("supernet/supernet.safetensors"), ["study.candidates=60"], ["supernet.safetensors is damaged"]),
        (cut("front.csv"), ["export.winners=1"], ["front.csv is damaged"]),
        (cut("points.json", 20), ["export.winners=1"], ["points.json"]),
        (cut("stages.json"), [], ["stages.json is damaged"]),
        (cut("overrides.json", 20), [], ["overrides.json is damaged"]),
        (text("overrides.json", '{"a": 1}'), [], ["overrides.json is damaged"]),
        (text("overrides.json", '["what=is=this["]'), [], []),
        (cut("summary.json", 50), [], ["summary.json"]),
        (lambda run: (redo("supernet")(run), cut("supernet/last.ckpt")(run)), [], ["last.ckpt"]),
    ],
    ids=[
        *("table", "evaluations", "weights", "front", "points", "record", "overrides", "overrides-kind", "overrides-grammar"),
        *("summary", "checkpoint"),
    ],
)
def test_a_damaged_file_of_a_run(
    call: Call, copy: Path, tmp_path: Path, damage: Damage, arguments: list[str], words: list[str]
) -> None:
    damage(copy)
    evaluations, front = (copy / "evaluations.parquet").read_bytes(), (copy / "front.csv").read_bytes()
    one_line(call(tmp_path, "run=run", *arguments), *words)
    assert (copy / "evaluations.parquet").read_bytes() == evaluations
    if "study" not in " ".join(arguments):
        assert (copy / "front.csv").read_bytes() == front


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("evaluations.parquet", ["study.candidates=60", "stages=[predictors,study]"]),
        ("tables/x86.parquet", ["study.candidates=60", "stages=[tables,predictors,study]"]),
        ("supernet/supernet.safetensors", ["study.candidates=60", "stages=[supernet,predictors,study]"]),
        ("front.csv", ["stages=[study,export]"]),
        ("summary.json", ["stages=[report]"]),
        ("report.html", ["stages=[report]"]),
        ("winners/x86/1/model.onnx", ["stages=[export]"]),
    ],
)
def test_what_is_missing_is_made_again(call: Call, copy: Path, tmp_path: Path, name: str, arguments: list[str]) -> None:
    """Whoever deletes a damaged file, as its message advises, gets a whole one by running again."""
    (copy / name).unlink()
    ended = call(tmp_path, "run=run", *arguments)
    assert ended.status == 0, ended.err
    assert (copy / name).exists()


def test_after_the_record_is_deleted_old_weights_are_not_taken_for_new_settings(
    call: Call, copy: Path, tmp_path: Path, finished: Path
) -> None:
    (copy / "stages.json").unlink()
    ended = call(tmp_path, "run=run", "seed=1", "stages=[supernet]")
    assert ended.status == 0, ended.err
    weights = "supernet/supernet.safetensors"
    assert (copy / weights).read_bytes() != (finished / weights).read_bytes()


def test_a_full_disk_is_one_line(call: Call, copy: Path, tmp_path: Path) -> None:
    redo("report")(copy)
    one_line(call(tmp_path, "run=run", file_bytes=1_000_000), "report.html")


# -- what works ---------------------------------------------------------------------------------------------------------------


def test_a_run_says_nothing_on_stderr(call: Call, tmp_path: Path, tiny_job: Job) -> None:
    ended = call(tmp_path, *tiny_job, "run=run")
    assert (ended.status, ended.err) == (0, "")
    for words in ("Front of run", "winners", "report: run/report.html"):
        assert words in ended.out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
    left = {p.name for p in (tmp_path / "run").iterdir()}
    assert left == {
        *(".claims", "config.yaml", "overrides.json", "stages.json", "space.json", "tables", "supernet", "predictors"),
        *(
            "evaluations.parquet",
            "study.log",
            "front.csv",
            "points.json",
            "winners",
            "baselines",
            "summary.json",
            "report.html",
        ),
    }
    assert not [p for p in (tmp_path / "run").rglob("*") if p.name.endswith((".tmp", ".partial", ".lock"))]


def test_done_again_nothing_is_done_and_its_settings_are_remembered(call: Call, copy: Path, tmp_path: Path) -> None:
    before = contents(copy)
    ended = call(tmp_path, "run=run")
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.count("done before") >= 6
    changed = {name for name, content in contents(copy).items() if before.get(name) != content}
    assert changed <= {"stages.json", "space.json"}
    assert contents(copy).keys() == before.keys()


def test_a_gradient_search_with_nothing_to_decide_is_told(call: Call, copy: Path, tmp_path: Path) -> None:
    held = ("+relaxation.held.precision=fp32", "+relaxation.held.sparsity=dense")
    ended = call(tmp_path, "run=run", "stages=[relax]", *held)
    assert ended.status == 2
    assert "space mobile has no choice left to relax; hold fewer kinds" in ended.err
    assert len(ended.err.splitlines()) == 1


def test_part_of_the_job_on_an_existing_run(call: Call, copy: Path, tmp_path: Path) -> None:
    ended = call(tmp_path, "run=run", "stages=[export]", "export.winners=1")
    assert ended.status == 0, ended.err
    assert [p.name for p in (copy / "winners" / "x86").iterdir()] == ["1"]
    record = json.loads((copy / "stages.json").read_text())
    assert len(record["export"]["facts"]["devices"]["x86"]["winners"]) == 1
    assert not [text for text in json.loads((copy / "overrides.json").read_text()) if text.startswith(("stages", "run"))]


@pytest.mark.parametrize("arguments", [["export.winners=8"], ["export.winners=8", 'constraints=["size<=200kB"]']])
def test_winners_are_each_another_network(call: Call, copy: Path, tmp_path: Path, arguments: list[str]) -> None:
    ended = call(tmp_path, "run=run", "stages=[study,export]", *arguments)
    assert ended.status == 0, ended.err
    cards = [json.loads(path.read_text()) for path in (copy / "winners").rglob("card.json")]
    assert len(cards) == 8
    assert len({json.dumps(card["architecture"], sort_keys=True) for card in cards}) == 8


def test_what_was_left_out_is_told_or_nothing_is_left_out(call: Call, copy: Path, tmp_path: Path) -> None:
    def left_out() -> Any:
        return json.loads((copy / "summary.json").read_text())["study"]["left_out"]

    told = left_out()
    assert told["devices"] == ["x86"]
    assert 0 <= told["options"] < told["of"]
    assert (told["options"] > 0) == (told["what"] != [])
    ended = call(tmp_path, "run=run", "study.leave_out_what_does_not_pay=false")
    assert ended.status == 0, ended.err
    assert left_out()["options"] == 0
    assert "left out" not in ended.out
    ended = call(tmp_path, "run=run", "study.leave_out_what_does_not_pay=true", "stages=[study]")
    assert ended.status == 0, ended.err
    assert (f"{told['options']} of {told['of']} options left out" in ended.out) == (told["options"] > 0)
    for sentence in told["what"]:
        assert sentence in " ".join(ended.out.split())


def test_nothing_feasible_is_told(call: Call, copy: Path, tmp_path: Path) -> None:
    ended = call(tmp_path, "run=run", 'constraints=["latency@x86<=1us"]')
    assert ended.status == 0, ended.err
    assert "nothing is feasible: latency@x86<=1us binds" in ended.out.replace("\n", " ")
    assert not (copy / "winners").exists()
    assert json.loads((copy / "summary.json").read_text())["winners"] == []


@pytest.mark.parametrize("initial", [1, 2, 3])
def test_a_handful_of_evaluations_is_enough_or_one_line(call: Call, copy: Path, tmp_path: Path, initial: int) -> None:
    ended = call(tmp_path, "run=run", f"evaluation.initial={initial}", "export.winners=1")
    if ended.status == 0:
        json.loads((copy / "summary.json").read_text(), parse_constant=lambda text: pytest.fail(f"{text} in summary.json"))
    else:
        one_line(ended, "evaluation.initial")


def test_the_accuracy_predictor_is_chosen_told_and_used_by_the_study(call: Call, copy: Path, tmp_path: Path) -> None:
    ended = call(tmp_path, "run=run", "evaluation.initial=34", "evaluation.held_out=10", "export.winners=1")
    assert ended.status == 0, ended.err
    chosen = json.loads((copy / "summary.json").read_text())["accuracy_predictor"]
    compared = chosen["compared"]
    assert compared[chosen["kind"]] == max(compared.values())
    words = f"{chosen['kind'].replace('_', ' ')} {compared[chosen['kind']]:.2f}"
    assert f"chosen by Kendall tau in cross-validation on the others: {words}, " in ended.out
    assert f"without those held out: {words}, " in (copy / "report.html").read_text()
    record = copy / "stages.json"
    record.write_text(record.read_text().replace(f'"kind": "{chosen["kind"]}"', '"kind": "oracle"'))
    one_line(call(tmp_path, "run=run", "stages=[study]", "study.rounds=1"), str(record.name), "'oracle'", "delete it")


def test_proxies_are_features_and_it_is_told_whether_they_help(call: Call, copy: Path, tmp_path: Path) -> None:
    job = ("run=run", "proxies.features=[synflow,naswot]", "proxies.images=16", "study.candidates=40")
    ended = call(tmp_path, *job)
    assert ended.status == 0, ended.err
    used = json.loads((copy / "summary.json").read_text())["accuracy_predictor"]
    assert used["proxies"]["names"] == ["synflow", "naswot"]
    helps = used["kendall_tau"] > used["proxies"]["kendall_tau_without"]
    assert f"without the proxies synflow, naswot it is {used['proxies']['kendall_tau_without']:.2f}" in ended.out
    assert (": they do not help" in ended.out) is not helps
    assert "It also sees the zero-cost proxies synflow, naswot" in (copy / "report.html").read_text()
    known = pq.read_table(copy / "proxies.parquet").to_pylist()
    assert len(known) > 12
    assert all(row["synflow"] is not None and row["zen"] is None for row in known)
    assert call(tmp_path, *job, "stages=[predictors,study]").out.count("done before") == 2


def test_more_of_the_tables_does_not_cost_the_evaluations(call: Call, copy: Path, tmp_path: Path) -> None:
    """Evaluations depend on supernet and data, not on tables; they are what takes long."""
    before = pq.read_table(copy / "evaluations.parquet").to_pylist()
    ended = call(tmp_path, "run=run", "profile.held_out=3", "stages=[tables,predictors]")
    assert ended.status == 0, ended.err
    assert pq.read_table(copy / "evaluations.parquet").to_pylist()[: len(before)] == before


def test_the_space_is_printed_every_time(call: Call, tmp_path: Path, tiny_job: Job) -> None:
    for _ in range(2):
        ended = call(tmp_path, *tiny_job, "stages=[space]")
        assert (ended.status, ended.err) == (0, "")
        for words in ("stage1.block1.expand.sparsity", "group@1/4, group@1/2, dense", "16 choices, 10^3.2 networks", "MACs"):
            assert words in ended.out
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("mobile-digits-x86-")


# -- several devices ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def both(both_finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run on two devices, called `run` in an empty folder."""
    shutil.copytree(both_finished, tmp_path / "run")
    return tmp_path / "run"


def front_of(run: Path) -> list[dict[str, str]]:
    with (run / "front.csv").open() as file:
        return list(csv.DictReader(file))


def test_one_supernet_gives_each_device_its_own_front_and_winners(both_finished: Path) -> None:
    run, rows = both_finished, front_of(both_finished)
    assert list(rows[0]) == ["device", "accuracy", "latency@x86", "latency@two", "architecture"]
    assert list(dict.fromkeys(row["device"] for row in rows)) == ["x86", "two"]
    for device in ("x86", "two"):
        front = [row for row in rows if row["device"] == device]
        costs = [float(row[f"latency@{device}"]) for row in front]
        accuracies = [float(row["accuracy"]) for row in front]
        assert costs == sorted(set(costs))
        assert accuracies == sorted(set(accuracies))  # not dominated: whoever is slower is more accurate
        cards = [json.loads(path.read_text()) for path in sorted((run / "winners" / device).rglob("card.json"))]
        assert len(cards) == 2
        assert cards[0]["device"]["batch"] == {"x86": 1, "two": 2}[device]
        fastest_first = [card["predicted_us"] for card in cards]
        assert fastest_first == sorted(fastest_first)
        if len(front) >= 2:
            chosen = {json.dumps(card["architecture"], sort_keys=True) for card in cards}
            assert chosen <= {json.dumps(json.loads(row["architecture"]), sort_keys=True) for row in front}
    sources = list(dict.fromkeys(pq.read_table(run / "evaluations.parquet")["source"].to_pylist()))
    assert sources == ["initial", *(f"{device} round {n}" for device in ("x86", "two") for n in (1, 2)), "random"]
    studies = optuna.get_all_study_summaries(JournalStorage(JournalFileBackend(str(run / "study.log"))))
    assert [study.study_name for study in studies] == ["run-x86", "run-two"]
    assert set(json.loads((run / "points.json").read_text())) == {"x86", "two"}


def test_the_summary_tells_of_every_device_and_first_of_the_first(both_finished: Path, finished: Path) -> None:
    summary, one = (json.loads((run / "summary.json").read_text()) for run in (both_finished, finished))
    assert set(summary) == set(one)
    assert one["devices"] == {}
    assert one["study"]["objectives"][1]["name"] == "latency@x86"
    assert one["study"]["hypervolume_after"] == ["initial", "round 1", "round 2"]
    assert list(front_of(finished)[0]) == ["device", "accuracy", "latency@x86", "architecture"]
    assert list(summary["devices"]) == ["x86", "two"]
    for name, device in summary["devices"].items():
        assert device["table"]["device"]["name"] == name
        assert [o["name"] for o in device["study"]["objectives"]] == ["accuracy", f"latency@{name}"]
        assert [w["path"] for w in device["winners"]] == [f"winners/{name}/{rank}/model.onnx" for rank in (1, 2)]
        assert len(device["front"]) == sum(row["device"] == name for row in front_of(both_finished))
        predicted = [row["predicted_us"] for row in device["front"]]
        assert predicted == [float(r[f"latency@{name}"]) for r in front_of(both_finished) if r["device"] == name]
    for part in ("table", "latency_model", "study", "front", "winners", "baselines", "beats", "pays", "does_not_pay"):
        assert summary[part] == summary["devices"]["x86"][part]


def test_the_console_and_the_page_tell_of_every_device(both_finished: Path) -> None:
    said = (both_finished.parent / "run.out").read_text()
    for words in ("x86: 80 candidates", "two: 80 candidates", "Front of run on x86", "Front of run on two", "two: 2 winners"):
        assert words in said
    page = (both_finished / "report.html").read_text()
    for words in ("Where each device's winners differ", 'id="device-2"', 'href="winners/two/1/model.onnx"'):
        assert words in page


def test_a_device_that_is_added_costs_no_training_and_no_evaluation(
    call: Call, copy: Path, tmp_path: Path, both_tables: Path, second_device: str
) -> None:
    # The table as the study saw it: the winners have taught it since, and a better model may choose other networks on x86.
    shutil.copyfile(both_tables / "x86.parquet", copy / "tables" / "x86.parquet")
    before = pq.read_table(copy / "evaluations.parquet").to_pylist()
    more = (second_device, f"profile.tables={both_tables}", "stages=[tables,supernet,predictors,study]")
    ended = call(tmp_path, "run=run", *more)
    assert (ended.status, ended.err) == (0, "")
    assert "supernet: done before" in ended.out
    assert "study: done before" not in ended.out
    after = pq.read_table(copy / "evaluations.parquet").to_pylist()
    assert all(row in after for row in before)
    assert {row["source"] for row in after if row not in before} <= {"two round 1", "two round 2", "random"}
    assert {row["device"] for row in front_of(copy)} == {"x86", "two"}
    ended = call(tmp_path, "run=run", 'constraints=["latency<=1us"]', "stages=[study]")  # the device is remembered
    assert (ended.status, ended.err) == (0, "")
    told = ended.out.replace("\n", " ")
    for device in ("x86", "two"):
        assert f"{device}: nothing is feasible: latency@{device}<=1us binds" in told
    assert front_of(copy) == []


def test_a_study_is_done_again_when_it_looks_for_something_else(call: Call, copy: Path, tmp_path: Path) -> None:
    same = call(tmp_path, "run=run", "objectives=[accuracy,latency@x86]", "stages=[study]")  # what latency means there
    assert "study: done before" in same.out
    other = call(tmp_path, "run=run", "objectives=[accuracy,size]", "stages=[study]")
    assert (other.status, other.err) == (0, "")
    assert "study: done before" not in other.out
    assert list(front_of(copy)[0]) == ["device", "accuracy", "size", "latency@x86", "architecture"]


def test_when_every_latency_names_its_device_one_front_serves_all(call: Call, both: Path, tmp_path: Path) -> None:
    arguments = ("objectives=[accuracy,latency@x86,latency@two]", "export.winners=1", "export.random_winners=1")
    ended = call(tmp_path, "run=run", *arguments)
    assert (ended.status, ended.err) == (0, "")
    assert {row["device"] for row in front_of(both)} == {"x86+two"}
    x86, two = (json.loads((both / f"winners/{name}/1/card.json").read_text()) for name in ("x86", "two"))
    assert x86["architecture"] == two["architecture"]
    summary = json.loads((both / "summary.json").read_text())
    assert len(summary["devices"]["x86"]["front"]) == len(summary["devices"]["two"]["front"])
    assert summary["devices"]["x86"]["front"] != summary["devices"]["two"]["front"]  # each with its own latency
    studies = optuna.get_all_study_summaries(JournalStorage(JournalFileBackend(str(both / "study.log"))))
    assert [study.study_name for study in studies] == ["run"]


# -- as a program -------------------------------------------------------------------------------------------------------------


def program(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment: Mapping[str, str] = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "search", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_help_explains(tmp_path: Path) -> None:
    done = program(tmp_path, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for words in (
        *(
            "accuracy, latency, latency@DEVICE, peak_memory, peak_memory@DEVICE, energy, energy@DEVICE, size, memory, macs",
            "us ms s",
            "python -m search stages=[space]",
        ),
        *(
            "run=runs/NAME stages=[export]",
            "-m seed=0,1,2",
            "study: nni_evolution, nsga2, one_by_one, random, reinforce, tpe, training_free",
            "candidates: 5000",
        ),
    ):
        assert words in done.stdout
    assert not list(tmp_path.iterdir())


def test_as_a_program_a_mistake_is_one_line(tmp_path: Path) -> None:
    done = program(tmp_path, "objectives=[accuracy,latency@phone]", "stages=[space]")
    assert done.returncode == 2
    assert not done.stdout.strip()
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
