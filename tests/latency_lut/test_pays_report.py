"""`python -m latency_lut report`: what is told, written and refused, from the tables' files alone."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from latency_lut.__main__ import COMMANDS, main
from latency_lut.command import run_hydra
from latency_lut.pays import BESIDE, what_pays
from latency_lut.pays_figure import CROSS
from latency_lut.pays_report import differences, read_tables, report_of, write_report
from latency_lut.table import LatencyTable
from latency_lut.timing import Timing

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "</script><img src=x onerror=alert(1)>[bold]"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def tables(tiny_table: LatencyTable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tables of this machine and of a phone that is not here, on which integer arithmetic is slow."""
    folder = tmp_path_factory.mktemp("report") / "tables"
    tiny_table.save(folder / "x86.parquet")
    description: dict[str, str | int] = {
        "cpu": "Cortex-X4",
        "runtime": "pocket",
        "runtime_version": "2.7",
        "threads": 3,
        "batch": 2,
    }
    phone = replace(tiny_table, device_name="phone", device_fingerprint="0" * 16, device=description)
    slow = {"qdq_u8", "gather_groups_qdq"}
    phone.entries = {
        (spec, name): Timing(entry.us * (9 if name in slow else 1), entry.spread_us, entry.count)
        for (spec, name), entry in tiny_table.entries.items()
    }
    phone.save(folder / "phone.parquet")
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line in an empty folder, within this process; status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["latency_lut", *arguments])
        status = 0
        try:
            run_hydra(main, "latency_lut", COMMANDS)
        except SystemExit as stop:
            status = int(stop.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def without_scripts(page: str) -> str:
    return re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)


def drawn(page: str) -> dict[str, Any]:
    """The figures that a page draws, by name."""
    line = next(line for line in page.splitlines() if "plots = {" in line)
    return dict(json.loads(line[line.index("plots = ") + len("plots = ") :].rstrip(";")))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["reprot"], ["command 'reprot'", "report"]),
        (["measure", "device=x86"], ["command 'measure'"]),
        (["report"], ["no table tables/x86.parquet", "python -m latency_lut device=x86"]),
        (["report", "device=x86", "tables=elsewhere"], ["no table elsewhere/x86.parquet", "tables=elsewhere"]),
        (["report", "device=[]"], ["no tables in tables"]),
        (["report", "device=toaster"], ["toaster"]),
        (["report", "report"], ["report"]),
        (["report", "gadget=1"], ["gadget"]),
    ],
)
def test_mistakes_take_one_line_each_and_status_2(run: Run, tmp_path: Path, arguments: list[str], said: list[str]) -> None:
    status, _, err = run(*arguments)
    assert status == 2
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    for words in said:
        assert words in err
    assert not list(tmp_path.iterdir())


def test_a_damaged_table_is_a_mistake(run: Run, tables: Path, tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "x86.parquet").write_bytes((tables / "x86.parquet").read_bytes()[:500])
    status, _, err = run("report")
    assert (status, len(err.splitlines())) == (2, 1)
    assert "is damaged" in err


