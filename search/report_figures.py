"""The figures of a run's report, each drawn from its summary.

A figure function takes the whole summary and returns a plotly figure, or `None` where the summary has nothing to draw. Titles,
captions and the page itself are in `report_template.html`. Text that comes from the run is escaped here, because plotly reads a
small HTML of its own. Colours are those of Okabe and Ito, which colour-blind people can tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from latency_lut.figures import INK, figure_of, number, safe, shown, with_numbers
from search.report_text import Summary, family_name, microseconds, pareto, percent, plus_minus

BLUE, ORANGE, GREEN, RED, SKY, PINK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7"
GREY = "#8A8F98"
MARKERS = {  # of baselines, by family
    "uniform_int8": (RED, "square"),
    "uniform_float": (GREEN, "diamond"),
    "largest_float": (INK, "star"),
    "random": (PINK, "x"),
}


# -- the front ------------------------------------------------------------------------------------------------------------


def front(summary: Summary) -> go.Figure | None:
    """Measured latency against test accuracy in the runtime: winners, where they were predicted, baselines."""
    winners = with_numbers(summary.get("winners"), "measured_us", "accuracy_runtime")
    baselines = with_numbers(summary.get("baselines"), "measured_us", "accuracy_runtime")
    if not winners:
        return None
    figure = figure_of(520, "latency (µs)", "test accuracy in the runtime")
    steps = pareto((w["measured_us"], w["accuracy_runtime"]) for w in winners)
    line = {"color": BLUE, "width": 1.5, "dash": "dot", "shape": "hv"}
    figure.add_scatter(**_xy(steps), mode="lines", line=line, name="front of the winners", hoverinfo="skip")
    for family in dict.fromkeys((*MARKERS, *(str(b.get("family")) for b in baselines))):
        members = [b for b in baselines if str(b.get("family")) == family]
        if not members:
            continue
        colour, symbol = MARKERS.get(family, (GREY, "triangle-up"))
        figure.add_scatter(
            **_xy((b["measured_us"], b["accuracy_runtime"]) for b in members),
            mode="markers",
            marker={"color": colour, "symbol": symbol, "size": 14 if family == "largest_float" else 9},
            name=f"{safe(family_name(family))}, measured",
            **hover_of(_baseline_text(b) for b in members),
        )
    threads: list[tuple[float | None, float | None]] = []
    for w in (w for w in winners if number(w.get("predicted_us")) is not None):
        threads += [(w["predicted_us"], w["accuracy_runtime"]), (w["measured_us"], w["accuracy_runtime"]), (None, None)]
    figure.add_scatter(**_xy(threads), mode="lines", line={"color": INK, "width": 1}, hoverinfo="skip", showlegend=False)
    figure.add_scatter(
        **_xy((w["measured_us"], w["accuracy_runtime"]) for w in winners),
        mode="markers+text",
        cliponaxis=False,
        marker={"color": [BLUE if w.get("verified") else GREY for w in winners], "size": 13},
        text=[safe(w.get("rank", "")) for w in winners],
        textposition=["top left" if (w["measured_us"], w["accuracy_runtime"]) in steps else "bottom right" for w in winners],
        name="winner, measured (number: rank)",
        **hover_of(winner_text(w) for w in winners),
    )
    hollow = {"symbol": "circle-open", "color": INK, "size": 13, "line": {"width": 1.5}}
    figure.add_scatter(**_xy(threads[::3]), mode="markers", marker=hollow, name="winner, predicted latency", hoverinfo="skip")
    figure.update_xaxes(**latency_axis([w["measured_us"] for w in (*winners, *baselines)] + [x for x, _ in threads if x]))
    figure.update_yaxes(tickformat=".1%")
    return figure


def winner_text(w: Mapping[str, Any]) -> str:
    """All figures of a winner, for hovering."""
    return (
        f"<b>winner {safe(w.get('rank', ''))}</b>{'' if w.get('verified') else ' (not verified)'}"
        f"<br>test accuracy, runtime: {percent(w.get('accuracy_runtime'))}"
        f"<br>test accuracy, torch: {percent(w.get('accuracy_torch'))}"
        f"<br>validation accuracy, torch: {percent(w.get('accuracy_validation'))}"
        f"<br>latency measured: {plus_minus(w.get('measured_us'), w.get('spread_us'))} µs"
        f"<br>latency predicted: {plus_minus(w.get('predicted_us'), w.get('std_us'))} µs"
        f"<br>file: {shown(w.get('bytes'), ',.1f', ' kB', 1e-3)}, {shown(w.get('macs'), ',.2f', 'M MACs', 1e-6)}"
        f"<br>{shown(w.get('parameters'), ',.1f', 'k parameters', 1e-3)}, "
        f"peak activations {shown(w.get('peak_activation_bytes'), ',.1f', ' kB', 1e-3)}"
    )


def _baseline_text(b: Mapping[str, Any]) -> str:
    return (
        f"<b>{safe(b.get('name', ''))}</b><br>test accuracy, runtime: {percent(b.get('accuracy_runtime'))}"
        f"<br>latency measured: {plus_minus(b.get('measured_us'), b.get('spread_us'))} µs"
        f"<br>file: {shown(b.get('bytes'), ',.1f', ' kB', 1e-3)}"
    )


# -- predictors -----------------------------------------------------------------------------------------------------------


def latency(summary: Summary) -> go.Figure | None:
    """Predicted against measured latency of whole networks that the model was not fitted to, and of the winners."""
    model = summary.get("latency_model") or {}
    held_out = _pairs(model.get("predicted_us"), model.get("measured_us"))
    winners = with_numbers(summary.get("winners"), "predicted_us", "measured_us")
    points = held_out + [(w["predicted_us"], w["measured_us"]) for w in winners]
    if not points:
        return None
    figure = figure_of(420, "predicted latency (µs)", "measured latency (µs)")
    ends = [0.85 * min(min(p) for p in points), 1.15 * max(max(p) for p in points)]
    tolerance = number((summary.get("tolerances") or {}).get("latency"))
    if tolerance is not None:
        band = {"x": ends + ends[::-1], "y": [e * (1 + tolerance) for e in ends] + [e * (1 - tolerance) for e in ends[::-1]]}
        name = f"within ±{100 * tolerance:.0f} %"
        figure.add_scatter(
            **band, mode="lines", fill="toself", fillcolor="#EEF3F8", line={"width": 0}, hoverinfo="skip", name=name
        )
    figure.add_scatter(x=ends, y=ends, mode="lines", line={"color": GREY, "width": 1}, hoverinfo="skip", showlegend=False)
    text = [f"held-out network<br>predicted {microseconds(p)}<br>measured {microseconds(m)}" for p, m in held_out]
    marker = {"color": ORANGE, "size": 9, "symbol": "diamond", "line": {"color": "white", "width": 1}}
    figure.add_scatter(**_xy(held_out), mode="markers", marker=marker, name="held-out networks", **hover_of(text))
    marker = {"color": BLUE, "size": 10, "line": {"color": "white", "width": 1}}
    xy = _xy((w["predicted_us"], w["measured_us"]) for w in winners)
    figure.add_scatter(**xy, mode="markers", marker=marker, name="winners", **hover_of(winner_text(w) for w in winners))
    axis = latency_axis(ends)
    return figure.update_xaxes(**axis).update_yaxes(**axis)


def accuracy(summary: Summary) -> go.Figure | None:
    """Predicted against measured validation accuracy of held-out architectures."""
    predictor = summary.get("accuracy_predictor") or {}
    points = _pairs(predictor.get("predicted"), predictor.get("measured"))
    if not points:
        return None
    figure = figure_of(420, "predicted accuracy", "validation accuracy, measured")
    ends = [min(min(p) for p in points), max(max(p) for p in points)]
    figure.add_scatter(x=ends, y=ends, mode="lines", line={"color": GREY, "width": 1}, name="equal", hoverinfo="skip")
    text = [f"predicted {percent(p)}<br>measured {percent(m)}" for p, m in points]
    marker = {"color": SKY, "size": 8, "line": {"color": BLUE, "width": 1}}
    figure.add_scatter(**_xy(points), mode="markers", marker=marker, name="held-out architectures", **hover_of(text))
    return figure.update_xaxes(tickformat=".0%").update_yaxes(tickformat=".0%")


# -- the search -----------------------------------------------------------------------------------------------------------


def search(summary: Summary) -> go.Figure | None:
    """Predicted latency against accuracy: candidates seen by the predictors alone, evaluated ones, random ones, the front."""
    study = summary.get("study") or {}
    found = with_numbers(summary.get("front"), "predicted_us", "accuracy")
    strategy = safe((summary.get("relaxation") or {}).get("strategy", "gradient search"))
    groups = (
        ("candidates, accuracy predicted", study.get("cloud"), {"color": "#C3C8D0", "size": 4}),
        ("random search, accuracy measured", study.get("random"), {"color": PINK, "size": 7, "symbol": "x"}),
        ("evaluated, accuracy measured", study.get("evaluated"), {"color": SKY, "size": 7}),
        (f"{strategy}, accuracy measured", study.get("relaxed"), {"color": ORANGE, "size": 9, "symbol": "diamond"}),
    )
    figure = figure_of(460, "predicted latency (µs)", "validation accuracy")
    latencies = [f["predicted_us"] for f in found]
    for name, points, marker in groups:
        pairs = [(x, y) for x, y, *_ in points or [] if number(x) is not None and number(y) is not None]
        latencies += [x for x, _ in pairs]
        text = (f"{name}<br>latency predicted: {microseconds(x)}<br>validation accuracy: {percent(y)}" for x, y in pairs)
        if pairs:
            figure.add_scatter(**_xy(pairs), mode="markers", marker=marker, name=name, **hover_of(text))
    if not latencies:
        return None
    found.sort(key=lambda f: float(f["predicted_us"]))
    figure.add_scatter(
        **_xy((f["predicted_us"], f["accuracy"]) for f in found),
        mode="lines+markers",
        line={"color": BLUE, "width": 2, "shape": "hv"},
        marker={"size": 8, "color": BLUE},
        name="front, accuracy measured",
        **hover_of(f"front<br>predicted {microseconds(f['predicted_us'])}<br>accuracy {percent(f['accuracy'])}" for f in found),
    )
    return figure.update_xaxes(**latency_axis(latencies)).update_yaxes(tickformat=".0%")


def hypervolume(summary: Summary) -> go.Figure | None:
    """Hypervolume after the initial evaluations and after each round, of all devices' studies, beside random search."""
    study = summary.get("study") or {}
    values = [number(value) for value in study.get("hypervolume_by_round") or []]
    if not values:
        return None
    figure = figure_of(300, "round", "hypervolume")
    rounds = list(range(1, len(values) + 1))
    told = [safe(after).replace("round ", "") for after in study.get("hypervolume_after") or []]
    names = told if len(told) == len(values) else [str(number) for number in rounds]
    figure.add_scatter(x=rounds, y=values, mode="lines+markers", line={"color": BLUE, "width": 2}, name="search")
    by_random = number(study.get("hypervolume_random"))
    if by_random is not None:
        line = {"color": PINK, "width": 2, "dash": "dash"}
        figure.add_scatter(x=[0.75, len(values) + 0.25], y=[by_random] * 2, mode="lines", line=line, name="random search")
    return figure.update_xaxes(tickvals=rounds, ticktext=names, range=[0.7, len(values) + 0.3])


