"""A measurement that stops a study in the middle, as Ctrl-C does."""

from __future__ import annotations

from collections.abc import Callable

from search.evaluation import Evaluation
from spaces.choice import Architecture

Measure = Callable[[Architecture], Evaluation]


def interrupted(measure: Measure, after: int) -> Measure:
    """Measures `after` networks and is interrupted at the next."""
    left = after

    def measured(architecture: Architecture) -> Evaluation:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return measure(architecture)

    return measured
