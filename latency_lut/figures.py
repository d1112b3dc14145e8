"""What all pages have in common: the style of their figures, and values as text.

Used by `latency_lut.pays_report` and by the report of a search; colours are those of Okabe and Ito, which colour-blind people
can tell apart.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

INK = "#22262D"
PAGE_PARTS = Path(__file__).parent  # `page_style.css` and `page_script.js`, which templates include


def number(value: object) -> float | None:
    """A finite number, or `None` for everything else."""
    finite = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if finite else None  # type: ignore[arg-type]


def shown(value: object, pattern: str, unit: str = "", factor: float = 1.0) -> str:
    """A number formatted and followed by its unit, or `n/a` where there is none."""
    finite = number(value)
    return "n/a" if finite is None else f"{finite * factor:{pattern}}{unit}"


def ratio(value: object) -> str:
    """A factor, e.g. of speed."""
    return shown(value, ".2f", "\N{MULTIPLICATION SIGN}")


def with_numbers(entries: Iterable[Mapping[str, Any]] | None, *keys: str) -> list[Mapping[str, Any]]:
    """Entries that have a finite number under every key."""
    return [entry for entry in entries or [] if all(number(entry.get(key)) is not None for key in keys)]


def safe(text: object) -> str:
    """Text with the characters escaped that plotly would read as HTML."""
    return html.escape(str(text), quote=False)


def figure_of(height: int, x: str, y: str) -> go.Figure:
    """An empty figure in the pages' style: height in pixels, titles of the axes."""
    font = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
    axis = {"gridcolor": "#EBEEF2", "zeroline": False, "linecolor": "#B8BEC8", "ticks": "outside", "automargin": True}
    return go.Figure(
        layout={
            "template": "none",
            "height": height,
            "font": {"family": font, "size": 13, "color": INK},
            "margin": {"l": 10, "r": 14, "t": 48, "b": 10},
            "xaxis": {**axis, "title": {"text": x, "standoff": 8, "font": {"size": 13}}},
            "yaxis": {**axis, "title": {"text": y, "standoff": 8, "font": {"size": 13}}},
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"size": 12}},
            "hoverlabel": {
                "align": "left",
                "font": {"family": font, "size": 12, "color": INK},
                "bgcolor": "white",
                "bordercolor": "#B8BEC8",
            },
            "hovermode": "closest",
        }
    )


def condition(device: Mapping[str, Any], statistic: object) -> str:
    """What every latency says: device, runtime, threads, batch and statistic; empty without a device.

    Args:
        device: its name as `name`, and what `Device.describe` says.
        statistic: what a latency is over the runs.
    """
    if not device:
        return ""
    threads, batch = device.get("threads", "n/a"), device.get("batch", "n/a")
    runtime = f"{device.get('runtime', 'runtime unknown')} {device.get('runtime_version', '')}".strip()
    parts = [f"{device.get('name', 'device')} ({device.get('cpu', 'CPU unknown')})", runtime]
    parts += [str(device[key]) for key in ("provider", "host") if key in device]
    parts += [f"{threads} thread{'' if threads == 1 else 's'}", f"batch {batch}"]
    return ", ".join(parts) + (f"; {statistic}" if statistic else "")
