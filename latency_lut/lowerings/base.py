"""What a lowering is, and what all of them share: skip, activation and the output's grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir

from latency_lut.graph import GraphBuilder, Tensor
from spaces.layers import LayerSpec
from spaces.precision import BYTE_PRODUCT_BITS, FLOAT, FLOAT_BITS
from spaces.quantizers import EncodedWeight, activation_grid

ONNX, PROGRAM = "onnx", "pt2"  # kinds of models, by the ending of their files

Range = tuple[float, float]
Description = Mapping[str, str | int]


@dataclass(frozen=True)
class LayerWeights:
    """What fills a layer in its final form: batch norm folded, mask applied, weights on their grid.

    Args:
        weight: float32 of `LayerSpec.weight_shape`, or the second of `LayerSpec.factor_shapes`; `None` without weights;
            `(channels,)` for a layer norm.
        bias: `(out_channels,)` float32, `None` likewise.
        output_range: range of the output's grid, when the output is quantized.
        input_range: range of the input's grid, when an integer layer gets a float input.
        sum_range: range of what an integer layer computes before a skip is added or a hard-swish applied.
        encoded: how `weight` is stored, when it is quantized; `None`: as the quantizer with the largest magnitude on its last
            level would.
        factor: float32 of the first of `LayerSpec.factor_shapes`, for layers with a rank.
        factor_encoded: how `factor` is stored.
        factor_range: range of what an integer layer with a rank computes between its factors.
        traced: float32 weights of a program, in its order.
    """

    weight: np.ndarray | None = None
    bias: np.ndarray | None = None
    output_range: Range | None = None
    input_range: Range | None = None
    sum_range: Range | None = None
    encoded: EncodedWeight | None = None
    factor: np.ndarray | None = None
    factor_encoded: EncodedWeight | None = None
    factor_range: Range | None = None
    traced: tuple[np.ndarray, ...] = ()


Core = Callable[..., ir.Value]  # of graph, layer, weights and input; of a program also its second input


def as_itself(spec: LayerSpec) -> LayerSpec:
    """A layer that costs what it says."""
    return spec


def as_byte_products(spec: LayerSpec) -> LayerSpec:
    """Weights of fewer bits run in the kernels for bytes; without VNNI x86 CPUs have others for those of 8 bits.

    Levels of few bits are multiplied up, see `spaces.quantizers.integer_layer`, but not beyond those of 7 bits.
    """
    bits = max(spec.arithmetic.weight_bits, BYTE_PRODUCT_BITS)
    return replace(spec, precision=f"w{bits}a8")


def as_dense_float(spec: LayerSpec) -> LayerSpec:
    """Removed weights are multiplied as zeros, stored ones are unpacked into floats when the model is loaded."""
    return replace(spec, sparsity="dense", precision=FLOAT)


@dataclass(frozen=True)
class Lowering:
    """One way to lower a layer.

    Args:
        name: of the lowering.
        applies: to which layers it does.
        core: makes the nodes of the arithmetic.
        runs_as: the layer that the runtime runs just as fast, since it runs the same kernels: the key in a latency table.
        measured_as: with which lowering that layer has these kernels.
        integer_kernels: how many kernels of the optimized graph compute in integers.
        model_kind: `ONNX`; or `PROGRAM`, for the runtime torch, whose lowerings make modules instead of nodes.
        runs_on: the devices that have its kernels, by their `Device.describe`.
        rounds: whether a layer of floats comes out rounded more coarsely than in single precision.
    """

    name: str
    applies: Callable[[LayerSpec], bool]
    core: Callable[..., Any]
    runs_as: Callable[[LayerSpec], LayerSpec]
    measured_as: str
    integer_kernels: int = 0
    model_kind: str = ONNX
    runs_on: Callable[[Description], bool] = lambda description: True
    rounds: bool = False


LOWERINGS: dict[str, Lowering] = {}


def lowering(
    name: str,
    applies: Callable[[LayerSpec], bool],
    runs_as: Callable[[LayerSpec], LayerSpec] = as_itself,
    integer_kernels: int = 0,
    measured_as: str | None = None,
) -> Callable[[Core], Core]:
    """Register a lowering; see `Lowering` for the arguments."""

    def register(core: Core) -> Core:
        LOWERINGS[name] = Lowering(name, applies, core, runs_as, measured_as or name, integer_kernels)
        return core

    return register


def model_kind(description: Description) -> str:
    """What a device with this `Device.describe` loads: `ONNX`, or `PROGRAM` where it says so."""
    return str(description.get("model_kind", ONNX))


def applicable(spec: LayerSpec, description: Description = MappingProxyType({})) -> tuple[str, ...]:
    """Names of the lowerings that can make this layer on a device with this `Device.describe`; by default as ONNX."""
    kind = model_kind(description)
    return tuple(
        name
        for name, entry in LOWERINGS.items()
        if entry.model_kind == kind and entry.runs_on(description) and entry.applies(spec)
    )


def lower(name: str, g: GraphBuilder, spec: LayerSpec, weights: LayerWeights, x: Tensor, skip: Tensor | None) -> Tensor:
    """Append a layer's nodes to a graph.

    Args:
        name: a lowering out of `applicable(spec)`.
        g: the graph; its scope names the layer.
        spec: the layer.
        weights: what fills it.
        x: main input, quantized as `spec.input_bits` says.
        skip: what is added before the activation, when `spec.skip_bits` is not 0.

    Raises:
        ValueError: the lowering does not apply, or a range that the layer needs is missing.
    """
    if name not in LOWERINGS or LOWERINGS[name].model_kind != ONNX or not LOWERINGS[name].applies(spec):
        raise ValueError(f"lowering {name!r} does not apply to {spec}; allowed are {', '.join(applicable(spec))}")
    if spec.program:  # its second input is no addition
        return Tensor(LOWERINGS[name].core(g, spec, weights, x, skip))
    y = LOWERINGS[name].core(g, spec, weights, x)
    if spec.quantizes_sum:
        quantized = g.quantize(y, *activation_grid(*range_of(weights.sum_range, "sum_range", spec)), name="sum_q")
        y = g.dequantize(quantized, "sum_dq")
    if skip is not None:
        y = g.op("Add", [y, g.dequantize(skip, "skip_dq")], "add")
    y = _activation(g, spec, y)
    if spec.output_bits < FLOAT_BITS:
        return g.quantize(y, *activation_grid(*range_of(weights.output_range, "output_range", spec)), name="out_q")
    return Tensor(y)


def _activation(g: GraphBuilder, spec: LayerSpec, y: ir.Value) -> ir.Value:
    if spec.activation == "hard_swish":
        return g.op("HardSwish", [y], "act")
    if spec.activation == "relu6":
        return g.op("Clip", [y, *(g.constant(f"act_{v}", np.array(v, np.float32)) for v in (0, 6))], "act")
    # Between two quantized tensors onnxruntime turns a float Conv into an integer one (WeightBiasQuantization), with other
    # speed and other outputs than the architecture says. It looks through Relu only; a LeakyRelu computes the same (slope 0
    # is ReLU, slope 1 the identity), fuses into the Conv for free, and stops it.
    guarded = not spec.integer and spec.weight_shape and not spec.skip_bits and spec.input_bits < FLOAT_BITS > spec.output_bits
    if guarded:
        return g.op("LeakyRelu", [y], "act", alpha=0.0 if spec.activation == "relu" else 1.0)
    return g.op("Relu", [y], "act") if spec.activation == "relu" else y


def range_of(value: Range | None, what: str, spec: LayerSpec) -> Range:
    """A range that a layer needs.

    Raises:
        ValueError: it is missing.
    """
    if value is None:
        raise ValueError(f"{what} is missing for {spec}; calibrate the network first")
    return value
