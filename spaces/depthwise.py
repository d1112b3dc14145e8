"""Depthwise convolution with a quick weight gradient on CPUs.

oneDNN has a quick kernel for the weight gradient of a 3x3 depthwise convolution, but not for 5x5 and 7x7: there it takes ten to
thirty times as long as the forward pass, and most of a training step. On small maps the gradient is a matrix product
instead: for each channel, the products of all input with all output positions, summed over the batch, hold every tap's
gradient; a 0/1 matrix sums the position pairs that belong to one tap. Elsewhere torch's own gradient is used.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional as F

LEAST_KERNEL = 5
MOST_POSITION_PAIRS = 64 * 64


def depthwise_conv2d(x: torch.Tensor, weight: torch.Tensor, stride: int) -> torch.Tensor:
    """Depthwise convolution, padded by half the kernel.

    Args:
        x: `(n, channels, height, width)`.
        weight: `(channels, 1, kernel, kernel)`.
        stride: in both directions.
    """
    channels, _, kernel, _ = weight.shape
    height, width = x.shape[2:]
    pairs = height * width * ((height - 1) // stride + 1) * ((width - 1) // stride + 1)
    if x.is_cuda or kernel < LEAST_KERNEL or pairs > MOST_POSITION_PAIRS or not torch.is_grad_enabled():
        return F.conv2d(x, weight, stride=stride, padding=kernel // 2, groups=channels)
    result: torch.Tensor = _SmallMapDepthwise.apply(x, weight, stride)  # type: ignore[no-untyped-call]
    return result


class _SmallMapDepthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, stride: int) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=weight.shape[0])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, weight = ctx.saved_tensors
        channels, _, kernel, _ = weight.shape
        strides, pads, ones, zeros = [ctx.stride] * 2, [kernel // 2] * 2, [1, 1], [0, 0]
        x_gradient = weight_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient, _, _ = torch.ops.aten.convolution_backward(
                gradient, x, weight, None, strides, pads, ones, False, zeros, channels, [True, False, False]
            )
        if ctx.needs_input_grad[1]:
            n, _, height, width = x.shape
            inputs = x.permute(1, 2, 3, 0).reshape(channels, height * width, n)
            outputs = gradient.permute(1, 0, 2, 3).reshape(channels, n, -1)
            products = torch.bmm(inputs, outputs).reshape(channels, -1)
            taps = _taps(height, width, gradient.shape[2], gradient.shape[3], kernel, ctx.stride, x.dtype)
            weight_gradient = (products @ taps).reshape(weight.shape)
        return x_gradient, weight_gradient, None


@lru_cache(maxsize=256)
def _taps(
    height: int, width: int, out_height: int, out_width: int, kernel: int, stride: int, dtype: torch.dtype
) -> torch.Tensor:
    """Which tap joins an input and an output position: `(input positions * output positions, kernel * kernel)`, 0 or 1."""

    def tap(size: int, out_size: int) -> torch.Tensor:
        offset = torch.arange(size)[:, None] - torch.arange(out_size)[None, :] * stride + kernel // 2
        return (offset[:, :, None] == torch.arange(kernel)).to(dtype)  # (input, output, tap) along one axis

    rows, columns = tap(height, out_height), tap(width, out_width)
    return torch.einsum("ipk,jql->ijpqkl", rows, columns).reshape(height * width * out_height * out_width, kernel * kernel)
