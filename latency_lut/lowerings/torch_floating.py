"""Float arithmetic in torch: single precision, bfloat16 and half precision, dense and with gathered groups.

Integer layers run here too, with the values of their levels: a grouped convolution, for one, has no integer kernel in torch.
Weights of few bits are unpacked when the model is made.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from latency_lut.lowerings.base import Description, LayerWeights, range_of
from latency_lut.lowerings.floating import has_groups
from latency_lut.lowerings.nodes import bias_of, encoded_weight, kept_columns, values_of, weight_of
from latency_lut.lowerings.torch_layers import Grid, ModuleCore, to_dtype, torch_lowering, values
from spaces.layers import LayerSpec
from spaces.precision import FLOAT, FLOAT8
from spaces.program import ProgramModule
from spaces.quantizers import quantize_by_sample, quantize_to_float8
from spaces.sparsity import GROUP_BLOCKS, group_channels, kept_inputs
from spaces.tokens import layer_norm, self_attention

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Entrance(nn.Module):
    """The input of a layer with weights: levels of a quantized one, without their scale, which belongs into the weights."""

    def __init__(self, spec: LayerSpec, weights: LayerWeights, grid: Grid | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec, self.dtype, self.grid = spec, dtype, grid
        self.rounding = input_rounding(spec, weights, grid)
        found = grid or self.rounding
        self.scale = 1.0 if found is None else found.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.spec.operator == "linear":
            x = x.flatten(1)
        if self.grid is not None:
            return self.grid.levels(x, self.dtype)
        if self.rounding is not None:
            return to_dtype(self.rounding.round(x), self.dtype)
        precision = self.spec.arithmetic
        if precision.activations == "float8":
            x = quantize_to_float8(to_dtype(x, torch.float32))
        elif precision.activations == "dynamic":
            x = quantize_by_sample(to_dtype(x, torch.float32), precision.scales if isinstance(precision.scales, int) else None)
        return to_dtype(x, self.dtype)


def input_rounding(spec: LayerSpec, weights: LayerWeights, grid: Grid | None) -> Grid | None:
    """The grid on which an integer layer puts a float input."""
    if grid is not None or not spec.integer:
        return None
    return Grid.of(*range_of(weights.input_range, "input_range", spec))


class Weighted(nn.Module):
    """A convolution or a matrix multiplication with a bias."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, stride: int, groups: int) -> None:
        super().__init__()
        layout = torch.channels_last if weight.ndim == 4 else torch.contiguous_format
        self.register_buffer("weight", weight.contiguous(memory_format=layout))
        self.register_buffer("bias", bias)
        self.stride, self.groups, self.padding = stride, groups, weight.shape[-1] // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight.ndim == 2:
            return F.linear(x, self.weight, self.bias)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, groups=self.groups)


class Middle(nn.Module):
    """What an integer layer with a rank has between its factors, as levels without their scale."""

    def __init__(self, grid: Grid, dtype: torch.dtype) -> None:
        super().__init__()
        self.grid, self.dtype = grid, dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return to_dtype(self.grid.round(x), self.dtype)