def training(summary: Summary) -> go.Figure | None:
    """Validation accuracy of the largest and the smallest network by epoch."""
    return _curve(summary, "validation_accuracy", "validation accuracy", ".0%")


def losses(summary: Summary) -> go.Figure | None:
    """Training loss of the largest and the smallest network by epoch."""
    return _curve(summary, "loss", "training loss", "")


def _curve(summary: Summary, kind: str, title: str, tickformat: str) -> go.Figure | None:
    curve = (summary.get("supernet") or {}).get("curve") or []
    figure = figure_of(300, "epoch", title)
    for size, colour, dash in (("largest", BLUE, "solid"), ("smallest", ORANGE, "dash")):
        keys = (f"{kind}_{size}", f"{size}_{kind}")
        points = [(c.get("epoch"), next((number(c[key]) for key in keys if key in c), None)) for c in curve]
        if any(value is not None for _, value in points):
            figure.add_scatter(**_xy(points), mode="lines", line={"color": colour, "width": 2, "dash": dash}, name=size)
    return figure.update_yaxes(tickformat=tickformat) if figure.data else None


def stages(summary: Summary) -> go.Figure | None:
    """Seconds of each stage."""
    seconds = {str(name): number(value) or 0.0 for name, value in (summary.get("stages") or {}).items()}
    if not seconds:
        return None
    figure = figure_of(70 + 28 * len(seconds), "seconds", "")
    figure.add_bar(
        x=list(seconds.values()),
        y=[safe(name) for name in seconds],
        orientation="h",
        marker={"color": BLUE},
        text=[f"{value:.1f} s" for value in seconds.values()],
        textposition="outside",
        cliponaxis=False,
        hoverinfo="skip",
        showlegend=False,
    )
    figure.update_xaxes(range=[0, 1.15 * max(*seconds.values(), 1e-9)])
    return figure.update_yaxes(autorange="reversed", showgrid=False, ticks="", type="category").update_layout(
        dragmode=False, margin_t=10
    )


# -- common to all --------------------------------------------------------------------------------------------------------


def latency_axis(values: Sequence[float]) -> dict[str, Any]:
    """Logarithmic where latencies spread over more than a factor of six, with ticks at 1, 2, 5, 10, ..."""
    low, high = min(values), max(values)
    if low <= 0 or high / low <= 6:
        return {}
    ticks = [m * 10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for m in (1, 2, 5)]
    pad = 0.06 * math.log10(high / low)
    span = [math.log10(low) - pad, math.log10(high) + pad]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:,g}" for tick in ticks], "range": span}


def _pairs(xs: Iterable[Any] | None, ys: Iterable[Any] | None) -> list[tuple[float, float]]:
    pairs = zip(xs or [], ys or [], strict=False)
    return [(float(x), float(y)) for x, y in pairs if number(x) is not None and number(y) is not None]


def _xy(points: Iterable[tuple[Any, Any]]) -> dict[str, list[Any]]:
    kept = list(points)
    return {"x": [x for x, _ in kept], "y": [y for _, y in kept]}


def hover_of(texts: Iterable[str]) -> dict[str, Any]:
    """Arguments of a trace that shows one text per point."""
    return {"hovertext": list(texts), "hovertemplate": "%{hovertext}<extra></extra>"}
