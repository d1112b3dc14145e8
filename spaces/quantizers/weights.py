"""Weight quantizers: one interface for every way to store weights in a few bits, and the form in which they deploy.

A quantizer belongs to one layer and one precision. It gets the stored weight or a slice of it (the first outputs and inputs,
the centre of the kernel) and returns the values that the deployed layer will have, with gradients for training; `encode` says
the same as codes and scales. What is learned belongs to the largest weight and is sliced with it. A new kind of weights is one
class with `@weight_quantizer`; the contract tests pick it up.

Encode the weight that was trained, not the quantized one: most rules would find another scale for that.

Zeros stay zero in every format, so that a masked weight stays masked.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import nn

from spaces.errors import UserError
from spaces.precision import KINDS, PER_CHANNEL, PER_TENSOR, Kind, Precision
from spaces.quantizers.scales import Scales, Shape, group_shape, spread

SCALE_RULES = ("maximum", "percentile", "learned", "statistics")
BINARY_ESTIMATORS = ("straight_through", "reste", "biper")
CODEBOOK_KINDS = ("power", "codebook")


@dataclass(frozen=True)
class QuantizerSettings:
    """How weights are quantized during the training of a supernet; the same for all of its layers.

    Args:
        scale: where the step of an integer grid comes from: `maximum` or `percentile` of the magnitudes, `statistics` (StatsQ
            of OFQ, arXiv:2302.02210) or `learned` (LSQ, arXiv:1902.08153). `power` follows it too, with `maximum` for
            `learned`; the other formats have a rule of their own.
        percentile: share of each group's weights that `percentile` covers.
        binary: gradient of the sign: `straight_through`, `reste` (arXiv:2308.06689) or `biper` (arXiv:2404.01278).
        annealing: at the end of the training only integer weights close to a rounding threshold go on learning (OFQ's
            confidence-guided annealing).

    Raises:
        UserError: a value that is not allowed.
    """

    scale: str = "maximum"
    percentile: float = 0.999
    binary: str = "straight_through"
    annealing: bool = False

    def __post_init__(self) -> None:
        if self.scale not in SCALE_RULES:
            raise UserError(f"scale of the weight quantizers {self.scale!r}; allowed are {', '.join(SCALE_RULES)}")
        if not 0.5 <= self.percentile <= 1:
            raise UserError(f"percentile of the weight quantizers {self.percentile}; allowed is 0.5 to 1, such as 0.999")
        if self.binary not in BINARY_ESTIMATORS:
            raise UserError(f"estimator of binary weights {self.binary!r}; allowed are {', '.join(BINARY_ESTIMATORS)}")


DEFAULT_SETTINGS = QuantizerSettings()


@dataclass(frozen=True)
class EncodedWeight:
    """A quantized weight as it deploys: `value = (codebook[code] if there is a codebook else code) * scale`.

    Args:
        codes: int8, shape of the weight `(out, in, ...)`. Without a codebook they are signed and symmetric around 0, with one
            they count from 0. Binary codes are -1 and 1, and 0 where a mask took the weight out.
        scales: float32, `(out or 1, blocks or in or 1)`, in the order of `spaces.quantizers.scales`; `(out, in)` when a weight
            with a scale per input was multiplied by channel.
        codebook: float32 `(2**bits,)` or None.
        bits: of one code.
        shared: what shares a scale, see `Precision.scales`.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    codebook: torch.Tensor | None
    bits: int
    shared: Scales = PER_CHANNEL

    def decode(self) -> torch.Tensor:
        """The weight, float32, to the bit what the quantizer's forward gives."""
        values = self.codes.to(self.scales.dtype) if self.codebook is None else look_up(self.codebook, self.codes.int())
        return values * spread(self.scales, self.codes.shape, self.shared)

    def times(self, factor: torch.Tensor) -> EncodedWeight:
        """The weight with each output channel multiplied, as when a batch norm is folded into it.

        `decode()` then equals `factor * decode()` up to the rounding of `scale * factor`. Signed codes take the sign of the
        factor, so their scales stay positive; scales of a codebook become negative with the factor.

        Args:
            factor: `(out,)`.
        """
        scales = self.scales * factor.to(self.scales.dtype).view(-1, 1)
        shared = PER_CHANNEL if self.shared == PER_TENSOR else self.shared
        if self.codebook is not None:
            return replace(self, scales=scales, shared=shared)
        signs = torch.where(factor < 0, -1, 1).to(torch.int8).view(-1, *[1] * (self.codes.ndim - 1))
        return replace(self, codes=self.codes * signs, scales=scales.abs(), shared=shared)


class WeightQuantizer(nn.Module, ABC):
    """Quantizer of the weight of one layer at one precision.

    Args:
        precision: its `weights` chose this class.
        shape: of the largest stored weight, `(out, in, ...)`.
        settings: of the supernet.

    Attributes:
        progress: share of the training that is done, 0 to 1; the training loop sets it.
    """

    def __init__(self, precision: Precision, shape: Shape, settings: QuantizerSettings) -> None:
        super().__init__()
        self.precision = precision
        self.shape = tuple(shape)
        self.settings = settings
        self.progress = 0.0

    def start(self, weight: torch.Tensor) -> None:
        """Set what is learned from the largest weight, before the training."""

    @abstractmethod
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The quantized values, differentiable, of a weight `(out, in, ...)`: the largest or a slice of it."""

    @abstractmethod
    def encode(self, weight: torch.Tensor) -> EncodedWeight | None:
        """How exactly these values deploy; None where codes and scales cannot say it."""


WEIGHT_QUANTIZERS: dict[str, type[WeightQuantizer]] = {}

Quantizer = TypeVar("Quantizer", bound=type[WeightQuantizer])


def weight_quantizer(name: str, kind: Kind | None = None) -> Callable[[Quantizer], Quantizer]:
    """Register a quantizer.

    Args:
        name: in `Precision.weights`; lower-case letters.
        kind: how such a precision is written; `None` for integers, which `spaces.precision` knows.
    """

    def register(cls: Quantizer) -> Quantizer:
        WEIGHT_QUANTIZERS[name] = cls
        if kind is not None:
            KINDS[name] = kind
        return cls

    return register


def quantizer_of(precision: Precision, shape: Shape, settings: QuantizerSettings = DEFAULT_SETTINGS) -> WeightQuantizer | None:
    """A new quantizer for a stored weight of `shape`; None for float weights."""
    return None if precision.float_weights else WEIGHT_QUANTIZERS[precision.weights](precision, shape, settings)


def stored_bytes(precision: Precision, shape: Shape, kept_weights: int) -> int:
    """Bytes of a stored weight: packed codes, 4 per scale, 4 per value of a codebook. No bias.

    `partial` has two scales per output channel and needs one more bit per weight, which says whether it is salient.

    Args:
        shape: of the weight, `(out, in, ...)`.
        kept_weights: how many of them a sparse layer stores.
    """
    if precision.float_weights:
        return 4 * kept_weights
    rows, columns = group_shape(shape, precision.scales)
    partial = precision.weights == "partial"
    bits = precision.bits + 1 if partial else precision.bits
    codebook = 2**precision.weight_bits if precision.weights in CODEBOOK_KINDS else 0
    return math.ceil(kept_weights * bits / 8) + 4 * (rows * columns * (2 if partial else 1) + codebook)


def look_up(table: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """`table[codes]`, in a third of its time on CPUs."""
    return table.index_select(0, codes.reshape(-1)).view(codes.shape)
