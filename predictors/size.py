"""Bytes of an exported model, predicted from its layers and their lowerings."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from latency_lut.lowering import LOWERINGS
from latency_lut.lowerings.base import ONNX, PROGRAM
from latency_lut.models import layer_bytes
from spaces.layers import Network

MODEL_BYTES = {ONNX: 100, PROGRAM: 4500}  # of a file without layers
ARCHITECTURE_BYTES = 50  # per layer: the choices that the model's metadata names


_layer_bytes = cache(layer_bytes)


def model_bytes(network: Network, lowerings: Sequence[str]) -> int:
    """Bytes of the exported file of a network. Names are part of it, so layers are counted with names of their length."""
    nodes = zip(network.nodes, lowerings, strict=True)
    described = MODEL_BYTES[LOWERINGS[lowerings[0]].model_kind] + ARCHITECTURE_BYTES * len(network.nodes)
    return described + sum(_layer_bytes(node.spec, lowering, "n" * len(node.name)) for node, lowering in nodes)
