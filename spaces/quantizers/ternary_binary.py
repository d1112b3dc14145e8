"""Weights of three and of two levels."""

from __future__ import annotations

import torch

from spaces.quantizers.weights import SMALLEST_SCALE, EncodedWeight, WeightQuantizer, expanded, weight_quantizer, with_gradient

TERNARY_THRESHOLD = 0.7  # of the mean magnitude
PASSES = 3.0  # mean magnitudes up to which a binary weight still moves
RESTE_EXPONENT = 3.0  # at the end of the training
RESTE_STEEPEST = 3.0


@weight_quantizer("ternary")
class TernaryQuantizer(WeightQuantizer):
    """Levels -1, 0, 1 times a scale per output channel (ternary weight networks, arXiv:1605.04711)."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        codes, scales = _ternary(weight.detach())
        return with_gradient(weight, codes * expanded(scales, tuple(weight.shape), "channel"), torch.ones_like(codes))

    def encode(self, weight: torch.Tensor) -> EncodedWeight:
        codes, scales = _ternary(weight.detach())
        return EncodedWeight(codes.to(torch.int8), scales, None, 2)


def _ternary(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes as floats, and scales `(out, 1)`: the mean magnitude of what is not 0."""
    magnitudes = weight.abs().flatten(1)
    kept = magnitudes > TERNARY_THRESHOLD * magnitudes.mean(dim=1, keepdim=True)
    scales = (magnitudes * kept).sum(dim=1, keepdim=True) / kept.sum(dim=1, keepdim=True).clamp_min(1)
    return weight.sign() * kept.reshape(weight.shape), scales.clamp_min(SMALLEST_SCALE)


@weight_quantizer("binary")
class BinaryQuantizer(WeightQuantizer):
    """Levels -1 and 1 times the mean magnitude of an output channel (XNOR-Net; per channel as in BiViT, arXiv:2211.07091)."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        signs, scales = self._binary(weight.detach())
        step = expanded(scales, tuple(weight.shape), "channel")
        return with_gradient(weight, signs * step, self._derivative(weight.detach() / step))

    def encode(self, weight: torch.Tensor) -> EncodedWeight:
        signs, scales = self._binary(weight.detach())
        return EncodedWeight(signs.to(torch.int8), scales, None, 1)

    def _binary(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scales = weight.abs().flatten(1).mean(dim=1, keepdim=True).clamp_min(SMALLEST_SCALE)
        position = weight
        if self.settings.binary == "biper":
            position = torch.sin(weight / expanded(scales, tuple(weight.shape), "channel"))
        return torch.where(position >= 0, 1.0, -1.0), scales

    def _derivative(self, z: torch.Tensor) -> torch.Tensor:
        """Derivative that stands in for the sign's, of weights in mean magnitudes."""
        if self.settings.binary == "biper":
            return torch.cos(z)
        passes = (z.abs() <= PASSES).to(z.dtype)
        if self.settings.binary == "straight_through":
            return passes
        # The derivative of sign(z) |z|^(1/o), which turns from the identity (o = 1) towards the sign.
        o = 1.0 + self.progress * (RESTE_EXPONENT - 1.0)
        slope = z.abs().clamp_min(1e-6) ** ((1.0 - o) / o) / o
        return slope.clamp_max(RESTE_STEEPEST) * passes
