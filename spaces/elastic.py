"""Elastic operators: layers whose weights are shared by every size, sparsity and precision.

An elastic layer stores the weight of its largest form and computes any smaller `LayerSpec` from it:

    stored weight -> slice (width, kernel) -> sparsify (mask) -> quantize -> functional operator

Each step is skipped when it changes nothing; at full size, dense and float the parameter itself is used. Batch norm always
normalises with the statistics of the batch: running statistics belong to one architecture, so they live in the plain layer
that `extract` makes. A new operator is one class with `@operator`; the contract tests pick it up.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from spaces.depthwise import depthwise_conv2d
from spaces.layers import FLOAT_BITS, LayerSpec
from spaces.plain import PlainLayer, finish_layer
from spaces.quantizers import quantize_to_own_range, quantize_weight
from spaces.sparsity import mask


class ElasticLayer(nn.Module, ABC):
    """Shared weights of one layer of a space.

    Args:
        spec: its largest form.
    """

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, spec: LayerSpec, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the layer as `spec` says.

        Args:
            spec: at most as large as the largest form.
            x: `(n, spec.in_channels, spec.height, spec.width)`.
            skip: of the output's shape, when `spec.skip_bits` is not 0.
        """
        if spec.weight_bits < FLOAT_BITS and spec.input_bits == FLOAT_BITS:
            x = _quantize_by_batch(x)
        return finish_layer(spec, self.arithmetic(spec, x), skip, _quantize_by_batch, _quantize_by_batch)

    @abstractmethod
    def arithmetic(self, spec: LayerSpec, x: torch.Tensor) -> torch.Tensor:
        """The operator itself with its batch norm, before skip and activation."""

    @abstractmethod
    def extract(self, spec: LayerSpec) -> PlainLayer:
        """A plain layer with copies of what `spec` uses; in training mode it computes the same as `forward`."""


OPERATORS: dict[str, type[ElasticLayer]] = {}

Layer = TypeVar("Layer", bound=type[ElasticLayer])


def operator(name: str) -> Callable[[Layer], Layer]:
    """Register an elastic operator under its name in `LayerSpec.operator`."""

    def register(cls: Layer) -> Layer:
        OPERATORS[name] = cls
        return cls

    return register


def effective_weight(weight: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
    """The weight that `spec` computes with, `spec.weight_shape`: sliced, masked and quantized from the stored one."""
    out_channels, in_channels, *kernel = spec.weight_shape
    if weight.shape[:2] != (out_channels, in_channels):
        weight = weight[:out_channels, :in_channels]
    if kernel and kernel[0] != weight.shape[-1]:
        border = (weight.shape[-1] - kernel[0]) // 2
        weight = weight[:, :, border : border + kernel[0], border : border + kernel[0]]
    keep = mask(weight, spec.sparsity)
    if keep is not None:
        weight = weight * keep
    return quantize_weight(weight) if spec.weight_bits < FLOAT_BITS else weight


def _quantize_by_batch(x: torch.Tensor) -> torch.Tensor:
    return quantize_to_own_range(x)[0]


@operator("conv2d")
class ElasticConv2d(ElasticLayer):
    """Convolution (dense or depthwise) with batch norm. Width and kernel are slices: first channels, centre of the kernel."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec)
        self.weight = nn.Parameter(torch.empty(spec.weight_shape))
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        if spec.depthwise:
            nn.init.normal_(self.weight, std=math.sqrt(2.0) / spec.kernel)
        self.norm_weight = nn.Parameter(torch.ones(spec.out_channels))
        self.norm_bias = nn.Parameter(torch.zeros(spec.out_channels))

    def arithmetic(self, spec: LayerSpec, x: torch.Tensor) -> torch.Tensor:
        weight = effective_weight(self.weight, spec)
        if spec.depthwise:
            y = depthwise_conv2d(x, weight, spec.stride)
        else:
            y = F.conv2d(x, weight, stride=spec.stride, padding=spec.kernel // 2, groups=spec.groups)
        out = spec.out_channels
        return F.batch_norm(y, None, None, self.norm_weight[:out], self.norm_bias[:out], training=True)

    def extract(self, spec: LayerSpec) -> PlainLayer:
        conv = nn.Conv2d(
            spec.in_channels,
            spec.out_channels,
            spec.kernel,
            spec.stride,
            spec.kernel // 2,
            groups=spec.groups,
            bias=False,
            device=self.weight.device,
        )
        norm = nn.BatchNorm2d(spec.out_channels, device=self.weight.device)
        with torch.no_grad():
            conv.weight.copy_(effective_weight(self.weight, spec))
            norm.weight.copy_(self.norm_weight[: spec.out_channels])
            norm.bias.copy_(self.norm_bias[: spec.out_channels])
        return PlainLayer(spec, conv, norm)


@operator("linear")
class ElasticLinear(ElasticLayer):
    """Linear layer with bias."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec)
        self.weight = nn.Parameter(torch.empty(spec.weight_shape))
        nn.init.normal_(self.weight, std=1.0 / math.sqrt(spec.in_channels))
        self.bias = nn.Parameter(torch.zeros(spec.out_channels))

    def arithmetic(self, spec: LayerSpec, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.flatten(1), effective_weight(self.weight, spec), self.bias[: spec.out_channels])

    def extract(self, spec: LayerSpec) -> PlainLayer:
        linear = nn.Linear(spec.in_channels, spec.out_channels, device=self.weight.device)
        with torch.no_grad():
            linear.weight.copy_(effective_weight(self.weight, spec))
            linear.bias.copy_(self.bias[: spec.out_channels])
        return PlainLayer(spec, linear)


@operator("global_pool")
class GlobalPool(ElasticLayer):
    """Mean over rows and columns; nothing to share."""

    def arithmetic(self, spec: LayerSpec, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(2, 3), keepdim=True)

    def extract(self, spec: LayerSpec) -> PlainLayer:
        return PlainLayer(spec, nn.AdaptiveAvgPool2d(1))
