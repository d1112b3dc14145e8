"""Convolution and linear layer whose input gradient is computed with another weight than their output.

An N:M mask along the inputs helps the forward pass only: the gradient of the input sums over the outputs, so a kernel for
sparse weights needs N:M along the outputs there. Bidirectional training (BDWP, arXiv:2309.13015; Bi-Mask, arXiv:2302.06058)
therefore keeps two maskings of one stored weight. These functions give that arithmetic with dense kernels: what is trained
is what such hardware would train, no faster here. The gradient of the weight is that of the ordinary operator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F


def bidirectional_conv2d(
    x: torch.Tensor, weight: torch.Tensor, backward_weight: torch.Tensor, stride: int = 1, padding: int = 0
) -> torch.Tensor:
    """Convolution of one group, `F.conv2d(x, weight)`, with the gradient of `F.conv2d(x, backward_weight)` for `x`.

    Args:
        x: `(n, in, height, width)`.
        weight: `(out, in, kernel, kernel)`; receives its own, ordinary gradient.
        backward_weight: of the same shape; receives no gradient.
        stride: in both directions.
        padding: on each side, zeros.
    """
    result: torch.Tensor = _BidirectionalConv2d.apply(  # type: ignore[no-untyped-call]
        x, weight, backward_weight.detach(), stride, padding
    )
    return result


def bidirectional_linear(
    x: torch.Tensor, weight: torch.Tensor, backward_weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Linear layer, `F.linear(x, weight, bias)`, with the gradient of `F.linear(x, backward_weight)` for `x`.

    Args:
        x: `(..., in)`.
        weight: `(out, in)`; receives its own, ordinary gradient.
        backward_weight: of the same shape; receives no gradient.
        bias: `(out,)`.
    """
    y: torch.Tensor = _BidirectionalLinear.apply(x, weight, backward_weight.detach())  # type: ignore[no-untyped-call]
    return y if bias is None else y + bias


class _BidirectionalConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, backward_weight: torch.Tensor, stride: int, padding: int
    ) -> torch.Tensor:
        ctx.save_for_backward(x, backward_weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, stride=stride, padding=padding)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None]:
        x, backward_weight = ctx.saved_tensors
        # The gradient of the weight does not depend on the weight's values, so one call serves both.
        x_gradient, weight_gradient, _ = torch.ops.aten.convolution_backward(
            gradient,
            x,
            backward_weight,
            None,
            [ctx.stride] * 2,
            [ctx.padding] * 2,
            [1, 1],
            False,
            [0, 0],
            1,
            [*ctx.needs_input_grad[:2], False],
        )
        return x_gradient, weight_gradient, None, None, None


class _BidirectionalLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, backward_weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, backward_weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, backward_weight = ctx.saved_tensors
        x_gradient = gradient @ backward_weight if ctx.needs_input_grad[0] else None
        weight_gradient = None
        if ctx.needs_input_grad[1]:
            weight_gradient = gradient.flatten(0, -2).t() @ x.flatten(0, -2)
        return x_gradient, weight_gradient, None
