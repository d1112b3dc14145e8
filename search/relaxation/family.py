"""A family of architectures: one gradient search for every weight of the cost.

Each member begins with the trained supernet's weights and with all options equally probable. What is drawn depends on the seed,
the member and the step alone, and a member is kept after each epoch, so that a search that is killed ends as if it were not.
"""

from __future__ import annotations

import copy
import io
import math
import pickle  # for the name of an error; torch.load runs with weights_only
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from search.relaxation.cost import ExpectedCost
from search.relaxation.relaxed import Relaxed
from search.relaxation.strategy import GradientStrategy, SearchStep
from spaces.choice import Architecture, Option
from spaces.entangled import Entangled
from spaces.errors import UserError
from spaces.files import write_atomically
from spaces.supernet import Supernet


@dataclass(frozen=True)
class RelaxationSettings:
    """How a family is searched for.

    Args:
        strategy: how choices become gates.
        cost_weights: of the logarithm of the expected cost in the loss, a member for each.
        epochs: passes over the training data for one member.
        learning_rate: of the logits' Adam.
        weights_rate: of the shared weights' SGD, on a member's own copy, in every other step; 0: they stay as they are.
        cost_samples: architectures to which the expected cost is fitted.
        held: by kind of choice, an option at which it stays: for what cannot be relaxed.

    Raises:
        UserError: a value that is not allowed.
    """

    strategy: GradientStrategy
    cost_weights: Sequence[float]
    epochs: int = 2
    learning_rate: float = 0.1
    weights_rate: float = 0.0
    cost_samples: int = 600
    held: Mapping[str, Option] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.strategy, GradientStrategy):
            found = f"relaxation.strategy is a {type(self.strategy).__name__}"
            raise UserError(f"{found}; allowed is a search.relaxation.GradientStrategy")
        if type(self.epochs) is not int or self.epochs < 1 or type(self.cost_samples) is not int:
            found = f"relaxation.epochs is {self.epochs!r} and cost_samples {self.cost_samples!r}"
            raise UserError(f"{found}; allowed are integers from 1")
        if not self.learning_rate > 0.0 or not self.weights_rate >= 0.0:
            found = f"relaxation.learning_rate is {self.learning_rate} and weights_rate {self.weights_rate}"
            raise UserError(f"{found}; allowed are a rate above 0 and a rate from 0")
        weights = list(self.cost_weights)
        if not weights or not all(isinstance(w, (int, float)) and math.isfinite(w) and w >= 0.0 for w in weights):
            raise UserError(f"relaxation.cost_weights is {weights}; allowed is a list of numbers from 0")


@dataclass(frozen=True)
class Member:
    """One member of a family.

    Args:
        weight: of the cost.
        architecture: what was decided.
        expected_cost: of the probabilities at the end, by the sum that was fitted; in the cost's unit.
        entropy: of the choices at the end, see `Relaxed.entropy`.
        loss: mean of the last epoch, without the cost.
        macs: multiply-accumulates that it took.
    """

    weight: float
    architecture: Architecture
    expected_cost: float
    entropy: float
    loss: float
    macs: int


def search_member(
    supernet: Supernet,
    settings: RelaxationSettings,
    cost: ExpectedCost,
    data: pl.LightningDataModule,
    weight: float,
    seed: int,
    path: Path,
    on_epoch: Callable[[int], None] = lambda done: None,
) -> Member:
    """Train the logits of all choices by gradient descent on one weight of the cost.

    Args:
        supernet: trained; stays as it is.
        settings: how.
        cost: that counts.
        data: training batches.
        weight: of the cost.
        seed: of what is drawn and of the data's order.
        path: receives the state after each epoch, from which a killed search goes on.
        on_epoch: called after each epoch with the epochs done.

    Raises:
        UserError: the strategy cannot relax the space, the loss is not finite, or the state is damaged.
    """
    search = _Search(copy.deepcopy(supernet), settings, cost, weight, seed)
    search.restore(path)
    while search.epoch < settings.epochs:
        # The data's order and augmentation restart from the epoch, as in the supernet's training.
        torch.manual_seed(seed * 100_003 + search.epoch)
        search.train_epoch(data)
        write_atomically(path, search.state())
        on_epoch(search.epoch)
    with torch.no_grad():
        expected_cost = float(cost.expected(search.relaxed.marginals()))
        entropy = float(search.relaxed.entropy())
    macs = search.supernet.macs_done - supernet.macs_done
    return Member(weight, search.relaxed.architecture(), expected_cost, entropy, search.loss, macs)


