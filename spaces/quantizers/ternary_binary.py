"""Ternary and binary weights: three or two levels with a scale per output channel."""

from __future__ import annotations

import math

import torch

from spaces.precision import PER_CHANNEL, Kind
from spaces.quantizers.activations import SMALLEST_SCALE
from spaces.quantizers.scales import grouped, mean_magnitude, spread
from spaces.quantizers.straight_through import straight_through
from spaces.quantizers.weights import EncodedWeight, WeightQuantizer, weight_quantizer

TERNARY_THRESHOLD = 0.7  # of the mean magnitude, arXiv:1605.04711

# Bounds of the estimators, in units of the channel's mean magnitude.
CLIP = 3.0  # beyond, no gradient: such a weight only grows
RESTE_LINEAR = 0.1  # closer to 0 the slope of the power function is replaced by a secant, as in the authors' code
RESTE_LAST_EXPONENT = 3.0
BIPER_FREQUENCY = 0.8  # about one over the standard deviation of normally distributed weights


@weight_quantizer("ternary", Kind("ternary", (2,), integer_levels=True))
class TernaryWeights(WeightQuantizer):
    """Weights -s, 0, s (TWN, arXiv:1605.04711): 0 up to 0.7 of the mean magnitude, s the mean of the magnitudes above it.

    The gradient goes straight through.
    """

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        codes, scales = _ternary(weight.detach())
        return straight_through(weight, codes * spread(scales, weight.shape, PER_CHANNEL))

    def encode(self, weight: torch.Tensor) -> EncodedWeight:
        codes, scales = _ternary(weight.detach())
        return EncodedWeight(codes.to(torch.int8), scales, None, self.precision.weight_bits)


def _ternary(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    magnitudes = weight.abs()
    threshold = TERNARY_THRESHOLD * mean_magnitude(grouped(magnitudes, PER_CHANNEL))
    kept = magnitudes > spread(threshold, weight.shape, PER_CHANNEL)
    scales = mean_magnitude(grouped(magnitudes * kept, PER_CHANNEL)).clamp_min(SMALLEST_SCALE)
    return weight.sign() * kept, scales


@weight_quantizer("binary", Kind("binary", (1,), integer_levels=True, has_zero=False))
class BinaryWeights(WeightQuantizer):
    """Weights -s and s with s the mean magnitude of the channel (arXiv:1603.05279, arXiv:2211.07091).

    With z the weight in units of s, the gradient of the values is the incoming one times a slope:

        straight_through  1 up to |z| = 3
        reste             slope of sign(z) |z|**(1/o), where o grows from 1 to 3 with the progress (arXiv:2308.06689), up to 3
        biper             slope of sin(omega z); the values have the sign of that sine (arXiv:2404.01278)

    The papers set their bounds in units of the raw weights, which depend on a layer's fan-in; here they are relative.
    """

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            codes, scales, relative = self._codes(weight)
            slope = self._slope(relative) if weight.requires_grad else None
            values = codes * spread(scales, weight.shape, PER_CHANNEL)
        return straight_through(weight, values, slope)

    def encode(self, weight: torch.Tensor) -> EncodedWeight:
        codes, scales, _ = self._codes(weight.detach())
        return EncodedWeight(codes.to(torch.int8), scales, None, self.precision.weight_bits)

    def _codes(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scales = mean_magnitude(grouped(weight.abs(), PER_CHANNEL)).clamp_min(SMALLEST_SCALE)
        relative = weight * spread(scales.reciprocal(), weight.shape, PER_CHANNEL)
        wave = (relative * BIPER_FREQUENCY).sin_() if self.settings.binary == "biper" else weight
        return wave.sign(), scales, relative

    def _slope(self, relative: torch.Tensor) -> torch.Tensor:
        if self.settings.binary == "biper":
            return (relative * BIPER_FREQUENCY).cos_().mul_(BIPER_FREQUENCY)
        magnitudes = relative.abs()
        inside = (magnitudes <= CLIP).to(relative.dtype)
        if self.settings.binary == "straight_through":
            return inside
        exponent = 1 + (1 - math.cos(self.progress * math.pi / 2)) * (RESTE_LAST_EXPONENT - 1)
        secant = RESTE_LINEAR ** (1 / exponent - 1)
        tangent = magnitudes.clamp_min(RESTE_LINEAR).pow_(1 / exponent - 1).div_(exponent)
        return torch.where(magnitudes <= RESTE_LINEAR, secant, tangent).mul_(inside)
