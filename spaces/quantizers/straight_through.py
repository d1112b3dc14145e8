"""Straight-through gradients for values that were computed without one."""

from __future__ import annotations

from typing import Any

import torch


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, values: torch.Tensor, slope: torch.Tensor | None) -> torch.Tensor:
        ctx.slope = slope
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return (gradient if ctx.slope is None else gradient * ctx.slope), None, None


def straight_through(weight: torch.Tensor, values: torch.Tensor, slope: torch.Tensor | None = None) -> torch.Tensor:
    """`values`, with the gradient that reaches them handed on to `weight`, times `slope` where there is one.

    Args:
        weight: any shape.
        values: of the same shape, without a gradient of their own.
        slope: of the same shape.
    """
    result: torch.Tensor = _StraightThrough.apply(weight, values, slope)  # type: ignore[no-untyped-call]
    return result
