"""Models of either kind: ONNX, or programs for the runtime torch. The lowerings say which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from latency_lut import network as onnx_models
from latency_lut import programs
from latency_lut.lowering import LOWERINGS, LayerWeights
from latency_lut.lowerings.base import PROGRAM
from spaces.layers import LayerSpec, Network


def build_model(
    network: Network,
    lowerings: Sequence[str],
    weights: Mapping[str, LayerWeights],
    batch: int = 1,
    metadata: dict[str, str] | None = None,
) -> bytes:
    """A network as a serialized model; see `latency_lut.network.build_model` and `latency_lut.programs.build_model`."""
    build = programs.build_model if lowerings and _is_program(lowerings[0]) else onnx_models.build_model
    return build(network, lowerings, weights, batch, metadata)


def build_layer(spec: LayerSpec, lowering: str, weights: LayerWeights, batch: int = 1) -> bytes:
    """One layer alone as a serialized model, in the surroundings that it has in a network."""
    build = programs.build_layer if _is_program(lowering) else onnx_models.build_layer
    return build(spec, lowering, weights, batch)


def layer_bytes(spec: LayerSpec, lowering: str, scope: str) -> int:
    """Bytes that one layer, called `scope`, adds to a model file."""
    count = programs.layer_bytes if _is_program(lowering) else onnx_models.layer_bytes
    return count(spec, lowering, scope)


def _is_program(lowering: str) -> bool:
    return lowering in LOWERINGS and LOWERINGS[lowering].model_kind == PROGRAM
