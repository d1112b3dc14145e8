"""Sparsity patterns: which weights of a layer stay.

A sparsity is written as text: an option of a choice, a field of a `LayerSpec` and part of a table's key.

    dense            every weight
    group@1/2        each of two blocks of output channels keeps its own input channels
    2:4  1:4  4:8    so many of so many consecutive inputs, of every output and kernel position (quote them in YAML: '2:4')
    block4x1@1/2     blocks of 4 outputs and 1 input, of every kernel position; each row of blocks keeps equally many
    unstructured@1/4 the largest of the whole weight
    2:4+selective    any of these, with the last of the removed weights chosen for the activations (`spaces.selective`)

A pattern is declared with `@pattern` and says only how it cuts a weight into sets of units (`spaces.cut`); masks and counts
follow from that. In every set the most salient units stay, between equals the first. So how many weights stay depends on the
shape alone, a masked weight gives the same mask again, and a smaller share keeps a subset of what a larger one keeps. What
makes a weight salient is in `spaces.saliency`; how masked weights are trained is decided elsewhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache

import torch

from spaces.cut import COLUMN_BLOCKS, COLUMNS, POSITIONS, ROWS, Cut
from spaces.errors import UserError
from spaces.selective import removed_last, selective_saliency

DENSE = "dense"
GROUP_BLOCKS = 2

_TEXT = re.compile(
    r"(?P<n>[0-9]+):(?P<m>[0-9]+)|(?P<name>[a-z]+(?:_[a-z]+)*)(?P<sizes>[0-9]+(?:x[0-9]+)*)?@(?P<share>[0-9./]+)"
)
_SELECTIVE = "+selective"


@dataclass(frozen=True)
class Sparsity:
    """A sparsity, taken apart. Two are equal when they mean the same: `group@1/2` and `group@2/4`.

    Args:
        text: as it is written.
        pattern: `dense` or a name in `PATTERNS`.
        kept: share of the weights that stay.
        sizes: the numbers in the pattern: (n, m) of `n:m`, (outputs, inputs) of a block, else none.
        selective: whether the last of the removed weights are chosen for the activations.
    """

    text: str = field(compare=False)
    pattern: str
    kept: Fraction
    sizes: tuple[int, ...] = ()
    selective: bool = False

    def with_share(self, kept: Fraction) -> Sparsity:
        """The same pattern with another share, up to 1; `n:m` takes the next larger n that is possible.

        Raises:
            ValueError: a share outside (0, 1].
        """
        if not 0 < kept <= 1:
            raise ValueError(f"share {kept}; allowed is more than 0, up to 1")
        if self.pattern == DENSE:
            return self
        if self.pattern == "n:m":
            m = self.sizes[1]
            n = math.ceil(kept * m)
            return Sparsity(f"{n}:{m}{self._ending}", self.pattern, Fraction(n, m), (n, m), self.selective)
        return replace(self, text=f"{self.text.partition('@')[0]}@{kept}{self._ending}", kept=kept)

    @property
    def _ending(self) -> str:
        return _SELECTIVE if self.selective else ""


@dataclass(frozen=True)
class Pattern:
    """A registered pattern: an example of its text, and how it cuts a weight of given outputs, inputs and kernel positions."""

    example: str
    cut: Callable[[tuple[int, ...], int, int, int], Cut]


PATTERNS: dict[str, Pattern] = {}


def pattern(name: str, example: str) -> Callable[[Callable[..., Cut]], Callable[..., Cut]]:
    """Register a pattern: a function `(sizes, outputs, inputs, kernel positions) -> Cut`.

    Args:
        name: lower-case letters and `_`.
        example: a text of it, `NAME@SHARE` or `NAME4x1@SHARE`, with as many sizes as the pattern has.
    """

    def register(function: Callable[..., Cut]) -> Callable[..., Cut]:
        PATTERNS[name] = Pattern(example, function)
        return function

    return register


@cache
def parse(text: str) -> Sparsity:
    """A sparsity from its text.

    Raises:
        UserError: unknown pattern, sizes below 1 or too many or few, or a share outside (0, 1).
    """
    if text == DENSE:
        return Sparsity(DENSE, DENSE, Fraction(1))
    plain = text.removesuffix(_SELECTIVE)
    try:
        name, sizes, kept = _parts(plain)
        known = name in PATTERNS and len(sizes) == len(_parts(PATTERNS[name].example)[1])
    except (ValueError, ZeroDivisionError):
        known = False
    if not known or min(sizes, default=1) < 1 or not 0 < kept < 1:
        examples = ", ".join(p.example for p in PATTERNS.values())
        raise UserError(f"sparsity {text!r}; allowed are {DENSE} and, with a share between 0 and 1, such as {examples}")
    return Sparsity(text, name, kept, sizes, plain != text)


def selective(text: str) -> str:
    """The same sparsity with the last of the removed weights chosen for the activations; dense stays dense."""
    return text if text == DENSE or text.endswith(_SELECTIVE) else text + _SELECTIVE


def as_shipped(text: str) -> str:
    """The sparsity without the rule that chose the mask, which a deployed layer does not know."""
    return text.removesuffix(_SELECTIVE)


def mask(
    weight: torch.Tensor,
    sparsity: str | Sparsity,
    saliency: torch.Tensor | None = None,
    start: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Mask (0 or 1, shape and type of `weight`, no gradient) of a sparsity, `None` for dense.

    Args:
        weight: `(out, in / groups, ...)`.
        sparsity: see `parse`.
        saliency: how much each weight matters, not negative, of the weight's shape; its magnitude when left out. Compared in
            float32.
        start: the weight when its training began, of its shape; zeros when left out. Used where the sparsity is selective.

    Raises:
        UserError: the pattern does not divide the channels.
        ValueError: a saliency of another shape.
    """
    wanted = _parsed(sparsity)
    if wanted.pattern == DENSE:
        return None
    if saliency is not None and saliency.shape != weight.shape:
        raise ValueError(f"saliency of shape {tuple(saliency.shape)} for a weight of shape {tuple(weight.shape)}")
    cut = _cut(wanted.pattern, wanted.sizes, tuple(weight.shape))
    scores, kept = weight.detach().abs() if saliency is None else saliency, _share_of(cut.units_per_set, wanted.kept)
    if wanted.selective:
        earlier = cut.kept_units(scores, kept + removed_last(cut.units_per_set - kept))
        scores = selective_saliency(weight, start).reshape(cut.shape) * earlier
    keep = cut.kept_units(scores, kept)
    return keep.to(weight.dtype).expand(cut.shape).reshape(weight.shape)


