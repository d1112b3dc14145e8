"""Nested random sub-models with accumulated gradients (SortedNet, arXiv:2309.00255)."""

from __future__ import annotations

from search.training.strategy import Losses, OnLabels, Step
from spaces.errors import UserError


class Sorted(OnLabels):
    """Every step adds up the gradients of several sub-models, each trained on the labels; nobody teaches.

    Sub-models of a supernet are nested by how it cuts weights: the first channels, the first blocks. Each is drawn by itself,
    at a size anywhere between the smallest and the largest.

    Args:
        networks: sub-models per step.

    Raises:
        UserError: a value that is not allowed.
    """

    def __init__(self, networks: int = 4) -> None:
        super().__init__()
        if type(networks) is not int or networks < 1:
            raise UserError(f"supernet.strategy.networks is {networks!r}; allowed are integers from 1")
        self.networks = networks

    def backward(self, step: Step) -> Losses:
        space, share = step.supernet.space, 1.0 / self.networks
        networks = [space.sample_spread(step.rng) for _ in range(self.networks)]
        losses = [step.on_labels(a, share, step.smoothing)[0] for a in networks]
        return {"drawn": sum(losses[1:], losses[0]) / self.networks}