def test_as_a_program(tables: Path, tmp_path: Path) -> None:
    """The runtime of a table that is not of this machine is never asked for."""
    command = [sys.executable, "-m", "latency_lut", "report", "device=[]", f"tables={tables}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("phone (Cortex-X4), pocket 2.7, 3 threads, batch 2; median", "1 thread, batch 1; median", "int8", CROSS):
        assert words in " ".join(done.stdout.split())
    assert {path.name for path in tables.iterdir()} == {
        *("phone.parquet", "x86.parquet", "report.html", "report.json", "report.csv")
    }
    assert not list(tmp_path.iterdir())
    page = (tables / "report.html").read_text(encoding="utf-8")
    rest = without_scripts(page)
    assert not re.search(r"https?:", rest)
    assert not re.search(r"\b(src|href)=|url\(|@import", rest)
    assert "default-src 'none'" in rest
    assert len(re.findall(r"plotly\.js v\d", page)) == 1


def test_the_report_of_one_device_names_no_other(run: Run, tables: Path) -> None:
    status, out, _ = run("report", "device=x86", f"tables={tables}")
    assert status == 0
    assert "phone" not in out
    assert "differs" not in out
    assert list(json.loads((tables / "report.json").read_text())["devices"]) == ["x86"]


def test_rows_are_those_of_each_table_with_all_that_they_have_to_say(tables: Path) -> None:
    read = read_tables(tables, ["phone", "x86"])
    report = report_of(read)
    assert list(report["devices"]) == ["phone", "x86"]
    for name, table in read.items():
        of_device = [row for row in report["rows"] if row["device"] == name]
        assert [(r["choice"], r["pairs"], r["median_ratio"]) for r in of_device] == [
            (r.choice, r.pairs, r.median_ratio) for r in what_pays(table)
        ]
    assert any("int8 depthwise" in line for line in report["never_pays"]["phone"])
    assert report["devices"]["phone"]["runtime"] == "pocket"
    assert write_report(report, tables)
    assert json.loads((tables / "report.json").read_text()) == report
    with (tables / "report.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(report["rows"])
    for line, row in zip(lines, report["rows"], strict=True):
        assert float(line["median_ratio"]) == row["median_ratio"]
        assert line["statistic"] == report["statistic"]
        assert (line["runtime"], line["threads"], line["batch"]) == (
            ("pocket", "3", "2") if line["device"] == "phone" else ("onnxruntime", "1", "1")
        )


def test_the_pictures_of_all_devices_have_the_same_axes_and_colours(tables: Path) -> None:
    report = report_of(read_tables(tables, []))
    write_report(report, tables)
    page = (tables / "report.html").read_text(encoding="utf-8")
    traces = [figure["data"][0] for figure in drawn(page).values()]
    assert len(traces) == 2
    for key in ("x", "y", "zmin", "zmax", "colorscale"):
        assert traces[0][key] == traces[1][key]
    beside, crossed = traces[0]["x"].index("float<br>beside<br>int8"), 0
    for trace in traces:
        for labels in trace["text"]:
            assert CROSS not in labels[beside]
            crossed += sum(CROSS in label for label in labels)
    marked = [row for row in report["rows"] if not row["pays"] and row["choice"] != BESIDE]
    assert crossed == len(marked) > 0


def test_what_pays_on_one_device_only_is_told_once() -> None:
    def row(device: str, size: str, ratio: float, choice: str = "int8") -> dict[str, Any]:
        values = {"device": device, "kind": "conv", "choice": choice, "size_class": size, "median_ratio": ratio}
        return {**values, "pairs": 9, "pays": ratio > 1}

    rows = [row("a", "small (up to 3k MACs)", 0.5), row("b", "small (up to 3k MACs)", 2.0)]
    rows += [row("a", "large (above 3k MACs)", 2.0), row("b", "large (above 3k MACs)", 3.0)]
    times = "\N{MULTIPLICATION SIGN}"
    assert differences(rows) == [f"int8 conv: small layers pay on b (2.00{times}), not on a (0.50{times})"]
    assert differences(rows[2:]) == []
    assert differences([rows[0]]) == []
    assert differences([row("a", "small", 0.5, BESIDE), row("b", "small", 2.0, BESIDE)]) == []


def test_text_of_a_table_is_escaped(tables: Path, tmp_path: Path) -> None:
    table = LatencyTable.load(tables / "phone.parquet")
    table.device = {**table.device, "cpu": HOSTILE}
    report = report_of({"phone": table})
    plain = report_of({"phone": LatencyTable.load(tables / "phone.parquet")})
    pages = []
    for name, content in (("hostile", report), ("plain", plain)):
        write_report(content, tmp_path / name)
        pages.append((tmp_path / name / "report.html").read_text(encoding="utf-8"))
    assert "<img" not in without_scripts(pages[0])
    assert pages[0].count("<script") == pages[1].count("<script")
    assert "&lt;/script&gt;" in pages[0]


def test_a_table_of_which_nothing_can_be_said(tables: Path, tmp_path: Path) -> None:
    empty = replace(LatencyTable.load(tables / "phone.parquet"), entries={}, anchors=(), networks=[])
    report = report_of({"phone": empty})
    assert report["rows"] == []
    write_report(report, tmp_path)
    assert "Nothing can be said" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_tables_of_different_spaces_are_told_apart(tables: Path) -> None:
    read = read_tables(tables, [])
    assert report_of(read)["notes"] == []
    read["phone"].space_fingerprint = "another"
    (note,) = report_of(read)["notes"]
    assert "2 different spaces" in note
