"""Quantizers of weights: the interface, what they have in common, and their registry.

A quantizer turns a weight into the values of its precision, differentiably, and says how exactly these values are stored. What
a precision can be is in `spaces.precision`; how scales and gradients come about is chosen once for a whole supernet, in
`QuantizerSettings`. A new kind of weights is one class with `@weight_quantizer`; the contract tests pick it up.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from spaces.errors import UserError
from spaces.precision import PER_CHANNEL, PER_INPUT, PER_TENSOR, Precision

SMALLEST_SCALE = 1e-12
SCALE_RULES = ("maximum", "percentile", "learned", "statistics")
BINARY_ESTIMATORS = ("straight_through", "reste", "biper")


@dataclass(frozen=True)
class QuantizerSettings:
    """How scales are found, and how gradients pass a grid.

    Args:
        scale: of integer weights. `maximum`: the largest magnitude lies on the last level; `percentile`: that share of the
            magnitudes lies within the levels; `learned`: trained beside the weight (LSQ, arXiv:1902.08153); `statistics`: a
            multiple of the mean magnitude (StatsQ of OFQ, arXiv:2302.02210).
        percentile: for the rule of that name, in (0.5, 1].
        binary: gradient estimator of binary weights: `straight_through`; `reste` (arXiv:2308.06689), which sharpens during the
            training; `biper` (arXiv:2404.01278), which takes the sign of a sine.
        annealing: stop, in the last fifth of the training, the gradients of integer weights that are far from a rounding
            threshold, so that only undecided ones still move (confidence-guided annealing of OFQ).

    Raises:
        UserError: an unknown name, or a percentile out of range.
    """

    scale: str = "maximum"
    percentile: float = 0.999
    binary: str = "straight_through"
    annealing: bool = False

    def __post_init__(self) -> None:
        for what, value, allowed in (("scale", self.scale, SCALE_RULES), ("binary", self.binary, BINARY_ESTIMATORS)):
            if value not in allowed:
                raise UserError(f"quantizer {what} is {value!r}; allowed are {', '.join(allowed)}")
        if not isinstance(self.percentile, float) or not 0.5 < self.percentile <= 1.0:
            raise UserError(f"quantizer percentile is {self.percentile!r}; allowed are numbers above 0.5 up to 1")


@dataclass(frozen=True)
class EncodedWeight:
    """A quantized weight as it is stored: `code * scale`, or `codebook[code] * scale`.

    Args:
        codes: int8, shape of the weight; positions in the codebook where there is one.
        scales: float32, `(out or 1, blocks or inputs or 1)`.
        codebook: float32 `(entries,)`, or `None`.
        bits: of a code.
        shared: what shares a scale, see `Precision.scales`.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    codebook: torch.Tensor | None
    bits: int
    shared: str | int = PER_CHANNEL

    def decode(self) -> torch.Tensor:
        """The values, float32."""
        values = self.codes.float() if self.codebook is None else self.codebook[self.codes.long()]
        return values * expanded(self.scales, tuple(self.codes.shape), self.shared)

    def times(self, factor: torch.Tensor) -> EncodedWeight:
        """The weight with its output channels multiplied by `(out,)` factors; scales of integer codes stay positive."""
        if self.codebook is not None:
            return replace(self, scales=self.scales * factor[:, None])
        signs = torch.where(factor < 0, -1, 1).to(torch.int8).reshape(-1, *[1] * (self.codes.dim() - 1))
        shared = PER_CHANNEL if self.shared == PER_TENSOR else self.shared
        return replace(self, codes=self.codes * signs, scales=self.scales * factor.abs()[:, None], shared=shared)


class WeightQuantizer(nn.Module, ABC):
    """Quantizes the weights of one layer in one precision. It has parameters only where something is learned.

    Args:
        precision: of the weights.
        shape: of the largest weight, `(out, in, ...)`; weights may be smaller.
        settings: how scales and gradients come about.

    Attributes:
        progress: 0 at the start of a training, 1 at its end; set by the training.
    """

    def __init__(self, precision: Precision, shape: tuple[int, ...], settings: QuantizerSettings) -> None:
        super().__init__()
        self.precision, self.settings = precision, settings
        self.progress = 0.0

    def start(self, weight: torch.Tensor) -> None:
        """Set what is learned from the largest weight, before the training."""

    @abstractmethod
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The quantized values of a weight `(out, in, ...)`, differentiable."""

    @abstractmethod
    def encode(self, weight: torch.Tensor) -> EncodedWeight | None:
        """How `forward` of this weight is stored, so that `decode` gives the same values; `None`: only as floats."""


WEIGHT_QUANTIZERS: dict[str, type[WeightQuantizer]] = {}

Quantizer = TypeVar("Quantizer", bound=type[WeightQuantizer])


def weight_quantizer(name: str) -> Callable[[Quantizer], Quantizer]:
    """Register a quantizer under its name in `Precision.weights`."""

    def register(cls: Quantizer) -> Quantizer:
        WEIGHT_QUANTIZERS[name] = cls
        return cls

    return register


def quantizer_of(precision: Precision, shape: tuple[int, ...], settings: QuantizerSettings) -> WeightQuantizer | None:
    """A quantizer for a precision, `None` for float weights.

    Args:
        precision: of the weights.
        shape: of the largest weight, `(out, in, ...)`.
        settings: how scales and gradients come about.
    """
    if precision.float_weights:
        return None
    return WEIGHT_QUANTIZERS[precision.weights](precision, shape, settings)


# -- what shares a scale -----------------------------------------------------------------------------------------------------


def grouped(weight: torch.Tensor, shared: str | int) -> torch.Tensor:
    """A weight `(out, in, ...)` as `(rows, columns, n)`: the n weights in the last dimension share the scale `(row, column)`.

    The last block of a row is filled up with zeros.
    """
    if shared == PER_TENSOR:
        return weight.reshape(1, 1, -1)
    if shared == PER_INPUT:
        return weight.transpose(0, 1).reshape(1, weight.shape[1], -1)
    if isinstance(shared, int):
        rows = weight.reshape(len(weight), -1)
        return F.pad(rows, (0, -rows.shape[1] % shared)).reshape(len(weight), -1, shared)
    return weight.reshape(len(weight), 1, -1)


def expanded(scales: torch.Tensor, shape: tuple[int, ...], shared: str | int) -> torch.Tensor:
    """Scales `(rows, columns)` so that they multiply a weight of `shape`."""
    if isinstance(shared, int):
        inputs = shape[1:].numel() if isinstance(shape, torch.Size) else torch.Size(shape[1:]).numel()
        return scales.repeat_interleave(shared, dim=1)[:, :inputs].reshape(-1, *shape[1:])
    return scales.reshape(*scales.shape, *[1] * (len(shape) - 2))


def straight_through(weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`values` with the gradient of `weight`."""
    result: torch.Tensor = _StraightThrough.apply(weight, values, None)  # type: ignore[no-untyped-call]
    return result


def with_gradient(weight: torch.Tensor, values: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """`values` with the gradient of `weight` times a factor of its shape."""
    result: torch.Tensor = _StraightThrough.apply(weight, values, factor)  # type: ignore[no-untyped-call]
    return result


class _StraightThrough(torch.autograd.Function):
    """An addition of `weight - weight.detach()` would do the same and round the values."""

    @staticmethod
    def forward(ctx, weight, values, factor):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(factor)
        return values.view_as(values)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        (factor,) = ctx.saved_tensors
        return (gradient if factor is None else gradient * factor), None, None