class Unweighted(nn.Module):
    """Pooling, layer norm and attention."""

    def __init__(self, spec: LayerSpec, weights: LayerWeights, grid: Grid | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec, self.grid, self.dtype = spec, grid, dtype
        if spec.operator == "layer_norm":
            for name, array in (("weight", weight_of(weights)), ("bias", bias_of(weights))):
                self.register_buffer(name, torch.from_numpy(array).to(dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = values(x, self.grid, self.dtype)
        if self.spec.operator == "global_pool":
            return F.adaptive_avg_pool2d(x, 1)
        if self.spec.operator == "layer_norm":
            return layer_norm(x, self.get_buffer("weight"), self.get_buffer("bias"))
        return self_attention(x, self.spec.heads)


class Traced(ProgramModule):
    """A program of `spaces.program`."""

    def __init__(self, spec: LayerSpec, weights: LayerWeights, dtype: torch.dtype) -> None:
        super().__init__(spec.traced, [torch.from_numpy(array).to(dtype) for array in weights.traced])
        self.dtype = dtype

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(*(to_dtype(x, self.dtype) for x in inputs))


def dense_key(spec: LayerSpec) -> LayerSpec:
    """The layer with the same kernels around the same tensors: dense, with weights of the plainest kind."""
    precision = spec.arithmetic
    block = f"@{precision.scales}" if isinstance(precision.scales, int) else ""
    plainest = {"float": FLOAT, "float8": FLOAT8, "static": "w8a8", "dynamic": f"w8d8{block}"}[precision.activations]
    return replace(spec, sparsity="dense", precision=plainest)


def _dense(dtype: torch.dtype) -> ModuleCore:
    def core(spec: LayerSpec, weights: LayerWeights, grid: Grid | None) -> nn.Module:
        if spec.program:
            return Traced(spec, weights, dtype)
        if not spec.weight_shape:
            return Unweighted(spec, weights, grid, dtype)
        entrance = Entrance(spec, weights, grid, dtype)
        dense, bias = decoded(spec, weights), torch.from_numpy(bias_of(weights))
        if not spec.rank:
            weight = (dense * entrance.scale).to(dtype)
            return nn.Sequential(entrance, Weighted(weight, bias.to(dtype), spec.stride, spec.groups))
        first = (_decoded_factor(spec, weights) * entrance.scale).to(dtype)
        parts: list[nn.Module] = [entrance, Weighted(first, None, spec.stride, 1)]
        if spec.integer:
            middle = Grid.of(*range_of(weights.factor_range, "factor_range", spec))
            parts.append(Middle(middle, dtype))
            dense = dense * middle.scale
        return nn.Sequential(*parts, Weighted(dense.to(dtype), bias.to(dtype), 1, 1))

    return core


def _gathered(dtype: torch.dtype) -> ModuleCore:
    def core(spec: LayerSpec, weights: LayerWeights, grid: Grid | None) -> nn.Module:
        entrance = Entrance(spec, weights, grid, dtype)
        channels = group_channels(torch.from_numpy(weight_of(weights)), kept_inputs(spec.sparsity, spec.in_channels)).numpy()
        kept = torch.from_numpy(kept_columns(decoded(spec, weights).numpy(), channels)) * entrance.scale
        bias = torch.from_numpy(bias_of(weights)).to(dtype)
        gather = Gather(torch.from_numpy(channels.reshape(-1)).long())
        return nn.Sequential(gather, entrance, Weighted(kept.to(dtype), bias, spec.stride, GROUP_BLOCKS))

    return core


class Gather(nn.Module):
    """The input channels that each block of outputs keeps, in a row; as bytes where the input is quantized."""

    def __init__(self, channels: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("channels", channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gathered = x.index_select(1, self.get_buffer("channels"))
        return gathered.contiguous(memory_format=torch.channels_last)


def decoded(spec: LayerSpec, weights: LayerWeights) -> torch.Tensor:
    """A layer's weight as the floats that its precision stores, `LayerSpec.weight_shape` or the second factor's shape."""
    dense = weight_of(weights)
    return torch.from_numpy(values_of(dense, encoded_weight(spec, dense, weights.encoded)))


def factor_of(weights: LayerWeights) -> torch.Tensor:
    """The first factor of a layer with a rank.

    Raises:
        ValueError: there is none.
    """
    if weights.factor is None:
        raise ValueError("this layer needs a factor")
    return torch.from_numpy(weights.factor)


def _decoded_factor(spec: LayerSpec, weights: LayerWeights) -> torch.Tensor:
    factor = factor_of(weights).numpy()
    return torch.from_numpy(values_of(factor, encoded_weight(spec, factor, weights.factor_encoded)))


def _runs_as_floats(spec: LayerSpec) -> bool:
    """All layers, but those of 8-bit floats only where torch multiplies none of these: a device without them says so.

    Blocks of an input's features, each with a range of its own, are those of linear layers.
    """
    precision = spec.arithmetic
    if precision.activations == "dynamic" and isinstance(precision.scales, int) and spec.operator != "linear":
        return False
    return precision.activations != "float8" or spec.groups > 1


def _register(name: str, dtype: torch.dtype) -> None:
    rounds = dtype != torch.float32

    def runs_on(description: Description) -> bool:
        return not rounds or description.get("half") == name

    torch_lowering(f"torch_{name}", _runs_as_floats, dense_key, runs_on=runs_on, rounds=rounds)(_dense(dtype))
    torch_lowering(
        f"torch_gather_{name}",
        lambda spec: has_groups(spec) and not spec.arithmetic.rounds_input,
        lambda spec: replace(spec, precision="w8a8" if spec.integer else FLOAT),
        runs_on=runs_on,
        rounds=rounds,
    )(_gathered(dtype))


for _name, _dtype in FLOATS.items():
    _register(_name, _dtype)