def check_strategy(strategy: GradientStrategy, entangled: Entangled) -> None:
    """Make sure that a strategy can search a space.

    Raises:
        UserError: it cannot, or there is nothing to search.
    """
    if not entangled.choices:
        raise UserError(f"space {entangled.space.name} has no choice left to relax; hold fewer kinds in relaxation.held")
    strategy.check(entangled)


class _Search:
    """A member on its way."""

    def __init__(self, supernet: Supernet, settings: RelaxationSettings, cost: ExpectedCost, weight: float, seed: int) -> None:
        self.supernet, self.settings, self.cost, self.weight, self.seed = supernet, settings, cost, weight, seed
        self.entangled = Entangled(supernet, settings.held)
        check_strategy(settings.strategy, self.entangled)
        supernet.start_step(1, 1)
        supernet.requires_grad_(settings.weights_rate > 0.0)
        self.relaxed = Relaxed(supernet.space, settings.held)
        settings.strategy.prepare(self.relaxed)
        # Without momentum: an option that took no part in a step does not move by what earlier steps said.
        self.logits = torch.optim.Adam(self.relaxed.parameters(), lr=settings.learning_rate, betas=(0.0, 0.999))
        own = [p for p in supernet.parameters() if p.requires_grad]
        self.weights = torch.optim.SGD(own, lr=settings.weights_rate, momentum=0.9) if own else None
        self.epoch, self.loss = 0, math.nan

    def train_epoch(self, data: pl.LightningDataModule) -> None:
        """One pass over the data; every other batch is for the weights where they are trained too."""
        loader = data.train_dataloader()
        steps = len(loader)
        losses = []
        for index, (images, labels) in enumerate(loader):
            number = self.epoch * steps + index
            step = SearchStep(
                self.entangled,
                self.relaxed,
                images,
                labels,
                number / (self.settings.epochs * steps),
                np.random.default_rng([self.seed, 41, number]),
            )
            if self.weights is not None and index % 2 == 0:
                self._train(self.weights, self.settings.strategy.loss(step))
                continue
            losses.append(self._train_logits(step))
        self.epoch += 1
        self.loss = float(np.mean(losses))

    def _train_logits(self, step: SearchStep) -> float:
        strategy = self.settings.strategy
        loss = strategy.loss(step)
        weight = self.weight * strategy.cost_share(step.progress)
        total = loss + weight * self.cost.log_expected(self.relaxed.marginals())
        extra = strategy.regularizer(step)
        self._train(self.logits, total if extra is None else total + extra)
        strategy.after_step(self.relaxed)
        return float(loss.detach())

    def _train(self, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        if not loss.isfinite():
            raise UserError(
                f"the loss is {float(loss)} in epoch {self.epoch + 1} of the gradient search; "
                f"lower the rates: relaxation.learning_rate={self.settings.learning_rate / 4:g}"
            )
        self.relaxed.zero_grad()
        self.supernet.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    # -- storing --------------------------------------------------------------------------------------------------------------

    def state(self) -> bytes:
        """Everything that the next epoch depends on."""
        values: dict[str, Any] = {
            "epoch": self.epoch,
            "loss": self.loss,
            "macs": self.supernet.macs_done,
            "relaxed": self.relaxed.state_dict(),
            "logits": self.logits.state_dict(),
        }
        if self.weights is not None:
            values |= {"supernet": self.supernet.state_dict(), "weights": self.weights.state_dict()}
        buffer = io.BytesIO()
        torch.save(values, buffer)
        return buffer.getvalue()

    def restore(self, path: Path) -> None:
        """Go on from a state, where there is one."""
        if not path.exists():
            return
        try:
            values = torch.load(path, weights_only=True)
            self.relaxed.load_state_dict(values["relaxed"])
            self.logits.load_state_dict(values["logits"])
            if self.weights is not None:
                self.supernet.load_state_dict(values["supernet"])
                self.weights.load_state_dict(values["weights"])
            self.epoch, self.loss = int(values["epoch"]), float(values["loss"])
            self.supernet.macs_done = int(values["macs"])
        except (RuntimeError, OSError, EOFError, KeyError, ValueError, TypeError, pickle.UnpicklingError) as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"{path} is damaged ({reason}); delete it to search again") from error
