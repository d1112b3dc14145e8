"""Layers as torch modules, for the runtime torch: what all of its lowerings share.

Between layers a tensor has channels first with the strides of channels last. Quantized ones are bytes, whose grid both sides
know when the modules are made. Float ones are in the numbers in which their layer computes; the next one converts them where
it computes in others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from latency_lut.lowerings.base import (
    LOWERINGS,
    PROGRAM,
    Description,
    LayerWeights,
    Lowering,
    applicable,
    as_itself,
    range_of,
)
from spaces.layers import LayerSpec
from spaces.precision import FLOAT_BITS
from spaces.quantizers import activation_grid

LARGEST_BYTE = 255


@dataclass(frozen=True)
class Grid:
    """Where the levels of a byte lie: `value = (byte - zero_point) * scale`."""

    scale: float
    zero_point: int

    @staticmethod
    def of(low: float, high: float) -> Grid:
        """The grid that covers a range."""
        scale, zero_point = activation_grid(low, high)
        return Grid(float(scale), zero_point)

    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        """Floats as bytes; three kernels. A half is rounded up, where torch's training rounds it to the even level."""
        shifted = torch.rsub(to_dtype(x, torch.float32), self.zero_point + 0.5, alpha=-1.0 / self.scale)
        return shifted.clamp(0.0, LARGEST_BYTE + 0.5).to(torch.uint8)

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """Floats as levels without the scale, still in single precision."""
        levels = torch.round(to_dtype(x, torch.float32) * (1.0 / self.scale))
        return levels.clamp(-self.zero_point, LARGEST_BYTE - self.zero_point)

    def levels(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Bytes as levels without the scale: whole numbers up to 255 in magnitude, exact in bfloat16 too."""
        return x.to(dtype) - self.zero_point if self.zero_point else x.to(dtype)

    def dequantize(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Bytes as the values that they stand for."""
        return self.levels(x, dtype) * self.scale


def to_dtype(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor in other numbers; no kernel where it has them already."""
    return x if x.dtype == dtype else x.to(dtype)


def values(x: torch.Tensor, grid: Grid | None, dtype: torch.dtype) -> torch.Tensor:
    """What a tensor between layers stands for, in the numbers `dtype`."""
    return to_dtype(x, dtype) if grid is None else grid.dequantize(x, dtype)


class LayerProgram(nn.Module):
    """One layer: arithmetic, sum on its grid, skip, activation, output on its grid.

    Args:
        spec: the layer.
        core: from the input as it arrives to floats, bias included.
        skip_grid: of the skip, when that is quantized.
        sum_grid: of the arithmetic's result, where the layer rounds it.
        output_grid: of the output, when that is quantized.
    """

    def __init__(
        self, spec: LayerSpec, core: nn.Module, skip_grid: Grid | None, sum_grid: Grid | None, output_grid: Grid | None
    ) -> None:
        super().__init__()
        self.spec, self.core = spec, core
        self.skip_grid, self.sum_grid, self.output_grid = skip_grid, sum_grid, output_grid

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        """Input and skip `(n, channels, height, width)`."""
        y: torch.Tensor = self.core(x)
        if self.sum_grid is not None:
            y = to_dtype(self.sum_grid.round(y) * self.sum_grid.scale, y.dtype)
        if skip is not None:
            y = y + values(skip, self.skip_grid, y.dtype)
        absorbed = self.output_grid is not None and self.output_grid.zero_point == 0  # no byte is below zero
        if self.spec.activation == "relu" and not absorbed:
            y = F.relu(y)
        elif self.spec.activation == "hard_swish":
            y = F.hardswish(y)
        elif self.spec.activation == "relu6":
            y = F.relu6(y)
        return y if self.output_grid is None else self.output_grid.quantize(y)


ModuleCore = Callable[[LayerSpec, LayerWeights, Grid | None], nn.Module]


def torch_lowering(
    name: str,
    applies: Callable[[LayerSpec], bool],
    runs_as: Callable[[LayerSpec], LayerSpec] = as_itself,
    *,
    runs_on: Callable[[Description], bool] = lambda description: True,
    integer_kernels: int = 0,
    rounds: bool = False,
) -> Callable[[ModuleCore], ModuleCore]:
    """Register a lowering of the runtime torch: a function that makes a layer's arithmetic as a module.

    It gets the layer, what fills it, and the grid of its input where that is quantized. See `Lowering` for the arguments.
    """

    def register(core: ModuleCore) -> ModuleCore:
        LOWERINGS[name] = Lowering(name, applies, core, runs_as, name, integer_kernels, PROGRAM, runs_on, rounds)
        return core

    return register


def lower_to_module(
    name: str, spec: LayerSpec, weights: LayerWeights, input_grid: Grid | None, skip_grid: Grid | None
) -> LayerProgram:
    """A layer as a module.

    Args:
        name: a lowering of the runtime torch that applies to the layer.
        spec: the layer.
        weights: what fills it.
        input_grid: of the main input, as `spec.input_bits` says.
        skip_grid: of the skip, as `spec.skip_bits` says.

    Raises:
        ValueError: the lowering does not apply, or a range that the layer needs is missing.
    """
    entry = LOWERINGS.get(name)
    if entry is None or entry.model_kind != PROGRAM or not entry.applies(spec):
        allowed = ", ".join(applicable(spec, {"model_kind": PROGRAM}))
        raise ValueError(f"lowering {name!r} does not apply to {spec}; allowed are {allowed}")
    sum_grid = output_grid = None
    if spec.quantizes_sum:
        sum_grid = Grid.of(*range_of(weights.sum_range, "sum_range", spec))
    if spec.output_bits < FLOAT_BITS:
        output_grid = Grid.of(*range_of(weights.output_range, "output_range", spec))
    return LayerProgram(spec, entry.core(spec, weights, input_grid), skip_grid, sum_grid, output_grid)
