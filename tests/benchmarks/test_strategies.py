"""The comparison of strategies, on a few of scikit-learn's digits in Parquet files."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from benchmarks import strategies_report
from benchmarks.strategies_bench import TRAINING, Bench, arithmetic, supernet_of
from benchmarks.strategies_cifar10 import Schedule, parse
from benchmarks.strategies_phases import ALONE_PARTS, Phases
from search.__main__ import do_stage
from search.run import Run
from search.stages import STAGES

SMALL = [
    "data.channels=1",
    "data.resolutions=[8]",
    "data.size=8",
    "data.module.val_share=0.3",
    "data.module.batch_size=32",
    "profile.max_pairs=40",
    "profile.networks=8",
    "profile.rounds=3",
    "space.stages=[{widths:[8,16],depths:[1],stride:2}]",
    "space.stem=[8]",
    "space.head=[16]",
    "space.kernels=[3]",
    "evaluation.calibration_images=32",
    "predictor=ridge",
    "study.candidates=60",
]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("digits")
    digits = load_digits()
    for part, chosen in (("train", slice(0, 200)), ("test", slice(200, 300))):
        rows = []
        for pixels, label in zip(digits.images[chosen], digits.target[chosen], strict=True):
            file = io.BytesIO()
            Image.fromarray((pixels * 15).astype(np.uint8)).save(file, format="PNG")
            rows.append({"image": {"bytes": file.getvalue(), "path": None}, "label": int(label)})
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{part}.parquet")
    settings = ["rows=null", "test_images=100", "epochs=4", "networks=4", "members=[0.1]", "timed=3", "threads=1"]
    return [f"data={folder}", f"work={folder / 'work'}", "setting=quick", *settings, f"search={json.dumps(SMALL)}"]


@pytest.fixture(scope="module")
def bench(arguments: list[str]) -> Bench:
    bench = parse([*arguments, "strategies=focused"]).bench
    arithmetic(bench)
    return bench


def test_training_strategies_get_equal_arithmetic(bench: Bench) -> None:
    macs = {s: bench.epochs_of(s, 20.0) * bench.plan["macs_per_image"][s] for s in TRAINING}
    assert max(macs.values()) / min(macs.values()) < 1.05
    total = bench.alone_epochs("equal", 0.05) * 3 * bench.plan["macs"]["networks"]
    supernet = bench.epochs * bench.plan["macs_per_image"]["bignas"] * 1.2
    assert 0 <= total - supernet < 3 * bench.plan["macs"]["networks"]  # whole epochs, at least as much


@pytest.mark.parametrize("strategy", ["focused", "uniform_int8", "tangle", "focused@0.5"])
def test_what_whole_epochs_leave_of_the_arithmetic_is_focused_with(bench: Bench, strategy: str) -> None:
    name, _, length = strategy.partition("@")
    settings = dict(text.split("=", 1) for text in replace(bench, epochs=7).overrides(strategy))
    per_image = bench.plan["macs_per_image"]
    spent = int(settings["supernet.epochs"]) * (1 + float(settings["focus.share"])) * per_image[supernet_of(name)]
    assert spent == pytest.approx(7 * float(length or 1) * per_image["bignas"], rel=1e-3)


def test_what_a_supernet_took_in_fact_is_what_counts(bench: Bench, tmp_path: Path) -> None:
    own = replace(bench, epochs=7, work=str(tmp_path))
    shutil.copy(Path(bench.work, "plan.json"), tmp_path)
    total = 7 * bench.plan["macs_per_image"]["bignas"] * bench.plan["images"]["train"]
    Run(own.run("focused")).do("supernet", "key", [], lambda: {"macs": int(0.4 * total)})
    for strategy in ("focused", "random"):  # which searches in the former's supernet
        assert "focus.share=1.5000" in own.overrides(strategy)


def test_networks_trained_alone_are_the_same_every_time_and_spread_over_sizes(bench: Bench) -> None:
    space = bench.job("focused").space
    six, others = (replace(bench, networks=6, seed=seed) for seed in (3, 4))
    chosen = six.reference_networks(space)
    assert chosen == six.reference_networks(space) != others.reference_networks(space)
    macs = [space.network(a).macs for a in chosen]
    assert macs == sorted(macs)
    assert macs[-1] > 1.5 * macs[0]


def test_phases_give_the_figures_and_the_picture(bench: Bench, tmp_path: Path) -> None:
    stages = {stage.name: stage for stage in STAGES}
    for names in (("space", "tables", "supernet"), ("predictors", "focus", "study")):
        job = bench.job("focused")
        for name in names:
            do_stage(job, stages[name], None)
    phases = [f"alone:{name}:{part}" for name in bench.alone for part in range(ALONE_PARTS)]
    for phase in (*phases, "judge:focused", "front:focused", "timing:focused"):
        Phases(bench).run(phase)
    before = {path: path.stat().st_mtime_ns for path in Path(bench.work, "results").glob("alone-*")}
    Phases(bench).run(phases[0])
    assert len(before) == 8
    assert before == {path: path.stat().st_mtime_ns for path in before}
    rows = json.loads(bench.result_path("timing").read_text())["rows"]
    assert all(0.0 <= row["finished"] <= 1.0 for row in rows if row["strategy"] == "focused")
    for phase in ("supernet:focused", "focus:focused", "search:focused"):
        bench.cost_path(phase).parent.mkdir(exist_ok=True)
        bench.cost_path(phase).write_text('{"cpu_s": 1.0, "wall_s": 2.0, "peak_mib": 3.0}')
    (tmp_path / "strategies.md").write_text(f"before\n{strategies_report.BEGIN}old{strategies_report.END}\nafter\n")
    result = strategies_report.write(bench, ["focused"], tmp_path)
    row = result["strategies"]["focused"]
    assert {"tau", "gap_points", "gap_finished_points", "hypervolume", "accuracy_at_budget", "train_s"} <= row.keys()
    assert 0.0 <= row["hypervolume"] < 1.0
    assert row["train_macs"] == pytest.approx(bench.epochs * job.train_images * bench.plan["macs_per_image"]["bignas"], rel=0.3)
    text = (tmp_path / "strategies.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "| `focused` |" in text
    assert "old" not in text
    assert (tmp_path / "strategies.png").read_bytes().startswith(b"\x89PNG")


def test_gradient_strategies_search_in_the_default_supernet_after_it_is_there(arguments: list[str]) -> None:
    options = parse([*arguments, "strategies=tangle"])
    waves = [[name for name, _ in wave] for wave in Schedule(options).waves()]
    place = {name: index for index, names in enumerate(waves) for name in names}
    assert place["supernet:focused"] < place["focus:focused"] < place["search:tangle"] < place["timing:focused+tangle"]
    assert "supernet:tangle" not in place
    assert "supernet=single_path" in options.bench.overrides("tangle")


def test_search_strategies_search_in_the_default_supernet_and_int8_in_its_own(arguments: list[str]) -> None:
    options = parse([*arguments, "strategies=uniform_int8,training_free"])
    names = [name for wave in Schedule(options).waves() for name, _ in wave]
    assert {"supernet:uniform_int8", "tables:uniform_int8", "search:training_free"} <= set(names)
    assert not {"supernet:training_free", "judge:uniform_int8"} & set(names)
    assert {"supernet=single_path", "study=training_free"} <= set(options.bench.overrides("training_free"))
    assert {"supernet=single_path", "space.precisions=[w7a8]"} <= set(options.bench.overrides("uniform_int8"))


def test_int8_is_compared_at_equal_latency_and_at_equal_accuracy() -> None:
    fronts = {"focused": [(1.0, 0.4), (3.0, 0.7)], "uniform_int8": [(0.5, 0.2), (2.0, 0.3), (4.0, 0.6), (9.0, 0.9)]}
    rows = [{"strategy": name, "us": us, "finished": share} for name, front in fronts.items() for us, share in front]
    over = strategies_report.over_int8({"rows": rows}, "finished")
    assert [over[key] for key in ("points_lowest", "points", "points_highest")] == pytest.approx([-20.0, 10.0, 10.0])
    assert [over[key] for key in ("speedup_lowest", "speedup", "speedup_highest")] == pytest.approx([0.5, 4 / 3, 2.0])


@pytest.mark.parametrize("mistake", ["setting=fast", "strategies=best", "epoch=3", "data=nowhere"])
def test_a_mistake_is_one_line(arguments: list[str], mistake: str) -> None:
    with pytest.raises(SystemExit, match=r"error: .*(allowed|no file)"):
        parse([*arguments, mistake])
