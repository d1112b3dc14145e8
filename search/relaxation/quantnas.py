"""Search against quantization noise (QuantNAS, arXiv:2208.14839)."""

from __future__ import annotations

import torch

from search.relaxation.strategy import GradientStrategy, SearchStep
from spaces.entangled import Entangled
from spaces.errors import UserError
from spaces.weights import ElasticWeight


class QuantNas(GradientStrategy):
    """All options mixed by their probabilities, with noise in place of rounded weights, and decided by an entropy term.

    The noise has, per output channel, the power of the error that rounding makes, so it works for every precision and its
    gradient needs no straight-through estimate. Activations are rounded as always. The entropy of the choices is added to the
    loss with a weight that grows linearly from 0. The paper's third part, Adaptive Deviation for Quantization, stands in for
    batch norm in networks that do badly with it; those of our spaces are made of it, so it is not here.

    Args:
        entropy: weight of the entropy at the end.

    Raises:
        UserError: a value that is not allowed.
    """

    name = "quantnas"

    def __init__(self, entropy: float = 0.3) -> None:
        if not entropy >= 0.0:
            raise UserError(f"relaxation.strategy.entropy is {entropy!r}; allowed are numbers from 0")
        self.entropy = entropy

    def check(self, entangled: Entangled) -> None:
        if not any(choice.kind == "precision" for choice in entangled.choices):
            raise UserError(
                f"quantnas needs a choice of precision, and space {entangled.space.name} has none that is free; "
                "give several: space.precisions=[w8a8,fp32]"
            )

    def loss(self, step: SearchStep) -> torch.Tensor:
        generator = torch.Generator().manual_seed(int(step.rng.integers(2**62)))

        def noisy(elastic: ElasticWeight, weight: torch.Tensor, precision: str) -> torch.Tensor:
            with torch.no_grad():
                error = elastic.on_grid(weight, precision) - weight
                power = error.square().flatten(1).mean(dim=1).reshape(-1, *[1] * (weight.dim() - 1))
                noise = 2.0 * torch.rand(weight.shape, generator=generator).to(weight) - 1.0
                added = noise * (3.0 * power).sqrt()  # a uniform variable on [-1, 1] has a variance of 1/3
            return weight + added

        return step.loss(step.relaxed.probabilities(), quantize=noisy)

    def regularizer(self, step: SearchStep) -> torch.Tensor:
        return self.entropy * step.progress * step.relaxed.entropy()
