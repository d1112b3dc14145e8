"""`python -m latency_lut report`: what pays on each device, side by side, as a table, a page, JSON and CSV.

Everything comes from the tables' files: no runtime is started, and the devices need not be reachable. All devices are told
with the same size classes, whose bounds come from the layers of all tables together.
"""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from latency_lut.figures import PAGE_PARTS, condition, ratio, shown
from latency_lut.pays import BESIDE, MARGIN, never_pays, size_bounds, what_pays
from latency_lut.pays_figure import CROSS, does_not_pay, figure_width, pays_axes, pays_figure
from latency_lut.table import STATISTIC, UNIT, LatencyTable
from spaces.errors import UserError
from spaces.files import write_atomically

FILES = ("report.html", "report.json", "report.csv")
WIDE = 560  # pixels; wider figures stand below each other

Report = dict[str, Any]


def read_tables(folder: Path, names: Sequence[str]) -> dict[str, LatencyTable]:
    """Tables by name of the device.

    Args:
        folder: holds DEVICE.parquet.
        names: of the devices; none: every table in the folder.

    Raises:
        UserError: a table is missing or damaged, or the folder has none.
    """
    names = list(names) or sorted(path.stem for path in folder.glob("*.parquet"))
    if not names:
        raise UserError(f"no tables in {folder}; run: python -m latency_lut device=x86 tables={folder}")
    for name in names:
        if not (folder / f"{name}.parquet").exists():
            raise UserError(f"no table {folder / name}.parquet; run: python -m latency_lut device={name} tables={folder}")
    return {name: LatencyTable.load(folder / f"{name}.parquet") for name in names}


def report_of(tables: Mapping[str, LatencyTable]) -> Report:
    """The content of `report.json`: what each table says of itself, every row of `Pays`, and the sentences."""
    bounds = size_bounds(tables.values())
    pays = {name: what_pays(table, bounds) for name, table in tables.items()}
    devices = {
        name: {
            "name": name,
            **table.device,
            "space": table.space_name,
            "space_fingerprint": table.space_fingerprint,
            "measured_pairs": len(table.entries),
            "created": table.created,
            "device_fingerprint": table.device_fingerprint,
            "table_fingerprint": table.fingerprint,
        }
        for name, table in tables.items()
    }
    rows = [{"device": name, **asdict(row), "pays": row.pays} for name, of_device in pays.items() for row in of_device]
    return {
        "unit": UNIT,
        "statistic": STATISTIC,
        "margin": MARGIN,
        "devices": devices,
        "rows": rows,
        "never_pays": {name: never_pays(of_device) for name, of_device in pays.items()},
        "differs": differences(rows),
        "beside": {name: beside_integers(of_device) for name, of_device in _by_device(rows).items()},
        "notes": notes(tables),
    }


