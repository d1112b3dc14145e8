"""Weights off the uniform grid: power curves, learned codebooks, a few salient weights in 8 bits, and 8-bit floats."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from spaces.precision import PER_CHANNEL, Kind, Precision
from spaces.quantizers.activations import LARGEST_FLOAT8, SMALLEST_SCALE
from spaces.quantizers.integer import WEIGHT_LIMIT, last_level, ruled_step
from spaces.quantizers.scales import Scales, Shape, grouped, maximum_step, mean_magnitude, spread
from spaces.quantizers.straight_through import straight_through
from spaces.quantizers.weights import EncodedWeight, QuantizerSettings, WeightQuantizer, look_up, weight_quantizer

FIRST_EXPONENTS = {2: 1.0, 3: 0.75, 4: 0.75}  # least squared error of normally distributed weights
EXPONENT_RANGE = (0.25, 2.0)

# Values with the least squared error for normally distributed weights, one of them 0; in units of the mean magnitude.
GAUSSIAN_CODEBOOKS = {
    2: (-1.534, 0.9582, 2.1608),
    3: (-2.5484, -1.489, -0.7025, 0.5559, 1.1514, 1.8502, 2.8256),
    4: (
        *(-3.3596, -2.5143, -1.9372, -1.4721, -1.0663, -0.695, -0.3431),
        *(0.3043, 0.6148, 0.9386, 1.2848, 1.6674, 2.1105, 2.6651, 3.4846),
    ),
}


@weight_quantizer("power", Kind("power4", (2, 3, 4)))
class PowerWeights(WeightQuantizer):
    """Levels that are uniform in `sign(w) |w|**a` (NUPES, arXiv:2308.05600), a codebook of one parameter, the exponent a.

    The scale is the largest value of the grid, by the rule of the settings. The exponent is learned per layer. Entry k of the
    codebook belongs to the level `k - 2**(bits-1)`; entry 0 is not used, as in integer weights.
    """

    def __init__(self, precision: Precision, shape: Shape, settings: QuantizerSettings) -> None:
        super().__init__(precision, shape, settings)
        self.limit = last_level(precision.weight_bits)
        self.exponent = nn.Parameter(torch.tensor(FIRST_EXPONENTS[precision.weight_bits]))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        a = self.exponent.clamp(*EXPONENT_RANGE)
        with torch.no_grad():
            relative, scales = self._relative(weight)
        result: torch.Tensor = _OnCurve.apply(weight, a, relative, scales, self.limit, self.precision.scales)  # type: ignore[no-untyped-call]
        return result

    def encode(self, weight: torch.Tensor) -> EncodedWeight:
        with torch.no_grad():
            a = self.exponent.clamp(*EXPONENT_RANGE)
            relative, scales = self._relative(weight)
            codes = _codes(relative, _curve(relative, a, self.limit), self.limit).to(torch.int8)
            return EncodedWeight(codes, scales, _curve_table(a, self.limit), self.precision.weight_bits, self.precision.scales)

    def _relative(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight in units of its scales, and these, `(rows, columns)`."""
        scales = ruled_step(weight, self.precision.scales, self.limit, self.settings) * self.limit
        return weight * spread(scales.reciprocal(), weight.shape, self.precision.scales), scales


def _curve(relative: torch.Tensor, a: torch.Tensor, limit: int) -> torch.Tensor:
    """Where the weights lie between the levels, without sign."""
    return relative.abs().pow_(float(a)).mul_(limit)


def _codes(relative: torch.Tensor, curve: torch.Tensor, limit: int) -> torch.Tensor:
    return curve.round().clamp_(max=limit).copysign_(relative).add_(limit + 1).int()


def _curve_table(a: torch.Tensor, limit: int) -> torch.Tensor:
    levels = torch.arange(-limit - 1, limit + 1, device=a.device) / limit
    return levels.sign() * levels.abs() ** (1 / a)


