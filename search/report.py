"""The report of a run: one HTML page that needs no network, and the front of each device as a table on the console.

Everything shown comes from the run's summary (the content of `summary.json`): nothing is measured anew. Parts that the
summary lacks are left out. The page is `report_template.html` with the sections of `report_sections.html`, rendered with every
text of the run (names, notes, configuration) escaped; its sentences are in `search.report_text`, its figures in
`search.report_figures`, `search.report_choices` and, with several devices, `search.report_devices`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from plotly.offline import get_plotlyjs
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from latency_lut.figures import PAGE_PARTS, number, ratio, shown
from search import report_choices, report_devices, report_figures
from search.report_text import (
    CLAIMS,
    Summary,
    accuracy_predictor,
    beaten,
    condition,
    device_of,
    family_name,
    finishing,
    focusing,
    gain,
    measured_where,
    microseconds,
    nearest_miss,
    noise,
    plus_minus,
    prediction_error,
    relaxation,
    shares_weights,
    supernet_cost,
    takeaway,
    verified,
    views,
)
from spaces.files import write_atomically

DEVICE_FIGURES = {
    "front": report_figures.front,
    "layers": report_choices.layers,
    "pays": report_choices.pays,
    "latency": report_figures.latency,
    "search": report_figures.search,
    "hypervolume": report_figures.hypervolume,
}
SHARED_FIGURES = {
    "accuracy": report_figures.accuracy,
    "training": report_figures.training,
    "losses": report_figures.losses,
    "stages": report_figures.stages,
}


def write_report(summary: Summary, path: Path) -> None:
    """Write the page, replacing the file in one step.

    Args:
        summary: the content of the run's `summary.json`; optional parts may be missing.
        path: of the page, by habit `report.html` in the run's folder: links to the winners are relative to it.

    Raises:
        UserError: the folder cannot be written.
    """
    page = environment().get_template("report_template.html").render(_context(summary)).encode("utf-8", "replace")
    write_atomically(path, page)


def print_front(summary: Summary, console: Console) -> None:
    """Print each front with units: the measured winners, or what was predicted where none is exported, or the nearest miss."""
    fronts = views(summary)
    for view in fronts:
        where = f" on {escape(str(device_of(view).get('name', 'a device')))}" if len(fronts) > 1 else ""
        _print_front_of(view, where, console)


def _print_front_of(summary: Summary, where: str, console: Console) -> None:
    winners, front = summary.get("winners") or [], summary.get("front") or []
    if not winners and not front:
        text = f"[bold]Nothing feasible was found{where}.[/bold] {escape(nearest_miss(summary))}".rstrip()
        console.print(text, highlight=False)
        return
    title = f"Front of {escape(str(summary.get('name', 'the run')))}{where}"
    table = Table(title=title, title_justify="left", header_style="bold")
    columns = ["rank", "accuracy\ntest, %", "measured\nus", "predicted\nus", "error\n%", "file\nkB", "MACs\nM", "verified"]
    predicted = ["", "accuracy\nvalidation, %", "predicted\nus", "size\nkB", "MACs\nM", "peak\nkB"]
    for name in columns if winners else predicted:
        table.add_column(name, justify="right", no_wrap=True)
    for w in winners:
        table.add_row(
            escape(str(w.get("rank", ""))),
            shown(w.get("accuracy_runtime"), ".2f", "", 100),
            microseconds(w.get("measured_us"), ""),
            microseconds(w.get("predicted_us"), ""),
            shown(prediction_error(w), "+.1f", "", 100),
            shown(w.get("bytes"), ",.1f", "", 1e-3),
            shown(w.get("macs"), ",.2f", "", 1e-6),
            "yes" if w.get("verified") else "[bold red]no[/bold red]",
        )
    for rank, f in enumerate(front if not winners else [], 1):
        table.add_row(
            str(rank),
            shown(f.get("accuracy"), ".2f", "", 100),
            microseconds(f.get("predicted_us"), ""),
            shown(f.get("size_bytes"), ",.1f", "", 1e-3),
            shown(f.get("macs"), ",.2f", "", 1e-6),
            shown(f.get("peak_activation_bytes"), ",.1f", "", 1e-3),
        )
    console.print(table)
    if condition(summary):
        console.print(f"Latency: {escape(condition(summary))}.", highlight=False)
    if measured_where(summary):
        console.print(escape(measured_where(summary)), highlight=False)
    console.print(escape(takeaway(summary)).replace("\N{MULTIPLICATION SIGN}", "x"), highlight=False)


# -- what the template is given -------------------------------------------------------------------------------------------


@cache
def environment() -> jinja2.Environment:
    """Where templates of pages are found, with the filters that they use; everything is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([Path(__file__).parent, PAGE_PARTS]),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "shown": shown,
        "microseconds": microseconds,
        "plus_minus": plus_minus,
        "ratio": ratio,
        "family_name": family_name,
        "prediction_error": prediction_error,
        "link": _link,
        "pretty": lambda value: json.dumps(value, indent=2, default=str, ensure_ascii=False),
    }
    return environment


