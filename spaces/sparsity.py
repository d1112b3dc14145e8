"""Sparsity patterns: which weights of a layer stay.

A sparsity is written as text, `dense` or `PATTERN@SHARE`, e.g. `group@1/4`: it is an option of a choice, a field of a
`LayerSpec` and part of a table's key. A pattern is registered with `@pattern` and turns a weight into a mask of the same
shape; masks depend on the weight alone, so a masked weight gives the same mask again.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import cache

import torch

from spaces.errors import UserError

GROUP_BLOCKS = 2

Mask = Callable[[torch.Tensor, int], torch.Tensor]
PATTERNS: dict[str, Mask] = {}


def pattern(name: str) -> Callable[[Mask], Mask]:
    """Register a sparsity pattern: a function `(weight, kept inputs) -> mask`."""

    def register(function: Mask) -> Mask:
        PATTERNS[name] = function
        return function

    return register


@cache
def parse(sparsity: str) -> tuple[str, Fraction]:
    """Pattern and kept share of a sparsity text.

    Raises:
        UserError: unknown pattern, or a share outside (0, 1).
    """
    if sparsity == "dense":
        return "dense", Fraction(1)
    name, _, text = sparsity.partition("@")
    try:
        share = Fraction(text)
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if name not in PATTERNS or not 0 < share < 1:
        raise UserError(f"sparsity {sparsity!r}; allowed are dense and {', '.join(PATTERNS)} with a share, such as group@1/2")
    return name, share


@cache
def kept_inputs(sparsity: str, inputs: int) -> int:
    """Input channels that each output channel keeps, at least one."""
    return max(1, round(inputs * parse(sparsity)[1]))


def mask(weight: torch.Tensor, sparsity: str) -> torch.Tensor | None:
    """Mask (0 or 1, shape and type of `weight`) of a sparsity, `None` for dense.

    Args:
        weight: `(out, in, ...)`.
        sparsity: see `parse`.
    """
    name, _ = parse(sparsity)
    if name == "dense":
        return None
    return PATTERNS[name](weight.detach(), kept_inputs(sparsity, weight.shape[1]))


def group_channels(weight: torch.Tensor, kept: int) -> torch.Tensor:
    """Input channels that each block of output channels keeps in the `group` pattern: those of the largest L1 norm.

    Args:
        weight: `(out, in, ...)`, `out` divisible by `GROUP_BLOCKS`.
        kept: channels to keep per block.

    Returns:
        `(GROUP_BLOCKS, kept)`, sorted indices into the input channels.

    Raises:
        UserError: the output channels do not divide into the blocks.
    """
    if weight.shape[0] % GROUP_BLOCKS:
        raise UserError(f"group sparsity needs output channels divisible by {GROUP_BLOCKS}, got {weight.shape[0]}")
    blocks = weight.reshape(GROUP_BLOCKS, weight.shape[0] // GROUP_BLOCKS, weight.shape[1], -1)
    saliency = blocks.abs().sum(dim=(1, 3))
    return saliency.topk(kept, dim=1).indices.sort(dim=1).values


@pattern("group")
def group(weight: torch.Tensor, kept: int) -> torch.Tensor:
    """Each of `GROUP_BLOCKS` blocks of output channels keeps its own input channels.

    The pattern is shared within a block, so that it runs as a Gather and a grouped convolution on any runtime (the idea of
    SparseByteNN, arXiv:2310.18509, with blocks of output channels).
    """
    channels = group_channels(weight, kept)
    keep = torch.zeros(GROUP_BLOCKS, weight.shape[1], dtype=weight.dtype, device=weight.device)
    keep.scatter_(1, channels, 1.0)
    keep = keep.repeat_interleave(weight.shape[0] // GROUP_BLOCKS, dim=0)
    return keep.reshape(weight.shape[0], weight.shape[1], *[1] * (weight.dim() - 2)).expand_as(weight)
