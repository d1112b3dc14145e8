"""All jobs of a sweep on one page: a front per device, budgets as lines, seeds as spread, and the jobs that failed by name.

The page is drawn from the summaries of the runs and from what the jobs wrote of themselves (`search.sweep`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any
from urllib.parse import quote

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from latency_lut.figures import INK, figure_of, number, safe, shown, with_numbers
from search.objectives import parse_constraint
from search.report import environment, print_front, write_report
from search.report_figures import BLUE, GREEN, ORANGE, PINK, RED, SKY, hover_of, latency_axis, winner_text
from search.report_text import Summary, condition, device_of, microseconds, pareto, verified, views
from search.summary import SUMMARY_FILE, read_summary
from search.sweep import DONE, JOBS_FOLDER, SweepJob, read_jobs
from spaces.errors import UserError
from spaces.files import write_atomically

PAGE = "report.html"
COLOURS = (BLUE, ORANGE, GREEN, RED, PINK, SKY, INK)
SEED = "seed"
FAR = 2.0  # times the slowest winner: a budget beyond would only press the winners into a corner; the text above names it


@dataclass(frozen=True)
class Told:
    """A job with the summary of its run.

    Args:
        job: what the job wrote of itself.
        summary: of its run; empty while there is none.
        group: the settings in which it differs from other jobs, apart from the seed.
        label: the same with the seed.
    """

    job: SweepJob
    summary: Summary
    group: str
    label: str


def tell_sweep(folder: Path, console: Console | None = None) -> None:
    """Write the page of a sweep and print what became of its jobs.

    Args:
        folder: of the sweep.
        console: where to print.

    Raises:
        UserError: the folder is no sweep's, or something in it is damaged.
    """
    jobs = told_jobs(folder)
    write_sweep_report(folder, jobs)
    (console or Console()).print(_table_of(folder, jobs))
    (console or Console()).print(f"report: {folder / PAGE}", soft_wrap=True)


def command() -> None:
    """`python -m search.report FOLDER`: draw the page of a run or of a sweep again.

    Raises:
        SystemExit: with status 2 after a user's mistake, told in one line on stderr.
    """
    try:
        if len(sys.argv) != 2:
            raise UserError(f"{len(sys.argv) - 1} arguments; allowed is one folder: python -m search.report runs/NAME")
        folder = Path(sys.argv[1])
        if (folder / JOBS_FOLDER).is_dir():
            tell_sweep(folder)
        elif (folder / SUMMARY_FILE).is_file():
            summary = read_summary(folder / SUMMARY_FILE)
            write_report(summary, folder / PAGE)
            print_front(summary, Console())
            print(f"report: {folder / PAGE}")
        else:
            raise UserError(f"{folder} is neither a finished run nor a sweep; make one: python -m search [-m] run={folder}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def told_jobs(folder: Path) -> list[Told]:
    """The jobs of a sweep with the summaries of their runs.

    Raises:
        UserError: the folder is no sweep's, or something in it is damaged.
    """
    jobs = read_jobs(folder)
    settings = [dict(text.lstrip("+").partition("=")[::2] for text in job.overrides) for job in jobs]
    names = sorted({name for values in settings for name in values})
    varied = [name for name in names if len({values.get(name) for values in settings}) > 1]

    def label(values: Mapping[str, str], which: Sequence[str]) -> str:
        return ", ".join(f"{name}={values[name]}" for name in which if name in values) or (
            "the defaults" if which else "all jobs"
        )

    return [
        Told(job, _summary(folder, job), label(values, [name for name in varied if name != SEED]), label(values, varied))
        for job, values in zip(jobs, settings, strict=True)
    ]


def _summary(folder: Path, job: SweepJob) -> Summary:
    path = folder / job.run / SUMMARY_FILE
    return read_summary(path) if job.run and job.state == DONE and path.exists() else {}


# -- the page -----------------------------------------------------------------------------------------------------------------


def write_sweep_report(folder: Path, jobs: Sequence[Told]) -> None:
    """Write `report.html` into the folder of a sweep, replacing it in one step.

    Raises:
        UserError: the folder cannot be written.
    """
    by_device: dict[str, list[tuple[Told, Summary]]] = {}
    for told in jobs:
        for view in views(told.summary) if told.summary else []:
            by_device.setdefault(str(device_of(view).get("name", "this device")), []).append((told, view))
    devices = [
        {"name": name, "condition": condition(of_device[0][1]), "budgets": [text for text, _ in budgets(of_device, name)]}
        for name, of_device in by_device.items()
    ]
    fronts = {f"front-{place}": front(of_device, name) for place, (name, of_device) in enumerate(by_device.items(), 1)}
    context = {
        "name": folder.resolve().name,
        "counts": _counts(jobs),
        "devices": devices,
        "figures": {name for name, figure in fronts.items() if figure is not None},
        "plots": ",".join(f'"{name}":{figure.to_json()}' for name, figure in fronts.items() if figure is not None),
        "plotlyjs": get_plotlyjs(),
        "rows": [_row(told) for told in jobs],
        "ended_badly": [told for told in jobs if told.job.line],
    }
    page = environment().get_template("sweep_template.html").render(context).encode("utf-8", "replace")
    write_atomically(folder / PAGE, page)


def budgets(of_device: Sequence[tuple[Told, Summary]], device: str) -> list[tuple[str, float]]:
    """Upper bounds on a device's latency under which jobs searched: as written, and in microseconds."""
    found: dict[str, float] = {}
    for _, view in of_device:
        for text in (view.get("study") or {}).get("constraints") or []:
            constraint = parse_constraint(str(text), [device])
            if constraint.upper and constraint.objective.name == f"latency@{device}":
                found[constraint.text] = constraint.bound
    return sorted(found.items(), key=lambda item: item[1])