@cache
def kept_weights(sparsity: str | Sparsity, weight_shape: tuple[int, ...]) -> int:
    """How many weights of a shape stay: exactly the ones in its `mask`.

    Raises:
        UserError: the pattern does not divide the channels.
    """
    wanted = _parsed(sparsity)
    if wanted.pattern == DENSE:
        return math.prod(weight_shape)
    cut = _cut(wanted.pattern, wanted.sizes, weight_shape)
    return math.prod(weight_shape) // cut.units_per_set * _share_of(cut.units_per_set, wanted.kept)


def check_sparsity(sparsity: str | Sparsity, weight_shape: tuple[int, ...]) -> None:
    """Raise a `UserError` when a pattern does not divide the channels of a weight `(out, in / groups, ...)`."""
    kept_weights(sparsity, weight_shape)


@cache
def kept_inputs(sparsity: str, inputs: int) -> int:
    """Input channels that each output channel keeps in the `group` pattern, at least one; all for dense."""
    return _share_of(inputs, parse(sparsity).kept)


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
    keep = _cut("group", (), tuple(weight.shape)).kept_units(weight.detach().abs(), kept)
    return keep.reshape(GROUP_BLOCKS, weight.shape[1]).nonzero()[:, 1].reshape(GROUP_BLOCKS, kept)


