"""Scale groups: which weights share a scale, and how large a step of the grid is.

A precision's scales are `channel`, `tensor`, `inputs` (one per input channel, arXiv:2309.15531) or a number: that many
consecutive weights of one output channel, in the order in which they are stored (of a convolution: input, row, column); the
last block of a channel may be shorter. Scales always have two dimensions, `(rows, columns)`:

    channel  (out, 1)      tensor  (1, 1)      inputs  (1, in)      block  (out, blocks)

`grouped` brings a weight into that order, `spread` brings scales to the shape of a weight. Zeros are weights that a mask took
out: they count in no mean.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from spaces.precision import PER_CHANNEL, PER_INPUT, PER_TENSOR
from spaces.quantizers.activations import SMALLEST_SCALE

Scales = str | int
Shape = tuple[int, ...]

# Steps with the least squared error for normally distributed weights, by the last level; in units of the mean magnitude.
GAUSSIAN_STEPS = {1: 1.5341, 3: 0.8156, 7: 0.4429}


def group_shape(shape: Shape, scales: Scales) -> tuple[int, int]:
    """Rows and columns of the scales of a weight `(out, in, ...)`."""
    if isinstance(scales, int):
        return shape[0], math.ceil(math.prod(shape[1:]) / scales)
    return {PER_CHANNEL: (shape[0], 1), PER_TENSOR: (1, 1), PER_INPUT: (1, shape[1])}[scales]


def group_sizes(shape: Shape, scales: Scales) -> torch.Tensor:
    """How many weights each group of a row has, `(columns,)`."""
    rows, columns = group_shape(shape, scales)
    sizes = torch.full((columns,), scales if isinstance(scales, int) else math.prod(shape) // (rows * columns))
    if isinstance(scales, int):
        sizes[-1] = math.prod(shape[1:]) - (columns - 1) * scales
    return sizes


def grouped(x: torch.Tensor, scales: Scales) -> torch.Tensor:
    """A weight as `(rows, columns, members)`; a last block that is shorter is filled up with zeros."""
    rows, columns = group_shape(x.shape, scales)
    if scales == PER_INPUT:
        return x.transpose(0, 1).reshape(rows, columns, -1)
    if isinstance(scales, int) and x[0].numel() % scales:
        x = F.pad(x.reshape(rows, -1), (0, columns * scales - x[0].numel()))
    return x.reshape(rows, columns, -1)


def spread(per_group: torch.Tensor, shape: Shape, scales: Scales) -> torch.Tensor:
    """Scales `(rows, columns)` in a shape that broadcasts to the weight's."""
    rows, columns = per_group.shape
    if not isinstance(scales, int) or columns == 1:
        return per_group.view(rows, columns, *[1] * (len(shape) - 2))
    each = per_group.unsqueeze(-1).expand(rows, columns, scales).reshape(rows, -1)
    return each[:, : math.prod(shape[1:])].reshape(rows, *shape[1:])


def mean_magnitude(magnitudes: torch.Tensor) -> torch.Tensor:
    """Mean over the last dimension of what is not zero."""
    return magnitudes.sum(-1) / magnitudes.sign().sum(-1).clamp_min(1)  # signs as floats: counting truth values is slower


def maximum_step(magnitudes: torch.Tensor, limit: int) -> torch.Tensor:
    """Step with which the largest magnitude of a group lies on the last level, `limit`.

    With the three levels -1, 0, 1 that would leave nearly all weights at 0. There three cells of equal width cover the range:
    the largest magnitude lies at the end of the last cell, one and a half steps from 0.

    Args:
        magnitudes: `(rows, columns, members)`.
    """
    largest = magnitudes.amax(dim=-1)
    return (largest * (2 / 3) if limit == 1 else largest / limit).clamp_min(SMALLEST_SCALE)


def percentile_step(magnitudes: torch.Tensor, sizes: torch.Tensor, limit: int, percentile: float) -> torch.Tensor:
    """`maximum_step` of the weights without the largest `1 - percentile` of each group, rounded down to whole weights."""
    dropped = ((1 - percentile) * sizes + 1e-9).floor().long()
    most = int(dropped.max())
    if most == 0:
        return maximum_step(magnitudes, limit)
    largest = magnitudes.topk(most + 1).values
    place = dropped.to(magnitudes.device).view(1, -1, 1).expand(len(magnitudes), -1, 1)
    kept = largest.gather(-1, place)
    return maximum_step(torch.where(kept > 0, kept, largest[..., :1]), limit)  # of a sparse group all that is left may be zeros


def statistical_step(magnitudes: torch.Tensor, limit: int) -> torch.Tensor:
    """Step from the mean magnitude of each group, the idea of StatsQ (arXiv:2302.02210).

    StatsQ cuts at twice the mean whatever the bits, and has no level at 0, which integer kernels and masks need. Here the step
    is the best one for normally distributed weights, at most `maximum_step`; with 8 bits it is `maximum_step`.
    """
    step = maximum_step(magnitudes, limit)
    if limit not in GAUSSIAN_STEPS:
        return step
    return torch.minimum(step, mean_magnitude(magnitudes) * GAUSSIAN_STEPS[limit]).clamp_min(SMALLEST_SCALE)
