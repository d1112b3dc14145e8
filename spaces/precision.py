"""Precisions: how the weights of a layer are stored and in which numbers it computes.

A precision is written as text: an option of a choice, a field of a `LayerSpec` and part of a table's key.

    fp32                    float weights, float arithmetic
    w8a8  w4a8  w2a8        integer weights; 8-bit activations with a fixed, calibrated range: integer arithmetic
    w7a8                    the same; two products with bytes fit into 16 bits, which x86 CPUs without VNNI are fast at
    ternary_a8  binary_a8   the same with the levels -1, 0, 1 or -1, 1
    w8d8  w7d8  w4d8@32     integer weights; the input is rounded to 8 bits by its own range in every run, the output is float
    fp8                     8-bit floats (e4m3) for weights and, by its own range in every run, the input; the output is float
    w8  w4  w3  w2          integer weights alone, one scale per output channel; float arithmetic
    w4@32                   one scale per 32 inputs of each output channel
    w4@tensor  w4@inputs    one scale in all, one scale per input channel
    ternary  binary         three or two levels with a scale per output channel; float arithmetic
    power4                  4-bit levels on a power curve (NUPES)
    codebook4               4-bit codes into learned values (JLCM)
    partial@1/8             binary, the most salient eighth in 8 bits (PB-LLM)
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

from spaces.errors import UserError

FLOAT, FLOAT8 = "fp32", "fp8"
FLOAT_BITS = 32
INT8 = ("w8a8", "w7a8")  # what is meant by int8: products of bytes, a scale per output channel
INTEGER_BITS = (2, 3, 4, 7, 8)
BYTE_PRODUCT_BITS = 7  # of weights, so that the sum of two of their products with bytes fits into 16 bits
PER_CHANNEL, PER_TENSOR, PER_INPUT = "channel", "tensor", "inputs"

_INTEGER = re.compile(r"w(\d+)([ad]8)?(?:@(\d+|tensor|inputs))?")
_NAMED = re.compile(r"([a-z]+)(\d+)?(?:@(\d+/[1-9]\d*))?(_a8)?")


@dataclass(frozen=True)
class Kind:
    """How weights that are no plain integers are written.

    Args:
        example: a text of this kind.
        bits: of a weight; when there are several, the text says which: `power4`.
        integer_levels: whether they run in integer arithmetic too, with `_a8` behind their text.
        has_zero: whether a weight can be 0, as sparse layers need.
        salient: whether the text says a share of the weights that stay in 8 bits: `partial@1/8`.
    """

    example: str
    bits: tuple[int, ...]
    integer_levels: bool = False
    has_zero: bool = True
    salient: bool = False


KINDS: dict[str, Kind] = {}  # by name; `spaces.quantizers` registers them


@dataclass(frozen=True)
class Precision:
    """A precision, taken apart.

    Args:
        text: as it is written.
        weights: the kind of weights: `float`, `float8`, `integer` or one of `KINDS`.
        weight_bits: bits of one stored weight (of the unsalient ones, for `partial`).
        activations: `float`; `static`: 8 bits with a fixed range; `dynamic`: the input in 8 bits by its own range; `float8`:
            the input in 8-bit floats by its own range.
        scales: what shares a scale: `channel`, `tensor`, `inputs` or, as a number, that many inputs of an output channel.
        salient: share of the weights that `partial` keeps in 8 bits.
    """

    text: str
    weights: str
    weight_bits: int
    activations: str = "float"
    scales: str | int = PER_CHANNEL
    salient: Fraction = Fraction(0)

    @property
    def integer(self) -> bool:
        """Whether the layer computes in integers with fixed ranges, and so quantizes the tensors at both of its sides."""
        return self.activations == "static"

    @property
    def rounds_input(self) -> bool:
        """Whether the layer rounds its input by its own range in every run."""
        return self.activations in ("dynamic", "float8")

    @property
    def float_weights(self) -> bool:
        return self.weights == "float"

    @property
    def has_zero(self) -> bool:
        """Whether a weight can be 0, as sparse layers need."""
        return self.weights not in KINDS or KINDS[self.weights].has_zero

    @property
    def bits(self) -> float:
        """Bits per weight, scales not counted."""
        return float(self.weight_bits + self.salient * (8 - self.weight_bits))


@cache
def parse_precision(text: str) -> Precision:
    """A precision from its text.

    Raises:
        UserError: it is none.
    """
    if text == FLOAT:
        return Precision(FLOAT, "float", FLOAT_BITS)
    if text == FLOAT8:
        return Precision(FLOAT8, "float8", 8, "float8")
    precision = _integer(text) or _named(text)
    if precision is None:
        named = [k.example + (f", {k.example}_a8" if k.integer_levels else "") for k in KINDS.values()]
        raise UserError(
            f"precision {text!r}; allowed are fp32, fp8, w8a8 w7a8 w4a8 w3a8 w2a8, w8d8 w7d8, w8 w4 w3 w2 (with @tensor, "
            f"@inputs or a block size such as @32), w4d8@32, {', '.join(named)}"
        )
    return precision


def _integer(text: str) -> Precision | None:
    match = _INTEGER.fullmatch(text)
    if match is None or int(match[1]) not in INTEGER_BITS:
        return None
    activations = {None: "float", "a8": "static", "d8": "dynamic"}[match[2]]
    scales: str | int = PER_CHANNEL if match[3] is None else int(match[3]) if match[3].isdigit() else match[3]
    block = isinstance(scales, int)
    if block and (scales < 16 or scales & (scales - 1)):  # type: ignore[operator]
        return None
    # Integer kernels take one scale per output channel; a block of inputs has a scale of its own on both sides of d8. 7 bits
    # are for kernels that multiply bytes: stored they take 8, like those of `w8`.
    bits = int(match[1])
    allowed = {
        "float": bits != BYTE_PRODUCT_BITS,
        "static": scales in (PER_CHANNEL, PER_TENSOR),
        "dynamic": (scales == PER_CHANNEL and bits >= BYTE_PRODUCT_BITS) or (block and bits != BYTE_PRODUCT_BITS),
    }
    return Precision(text, "integer", bits, activations, scales) if allowed[activations] else None


def _named(text: str) -> Precision | None:
    importlib.import_module("spaces.quantizers")  # where the kinds are; it needs this module, so not at the top
    match = _NAMED.fullmatch(text)
    kind = KINDS.get(match[1]) if match else None
    if match is None or kind is None:
        return None
    written, share = match[2], Fraction(match[3] or 0)
    bits = kind.bits[0] if len(kind.bits) == 1 else int(written or 0)
    several, static = len(kind.bits) > 1, match[4] is not None
    fits = (written is not None) is several and bits in kind.bits and (0 < share < 1 if kind.salient else not match[3])
    if not fits or (static and not kind.integer_levels):
        return None
    return Precision(text, match[1], bits, "static" if static else "float", salient=share)
