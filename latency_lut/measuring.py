"""How much of a space is measured on a device, and how: one set of settings for profiles, bundles and devices elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

from spaces.errors import UserError


@dataclass(frozen=True)
class MeasuringSettings:
    """What is measured for a latency table, and how long.

    Args:
        seed: decides which pairs and networks are measured.
        max_pairs: (layer, lowering) pairs to measure.
        networks: whole random networks to time.
        rounds: visits of every pair.
        visit_s: seconds of one visit.

    Raises:
        UserError: one of them is out of range.
    """

    seed: int = 0
    max_pairs: int = 2800
    networks: int = 40
    rounds: int = 12
    visit_s: float = 0.0006

    def __post_init__(self) -> None:
        for name, smallest in (("seed", 0), ("max_pairs", 1), ("networks", 0), ("rounds", 3)):
            value = getattr(self, name)
            if type(value) is not int or value < smallest:
                raise UserError(f"{name} is {value!r}; allowed are integers from {smallest}")
        if not isinstance(self.visit_s, (int, float)) or not 0 < self.visit_s < 60:
            raise UserError(f"visit_s is {self.visit_s!r}; allowed are seconds above 0 and below 60")


DEFAULTS = MeasuringSettings()
