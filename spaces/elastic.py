"""Elastic operators: layers whose weights are shared by every size, sparsity, rank and precision.

An elastic layer stores the weights of its largest form (`spaces.weights`) and computes any smaller `LayerSpec` from them.
Batch norm always normalises with the statistics of the batch: running statistics belong to one architecture, so they live in
the plain layer that `extract` makes. A new operator is one class with `@operator`; the contract tests pick it up.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from spaces.bidirectional import bidirectional_conv2d, bidirectional_linear
from spaces.depthwise import depthwise_conv2d
from spaces.layers import LayerSpec
from spaces.low_rank import factors_of
from spaces.plain import Factors, PlainLayer, enter_layer, finish_layer, plain_operator
from spaces.quantizers import EncodedWeight, quantize_to_own_range
from spaces.tokens import LayerNorm, SelfAttention, layer_norm, self_attention
from spaces.weights import ElasticWeight, Estimators, sliced


@dataclass(frozen=True)
class LayerOptions:
    """What a layer may be asked for besides its sizes.

    Args:
        precisions: those that occur; others work too unless their quantizers learn something.
        max_rank: the largest rank that occurs; 0: none.
        selective: whether masks are chosen for the activations (`spaces.selective`).
        estimators: how sparse and quantized weights are trained.
    """

    precisions: tuple[str, ...] = ()
    max_rank: int = 0
    selective: bool = False
    estimators: Estimators = field(default_factory=Estimators)


class ElasticLayer(nn.Module, ABC):
    """Shared weights of one layer of a space.

    Args:
        spec: its largest form.
        options: what it may be asked for.
    """

    def __init__(self, spec: LayerSpec, options: LayerOptions | None = None) -> None:
        super().__init__()
        self.spec, self.options = spec, options or LayerOptions()

    def forward(self, spec: LayerSpec, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the layer as `spec` says.

        Args:
            spec: at most as large as the largest form.
            x: `(n, spec.in_channels, spec.height, spec.width)`.
            skip: of the output's shape, when `spec.skip_bits` is not 0.
        """
        y = self.arithmetic(spec, enter_layer(spec, x, _quantize_by_batch))
        return finish_layer(spec, y, skip, _quantize_by_batch, _quantize_by_batch)

    @abstractmethod
    def arithmetic(self, spec: LayerSpec, x: torch.Tensor) -> torch.Tensor:
        """The operator itself with its batch norm, before skip and activation."""

    @abstractmethod
    def extract(self, spec: LayerSpec) -> PlainLayer:
        """A plain layer with copies of what `spec` uses; in training mode it computes the same as `forward`."""

    def weights_of(self, spec: LayerSpec) -> list[tuple[ElasticWeight, tuple[int, ...]]]:
        """The stored weights that `spec` uses, in the order in which they are applied, with the shapes that it uses of them."""
        return []


OPERATORS: dict[str, type[ElasticLayer]] = {}

Layer = TypeVar("Layer", bound=type[ElasticLayer])


def operator(name: str) -> Callable[[Layer], Layer]:
    """Register an elastic operator under its name in `LayerSpec.operator`."""

    def register(cls: Layer) -> Layer:
        OPERATORS[name] = cls
        return cls

    return register


def _quantize_by_batch(x: torch.Tensor) -> torch.Tensor:
    return quantize_to_own_range(x)[0]


