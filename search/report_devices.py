"""What differs between the devices of a run: one figure and one table of its report, only there with several devices.

Both take what `search.report_text.views` makes of the summary: the summary as each device sees it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from latency_lut.figures import figure_of, number, safe, shown
from search.report_choices import PLAIN_KINDS, kept, merged, patterns_of, style_of
from search.report_figures import hover_of
from search.report_text import Summary, device_of, microseconds, verified

Layer = Mapping[str, Any]


def contrast(views: Sequence[Summary]) -> go.Figure | None:
    """One row per device, one cell per layer along the depth: which share of the winners chose which precision and sparsity."""
    chosen = [[list(w.get("layers") or []) for w in view.get("winners") or []] for view in views]
    columns = merged([[str(layer.get("name")) for layer in layers] for winners in chosen for layers in winners if layers])
    if not columns or len(views) < 2:
        return None
    rows = [_counted(winners) for winners in chosen]
    styles = sorted({style for row in rows for counts in row.values() for style in counts}, key=_from_dense)
    patterns = patterns_of(sparsity for _, sparsity, _ in styles)
    figure = figure_of(130 + 84 * len(views) + round(6.2 * max(map(len, columns))), "", "")
    below = {(row, x): 0.0 for row in range(len(views)) for x in range(len(columns))}
    for name, sparsity, colour in styles:
        cells, texts = [], []
        for row, counts in enumerate(rows):
            for x, column in enumerate(columns):
                count = counts.get(column, Counter())[(name, sparsity, colour)]
                if count:
                    height = 0.8 * count / len(chosen[row])
                    cells.append((x, row + 0.9 - below[row, x] - height, height))
                    below[row, x] += height
                    told = f"{count} of {len(chosen[row])} winners: {name if sparsity == 'dense' else f'{name}, {sparsity}'}"
                    texts.append(f"<b>{safe(_name(views[row], row))}: {safe(column)}</b><br>{safe(told)}")
        figure.add_bar(
            x=[x for x, _, _ in cells],
            base=[base for _, base, _ in cells],
            y=[height for _, _, height in cells],
            width=0.88,
            marker={"color": colour, "pattern": patterns[sparsity]},
            name=safe(name if sparsity == "dense" else f"{name}, {sparsity}"),
            **hover_of(texts),
        )
    names = [safe(_name(view, row)) for row, view in enumerate(views)]
    figure.update_yaxes(tickvals=[row + 0.5 for row in range(len(views))], ticktext=names)
    figure.update_yaxes(range=[len(views), 0], showgrid=False, ticks="")
    figure.update_xaxes(tickvals=list(range(len(columns))), ticktext=[safe(c) for c in columns], tickangle=-90)
    figure.update_xaxes(range=[-0.6, len(columns) - 0.4], showgrid=False, ticks="")
    return figure.update_layout(barmode="overlay", dragmode=False)


def _counted(winners: Sequence[Sequence[Layer]]) -> dict[str, Counter[tuple[str, str, str]]]:
    """How many winners chose each style of a layer, by the layer's name."""
    counts: dict[str, Counter[tuple[str, str, str]]] = {}
    for layers in winners:
        for layer in layers:
            counts.setdefault(str(layer.get("name")), Counter())[style_of(layer)] += 1
    return counts


def _from_dense(style: tuple[str, str, str]) -> tuple[str, float, str]:
    return style[0], -kept(style[1]), style[1]


def overview(views: Sequence[Summary]) -> list[dict[str, str]]:
    """A row per device, by column: what its winners reach, and what their layers are made of."""
    rows = []
    for place, view in enumerate(views):
        winners = view.get("winners") or []
        layers = [layer for w in winners for layer in w.get("layers") or [] if layer.get("kind") not in PLAIN_KINDS]
        precisions = Counter(style_of(layer)[0] for layer in layers)
        sparse = sum(style_of(layer)[1] != "dense" for layer in layers)
        rows.append(
            {
                "device": _name(view, place),
                "winners verified": f"{verified(winners)} of {len(winners)}",
                "test accuracy, %": _range([w.get("accuracy_runtime") for w in winners], lambda v: shown(v, ".2f", "", 100)),
                "measured latency, µs": _range([w.get("measured_us") for w in winners], lambda v: microseconds(v, "")),
                "precision of their layers": ", ".join(
                    f"{name} {count / len(layers):.0%}" for name, count in sorted(precisions.items())
                ),
                "sparse layers": f"{sparse / len(layers):.0%}" if layers else "",
            }
        )
    return rows


def _range(values: Sequence[object], text: Any) -> str:
    known = [value for value in map(number, values) if value is not None]
    return " to ".join(dict.fromkeys((text(min(known)), text(max(known))))) if known else "n/a"


def _name(view: Summary, place: int) -> str:
    return str(device_of(view).get("name", f"device {place + 1}"))