def differences(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """A sentence for each choice that pays on one device and not on another, in a size class that both measured."""
    cells: dict[tuple[str, str], dict[str, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["choice"] != BESIDE:
            cells[row["kind"], row["choice"]][row["size_class"]].append(row)
    sentences = []
    for (kind, choice), sizes in cells.items():
        parts = []
        for size, of_size in sizes.items():
            told = [
                [f"{r['device']} ({ratio(r['median_ratio'])})" for r in of_size if r["pays"] is pays] for pays in (True, False)
            ]
            if all(told):
                parts.append(f"{size.split(' (')[0]} layers pay on {', '.join(told[0])}, not on {', '.join(told[1])}")
        if parts:
            sentences.append(f"{choice} {kind}: {'; '.join(parts)}")
    return sentences


def beside_integers(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """What a float layer costs beside integer ones, a sentence per kind."""
    by_kind: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row["choice"] == BESIDE:
            by_kind[row["kind"]].append(row["median_ratio"])
    return [f"{kind}: {min(v):.2f} to {max(v):.2f} times its speed between float layers" for kind, v in by_kind.items()]


def notes(tables: Mapping[str, LatencyTable]) -> list[str]:
    """What stands in the way of comparing the devices."""
    spaces = {table.space_fingerprint for table in tables.values()}
    if len(spaces) == 1:
        return []
    return [f"The tables are of {len(spaces)} different spaces: medians are over other layers on each device."]


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write the page, the JSON and the CSV into a folder; returns their paths.

    Raises:
        UserError: the folder cannot be written.
    """
    contents = (_page(report), json.dumps(report, indent=1, allow_nan=False), _csv(report))
    for name, content in zip(FILES, contents, strict=True):
        write_atomically(folder / name, content.encode("utf-8", "replace"))
    return [folder / name for name in FILES]


def print_report(report: Report, console: Console) -> None:
    """Print kinds, sizes and choices with a column per device: the ratio and, in brackets, the pairs that it is over."""
    devices = list(report["devices"])
    cells = {(r["kind"], r["size_class"], r["choice"], r["device"]): r for r in report["rows"]}
    classes, choices = pays_axes(report["rows"])
    table = Table(title="Times faster than dense float (measured pairs)", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("kind", "size", "choice"):
        table.add_column(name)
    for name in devices:
        table.add_column(escape(name), justify="right", no_wrap=True)
    last = ""
    for kind, size in classes:
        for choice in choices:
            found = [cells.get((kind, size, choice, name)) for name in devices]
            if any(found):
                new = last != f"{kind} {size}"
                last = f"{kind} {size}"
                shown_size = escape(size.replace(" MACs", "")) if new else ""
                table.add_row(kind if new else "", shown_size, escape(choice), *(_cell(row) for row in found))
        table.add_section()
    console.print(table)
    console.print(
        f"{CROSS} does not pay: less than {MARGIN} times as fast in the median. Sizes in dense MACs.", highlight=False
    )
    for name, device in report["devices"].items():
        console.print(escape(condition(device, report["statistic"])), highlight=False)
        for line in report["never_pays"][name]:
            console.print(f"  never pays: {escape(line)}", highlight=False)
    for line in report["differs"]:
        console.print(f"differs: {escape(line)}".replace("\N{MULTIPLICATION SIGN}", "x"), highlight=False)
    for line in report["notes"]:
        console.print(f"note: {escape(line)}", highlight=False)


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    mark = CROSS if does_not_pay(row) else " "
    return f"{row['median_ratio']:.2f} ({row['pairs']}) {mark}"


def _by_device(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    grouped: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        grouped[row["device"]].append(row)
    return dict(grouped)


def _csv(report: Report) -> str:
    """A line per row, each with everything that its number has to say."""
    text = io.StringIO()
    about = ("cpu", "runtime", "runtime_version", "provider", "threads", "batch", "table_fingerprint")
    fields = ("device", "kind", "size_class", "choice", "pairs", "median_ratio", "share_faster", "pays")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*fields, *about, "statistic"])
    for row in report["rows"]:
        device = report["devices"][row["device"]]
        writer.writerow([*(row[f] for f in fields), *(device.get(name, "") for name in about), report["statistic"]])
    return text.getvalue()


def _page(report: Report) -> str:
    by_device, axes = _by_device(report["rows"]), pays_axes(report["rows"])
    figures = {f"pays-{i}": pays_figure(by_device.get(name), axes) for i, name in enumerate(report["devices"])}
    plots = ",".join(f'"{name}":{figure.to_json()}' for name, figure in figures.items() if figure is not None)
    sizes = [f"{kind} {size}" for kind, size in axes[0]]
    return (
        _environment()
        .get_template("pays_template.html")
        .render(
            report=report,
            names=[name for name, figure in figures.items() if figure is not None],
            conditions={name: condition(device, report["statistic"]) for name, device in report["devices"].items()},
            by_device=by_device,
            width=figure_width(axes[1]),
            wide=figure_width(axes[1]) > WIDE,
            sizes=sizes,
            plots=plots,
            plotlyjs=get_plotlyjs(),
        )
    )


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE_PARTS), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"ratio": ratio, "shown": shown}
    environment.tests["crossed"] = does_not_pay
    return environment
