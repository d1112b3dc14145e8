"""Relaxed choices: a probability for every option of every choice, made of parameters that gradients can reach.

Choices are independent given that they are active, and a choice is active with the probability that its parent has one of the
values that it needs. So marginals and expectations of everything that adds up over options are exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from spaces.choice import Architecture, Choice, Option
from spaces.entangled import check_held, free_choices
from spaces.plain import module_key
from spaces.space import Space

CLOSED = 30.0  # below the largest logit: finite, so that entropies have gradients


class Relaxed(nn.Module):
    """Logits of every free choice's options, equal at first.

    Args:
        space: of the choices.
        held: by kind of choice, the option at which it stays.

    Attributes:
        choices: those that are free: not held, with several options.
        own: parameters that a strategy adds, trained and kept with the logits.

    Raises:
        UserError: `held` names what the space does not have.
    """

    def __init__(self, space: Space, held: Mapping[str, Option] | None = None) -> None:
        super().__init__()
        self.space, self.held = space, dict(held or {})
        check_held(space, self.held)
        self.choices = free_choices(space, self.held)
        self.own = nn.ModuleDict()
        self.alphas = nn.ParameterDict({module_key(c.name): torch.zeros(len(c.options)) for c in self.choices})

    def alpha(self, choice: Choice) -> torch.Tensor:
        """The logits of a choice, `(options,)`."""
        alpha: torch.Tensor = self.alphas[module_key(choice.name)]
        return alpha

    def close(self, choice: Choice, at: int) -> None:
        """Take the option at a position out for good: its probability is as good as 0, and so is its gradient."""
        alpha = self.alpha(choice)
        if at in self._positions(choice):
            with torch.no_grad():
                alpha[at] = alpha.max() - CLOSED

    def opened(self) -> dict[str, list[int]]:
        """By free choice, the positions of the options that were not closed."""
        return {choice.name: self._positions(choice) for choice in self.choices}

    def _positions(self, choice: Choice) -> list[int]:
        logits = self.alpha(choice).tolist()
        return [at for at, logit in enumerate(logits) if logit > max(logits) - CLOSED / 2]

    def probabilities(self) -> dict[str, torch.Tensor]:
        """By free choice, the probability of every option while the choice is active, `(options,)`."""
        return {c.name: self.alpha(c).softmax(dim=0) for c in self.choices}

    def marginals(self) -> torch.Tensor:
        """The probability of every option of every choice of the space, also that it is active, in the order of `Space.encode`.

        Returns:
            `(len(space.feature_names),)`; the parts of a choice sum to the probability that it is active.
        """
        free, active, parts = self.probabilities(), dict[str, torch.Tensor](), dict[str, torch.Tensor]()
        one = next(self.parameters()).new_ones(())
        for choice in self.space.choices:
            own = free[choice.name] if choice.name in free else self._fixed(choice).to(one.dtype)
            if choice.when is None:
                active[choice.name] = one
            else:
                name, values = choice.when
                parent = next(c for c in self.space.choices if c.name == name)
                wanted = [i for i, option in enumerate(parent.options) if option in values]
                active[choice.name] = parts[name][wanted].sum()
            parts[choice.name] = own * active[choice.name]
        return torch.cat(list(parts.values()))

    def _fixed(self, choice: Choice) -> torch.Tensor:
        at = choice.options.index(self.held[choice.kind]) if choice.kind in self.held else len(choice.options) - 1
        return torch.eye(len(choice.options))[at]

    def entropy(self) -> torch.Tensor:
        """Mean entropy of the choices as a share of the largest possible: 1 where nothing is decided, 0 where everything is."""
        return torch.stack([self.entropy_of(c) / math.log(len(c.options)) for c in self.choices]).mean()

    def entropy_of(self, choice: Choice) -> torch.Tensor:
        """The entropy of one choice, in nats; its gradient is finite however small a probability is."""
        log = self.alpha(choice).log_softmax(dim=0)
        return -(log.exp() * log).sum()

    def architecture(self) -> Architecture:
        """What was decided: the median of ordered choices, of others the most probable option.

        Where the ends of an ordered choice are equally probable the median is in the middle, where the most probable option
        would be decided by the last digit.
        """
        values: dict[str, Option] = {}
        with torch.no_grad():
            for choice in self.choices:
                p = self.alpha(choice).double().softmax(dim=0)
                at = int((p.cumsum(dim=0) < 0.5).sum()) if choice.ordered else int(p.argmax())
                values[choice.name] = choice.options[min(at, len(p) - 1)]
        return self.completed(values)

    def sample(self, rng: np.random.Generator) -> Architecture:
        """An architecture drawn by the probabilities."""
        values: dict[str, Option] = {}
        for choice in self.choices:
            p = self.alpha(choice).detach().double().softmax(dim=0).numpy()
            values[choice.name] = choice.options[int(rng.choice(len(p), p=p / p.sum()))]
        return self.completed(values)

    def completed(self, values: Mapping[str, Option]) -> Architecture:
        """The architecture with these values of free choices and the held ones."""
        return self.space.completed({**self.space.graded(1.0, **self.held), **values})
