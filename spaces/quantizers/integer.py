"""Integer weights: a uniform grid, symmetric around 0, whose last level is 127, 7, 3 or 1 for 8, 4, 3 or 2 bits.

The level -(2**(bits-1)) is not used, so that a weight can change its sign with the factor of a batch norm; `MatMulNBits` takes
the codes with zero point 2**(bits-1). With 2 bits that leaves -1, 0, 1: on a normally distributed weight the squared error of
`ternary`, half of `binary`'s.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from spaces.precision import Precision
from spaces.quantizers.activations import SMALLEST_SCALE
from spaces.quantizers.scales import (
    Scales,
    Shape,
    group_shape,
    group_sizes,
    grouped,
    maximum_step,
    percentile_step,
    spread,
    statistical_step,
)
from spaces.quantizers.straight_through import straight_through
from spaces.quantizers.weights import EncodedWeight, QuantizerSettings, WeightQuantizer, weight_quantizer

WEIGHT_LIMIT = 127
ANNEALING_START = 0.9  # share of the training
ANNEALING_BOUNDARY = 0.005  # distance to a rounding threshold, in steps; OFQ's published code has the same


def last_level(bits: int) -> int:
    """The largest level of the symmetric grid."""
    return int(2 ** (bits - 1)) - 1


def ruled_step(weight: torch.Tensor, scales: Scales, limit: int, settings: QuantizerSettings) -> torch.Tensor:
    """Steps `(rows, columns)` by a rule that learns nothing; `learned` counts as `maximum`.

    With three levels each rule is `statistics`: up to the largest magnitude, they would be worse than two.
    """
    magnitudes = grouped(weight.detach().abs(), scales)
    if settings.scale == "statistics" or limit == 1:
        return statistical_step(magnitudes, limit)
    if settings.scale == "percentile":
        return percentile_step(magnitudes, group_sizes(weight.shape, scales), limit, settings.percentile)
    return maximum_step(magnitudes, limit)


@weight_quantizer("integer")
class IntegerWeights(WeightQuantizer):
    """Weights on a uniform grid.

    Steps by `maximum`, `percentile` or `statistics` follow the weight, and gradients go straight through, for weights outside
    of the grid too: they would never come back.

    `learned` steps (LSQ, arXiv:1902.08153) are parameters that belong to the largest weight. A step that is not positive (a new
    one, or one that training drove there) starts at the step that `statistics` gives for the weight at hand; LSQ's own start,
    `2 * mean / sqrt(limit)`, spans 18 standard deviations in 8 bits. Weight decay is not for steps. A block of a smaller kernel
    takes the step of the block from which its first weight comes.
    """

    def __init__(self, precision: Precision, shape: Shape, settings: QuantizerSettings) -> None:
        super().__init__(precision, shape, settings)
        self.limit = last_level(precision.weight_bits)
        if settings.scale == "learned":
            self.steps = nn.Parameter(torch.zeros(group_shape(shape, precision.scales)))

    @torch.no_grad()
    def start(self, weight: torch.Tensor) -> None:
        if self.settings.scale == "learned":
            self.steps.zero_()
            self._steps(weight)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        steps = self._steps(weight)
        if self.settings.annealing and self.progress >= ANNEALING_START:
            weight = self._annealed(weight, steps)
        if self.settings.scale == "learned":
            result: torch.Tensor = _LearnedSteps.apply(weight, steps, self.limit, self.precision.scales)  # type: ignore[no-untyped-call]
            return result
        levels = _levels(weight.detach(), steps, self.limit, self.precision.scales)
        return straight_through(weight, levels.mul_(spread(steps, weight.shape, self.precision.scales)))

    def encode(self, weight: torch.Tensor) -> EncodedWeight:
        with torch.no_grad():
            steps = self._steps(weight)
            codes = _levels(weight, steps, self.limit, self.precision.scales).to(torch.int8)
            return EncodedWeight(codes, steps, None, self.precision.weight_bits, self.precision.scales)

    def _steps(self, weight: torch.Tensor) -> torch.Tensor:
        if self.settings.scale != "learned":
            return ruled_step(weight, self.precision.scales, self.limit, self.settings)
        rows, _ = group_shape(weight.shape, self.precision.scales)
        columns = self._columns(weight.shape).to(weight.device)
        steps = self.steps[:rows].index_select(1, columns)
        if not bool((steps > 0).all()):
            self._start(weight, rows, columns)
            steps = self.steps[:rows].index_select(1, columns)
        return steps.clamp_min(SMALLEST_SCALE)

    @torch.no_grad()
    def _start(self, weight: torch.Tensor, rows: int, columns: torch.Tensor) -> None:
        mine = self.steps[:rows]
        found = statistical_step(grouped(weight.abs(), self.precision.scales), self.limit)
        # Several blocks of a smaller kernel may share a step.
        start = torch.zeros_like(mine).scatter_reduce_(1, columns.expand(rows, -1), found, "amax")
        mine.copy_(torch.where(mine > 0, mine, start))

    def _columns(self, shape: Shape) -> torch.Tensor:
        """Which columns of the learned steps a slice uses."""
        columns = torch.arange(group_shape(shape, self.precision.scales)[1])
        scales = self.precision.scales
        if not isinstance(scales, int) or tuple(shape[2:]) == self.shape[2:]:
            return columns
        border = (self.shape[2] - shape[2]) // 2
        centre = slice(border, border + shape[2])
        places = torch.arange(math.prod(self.shape[1:])).view(self.shape[1:])[: shape[1], centre, centre]
        return places.flatten()[::scales] // scales

    def _annealed(self, weight: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """The weight with the gradients of those cut off that are sure of their level."""
        with torch.no_grad():
            in_steps = weight * spread(steps.reciprocal(), weight.shape, self.precision.scales)
            to_threshold = ((in_steps - in_steps.round()).abs() - 0.5).abs()
            unsure = (to_threshold <= ANNEALING_BOUNDARY) & (in_steps.abs() < self.limit)
        return torch.where(unsure, weight, weight.detach())


def _levels(weight: torch.Tensor, steps: torch.Tensor, limit: int, scales: Scales) -> torch.Tensor:
    """Levels as floats. The product with the reciprocal is what `torch.fake_quantize_per_channel_affine` computes."""
    return weight.mul(spread(steps.reciprocal(), weight.shape, scales)).round_().clamp_(-limit, limit)


class _LearnedSteps(torch.autograd.Function):
    """Rounding with the gradients of LSQ, equations 1 to 5 of arXiv:1902.08153, and its gradient scale 1 / sqrt(n * limit).

    n is the number of weights that share the step; the paper has one step per layer.
    """

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, steps: torch.Tensor, limit: int, scales: Scales) -> torch.Tensor:
        in_steps = weight * spread(steps.reciprocal(), weight.shape, scales)
        levels = in_steps.round().clamp_(-limit, limit)
        ctx.save_for_backward(in_steps, levels)
        ctx.limit, ctx.scales = limit, scales
        return levels * spread(steps, weight.shape, scales)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        in_steps, levels = ctx.saved_tensors
        inside = in_steps.abs() <= ctx.limit
        per_weight = gradient * torch.where(inside, levels - in_steps, levels)
        sizes = group_sizes(in_steps.shape, ctx.scales).to(gradient.device)
        per_step = grouped(per_weight, ctx.scales).sum(-1) / (sizes * ctx.limit).sqrt()
        return gradient * inside, per_step, None, None
