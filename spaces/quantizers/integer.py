"""Integer weights: symmetric levels, 8 to 2 bits, one scale per output channel, tensor, input channel or block of inputs."""

from __future__ import annotations

import math

import torch
from torch import nn

from spaces.precision import PER_CHANNEL, Precision
from spaces.quantizers.weights import (
    SMALLEST_SCALE,
    EncodedWeight,
    QuantizerSettings,
    WeightQuantizer,
    expanded,
    grouped,
    weight_quantizer,
    with_gradient,
)

# Where a symmetric grid ends so that its squared error on a Gaussian is least, in mean magnitudes, by bits.
STATISTICS_CLIP = {2: 1.54, 3: 2.45, 4: 3.11, 8: 4.91}
ANNEALING_BEGIN = 0.8
UNDECIDED = 0.15  # of a step around a rounding threshold


@weight_quantizer("integer")
class IntegerQuantizer(WeightQuantizer):
    """Levels from `-(2^(bits - 1) - 1)` to `2^(bits - 1) - 1` times a scale."""

    scale: nn.Parameter | None

    def __init__(self, precision: Precision, shape: tuple[int, ...], settings: QuantizerSettings) -> None:
        super().__init__(precision, shape, settings)
        self.limit = 2 ** (precision.weight_bits - 1) - 1
        sizes = grouped(torch.empty(shape, device="meta"), precision.scales).shape[:2]
        self.scale = nn.Parameter(torch.full(sizes, 1.0)) if settings.scale == "learned" else None

    def start(self, weight: torch.Tensor) -> None:
        if self.scale is not None:
            with torch.no_grad():
                self.scale.copy_(_statistics(grouped(weight, self.precision.scales), self.precision.weight_bits, self.limit))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        scales, annealed = self._scales(weight), self.settings.annealing and self.progress >= ANNEALING_BEGIN
        if self.scale is not None:
            return self._learned(weight, scales)
        if not annealed and self.precision.scales == PER_CHANNEL and self.settings.scale == "maximum":
            zeros = torch.zeros(len(weight), dtype=torch.int32, device=weight.device)
            return torch.fake_quantize_per_channel_affine(weight, scales[:, 0], zeros, 0, -self.limit, self.limit)
        step = expanded(scales, tuple(weight.shape), self.precision.scales)
        position = weight.detach() * (1.0 / step)
        levels = position.round().clamp(-self.limit, self.limit)
        inside = position.abs() <= self.limit + 0.5
        if annealed:
            inside &= (position - position.floor() - 0.5).abs() < UNDECIDED
        return with_gradient(weight, levels * step, inside.to(weight.dtype))

    def _learned(self, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Learned step size quantization: the gradient of a scale is lowered by `1 / sqrt(weights * limit)`."""
        shared = grouped(weight.detach(), self.precision.scales).shape[2]
        slower = 1.0 / math.sqrt(shared * self.limit)
        scales = scales * slower + (scales - scales * slower).detach()
        step = expanded(scales, tuple(weight.shape), self.precision.scales)
        position = (weight / step).clamp(-self.limit, self.limit)
        levels = with_gradient(position, position.detach().round(), torch.ones_like(position))
        return levels * step

    def encode(self, weight: torch.Tensor) -> EncodedWeight:
        with torch.no_grad():
            scales = self._scales(weight)
            step = expanded(scales, tuple(weight.shape), self.precision.scales)
            position = weight / step if self.scale is not None else weight * (1.0 / step)
            codes = position.round().clamp(-self.limit, self.limit).to(torch.int8)
            return EncodedWeight(codes, scales.clone(), None, self.precision.weight_bits, self.precision.scales)

    def _scales(self, weight: torch.Tensor) -> torch.Tensor:
        """`(rows, columns)`, above 0."""
        if self.scale is None:
            shares = grouped(weight.detach(), self.precision.scales)
            if self.settings.scale == "maximum":
                return torch.div(shares.abs().amax(dim=2), self.limit).clamp_min(SMALLEST_SCALE)
            if self.settings.scale == "statistics":
                return _statistics(shares, self.precision.weight_bits, self.limit)
            largest = _percentile(shares.abs(), self.settings.percentile)
            return torch.div(largest, self.limit).clamp_min(SMALLEST_SCALE)
        rows, columns = grouped(weight.detach(), self.precision.scales).shape[:2]
        return torch.abs(self.scale[:rows, :columns]).clamp_min(SMALLEST_SCALE)


def _statistics(shares: torch.Tensor, bits: int, limit: int) -> torch.Tensor:
    magnitudes = shares.detach().abs()
    clip = torch.minimum(magnitudes.mean(dim=2) * STATISTICS_CLIP[bits], magnitudes.amax(dim=2))
    return (clip / limit).clamp_min(SMALLEST_SCALE)


def _percentile(magnitudes: torch.Tensor, share: float) -> torch.Tensor:
    """The magnitude that so many of the last dimension do not exceed."""
    rank = min(magnitudes.shape[2], max(1, math.ceil(share * magnitudes.shape[2])))
    return magnitudes.kthvalue(rank, dim=2).values
