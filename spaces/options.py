"""What a user may write as the options of a space."""

from __future__ import annotations

from collections.abc import Sequence

from spaces.errors import UserError
from spaces.precision import parse_precision


def positive(what: str, value: object) -> int:
    """A positive integer.

    Raises:
        UserError: it is something else.
    """
    if type(value) is not int or value < 1:
        raise UserError(f"{what} is {value!r}; allowed are positive integers")
    return value


def ascending(what: str, values: object) -> tuple[int, ...]:
    """Distinct positive integers, the smallest first.

    Raises:
        UserError: they are something else.
    """
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise UserError(f"{what} is {values!r}; allowed is a list of positive integers")
    if any(type(value) is not int or value < 1 for value in values):
        raise UserError(f"{what} are {list(values)}; allowed are positive integers")
    return tuple(sorted(set(values)))


def distinct_precisions(texts: object) -> tuple[str, ...]:
    """Distinct precisions by the bits of weights and arithmetic, the cheapest first.

    Raises:
        UserError: they are no list of precisions.
    """
    if not isinstance(texts, Sequence) or isinstance(texts, str) or not texts or not all(isinstance(t, str) for t in texts):
        raise UserError(f"precisions is {texts!r}; allowed is a list such as [w8a8,fp32]")
    return tuple(sorted(set(texts), key=lambda text: (parse_precision(text).bits, not parse_precision(text).integer, text)))
