"""Single paths (SPOS, arXiv:1904.00420): one drawn network per step."""

from __future__ import annotations

from search.training.strategy import Losses, OnLabels, Step, drawn
from spaces.errors import UserError


class SinglePath(OnLabels):
    """Every step trains one drawn network on the labels.

    A step costs what that network costs, a fifth of the largest in the default space: equal arithmetic pays for several times
    as many steps as where the largest teaches.

    Args:
        spread: networks are drawn of all sizes, with choices of one kind alike (`Space.sample_spread`), as those are that
            searches look for. Otherwise every choice is drawn by itself, as in SPOS: then hardly any network is small, large,
            dense or of one precision throughout.

    Raises:
        UserError: a value that is not allowed.
    """

    def __init__(self, spread: bool = False) -> None:
        super().__init__()
        if type(spread) is not bool:
            raise UserError(f"supernet.strategy.spread is {spread!r}; allowed are true and false")
        self.spread = spread

    def backward(self, step: Step) -> Losses:
        (architecture,) = drawn(step.supernet.space, step.rng, 1, self.spread)
        loss, _ = step.on_labels(architecture, smoothing=step.smoothing)
        return {"drawn": loss}
