"""The picture of what pays on a device: speed-up over the dense float layer, by kind and size of layer and by choice."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from latency_lut.figures import INK, figure_of, ratio, safe, shown, with_numbers
from latency_lut.pays import BESIDE, SIZE_NAMES

SCALE = [[0, "#E08A2C"], [0.25, "#F3BC7C"], [0.5, "#F7F7F7"], [0.75, "#A9CFE8"], [1, "#4A97CF"]]
LARGEST_LOG2 = 2  # the colours end at four times slower and faster, so that figures compare
CROSS = "\N{BALLOT X}"

Row = Mapping[str, Any]
Axes = tuple[list[tuple[str, str]], list[str]]


def pays_axes(entries: Iterable[Row]) -> Axes:
    """Kinds with their size classes, and choices, in the order in which they are shown.

    Args:
        entries: rows of `latency_lut.pays.Pays` as mappings, of one device or of several.
    """
    entries = list(entries)
    kinds = list(dict.fromkeys(str(e.get("kind")) for e in entries))
    classes = {(str(e.get("kind")), str(e.get("size_class"))) for e in entries}
    rows = sorted(classes, key=lambda row: (kinds.index(row[0]), _size_order(row[1]), row[1]))
    return rows, sorted(dict.fromkeys(str(e.get("choice")) for e in entries), key=lambda choice: choice == BESIDE)


def does_not_pay(entry: Row) -> bool:
    """Whether a row is to be marked: a choice that is not faster. A float layer beside integer ones is no choice."""
    return not entry.get("pays") and entry.get("choice") != BESIDE


def pays_figure(entries: Iterable[Row] | None, axes: Axes | None = None) -> go.Figure | None:
    """Kind and size of layer (rows) against choice (columns); `None` without entries.

    Args:
        entries: of one device, rows of `Pays` as mappings with `pays`.
        axes: rows and columns, see `pays_axes`; `None`: those of the entries. Figures with equal axes compare cell by cell.
    """
    entries = [e for e in with_numbers(entries, "median_ratio") if e["median_ratio"] > 0]
    if not entries:
        return None
    rows, choices = pays_axes(entries) if axes is None else axes
    value: list[list[float | None]] = [[None] * len(choices) for _ in rows]
    label, hover = [[""] * len(choices) for _ in rows], [[""] * len(choices) for _ in rows]
    for e in entries:
        row, column = rows.index((str(e.get("kind")), str(e.get("size_class")))), choices.index(str(e.get("choice")))
        value[row][column] = math.log2(e["median_ratio"])
        label[row][column] = ratio(e["median_ratio"]) + (f" {CROSS}" if does_not_pay(e) else "")
        hover[row][column] = _hover(e)
    figure = figure_of(90 + 34 * len(rows), "", "")
    figure.add_heatmap(
        z=value,
        x=["<br>".join(map(safe, _lines(choice))) for choice in choices],
        y=[f"{safe(kind)}, {safe(size.split(' (')[0])}" for kind, size in rows],
        text=label,
        texttemplate="%{text}",
        textfont={"color": INK},
        customdata=hover,
        hovertemplate="%{customdata}<extra></extra>",
        colorscale=SCALE,
        zmin=-LARGEST_LOG2,
        zmax=LARGEST_LOG2,
        xgap=2,
        ygap=2,
        hoverongaps=False,
        showscale=False,
    )
    figure.update_xaxes(side="top", tickangle=0, showgrid=False, ticks="", type="category")
    figure.update_yaxes(autorange="reversed", showgrid=False, ticks="", type="category")
    return figure.update_layout(dragmode=False, margin_t=10)


def figure_width(choices: Sequence[str]) -> int:
    """Pixels that a figure with such columns needs for its labels not to overlap."""
    longest = max((len(line) for choice in choices for line in _lines(choice)), default=0)
    return 150 + len(choices) * max(62, 8 + 8 * longest)


def _lines(choice: str) -> list[str]:
    """A choice in short lines: `int8 group@1/2` as `int8`, `group` and `@1/2`."""
    return choice.replace("@", " @").split(" ")


def _size_order(size_class: str) -> int:
    name = size_class.split(" ")[0]
    return SIZE_NAMES.index(name) if name in SIZE_NAMES else len(SIZE_NAMES)


def _hover(e: Row) -> str:
    verdict = "no choice: the cost of integer neighbours" if e.get("choice") == BESIDE else None
    verdict = verdict or f"{'pays' if e.get('pays') else 'does not pay'} on this device"
    return (
        f"<b>{safe(e.get('choice'))}</b> on {safe(e.get('kind'))}, {safe(e.get('size_class'))}"
        f"<br>median speed-up over dense float: {ratio(e['median_ratio'])}"
        f"<br>faster in {shown(e.get('share_faster'), '.0f', ' %', 100)} of {shown(e.get('pairs'), '.0f')} measured pairs"
        f"<br>{verdict}"
    )
