"""Arithmetic of transformers on maps: layer norm over channels, and the core of multi-head self-attention.

A token is a position of a map `(n, channels, height, width)`, so that residuals are skips and projections are 1x1 convolutions
with a precision, sparsity and rank of their own. Attention reads one tensor that a projection has made. Its channels are, for
every head and every feature of the head, one query, one key and one value:

    channel 3 * (head * head_width + feature) + role        role: 0 query, 1 key, 2 value

A projection that shares weights is cut to its first channels, and in this order that keeps every role. With fewer heads
the first heads stay as they are. With narrower heads the first `heads * head_width` features are dealt out to heads anew:
queries still meet the keys, and values the output weights, of the same feature; only the features that share a softmax differ.
(AutoFormer, arXiv:2107.00651, interleaves the three in the same way.)

Scores are scaled by 1 / sqrt(head width). Masks, biases of positions, and other keys than the map's own are not done here.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

EPSILON = 1e-5  # added to the variance of a token


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Every token with mean 0 and variance 1 over its channels, then an affine map (arXiv:1607.06450).

    Args:
        x: `(n, channels, height, width)`.
        weight: `(channels,)`.
        bias: `(channels,)`.
    """
    return F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, EPSILON).permute(0, 3, 1, 2)


def self_attention(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Scaled dot products of all pairs of tokens (arXiv:1706.03762, section 3.2).

    Args:
        x: `(n, 3 * heads * head_width, height, width)`, channels in the order that the module's docstring gives.
        heads: their number.

    Returns:
        `(n, heads * head_width, height, width)`, head by head.
    """
    n, channels, height, width = x.shape
    parts = x.reshape(n, heads, channels // (3 * heads), 3, height * width).permute(3, 0, 1, 4, 2)
    query, key, value = parts.unbind(0)  # (n, heads, tokens, head_width) each
    y = F.scaled_dot_product_attention(query, key, value)
    return y.transpose(2, 3).reshape(n, channels // 3, height, width)


class LayerNorm(nn.Module):
    """`layer_norm` with copies of an affine map `(channels,)`."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(values.detach().clone()) for values in (weight, bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, self.weight, self.bias)


class SelfAttention(nn.Module):
    """`self_attention` with a number of heads."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self_attention(x, self.heads)
