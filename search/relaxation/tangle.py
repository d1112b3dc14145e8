"""Entangled weights in one forward pass (TangleNAS, arXiv:2312.10440)."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from search.relaxation.strategy import GradientStrategy, SearchStep
from spaces.errors import UserError

GATES = ("darts", "gdas", "drnas")


class Tangle(GradientStrategy):
    """All options of all choices in one forward pass of the largest network.

    Args:
        gates: how probabilities become gates: `darts` takes them as they are (arXiv:1806.09055), `gdas` draws one option by
            Gumbel noise and lets the gradient pass its softmax (arXiv:1910.04465), `drnas` draws mixtures from a Dirichlet
            distribution (arXiv:2006.10355).
        temperature: of the softmax of `gdas` at the beginning; it falls to a tenth, linearly.

    Raises:
        UserError: a value that is not allowed.
    """

    name = "tangle"

    def __init__(self, gates: str = "drnas", temperature: float = 5.0) -> None:
        if gates not in GATES or not temperature > 0.0:
            found = f"relaxation.strategy.gates is {gates!r} and temperature {temperature!r}"
            raise UserError(f"{found}; allowed are {', '.join(GATES)} and a value above 0")
        self.gates, self.temperature = gates, temperature

    def loss(self, step: SearchStep) -> torch.Tensor:
        relaxed = step.relaxed
        if self.gates == "darts":
            return step.loss(relaxed.probabilities())
        generator = torch.Generator().manual_seed(int(step.rng.integers(2**62)))
        if self.gates == "drnas":
            return step.loss({c.name: dirichlet(relaxed.alpha(c), generator) for c in relaxed.choices})
        temperature = self.temperature * (1.0 - 0.9 * step.progress)
        return step.loss({c.name: straight_through(relaxed.alpha(c), temperature, generator) for c in relaxed.choices})


def straight_through(alpha: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    """One option drawn by Gumbel noise, `(options,)` of 0 and 1, with the gradient of the softmax."""
    uniform = torch.rand(alpha.shape, generator=generator).clamp_(1e-9, 1.0 - 1e-7)
    soft = ((alpha.log_softmax(dim=0) - (-uniform.log()).log()) / temperature).softmax(dim=0)
    hard = F.one_hot(soft.argmax(), len(alpha)).to(alpha.dtype)
    return hard + soft - soft.detach()


def dirichlet(alpha: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A mixture drawn from a Dirichlet distribution, `(options,)`, with gradient to the logits.

    The concentrations are the probabilities times the number of options, so that the cost is expected under the mean of the
    mixtures; arXiv:2006.10355 learns the concentrations themselves.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        return torch.distributions.Dirichlet(len(alpha) * alpha.softmax(dim=0).clamp_min(1e-4)).rsample()