class _OnCurve(torch.autograd.Function):
    """Rounding on the curve: straight through to the weight, and to the exponent.

    With z the weight in units of its scale and v its rounded value, the rounding inside of `round(z**a)**(1/a)` taken straight
    through, the derivative by a is `(v**(1-a) z**a ln z - v ln v) / a`: as in LSQ the difference of one function at two places.
    For the squared error it gives, in a small cell around v, the square times `d ln(width of the cell) / da`, as it should. The
    derivative of v with the code held would be nearly blind: values are close to the middle of their cells for every a.
    Weights that round to 0 count nothing. The gradient scale is that of LSQ.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        a: torch.Tensor,
        relative: torch.Tensor,
        scales: torch.Tensor,
        limit: int,
        groups: Scales,
    ) -> torch.Tensor:
        curve = _curve(relative, a, limit)
        codes = _codes(relative, curve, limit)
        table = _curve_table(a, limit)
        each = spread(scales, weight.shape, groups)
        ctx.save_for_backward(a, relative, curve, codes, table, each)
        ctx.limit = limit
        return look_up(table, codes) * each

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None, None]:
        a, relative, curve, codes, table, each = ctx.saved_tensors
        sizes = table.abs()
        steepness = torch.where(sizes > 0, table.sign() * sizes ** (1 - a), 0)
        at_weight = torch.xlogy(curve, relative.abs()) * look_up(steepness / ctx.limit, codes)
        inside = curve <= ctx.limit
        by_exponent = torch.where(inside, at_weight - look_up(table.sign() * torch.xlogy(sizes, sizes), codes), 0)
        sums = (gradient * each * by_exponent).sum()
        return gradient, sums / (a * math.sqrt(codes.numel() * ctx.limit)), None, None, None, None


@weight_quantizer("codebook", Kind("codebook4", (2, 3, 4)))
class CodebookWeights(WeightQuantizer):
    """Each weight takes the nearest of a few learned values, times its scale (JLCM, arXiv:2309.17361).

    The scale is the mean magnitude of the channel, so that all channels can share the values. They start at the best ones for
    normally distributed weights; one of them is 0 and stays there, for masked weights. Gradients reach the values in use and go
    straight through to the weights, which so move from a value to the one beside it, a simple form of JLCM's proximal search.
    JLCM also reorders channels to give them several codebooks, which is not done here.
    """

    def __init__(self, precision: Precision, shape: Shape, settings: QuantizerSettings) -> None:
        super().__init__(precision, shape, settings)
        self.values = nn.Parameter(torch.tensor(GAUSSIAN_CODEBOOKS[precision.weight_bits]))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        table = self._table()
        with torch.no_grad():
            codes, scales = self._nearest(weight, table)
            each = spread(scales, weight.shape, self.precision.scales)
        result: torch.Tensor = _LookUp.apply(weight, table, codes, each)  # type: ignore[no-untyped-call]
        return result

    def encode(self, weight: torch.Tensor) -> EncodedWeight:
        with torch.no_grad():
            table = self._table()
            codes, scales = self._nearest(weight, table)
        return EncodedWeight(codes.to(torch.int8), scales, table, self.precision.weight_bits, self.precision.scales)

    def _table(self) -> torch.Tensor:
        return torch.cat([self.values, self.values.new_zeros(1)]).sort().values

    def _nearest(self, weight: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scales = mean_magnitude(grouped(weight.abs(), self.precision.scales)).clamp_min(SMALLEST_SCALE)
        each = spread(scales.reciprocal(), weight.shape, self.precision.scales)
        return nearest(weight * each, table), scales


def nearest(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Index (int32) of the entry of a sorted table of 2**bits entries that is nearest to each element of `x`.

    A binary search over the middles between entries, in a third of the time of `torch.bucketize` on CPUs.
    """
    middles = (table[1:] + table[:-1]) / 2
    half = len(table) // 2
    found = (x > middles[half - 1]).int().mul_(half)
    while half > 1:
        half //= 2
        found.add_((x > look_up(middles[half - 1 :], found)).int(), alpha=half)
    return found


class _LookUp(torch.autograd.Function):
    """`table[codes] * scales`: straight through to the weight, and to the entries that were used.

    As in LSQ the gradient of the table is divided by the root of the number of weights times the levels on one side: it sums
    over all weights and would be out of proportion to its parameters.
    """

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, table: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.entries = len(table)
        return look_up(table, codes) * scales

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        codes, scales = ctx.saved_tensors
        sums = gradient.new_zeros(ctx.entries).index_add_(0, codes.flatten(), (gradient * scales).flatten())
        return gradient, sums / math.sqrt(codes.numel() * (ctx.entries // 2)), None, None


@weight_quantizer("partial", Kind("partial@1/8", (1,), has_zero=False, salient=True))
class PartialWeights(WeightQuantizer):
    """Binary weights, but the largest magnitudes of the layer in 8 bits (PB-LLM, arXiv:2310.00034).

    Both parts have a scale per output channel: the mean magnitude, and the largest one over 127. The gradient goes straight
    through. Two grids in one weight are no codes times scales, so `encode` gives None and the layer deploys in float.
    """

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            magnitudes = weight.abs()
            rest = weight.numel() - int(self.precision.salient * weight.numel())
            salient = magnitudes > magnitudes.flatten().kthvalue(rest).values  # fewer where magnitudes are equal
            fine = spread(maximum_step(grouped(magnitudes, PER_CHANNEL), WEIGHT_LIMIT), weight.shape, PER_CHANNEL)
            coarse = spread(mean_magnitude(grouped(magnitudes * ~salient, PER_CHANNEL)), weight.shape, PER_CHANNEL)
            values = torch.where(salient, (weight * fine.reciprocal()).round_() * fine, weight.sign() * coarse)
        return straight_through(weight, values)

    def encode(self, weight: torch.Tensor) -> EncodedWeight | None:
        return None


@weight_quantizer("float8")
class Float8Weights(WeightQuantizer):
    """8-bit floats, e4m3 (arXiv:2209.05433): four bits of exponent, three of mantissa.

    The largest magnitude of an output channel lies on the largest of them. They are no levels, and too many for a codebook, so
    `encode` gives None; a lowering finds scales and codes again from the values.
    """

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            step = spread(maximum_step(grouped(weight.abs(), PER_CHANNEL), LARGEST_FLOAT8), weight.shape, PER_CHANNEL)
            values = (weight / step).to(torch.float8_e4m3fn).to(weight.dtype) * step
        return straight_through(weight, values)

    def encode(self, weight: torch.Tensor) -> EncodedWeight | None:
        return None
