"""Lowerings: the ways in which a layer becomes nodes of a graph.

`lower` is called by the profiler with random weights and by the exporter with trained ones; nothing else turns a layer into
nodes, so what was measured is what ships. A layer can have several lowerings (a sparse layer also runs dense, with zeros); all
compute the same function, and `applicable` lists them. They are defined in `latency_lut.lowerings`.

The runtime torch has lowerings of its own, which make torch modules instead of nodes: `lower_to_module`.
"""

from __future__ import annotations

from latency_lut.lowerings import (  # importing them registers them
    dynamic,
    floating,
    integer,
    low_rank,
    torch_floating,
    torch_matrices,
    traced,
    transformer,
)
from latency_lut.lowerings.base import LOWERINGS, Description, LayerWeights, Lowering, applicable, lower, model_kind
from latency_lut.lowerings.torch_layers import lower_to_module

__all__ = [
    "LOWERINGS",
    "Description",
    "LayerWeights",
    "Lowering",
    "applicable",
    "dynamic",
    "floating",
    "integer",
    "low_rank",
    "lower",
    "lower_to_module",
    "model_kind",
    "torch_floating",
    "torch_matrices",
    "traced",
    "transformer",
]