def front(of_device: Sequence[tuple[Told, Summary]], device: str) -> go.Figure | None:
    """Measured latency against test accuracy of all jobs' winners; runs that differ in the seed alone share a colour."""
    groups: dict[str, list[tuple[Told, list[Mapping[str, Any]]]]] = {}
    for told, view in of_device:
        winners = with_numbers(view.get("winners"), "measured_us", "accuracy_runtime")
        if winners:
            groups.setdefault(told.group, []).append((told, winners))
    if not groups:
        return None
    figure = figure_of(520, "latency (µs)", "test accuracy in the runtime")
    latencies = [w["measured_us"] for runs in groups.values() for _, winners in runs for w in winners]
    slowest = max(latencies)
    lines = [(text, bound) for text, bound in budgets(of_device, device) if bound <= FAR * slowest]
    latencies += [bound for _, bound in lines]
    for colour, (group, runs) in zip(cycle(COLOURS), groups.items(), strict=False):
        steps = [pareto((w["measured_us"], w["accuracy_runtime"]) for w in winners) for _, winners in runs]
        xs, low, high = spread_of(steps, slowest)
        style = {"shape": "hv", "color": colour, "width": 0}
        if len(steps) > 1 and xs:
            figure.add_scatter(x=xs, y=low, mode="lines", line=style, hoverinfo="skip", showlegend=False)
            name = f"{safe(group)}: between {len(steps)} seeds"
            figure.add_scatter(
                x=xs, y=high, mode="lines", line=style, fill="tonexty", fillcolor=_faint(colour), hoverinfo="skip", name=name
            )
        for place, ((told, winners), points) in enumerate(zip(runs, steps, strict=True)):
            line = {"color": colour, "width": 1.5, "shape": "hv", "dash": "dot"}
            figure.add_scatter(
                x=[x for x, _ in points], y=[y for _, y in points], mode="lines", line=line, hoverinfo="skip", showlegend=False
            )
            figure.add_scatter(
                x=[w["measured_us"] for w in winners],
                y=[w["accuracy_runtime"] for w in winners],
                mode="markers",
                marker={"color": colour, "size": 9, "symbol": "circle" if place == 0 else "circle-open"},
                name=safe(group) if len(runs) == 1 else f"{safe(group)}: winners",
                showlegend=place == 0,
                legendgroup=safe(group),
                **hover_of(f"{safe(told.label)}<br>{winner_text(w)}" for w in winners),
            )
    for text, bound in lines:
        figure.add_vline(bound, line={"color": INK, "width": 1, "dash": "dash"})
        where = {"x": math.log10(bound) if latency_axis(latencies) else bound, "y": 0, "yref": "paper", "yanchor": "bottom"}
        figure.add_annotation(**where, text=safe(text), showarrow=False, textangle=-90, xanchor="right", font={"size": 11})
    return figure.update_xaxes(**latency_axis(latencies)).update_yaxes(tickformat=".1%")


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.2)"


def spread_of(steps: Sequence[Sequence[tuple[float, float]]], last: float) -> tuple[list[float], list[float], list[float]]:
    """The least and the most accuracy that fronts reach, at every latency from which on all of them reach something.

    Args:
        steps: of each front, `(latency, accuracy)` by ascending latency.
        last: latency up to which the fronts go on.

    Returns:
        Latencies, least and most accuracy there.
    """
    begin = max(points[0][0] for points in steps)
    xs = sorted({x for points in steps for x, _ in points if x >= begin} | {last})
    reached = [[max(y for x, y in points if x <= at) for points in steps] for at in xs]
    return xs, [min(values) for values in reached], [max(values) for values in reached]


# -- the jobs -----------------------------------------------------------------------------------------------------------------


def _counts(jobs: Sequence[Told]) -> str:
    states = [told.job.state for told in jobs]
    parts = [f"{states.count(state)} {state}" for state in dict.fromkeys(("done", *states))]
    return f"{len(jobs)} job{'' if len(jobs) == 1 else 's'}: {', '.join(parts)}"


def _row(told: Told) -> dict[str, str]:
    """What the page's table tells of a job; `link` leads to its run's report."""
    winners = [w for view in views(told.summary) for w in view.get("winners") or []] if told.summary else []
    accuracies = [a for a in (number(w.get("accuracy_runtime")) for w in winners) if a is not None]
    fastest = [t for t in (number(w.get("measured_us")) for w in winners) if t is not None]
    return {
        "label": told.label,
        "link": quote(f"{told.job.run}/{PAGE}") if told.summary else "",
        "state": told.job.state,
        "verified": f"{verified(winners)} of {len(winners)}" if winners else "",
        "best": shown(max(accuracies), ".2f", "", 100) if accuracies else "",
        "fastest": microseconds(min(fastest), "") if fastest else "",
        "seconds": shown(told.summary["wall_s"], ",.0f") if number(told.summary.get("wall_s")) is not None else "",
        "where": f"{told.job.host}, process {told.job.pid}",
        "at": told.job.at[:16].replace("T", " "),
    }


def _table_of(folder: Path, jobs: Sequence[Told]) -> Table:
    title = f"Sweep {escape(folder.resolve().name)}: {_counts(jobs)}"
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("job")
    table.add_column("state")
    for name in ("verified", "best\naccuracy, %", "fastest\nus", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for told in jobs:
        row = _row(told)
        state = "done" if told.job.state == DONE else f"[bold red]{told.job.state}[/bold red]: {escape(told.job.line)}"
        table.add_row(escape(told.label), state.rstrip(": "), row["verified"], row["best"], row["fastest"], row["seconds"])
    return table