def _context(summary: Summary) -> dict[str, Any]:
    devices, drawn = views(summary), {name: draw(summary) for name, draw in SHARED_FIGURES.items()}
    drawn["contrast"] = report_devices.contrast(devices)
    parts = []
    for place, view in enumerate(devices, 1):
        suffix = f"-{place}" if place > 1 else ""
        of_device = {f"{name}{suffix}": draw(view) for name, draw in DEVICE_FIGURES.items()}
        drawn |= of_device
        parts.append(_of_device(view, place, suffix, {name for name, figure in of_device.items() if figure is not None}))
    figures = {name: figure for name, figure in drawn.items() if figure is not None}
    # plotly writes `<` as an escape, so that nothing in a figure can end the script it stands in
    plots = ",".join(f'"{name}":{figure.to_json()}' for name, figure in figures.items())
    return {
        "s": summary,
        "figures": set(figures),
        "plots": plots,
        "plotlyjs": get_plotlyjs(),
        "about": _about(summary, [part["name"] for part in parts]),
        "devices": parts,
        "overview": report_devices.overview(devices),
        "supernet_cost": supernet_cost(summary),
        "shares_weights": shares_weights(summary),
        "finishing": finishing(summary),
        "focusing": focusing(summary),
        "relaxation": relaxation(summary),
        "accuracy_predictor": accuracy_predictor(summary),
        "provenance": _provenance(summary),
    }


def _of_device(view: Summary, place: int, suffix: str, figures: set[str]) -> dict[str, Any]:
    """What the page shows of one device; `suffix` is that of its figures' names."""
    sizes = [str(entry.get("size_class")) for entry in view.get("pays") or []]
    return {
        "s": view,
        "place": place,
        "suffix": suffix,
        "figures": figures,
        "name": device_of(view).get("name", "this device" if place == 1 else f"device {place}"),
        "takeaway": takeaway(view),
        "tiles": _tiles(view),
        "nearest_miss": nearest_miss(view),
        "noise": noise(view),
        "measured_where": measured_where(view),
        "gain": gain(view),
        "condition": condition(view),
        "depth": max((len(w.get("layers") or []) for w in view.get("winners") or []), default=0),
        "bounds": [size for size in dict.fromkeys(sizes) if "(" in size],
        "provenance": _table_rows(view),
    }


def _about(summary: Summary, devices: Sequence[str]) -> list[str]:
    parts = [f"{kind} {(summary.get(kind) or {}).get('name', '')}" for kind in ("space", "data") if summary.get(kind)]
    parts += [f"device{'s' if len(devices) > 1 else ''} {', '.join(devices)}"] if "name" in device_of(summary) else []
    parts += [f"{kind} {summary[kind]}" for kind in ("seed", "netwright") if kind in summary]
    parts += [str(summary["created"])[:16].replace("T", " ")] if "created" in summary else []
    return parts + ([f"took {shown(summary['wall_s'], ',.0f')} s"] if "wall_s" in summary else [])


