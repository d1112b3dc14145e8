"""Paths of which two take part in a step (ProxylessNAS, arXiv:1812.00332)."""

from __future__ import annotations

import numpy as np
import torch

from search.relaxation.relaxed import Relaxed
from search.relaxation.strategy import GradientStrategy, SearchStep
from spaces.entangled import Entangled
from spaces.errors import UserError

GATES = ("between", "binary")


class Proxyless(GradientStrategy):
    """Two options of every choice take part in a step.

    They are drawn by their probabilities, and the gradient of their gates reaches the logits through the softmax over the two
    (section 3.2.1). Afterwards both logits are shifted so that together they are as probable as before, since nothing was
    learned about the others. A step holds the activations of one network, that with the larger of the two options of every
    choice, however many options there are.

    Args:
        gates: `binary`: one of the two is open (1), the other closed (0), as in the paper. The gradient then tells what an
            infinitely small opening does, which misleads on shared weights that were trained: scaling them is stationary where
            they are in use. `between`: the two gates are drawn uniformly with sum 1, so that the mean of their gradients is the
            whole difference that the one option instead of the other makes.

    Raises:
        UserError: a value that is not allowed.
    """

    name = "proxyless"

    def __init__(self, gates: str = "between") -> None:
        if gates not in GATES:
            raise UserError(f"relaxation.strategy.gates is {gates!r}; allowed are {', '.join(GATES)}")
        self.gates = gates
        self._before: dict[str, tuple[tuple[int, int], torch.Tensor]] = {}

    def check(self, entangled: Entangled) -> None:
        self._before = {}

    def loss(self, step: SearchStep) -> torch.Tensor:
        gates, opened = {}, {}
        self._before = {}
        for choice in step.relaxed.choices:
            alpha = step.relaxed.alpha(choice)
            pair = drawn_pair(alpha.detach().double().softmax(dim=0).numpy(), step.rng)
            soft = alpha[list(pair)].softmax(dim=0)
            share = step.rng.random()
            if self.gates == "binary":
                share = float(share < soft[0].item())
            drawn = alpha.new_tensor([share, 1.0 - share]) + soft - soft.detach()
            gates[choice.name] = torch.zeros_like(alpha).index_put((torch.tensor(pair),), drawn)
            opened[choice.name] = pair
            self._before[choice.name] = pair, alpha.detach()[list(pair)].logsumexp(dim=0)
        return step.loss(gates, opened)

    def after_step(self, relaxed: Relaxed) -> None:
        with torch.no_grad():
            for choice in relaxed.choices:
                pair, together = self._before[choice.name]
                alpha = relaxed.alpha(choice)
                if len(alpha) > 2:
                    alpha[list(pair)] += together - alpha[list(pair)].logsumexp(dim=0)


def drawn_pair(probabilities: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """Two different positions, drawn one after the other by their probabilities; ascending."""
    floor = np.maximum(probabilities, 1e-9)
    first, second = rng.choice(len(floor), size=2, replace=False, p=floor / floor.sum())
    return int(min(first, second)), int(max(first, second))
