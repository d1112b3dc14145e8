"""Search for networks that are pruned (DASS, arXiv:2207.06968)."""

from __future__ import annotations

import torch

from search.relaxation.strategy import GradientStrategy, SearchStep
from spaces.choice import Choice
from spaces.entangled import Entangled
from spaces.errors import UserError
from spaces.sparsity import DENSE


class Dass(GradientStrategy):
    """Sparse operators in the relaxed space, and from some point on the loss of the pruned network as the objective.

    At first every layer mixes its dense and its sparse forms: the dense pre-training of the paper. Then the dense forms of
    layers that have sparse ones are closed for good: weights, where they are trained, are those under masks, and all choices
    are decided by the loss after pruning, so that the network that is found is sparse wherever it can be.

    Args:
        dense_share: of the search, before dense layers are closed.

    Raises:
        UserError: a value that is not allowed.
    """

    name = "dass"

    def __init__(self, dense_share: float = 0.25) -> None:
        if not 0.0 <= dense_share < 1.0:
            raise UserError(f"relaxation.strategy.dense_share is {dense_share!r}; allowed are shares from 0 to below 1")
        self.dense_share = dense_share

    def check(self, entangled: Entangled) -> None:
        if not any(map(_prunes, entangled.choices)):
            raise UserError(
                f"dass needs a choice between dense and sparse layers, and space {entangled.space.name} has none that is free; "
                "give several: space.sparsities=[dense,group@1/2]"
            )

    def loss(self, step: SearchStep) -> torch.Tensor:
        relaxed = step.relaxed
        if step.progress >= self.dense_share:
            for choice in filter(_prunes, relaxed.choices):
                relaxed.close(choice, choice.options.index(DENSE))
        return step.loss(relaxed.probabilities(), relaxed.opened())


def _prunes(choice: Choice) -> bool:
    return choice.kind == "sparsity" and DENSE in choice.options
