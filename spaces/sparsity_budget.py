"""How much may stay, and how wide a layer may be, when weights or multiply-accumulates are given.

`layer_shares` spreads one share of all weights over the layers of a network; `iso_flop_hidden` says how wide a sparse block is
inside at the cost of the dense one. Which weights of a layer stay is decided in `spaces.sparsity`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from spaces.errors import UserError
from spaces.sparsity import DENSE, kept_weights

SHARE_RULES = ("uniform", "erdos_renyi_kernel")
WIDTH_STEP = 8  # kernels work on so many channels at once
ROUNDING_STEPS = 4


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


@dataclass(frozen=True)
class Bottleneck:
    """Convolutions around a hidden width: 1x1 to it, depthwise on it, 1x1 from it.

    Args:
        inputs: channels.
        hidden: channels when all is dense.
        outputs: channels.
        kernel: side of the depthwise kernel.
        input_positions: rows times columns of the input.
        output_positions: rows times columns behind the depthwise convolution.
    """

    inputs: int
    hidden: int
    outputs: int
    kernel: int
    input_positions: int
    output_positions: int

    def macs(self, hidden: int, expand: str, project: str) -> int:
        """Multiply-accumulates with another hidden width and the sparsities of both 1x1 convolutions.

        Raises:
            UserError: a pattern does not divide the channels.
        """
        into = kept_weights(expand, (hidden, self.inputs, 1, 1)) * self.input_positions
        out_of = kept_weights(project, (self.outputs, hidden, 1, 1)) + hidden * self.kernel**2
        return into + out_of * self.output_positions


@lru_cache(maxsize=65536)
def iso_flop_hidden(block: Bottleneck, expand: str, project: str) -> int:
    """The hidden width that a sparse block may have at no more than the dense block's multiply-accumulates.

    `Sparse Wide` of Sparse-IFT (arXiv:2303.11525) for a bottleneck whose outer widths are given: MACs are in proportion to the
    hidden width, so that it grows by about `1 / kept`, less what the depthwise convolution costs.

    Args:
        block: the dense one.
        expand: sparsity of the convolution to the hidden width.
        project: sparsity of the convolution from it.

    Returns:
        A multiple of `WIDTH_STEP` that both patterns divide; the dense width where none is wider.
    """
    most = block.macs(block.hidden, DENSE, DENSE)
    about = block.hidden * most // block.macs(block.hidden, expand, project) // WIDTH_STEP
    # Shares are rounded to whole units, so that a little more may fit than MACs in proportion would let.
    for hidden in range((about + ROUNDING_STEPS) * WIDTH_STEP, block.hidden, -WIDTH_STEP):
        try:
            if block.macs(hidden, expand, project) <= most:
                return hidden
        except UserError:
            continue  # the pattern does not divide this width
    return block.hidden


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


def _check_share(kept: Fraction) -> None:
    if not 0 < kept <= 1:
        raise UserError(f"kept share {kept}; allowed is more than 0, up to 1")
