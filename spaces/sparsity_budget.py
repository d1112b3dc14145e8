"""How much may stay, and how wide a layer may be, when weights or multiply-accumulates are given.

`layer_shares` spreads one share of all weights over the layers of a network; `iso_flop_width` says how wide a sparse layer is
at the cost of the dense one. Which weights of a layer stay is decided in `spaces.sparsity`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from spaces.errors import UserError

SHARE_RULES = ("uniform", "erdos_renyi_kernel")


def layer_shares(shapes: Sequence[tuple[int, ...]], kept: Fraction, rule: str) -> tuple[Fraction, ...]:
    """Share of its weights that each layer keeps, so that the layers together keep `kept` of all weights.

    `uniform` gives every layer the same share. `erdos_renyi_kernel` (ERK; RigL, arXiv:1911.11134) gives a layer a share in
    proportion to `(out + in + kernel height + kernel width) / (out * in * kernel height * kernel width)`, so that small layers
    stay denser; what would get more than all of its weights stays dense and leaves the rest to the others.

    Args:
        shapes: of the weights, `(out, in / groups, ...)`.
        kept: share of all weights together, in (0, 1].
        rule: one of `SHARE_RULES`.

    Returns:
        One share in (0, 1] per shape. With `erdos_renyi_kernel` a share times the layer's weights is a whole number, at least
        1, so the sum of kept weights differs from the wanted one by at most 1/2 per layer (more only where a layer would get
        none).

    Raises:
        UserError: an unknown rule, or a share outside (0, 1].
    """
    if rule not in SHARE_RULES:
        raise UserError(f"rule {rule!r} for the shares of layers; allowed are {', '.join(SHARE_RULES)}")
    _check_share(kept)
    if rule == "uniform":
        return (kept,) * len(shapes)
    weights = [math.prod(shape) for shape in shapes]
    return tuple(
        Fraction(max(1, round(share * count)), count)
        for share, count in zip(_erdos_renyi_kernel(shapes, weights, kept), weights, strict=True)
    )


def iso_flop_width(in_channels: int, out_channels: int, kept: Fraction, divisor: int = 8) -> tuple[int, int]:
    """Input and output channels that a layer may have with a share of its weights, at no more than the dense layer's MACs.

    Both widths grow by `1 / sqrt(kept)`: `Sparse Wide` of Sparse-IFT (arXiv:2303.11525). Its MACs are in proportion to the kept
    weights, `kept * in * out`, for any kernel and output size.

    Args:
        in_channels: of the dense layer.
        out_channels: of the dense layer.
        kept: share of the weights that stay, in (0, 1].
        divisor: widths are rounded down to multiples of it, but never below the dense layer's.

    Returns:
        Input and output channels of the sparse layer.

    Raises:
        UserError: a share outside (0, 1], or a divisor below 1.
    """
    _check_share(kept)
    if divisor < 1:
        raise UserError(f"divisor {divisor} of widths; allowed is 1 or more")
    return _widened(in_channels, kept, divisor), _widened(out_channels, kept, divisor)


def _erdos_renyi_kernel(shapes: Sequence[tuple[int, ...]], weights: Sequence[int], kept: Fraction) -> list[Fraction]:
    """Exact shares. What is set to 1 leaves a larger factor to the others, so a layer that was over 1 stays there."""
    density = [Fraction(sum(shape), count) for shape, count in zip(shapes, weights, strict=True)]
    dense: set[int] = set()
    while len(dense) < len(shapes):
        rest = kept * sum(weights) - sum(weights[i] for i in dense)
        factor = rest / sum(density[i] * weights[i] for i in range(len(shapes)) if i not in dense)
        over = {i for i in range(len(shapes)) if i not in dense and factor * density[i] > 1}
        if not over:
            return [Fraction(1) if i in dense else factor * density[i] for i in range(len(shapes))]
        dense |= over
    return [Fraction(1)] * len(shapes)


def _widened(channels: int, kept: Fraction, divisor: int) -> int:
    widest = math.isqrt(channels**2 * kept.denominator // kept.numerator)
    return max(channels, widest // divisor * divisor)


def _check_share(kept: Fraction) -> None:
    if not 0 < kept <= 1:
        raise UserError(f"kept share {kept}; allowed is more than 0, up to 1")
