"""Importance and sparsity in one search (Once for Both, arXiv:2403.15835)."""

from __future__ import annotations

import math

import torch
from torch import nn

from search.relaxation.relaxed import Relaxed
from search.relaxation.strategy import GradientStrategy, SearchStep
from spaces.errors import UserError
from spaces.plain import module_key

FIRST, LAST = 0.99, 0.1  # share of the importance in a mask, at the beginning and in the end


class OnceForBoth(GradientStrategy):
    """Units of ordered choices are masked by their importance at first, and more and more by the probability of being kept.

    Between two neighbouring options of an ordered choice lies a unit: some channels, a ring of a kernel, a block. Its mask is
    `share * importance + (1 - share) * P(the option is this one or a larger one)` (the bi-mask, equation 4), where the share
    falls linearly. The importance is a parameter of its own. Options that are less probable than a share of an equal chance are
    closed on the way, and an entropy term, relative to what the options that are still open allow and growing as the share
    falls, makes the rest one-hot (the adaptive one-hot loss). Choices that are not ordered are mixed by their probabilities.

    What is different here: units have an order, since small networks are the first channels of large ones, so importance does
    not reorder them. Masked image modelling, which the paper adds for transformers, is left out.

    Args:
        one_hot: weight of the entropy term.
        threshold: options with less than this share of an equal chance are closed.

    Raises:
        UserError: a value that is not allowed.
    """

    name = "once_for_both"

    def __init__(self, one_hot: float = 0.3, threshold: float = 0.2) -> None:
        if not one_hot >= 0.0 or not 0.0 <= threshold < 1.0:
            found = f"relaxation.strategy.one_hot is {one_hot!r} and threshold {threshold!r}"
            raise UserError(f"{found}; allowed are a number from 0 and a share from 0 to below 1")
        self.one_hot, self.threshold = one_hot, threshold

    def prepare(self, relaxed: Relaxed) -> None:
        units = {module_key(c.name): torch.zeros(len(c.options) - 1) for c in relaxed.choices if c.ordered}
        relaxed.own["importance"] = nn.ParameterDict(units)

    def loss(self, step: SearchStep) -> torch.Tensor:
        relaxed, share = step.relaxed, importance_share(step.progress)
        self._close(relaxed)
        opened, gates = relaxed.opened(), {}
        for choice in relaxed.choices:
            probabilities = relaxed.alpha(choice).softmax(dim=0)
            if choice.ordered:
                importance = relaxed.own["importance"].get_parameter(module_key(choice.name)).sigmoid()
                gates[choice.name] = bi_mask(probabilities, importance, share, opened[choice.name])
            else:
                gates[choice.name] = probabilities
        return step.loss(gates, opened)

    def cost_share(self, progress: float) -> float:
        """The cost counts as much as probabilities do in the masks; otherwise it would decide before they learn anything."""
        return 1.0 - importance_share(progress)

    def regularizer(self, step: SearchStep) -> torch.Tensor:
        opened, terms = step.relaxed.opened(), []
        for choice in step.relaxed.choices:
            count = len(opened[choice.name])
            if count > 1:
                terms.append(step.relaxed.entropy_of(choice) / math.log(count))
        if not terms:
            return torch.zeros(())
        return self.one_hot * (FIRST - importance_share(step.progress)) * torch.stack(terms).mean()

    def _close(self, relaxed: Relaxed) -> None:
        for choice, positions in ((c, relaxed.opened()[c.name]) for c in relaxed.choices):
            probabilities = relaxed.alpha(choice).detach().softmax(dim=0)
            for at in positions:
                if float(probabilities[at]) < self.threshold / len(positions):
                    relaxed.close(choice, at)


def importance_share(progress: float) -> float:
    """Of a mask, at a share of the search that is done."""
    return FIRST + (LAST - FIRST) * progress


def bi_mask(probabilities: torch.Tensor, importance: torch.Tensor, share: float, opened: list[int]) -> torch.Tensor:
    """Gates of the options of an ordered choice, whose units are masked by importance and sparsity; their sum is 1.

    Args:
        probabilities: of the options, `(options,)`.
        importance: of the units that each option but the first adds, from 0 to 1, `(options - 1,)`.
        share: of the importance in the masks.
        opened: positions of the options that are left; units below all of them are always there, those above never.
    """
    kept = probabilities.flip(0).cumsum(0).flip(0)[1:]
    masks = share * importance + (1.0 - share) * kept
    # A unit counts only together with those before it, so masks fall along the order.
    masks = torch.cummin(masks, dim=0).values
    at = torch.arange(1, len(probabilities))
    masks = torch.where(at <= opened[0], 1.0, torch.where(at > opened[-1], 0.0, masks))
    masks = torch.cat([masks.new_ones(1), masks, masks.new_zeros(1)])
    return masks[:-1] - masks[1:]
