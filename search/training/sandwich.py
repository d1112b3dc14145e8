"""The sandwich rule with in-place distillation (BigNAS, arXiv:2003.11142)."""

from __future__ import annotations

from search.training.strategy import Losses, Step, Strategy, drawn
from spaces.errors import UserError


class Sandwich(Strategy):
    """Every step trains the largest network on the labels, then the smallest and drawn ones on a teacher's predictions.

    Weight decay acts once a step and on whole weights, which are the largest network's, and labels are smoothed for the largest
    only: so the largest alone is regularised, as BigNAS has it.

    Args:
        random_networks: drawn per step beside the largest and the smallest.
        largest_first: share of the training in which the largest network is trained alone.
        largest_every: afterwards the largest network is trained in every so many steps; in the others it only teaches, which
            takes a third of its arithmetic.

    Raises:
        UserError: a value that is not allowed.
    """

    def __init__(self, random_networks: int = 2, largest_first: float = 0.0, largest_every: int = 1) -> None:
        super().__init__()
        if type(random_networks) is not int or random_networks < 0 or not 0.0 <= largest_first < 1.0:
            found = f"supernet.strategy.random_networks is {random_networks!r} and largest_first {largest_first!r}"
            raise UserError(f"{found}; allowed are integers from 0 and shares from 0 to below 1")
        if type(largest_every) is not int or largest_every < 1:
            raise UserError(f"supernet.strategy.largest_every is {largest_every!r}; allowed are integers from 1")
        self.random_networks, self.largest_first, self.largest_every = random_networks, largest_first, largest_every

    def backward(self, step: Step) -> Losses:
        space = step.supernet.space
        losses: Losses = {}
        outputs = None
        alone = step.progress < self.largest_first
        if alone or step.index % self.largest_every == 0:
            losses["largest"], outputs = step.on_labels(space.largest(), smoothing=step.smoothing)
        if alone:
            return losses
        lesson = step.distillation.lesson(step.supernet, step.images, outputs)
        del outputs  # its graph is done with
        losses["smallest"] = step.on_lesson(space.smallest(), lesson)
        for architecture in drawn(space, step.rng, self.random_networks):
            step.on_lesson(architecture, lesson)
        return losses
