"""Weights whose levels are not evenly spaced, and weights in two precisions at once."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import nn

from spaces.precision import PER_CHANNEL, Precision
from spaces.quantizers.integer import IntegerQuantizer
from spaces.quantizers.ternary_binary import BinaryQuantizer
from spaces.quantizers.weights import (
    SMALLEST_SCALE,
    EncodedWeight,
    QuantizerSettings,
    WeightQuantizer,
    expanded,
    straight_through,
    weight_quantizer,
)

START_EXPONENT = 0.7
EXPONENTS = (0.3, 1.0)


@weight_quantizer("codebook")
class CodebookQuantizer(WeightQuantizer):
    """`2^bits` values per layer, learned with the weights, times the largest magnitude of an output channel.

    Weights take the nearest value; their gradient passes, and a value receives those of the weights that took it (learned
    codebooks and mappings, JLCM, arXiv:2309.17361). The values start as quantiles of a Gaussian, where its weights are dense.
    """

    def __init__(self, precision: Precision, shape: tuple[int, ...], settings: QuantizerSettings) -> None:
        super().__init__(precision, shape, settings)
        entries = 2**precision.weight_bits
        quantiles = torch.special.ndtri((torch.arange(entries, dtype=torch.float64) + 0.5) / entries)
        self.codebook = nn.Parameter((quantiles / quantiles.max()).float())

    def start(self, weight: torch.Tensor) -> None:
        """Values at quantiles of the weights themselves, in largest magnitudes of their channels."""
        with torch.no_grad():
            z = (weight / expanded(_largest(weight), tuple(weight.shape), PER_CHANNEL)).flatten().sort().values
            entries = len(self.codebook)
            places = (torch.arange(entries, dtype=torch.float64) + 0.5) / entries * (len(z) - 1)
            self.codebook.copy_(z[places.round().long()])

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        book, codes, step = self._nearest(weight)
        return book[codes] * step + _passes(weight)

    def encode(self, weight: torch.Tensor) -> EncodedWeight:
        with torch.no_grad():
            book, codes, _ = self._nearest(weight)
            return EncodedWeight(codes.to(torch.int8), _largest(weight), book.clone(), self.precision.weight_bits)

    def _nearest(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sorted values, the position of the nearest for each weight, and scales that multiply."""
        book = self.codebook.sort().values
        step = expanded(_largest(weight), tuple(weight.shape), PER_CHANNEL)
        with torch.no_grad():
            codes = torch.bucketize(weight / step, (book[1:] + book[:-1]) / 2)
        return book, codes, step


@weight_quantizer("power")
class PowerQuantizer(WeightQuantizer):
    """Levels on a power curve: `sign(w) |w|^a` in even steps, the exponent `a` learned per layer (NUPES, arXiv:2308.05600).

    The curve is deployed as a codebook.
    """

    def __init__(self, precision: Precision, shape: tuple[int, ...], settings: QuantizerSettings) -> None:
        super().__init__(precision, shape, settings)
        self.limit = 2 ** (precision.weight_bits - 1) - 1
        self.exponent = nn.Parameter(torch.tensor(START_EXPONENT))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        step = expanded(_largest(weight), tuple(weight.shape), PER_CHANNEL)
        return self._book()[self._codes(weight, step)] * step + _passes(weight)

    def encode(self, weight: torch.Tensor) -> EncodedWeight:
        with torch.no_grad():
            scales = _largest(weight)
            codes = self._codes(weight, expanded(scales, tuple(weight.shape), PER_CHANNEL))
            return EncodedWeight(codes.to(torch.int8), scales, self._book().clone(), self.precision.weight_bits)

    def _exponent(self) -> torch.Tensor:
        return torch.clamp(self.exponent, *EXPONENTS)

    def _codes(self, weight: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            z = weight / step
            curved = torch.pow(z.abs(), self._exponent()) * z.sign()
            return torch.round(curved * self.limit).long() + self.limit

    def _book(self) -> torch.Tensor:
        levels = torch.arange(-self.limit, self.limit + 1, device=self.exponent.device) / self.limit
        return torch.pow(levels.abs().clamp_min(SMALLEST_SCALE), 1.0 / self._exponent()) * levels.sign()


@weight_quantizer("partial")
class PartialQuantizer(WeightQuantizer):
    """Binary weights but for the most salient share by magnitude, which stay in 8 bits (PB-LLM, arXiv:2310.00034)."""

    def __init__(self, precision: Precision, shape: tuple[int, ...], settings: QuantizerSettings) -> None:
        super().__init__(precision, shape, settings)
        self.integer = IntegerQuantizer(Precision("w8", "integer", 8), shape, QuantizerSettings())
        self.binary = BinaryQuantizer(Precision("binary", "binary", 1), shape, settings)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        salient = _largest_share(weight.detach().abs(), self.precision.salient)
        self.binary.progress = self.progress
        rest = self.binary(torch.where(salient, 0.0, weight))
        # The zeros of the salient ones count in the binary scale's mean; their number is the same in every step.
        share = (~salient).flatten(1).float().mean(dim=1).clamp_min(1.0 / salient[0].numel())
        rest = rest / expanded(share[:, None], tuple(weight.shape), PER_CHANNEL)
        return torch.where(salient, self.integer(weight), rest)

    def encode(self, weight: torch.Tensor) -> None:
        """Two codes and a map of places: no runtime reads that faster or smaller than its parts, so it ships as floats."""
        return


def _largest(weight: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each output channel, `(out, 1)`."""
    return weight.detach().abs().flatten(1).amax(dim=1, keepdim=True).clamp_min(SMALLEST_SCALE)


def _largest_share(magnitudes: torch.Tensor, share: Fraction) -> torch.Tensor:
    """Whether each element is among the largest of all, `share` of them and at least one."""
    count = max(1, round(magnitudes.numel() * share))
    chosen = torch.zeros(magnitudes.numel(), dtype=torch.bool, device=magnitudes.device)
    chosen[magnitudes.flatten().topk(count).indices] = True
    return chosen.reshape(magnitudes.shape)


def _passes(weight: torch.Tensor) -> torch.Tensor:
    """Zero, exactly, with the gradient of the weight."""
    return straight_through(weight, torch.zeros_like(weight))
