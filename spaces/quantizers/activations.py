"""Activations in 8 bits: the same arithmetic for torch and for every runtime.

A fixed grid is unsigned, per tensor, with a zero point that is 0 after a ReLU, so that the runtime can absorb the ReLU into the
quantization (otherwise the convolution stays in float). A grid by the input's own range is what runtimes make in every run.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from spaces.errors import DivergedError

ACTIVATION_LEVELS = 255
BLOCK_LIMIT = 127
LARGEST_FLOAT8 = 448
SMALLEST_SCALE = 1e-12


def activation_grid(low: float, high: float) -> tuple[np.float32, int]:
    """Scale and zero point of the unsigned 8-bit grid that covers `[low, high]` and holds 0 exactly.

    In single precision throughout, as torch computes it: a range that is symmetric puts its zero point between two levels,
    and double precision would round it to the other one.

    Raises:
        DivergedError: the range is not finite.
    """
    if not math.isfinite(low) or not math.isfinite(high):
        raise DivergedError(f"activations range from {low} to {high}: the training diverged; lower supernet.learning_rate")
    lowest, highest = np.float32(min(low, 0.0)), np.float32(max(high, 0.0))
    scale = max((highest - lowest) / np.float32(ACTIVATION_LEVELS), np.float32(SMALLEST_SCALE))
    return scale, int(np.rint(-lowest / scale))


def quantize_activation(x: torch.Tensor, low: torch.Tensor | float, high: torch.Tensor | float) -> torch.Tensor:
    """Activation rounded to the 8-bit grid of `[low, high]`; gradient straight through inside the range, 0 outside.

    Computes what `torch.fake_quantize_per_tensor_affine` computes, to the bit, in a tenth of its time on CPUs.
    """
    scale, zero_point = activation_grid(float(low), float(high))
    result: torch.Tensor = _RoundToGrid.apply(x, scale, zero_point, False)  # type: ignore[no-untyped-call]
    return result


def quantize_to_own_range(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Activation rounded to the 8-bit grid of its own range, and that range `(low, high)`; gradient straight through."""
    low, high = x.detach().aminmax()
    scale, zero_point = activation_grid(float(low), float(high))
    return _RoundToGrid.apply(x, scale, zero_point, True), low, high  # type: ignore[no-untyped-call]


class _RoundToGrid(torch.autograd.Function):
    """Rounding with a straight-through gradient; `covered` says that nothing lies outside of the grid."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: np.float32, zero_point: int, covered: bool) -> torch.Tensor:
        levels = x.mul(float(np.float32(1.0) / scale)).round_()
        if not covered and x.requires_grad:
            ctx.save_for_backward((levels >= -zero_point) & (levels <= ACTIVATION_LEVELS - zero_point))
        return levels.clamp_(-zero_point, ACTIVATION_LEVELS - zero_point).mul_(float(scale))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return (gradient * ctx.saved_tensors[0] if ctx.saved_tensors else gradient), None, None, None


def quantize_by_sample(x: torch.Tensor, block: int | None) -> torch.Tensor:
    """Activation rounded to 8 bits by its own range, as runtimes do in every run with one sample; gradient straight through.

    Args:
        x: `(n, ...)`.
        block: `None`: one unsigned grid per sample that covers its range and holds 0 (ONNX DynamicQuantizeLinear); a number:
            one symmetric grid for so many consecutive features of `(n, features)` (MatMulNBits at accuracy level 4).
    """
    if block is None:
        flat = x.detach().flatten(1)
        low, high = flat.amin(1).clamp_max(0.0), flat.amax(1).clamp_min(0.0)
        scale = ((high - low) / ACTIVATION_LEVELS).clamp_min(SMALLEST_SCALE).reshape(-1, *[1] * (x.dim() - 1))
        zero = (-low.reshape(scale.shape) / scale).round()
        rounded = ((x.detach() / scale).round() + zero).clamp(0, ACTIVATION_LEVELS).sub(zero).mul(scale)
    else:
        features = x.shape[1]
        blocks = F.pad(x.detach(), (0, -features % block)).reshape(len(x), -1, block)
        scale = (blocks.abs().amax(dim=2, keepdim=True) / BLOCK_LIMIT).clamp_min(SMALLEST_SCALE)
        rounded = ((blocks / scale).round() * scale).reshape(len(x), -1)[:, :features]
    return x + (rounded - x.detach())


def quantize_to_float8(x: torch.Tensor) -> torch.Tensor:
    """Activation rounded to 8-bit floats (e4m3, arXiv:2209.05433), the largest magnitude of a sample on the largest of them.

    Gradient straight through.

    Args:
        x: `(n, ...)`.
    """
    largest = x.detach().flatten(1).abs().amax(1)
    scale = (largest / LARGEST_FLOAT8).clamp_min(SMALLEST_SCALE).reshape(-1, *[1] * (x.dim() - 1))
    rounded = (x.detach() / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale
    return x + (rounded - x.detach())
