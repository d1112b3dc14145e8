"""Two figures of a run's report: what was chosen layer by layer, and what pays on the device.

Like the others in `search.report_figures`: each takes the whole summary and returns a figure, or `None` without data.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from latency_lut.figures import figure_of, safe, shown
from latency_lut.pays_figure import pays_figure
from search.report_figures import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, hover_of
from search.report_text import Summary, microseconds
from spaces.errors import UserError
from spaces.sparsity import parse

PRECISIONS = {"fp32": ("float", ORANGE), "w7a8": ("int8, weights of 7 bits", BLUE), "w8a8": ("int8", SKY)}
OTHER_COLOURS = (PINK, GREEN, RED)


def layers(summary: Summary) -> go.Figure | None:
    """One row per winner, one cell per layer along the depth: colour is precision, the filled share is what sparsity keeps."""
    winners = [w for w in summary.get("winners") or [] if w.get("layers")]
    columns = merged([[str(layer.get("name")) for layer in w["layers"]] for w in winners])
    if not columns:
        return None
    figure = figure_of(100 + 38 * len(winners) + round(6.2 * max(len(name) for name in columns)), "", "")
    place = {name: index for index, name in enumerate(columns)}
    styles: dict[tuple[str, str, str], list[tuple[int, int, Mapping[str, Any]]]] = {}
    for row, w in enumerate(winners):
        for layer in w["layers"]:
            styles.setdefault(style_of(layer), []).append((place[str(layer.get("name"))], row, layer))
    cells = [cell for group in styles.values() for cell in group]
    box = {"color": "#E9ECF0", "line": {"width": 0}}
    base = [row + 0.1 for _, row, _ in cells]
    whole = {"width": 0.88, "marker": box, "showlegend": False, **hover_of(_layer_text(winners[row], x) for _, row, x in cells)}
    figure.add_bar(x=[x for x, _, _ in cells], y=[0.8] * len(cells), base=base, **whole)
    patterns = patterns_of(sparsity for _, sparsity, _ in styles)
    for (name, sparsity, colour), group in sorted(styles.items(), key=lambda item: (item[0][0], -kept(item[0][1]))):
        figure.add_bar(
            x=[x for x, _, _ in group],
            y=[0.8 * kept(sparsity)] * len(group),
            base=[row + 0.9 - 0.8 * kept(sparsity) for _, row, _ in group],
            width=0.88,
            marker={"color": colour, "pattern": patterns[sparsity]},
            name=safe(name if sparsity == "dense" else f"{name}, {sparsity}"),
            **hover_of(_layer_text(winners[row], layer) for _, row, layer in group),
        )
    ticks = [f"{w.get('rank', '')} · {microseconds(w.get('measured_us', w.get('predicted_us')))}" for w in winners]
    figure.update_yaxes(tickvals=[row + 0.5 for row in range(len(winners))], ticktext=[safe(t) for t in ticks])
    figure.update_yaxes(range=[len(winners), 0], showgrid=False, ticks="")
    names = [safe(name) for name in columns]
    figure.update_xaxes(
        tickvals=list(range(len(columns))),
        ticktext=names,
        tickangle=-90,
        range=[-0.6, len(names) - 0.4],
        showgrid=False,
        ticks="",
    )
    return figure.update_layout(barmode="overlay", dragmode=False)


PLAIN_KINDS = ("pool", "layer_norm", "attention")  # kinds of layers without a weight that could be sparse or quantized


def style_of(layer: Mapping[str, Any]) -> tuple[str, str, str]:
    """Name of the precision, sparsity, and colour of a layer."""
    text = str(layer.get("precision"))
    name, colour = PRECISIONS.get(text, (text, OTHER_COLOURS[sum(text.encode()) % len(OTHER_COLOURS)]))
    return ("no weights", "dense", GREY) if layer.get("kind") in PLAIN_KINDS else (name, str(layer.get("sparsity")), colour)


def patterns_of(sparsities: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The pattern that each sparsity is drawn with, densest first."""
    stripes = {"fillmode": "overlay", "fgcolor": "white", "size": 6, "solidity": 0.2}
    ordered = sorted(set(sparsities), key=lambda sparsity: (-kept(sparsity), sparsity))
    shapes = itertools.chain(("", "/", "x", ".", "-"), itertools.repeat("|"))
    return {sparsity: {**stripes, "shape": shape} for sparsity, shape in zip(ordered, shapes, strict=False)}


def _layer_text(winner: Mapping[str, Any], layer: Mapping[str, Any]) -> str:
    return (
        f"<b>winner {safe(winner.get('rank', ''))}: {safe(layer.get('name', ''))}</b>"
        f"<br>{safe(layer.get('kind', layer.get('operator', '')))} {safe(layer.get('in_channels', ''))} → "
        f"{safe(layer.get('out_channels', ''))} channels, kernel {safe(layer.get('kernel', ''))}, "
        f"input {safe(layer.get('height', ''))} rows"
        f"<br>{safe(layer.get('precision', ''))}, {safe(layer.get('sparsity', ''))}"
        f"<br>shipped as {safe(layer.get('lowering', ''))}"
        f"<br>{shown(layer.get('macs'), ',.0f')} MACs, predicted {microseconds(layer.get('predicted_us'))}"
    )


def pays(summary: Summary) -> go.Figure | None:
    """Speed-up over the dense float layer, per kind and size of layer (rows) and choice (columns)."""
    return pays_figure(summary.get("pays"))


def merged(sequences: Sequence[Sequence[str]]) -> list[str]:
    """All names in one order that agrees with each sequence; between the same neighbours, in the order of the names."""
    merged: list[str] = []
    for sequence in sorted(sequences, key=len, reverse=True):
        position = 0
        for index, name in enumerate(sequence):
            if name not in merged:
                later, depth = set(sequence[index:]), _by_depth(name)
                while position < len(merged) and merged[position] not in later and _by_depth(merged[position]) < depth:
                    position += 1
                merged.insert(position, name)
            position = merged.index(name) + 1
    return merged


def _by_depth(name: str) -> list[tuple[int, str]]:
    """Numbers within a name compare as numbers: `stage2` comes before `stage10`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def kept(sparsity: str) -> float:
    """Share of the weights that a sparsity text keeps, for drawing: 1 where it says nothing."""
    try:
        return max(0.05, float(parse(sparsity).kept))
    except UserError:
        return 1.0
