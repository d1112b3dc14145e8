"""Learning rates over a training."""

from __future__ import annotations

import math

from spaces.errors import UserError

SCHEDULES = ("cosine", "constant_ending")
WARMUP = 0.05
ENDING = 0.05


def check_schedule(name: str) -> None:
    """Make sure that a schedule exists.

    Raises:
        UserError: it does not.
    """
    if name not in SCHEDULES:
        raise UserError(f"supernet.schedule is {name!r}; allowed are {', '.join(SCHEDULES)}")


def rate_factor(name: str, step: int, steps: int) -> float:
    """The learning rate before a step as a share of its peak.

    Both schedules rise over the first twentieth of the steps. `cosine` then falls to 0 along half a cosine. `constant_ending`
    falls exponentially and stays at a twentieth of the peak, which it reaches after three quarters of the steps: the networks
    of a supernet do not all converge at once (BigNAS, arXiv:2003.11142, section 3.2).
    """
    warmup = max(1, int(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    position = (step - warmup) / max(1, steps - warmup)
    if name == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * position))
    return max(ENDING, math.exp(math.log(ENDING) * position / 0.75))