def _tiles(summary: Summary) -> list[tuple[str, str, str]]:
    """Figure, label and note of each number in the heading."""
    winners, model, tiles = summary.get("winners") or [], summary.get("latency_model") or {}, []
    if winners:
        note = "Outputs, accuracy and latency re-measured on the exported models."
        tiles.append((f"{verified(winners)} of {len(winners)}", "winners verified", note))
    for family in CLAIMS:
        beat = (summary.get("beats") or {}).get(family)
        if not beat:
            continue
        counted = f"{shown(beat.get('beaten'), '.0f')} of {shown(beat.get('networks'), '.0f')} networks beaten"
        if beaten(beat):
            note = f"Measured, at equal or better test accuracy: {counted}, best {ratio(beat.get('best_speedup'))}."
            tiles.append((ratio(beat.get("median_speedup")), f"faster than {family_name(family)}", note))
        else:
            tiles.append(("none", f"faster than {family_name(family)}", f"At equal or better test accuracy: {counted}."))
    if number(model.get("mape")) is not None:
        note = (
            f"Mean over {shown(model.get('n'), '.0f')} held-out whole networks; Spearman {shown(model.get('spearman'), '.3f')}."
        )
        tiles.append((shown(model.get("mape"), ".1f", " %", 100), "error of predicted latency", note))
    return tiles


def _table_rows(view: Summary) -> list[tuple[str, str]]:
    """Names and values of a device and its table."""
    table = view.get("table") or {}
    if not table:
        return []
    rows = [
        *((name, str(value)) for name, value in device_of(view).items()),
        ("statistic", str(table.get("statistic", ""))),
        ("measured pairs", f"{shown(table.get('pairs'), ',.0f')} of {shown(table.get('reachable_pairs'), ',.0f')}"),
        ("transferred", str(table.get("transferred", ""))),
        ("speed of profiling", shown(table.get("pairs_per_min"), ",.0f", " pairs per minute")),
    ]
    return _told(rows)


def _provenance(summary: Summary) -> list[tuple[str, list[tuple[str, str]]]]:
    """Tables of names and values, by title, of what all devices share."""
    space, data = (summary.get(part) or {} for part in ("space", "data"))
    images = ", ".join(f"{data[part]:,} {part}" for part in ("train", "validation", "test") if part in data)
    rows = {
        "Space and data": [
            ("space", f"{space.get('name', '')}, {shown(space.get('choices'), '.0f')} choices") if space else ("", ""),
            ("size", f"10^{shown(space.get('size_log10'), '.1f')} networks") if "size_log10" in space else ("", ""),
            *((f"{which} network", _extent(space[which])) for which in ("largest", "smallest") if space.get(which)),
            ("data", f"{data.get('name', '')}: {images} images, {data.get('classes', '')} classes") if data else ("", ""),
        ],
        "Versions": [(name, str(value)) for name, value in (summary.get("versions") or {}).items()],
        "Fingerprints": [(name, str(value)) for name, value in (summary.get("fingerprints") or {}).items()],
    }
    return [(title, _told(named)) for title, named in rows.items()]


def _told(rows: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [row for row in rows if row[0] and row[1]]


def _extent(size: Mapping[str, Any]) -> str:
    work = f"{shown(size.get('macs'), ',.2f', 'M MACs', 1e-6)}, {shown(size.get('parameters'), ',.1f', 'k parameters', 1e-3)}"
    weights, peak = (shown(size.get(key), ",.1f", " kB", 1e-3) for key in ("weight_bytes", "peak_activation_bytes"))
    return f"{work}, weights {weights}, peak activations {peak}"


def _link(path: object, name: str | None = None) -> str:
    """A relative link to a file of the run, or to another one beside it."""
    parts = str(path).replace("\\", "/").split("/")
    return quote("/".join([*parts[:-1], name] if name else parts))


if __name__ == "__main__":
    from search.sweep_report import command

    command()
