"""The sandwich rule with in-place distillation (BigNAS, arXiv:2003.11142), with single paths between the sandwiches."""

from __future__ import annotations

from search.training.strategy import Losses, Step, Strategy, drawn
from spaces.errors import UserError


class Sandwich(Strategy):
    """A sandwich trains the largest network on the labels, then the smallest and drawn ones on a teacher's predictions.

    The largest network takes most of a sandwich's arithmetic. So a sandwich can be made in every so many steps only, and in the
    others drawn networks are trained on the labels (SPOS, arXiv:1904.00420): the ends of the space stay trained, and the same
    arithmetic pays for several times as many steps. BigNAS itself is `every=1` with two drawn networks.

    Weight decay acts once a step and on whole weights, which are the largest network's, and labels are smoothed for the largest
    only: so the largest alone is regularised, as BigNAS has it.

    Args:
        random_networks: drawn per step, in a sandwich beside the largest and the smallest.
        every: a sandwich is made in every so many steps.
        largest_first: share of the training in which the largest network is trained alone.
        spread: drawn networks are of all sizes, with choices of one kind alike (`Space.sample_spread`), as those are that
            searches look for. Otherwise every choice is drawn by itself, as in BigNAS: then hardly any network is small, large,
            dense or of one precision throughout.

    Raises:
        UserError: a value that is not allowed.
    """

    def __init__(self, random_networks: int = 2, every: int = 1, largest_first: float = 0.0, spread: bool = False) -> None:
        super().__init__()
        if type(random_networks) is not int or random_networks < 0 or not 0.0 <= largest_first < 1.0:
            found = f"supernet.strategy.random_networks is {random_networks!r} and largest_first {largest_first!r}"
            raise UserError(f"{found}; allowed are integers from 0 and shares from 0 to below 1")
        if type(every) is not int or every < 1 or (every > 1 and not random_networks):
            found = f"supernet.strategy.every is {every!r} and random_networks {random_networks}"
            raise UserError(f"{found}; allowed are integers from 1, and 1 alone where no networks are drawn")
        if type(spread) is not bool:
            raise UserError(f"supernet.strategy.spread is {spread!r}; allowed are true and false")
        self.random_networks, self.every, self.largest_first, self.spread = random_networks, every, largest_first, spread

    def backward(self, step: Step) -> Losses:
        space = step.supernet.space
        alone = step.progress < self.largest_first
        if not alone and step.index % self.every:
            paths = [step.on_labels(a)[0] for a in drawn(space, step.rng, self.random_networks, self.spread)]
            return {"drawn": sum(paths[1:], paths[0]) / len(paths)}
        losses = {}
        losses["largest"], outputs = step.on_labels(space.largest(), smoothing=step.smoothing)
        if alone:
            return losses
        lesson = step.distillation.lesson(step.supernet, step.images, outputs)
        del outputs  # its graph is done with
        losses["smallest"] = step.on_lesson(space.smallest(), lesson)
        for architecture in drawn(space, step.rng, self.random_networks, self.spread):
            step.on_lesson(architecture, lesson)
        return losses