# -- the patterns ------------------------------------------------------------------------------------------------------------


@pattern("group", "group@1/2")
def group(sizes: tuple[int, ...], outputs: int, inputs: int, positions: int) -> Cut:
    """Each of `GROUP_BLOCKS` blocks of output channels keeps its own input channels.

    The pattern is shared within a block, so that it runs as a Gather and a grouped convolution on any runtime (the idea of
    SparseByteNN, arXiv:2310.18509, with blocks of output channels).
    """
    rows = _quotient("group", "output channels", outputs, GROUP_BLOCKS)
    return Cut((GROUP_BLOCKS, rows, 1, inputs, positions), units=(COLUMNS,), members=(ROWS, POSITIONS))


@pattern("n:m", "2:4")
def n_of_m(sizes: tuple[int, ...], outputs: int, inputs: int, positions: int) -> Cut:
    """n of m consecutive inputs of each output and kernel position (NVIDIA's 2:4, arXiv:2104.08378; N:M, arXiv:2102.04010)."""
    n, m = sizes
    groups = _quotient(f"{n}:{m}", "input channels", inputs, m)
    return Cut((outputs, 1, groups, m, positions), units=(COLUMNS,))


@pattern("block", "block4x1@1/2")
def block(sizes: tuple[int, ...], outputs: int, inputs: int, positions: int) -> Cut:
    """Blocks of outputs x inputs at one kernel position, by their L1 norm within each row of blocks.

    Every output keeps as many inputs as any other, so that the work of a kernel is balanced (arXiv:1811.00206). In blocks along
    the outputs a CPU kernel uses an input several times once it is loaded (Fast Sparse ConvNets, arXiv:1911.09723).
    """
    rows, columns = sizes
    name = f"block{rows}x{columns}"
    row_blocks = _quotient(name, "output channels", outputs, rows)
    column_blocks = _quotient(name, "input channels", inputs, columns)
    return Cut((row_blocks, rows, column_blocks, columns, positions), units=(COLUMN_BLOCKS,), members=(ROWS, COLUMNS))


@pattern("unstructured", "unstructured@1/2")
def unstructured(sizes: tuple[int, ...], outputs: int, inputs: int, positions: int) -> Cut:
    """Any weights of the layer (magnitude pruning, arXiv:1506.02626): what accuracy would be without any structure."""
    return Cut((1, outputs, 1, inputs, positions), units=(ROWS, COLUMNS, POSITIONS))


# -- details -----------------------------------------------------------------------------------------------------------------


def _parts(text: str) -> tuple[str, tuple[int, ...], Fraction]:
    """Pattern, sizes and share of a text; `ValueError` or `ZeroDivisionError` when it is not of that form."""
    found = _TEXT.fullmatch(text)
    if found is None:
        raise ValueError(text)
    if found["m"]:
        sizes = (int(found["n"]), int(found["m"]))
        return "n:m", sizes, Fraction(*sizes)
    return found["name"], tuple(int(size) for size in (found["sizes"] or "").split("x") if size), Fraction(found["share"])


def _parsed(sparsity: str | Sparsity) -> Sparsity:
    return parse(sparsity) if isinstance(sparsity, str) else sparsity


@cache
def _cut(name: str, sizes: tuple[int, ...], weight_shape: tuple[int, ...]) -> Cut:
    outputs, inputs, *kernel = weight_shape
    return PATTERNS[name].cut(sizes, outputs, inputs, math.prod(kernel))


def _share_of(units: int, kept: Fraction) -> int:
    """The nearest number of units, at least one."""
    return max(1, round(units * kept))


def _quotient(name: str, what: str, number: int, divisor: int) -> int:
    if number % divisor:
        raise UserError(
            f"{name} sparsity needs {what} divisible by {divisor}, got {number}; change that width or leave it dense"
        )
    return number // divisor