class _WeightedLayer(ElasticLayer):
    """A layer with one weight or, where a rank is asked for, two factors."""

    def __init__(self, spec: LayerSpec, options: LayerOptions | None, values: torch.Tensor) -> None:
        super().__init__(spec, options)
        self.weight = self._elastic(values)
        self.factors: nn.ModuleList | None = None
        if self.options.max_rank:
            self.factors = nn.ModuleList([self._elastic(v) for v in factors_of(values, self.options.max_rank)])

    def _elastic(self, values: torch.Tensor) -> ElasticWeight:
        return ElasticWeight(values, self.options.precisions, self.options.estimators, self.options.selective)

    def weights_of(self, spec: LayerSpec) -> list[tuple[ElasticWeight, tuple[int, ...]]]:
        if not spec.rank:
            return [(self.weight, spec.weight_shape)]
        if self.factors is None or spec.rank > self.options.max_rank:
            raise ValueError(f"rank {spec.rank} of {spec}; this layer has ranks up to {self.options.max_rank}")
        return [(w, shape) for w, shape in zip(self.factors, spec.factor_shapes, strict=True) if isinstance(w, ElasticWeight)]

    def multiplied(self, spec: LayerSpec, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The input times the weight, or times one factor after the other, plus a bias."""
        pairs = self.weights_of(spec)
        if len(pairs) == 1:
            return _multiply(spec, x, *pairs[0], spec.stride, bias)
        y = _multiply(spec, x, *pairs[0], spec.stride)
        return _multiply(spec, _quantize_by_batch(y) if spec.integer else y, *pairs[1], 1, bias)

    def plain(self, spec: LayerSpec, bias: torch.Tensor | None = None) -> tuple[nn.Module, tuple[EncodedWeight | None, ...]]:
        """The arithmetic as plain modules with copies of the weights, and their codes."""
        finals = [weight.final(shape, spec.sparsity, spec.precision) for weight, shape in self.weights_of(spec)]
        codes = tuple(encoded for _, encoded in finals)
        if len(finals) == 1:
            return plain_operator(spec, finals[0][0], spec.stride, bias), codes
        first, second = (values for values, _ in finals)
        factors = Factors(plain_operator(spec, first, spec.stride), plain_operator(spec, second, 1, bias), spec.integer)
        return factors, codes


def _multiply(
    spec: LayerSpec,
    x: torch.Tensor,
    elastic: ElasticWeight,
    shape: tuple[int, ...],
    stride: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    weight = elastic(shape, spec.sparsity, spec.precision)
    other = elastic.backward_weight(shape, spec.sparsity)
    if spec.operator == "linear":
        return F.linear(x, weight, bias) if other is None else bidirectional_linear(x, weight, other, bias)
    if spec.depthwise:
        return depthwise_conv2d(x, weight, stride)
    if other is not None and spec.groups == 1:
        return bidirectional_conv2d(x, weight, other, stride, shape[-1] // 2)
    return F.conv2d(x, weight, bias, stride, shape[-1] // 2, groups=spec.groups)


@operator("conv2d")
class ElasticConv2d(_WeightedLayer):
    """Convolution (dense or depthwise) with batch norm. Width and kernel are slices: first channels, centre of the kernel."""

    def __init__(self, spec: LayerSpec, options: LayerOptions | None = None) -> None:
        values = torch.empty(spec.weight_shape)
        if spec.depthwise:
            nn.init.normal_(values, std=math.sqrt(2.0) / spec.kernel)
        else:
            nn.init.kaiming_normal_(values, mode="fan_out", nonlinearity="relu")
        super().__init__(spec, options, values)
        self.norm_weight = nn.Parameter(torch.ones(spec.out_channels))
        self.norm_bias = nn.Parameter(torch.zeros(spec.out_channels))

    def arithmetic(self, spec: LayerSpec, x: torch.Tensor) -> torch.Tensor:
        y, out = self.multiplied(spec, x), (spec.out_channels,)
        return F.batch_norm(y, None, None, sliced(self.norm_weight, out), sliced(self.norm_bias, out), training=True)

    def extract(self, spec: LayerSpec) -> PlainLayer:
        norm = nn.BatchNorm2d(spec.out_channels, device=self.norm_weight.device)
        with torch.no_grad():
            norm.weight.copy_(self.norm_weight[: spec.out_channels])
            norm.bias.copy_(self.norm_bias[: spec.out_channels])
        arithmetic, codes = self.plain(spec)
        return PlainLayer(spec, arithmetic, norm, codes)


@operator("linear")
class ElasticLinear(_WeightedLayer):
    """Linear layer with bias."""

    def __init__(self, spec: LayerSpec, options: LayerOptions | None = None) -> None:
        values = torch.empty(spec.weight_shape)
        nn.init.normal_(values, std=1.0 / math.sqrt(spec.in_channels))
        super().__init__(spec, options, values)
        self.bias = nn.Parameter(torch.zeros(spec.out_channels))

    def arithmetic(self, spec: LayerSpec, x: torch.Tensor) -> torch.Tensor:
        return self.multiplied(spec, x, sliced(self.bias, (spec.out_channels,)))

    def extract(self, spec: LayerSpec) -> PlainLayer:
        arithmetic, codes = self.plain(spec, self.bias[: spec.out_channels])
        return PlainLayer(spec, arithmetic, None, codes)


@operator("global_pool")
class GlobalPool(ElasticLayer):
    """Mean over rows and columns; nothing to share."""

    def arithmetic(self, spec: LayerSpec, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(2, 3), keepdim=True)

    def extract(self, spec: LayerSpec) -> PlainLayer:
        return PlainLayer(spec, nn.AdaptiveAvgPool2d(1))


@operator("layer_norm")
class ElasticLayerNorm(ElasticLayer):
    """Layer norm over the channels of every token. Width is a slice: the first channels. There are no statistics to keep."""

    def __init__(self, spec: LayerSpec, options: LayerOptions | None = None) -> None:
        super().__init__(spec, options)
        self.weight = nn.Parameter(torch.ones(spec.out_channels))
        self.bias = nn.Parameter(torch.zeros(spec.out_channels))

    def arithmetic(self, spec: LayerSpec, x: torch.Tensor) -> torch.Tensor:
        out = (spec.out_channels,)
        return layer_norm(x, sliced(self.weight, out), sliced(self.bias, out))

    def extract(self, spec: LayerSpec) -> PlainLayer:
        return PlainLayer(spec, LayerNorm(self.weight[: spec.out_channels], self.bias[: spec.out_channels]))


@operator("attention")
class Attention(ElasticLayer):
    """The core of self-attention in any number and width of heads; what is shared is in the projections around it."""

    def arithmetic(self, spec: LayerSpec, x: torch.Tensor) -> torch.Tensor:
        return self_attention(x, spec.heads)

    def extract(self, spec: LayerSpec) -> PlainLayer:
        return PlainLayer(spec, SelfAttention(spec.heads))
