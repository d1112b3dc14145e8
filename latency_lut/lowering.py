"""Lowerings: the ways in which a layer becomes nodes of a graph.

`lower` is called by the profiler with random weights and by the exporter with trained ones; nothing else turns a layer into
nodes, so what was measured is what ships. A layer can have several lowerings (a sparse layer also runs dense, with zeros); all
compute the same function, and `applicable` lists them. They are defined in `latency_lut.lowerings`.
"""

from __future__ import annotations

from latency_lut.lowerings import dynamic, floating, integer, low_rank, transformer  # importing them registers them
from latency_lut.lowerings.base import LOWERINGS, LayerWeights, Lowering, applicable, lower

__all__ = [
    "LOWERINGS",
    "LayerWeights",
    "Lowering",
    "applicable",
    "dynamic",
    "floating",
    "integer",
    "low_rank",
    "lower",
    "transformer",
]
