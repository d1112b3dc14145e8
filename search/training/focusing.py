"""Focusing: a supernet trained further where searches look, on networks like those of the predicted fronts.

A supernet trains all networks of its space alike, and a search then looks at few of them: those that are worth their latency
on a device. AttentiveNAS (arXiv:2011.09011) and GreedyNAS (arXiv:2003.11236) train promising networks more often. Here fronts
come from the predictors that guide the search, so that they are those of the user's devices and objectives. What is predicted
with a supernet that was trained shortly is a poor front; so fronts are predicted anew while the supernet becomes better, from
the losses of the very steps that train it, which costs no evaluation. What is given is arithmetic, so with every front the
epochs that are left are counted anew by what its networks take.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from search.training.distillation import Distillation
from search.training.strategy import Losses, OnLabels, Step
from spaces.choice import Architecture
from spaces.errors import UserError
from spaces.space import Space
from spaces.supernet import Supernet

DRAWS = 1000  # networks whose arithmetic tells what an epoch takes
LOSSES = 1500  # of the last steps, from which fronts are predicted anew; later ones tell more of the present weights
MACS_PER_TRAINING = 3  # forward, and backward to activations and weights


@dataclass(frozen=True)
class FocusSettings:
    """How a supernet is focused.

    Args:
        share: arithmetic, as a share of what training the supernet took; 0 leaves the supernet as it is.
        near: share of the steps that train networks like those of a front; the others train networks of all sizes.
        change: share of the choices of such a network that are drawn anew instead of taken from the front.
        together: share of such networks in which all choices of one kind are drawn anew as well, leaning together.
        rounds: how often fronts are predicted, each time with the weights as they then are and for as much arithmetic.
        learning_rate: its peak.
        candidates: predicted to find each front.
        networks: of each front, evenly along the logarithm of each cost.

    Raises:
        UserError: a value that is not allowed.
    """

    share: float = 3.0
    near: float = 0.8
    change: float = 0.05
    together: float = 0.3
    rounds: int = 6
    learning_rate: float = 0.01
    candidates: int = 2000
    networks: int = 64

    def __post_init__(self) -> None:
        if type(self.share) not in (int, float) or not 0.0 <= self.share < math.inf:
            raise UserError(f"focus.share is {self.share!r}; allowed are numbers from 0")
        if type(self.learning_rate) not in (int, float) or not 0.0 < self.learning_rate < math.inf:
            raise UserError(f"focus.learning_rate is {self.learning_rate!r}; allowed are numbers above 0")
        for name in ("near", "change", "together"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0.0 <= value <= 1.0:
                raise UserError(f"focus.{name} is {value!r}; allowed are shares from 0 to 1")
        for name in ("rounds", "candidates", "networks"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise UserError(f"focus.{name} is {value!r}; allowed are integers from 1")


class NearFronts(OnLabels):
    """Every step trains one network on the labels: often one like those of the fronts, otherwise one of any size.

    Args:
        fronts: networks worth training, each as often as it stands there; at least one.
        near: share of the steps that train networks like these.
        change: see `FocusSettings`.
        together: see `FocusSettings`.

    Attributes:
        rounds: the fronts so far, the last of which are trained.
        until: epochs after which the present round is over.
    """

    def __init__(self, fronts: Sequence[Architecture], near: float, change: float, together: float) -> None:
        super().__init__()
        self.rounds, self.near, self.change, self.together = [list(fronts)], near, change, together
        self.until = 0
        self._steps: deque[tuple[Architecture, torch.Tensor]] = deque(maxlen=LOSSES)

    def prepare(self, supernet: Supernet, distillation: Distillation) -> None:
        self._space = supernet.space

    def renew(self, fronts: Sequence[Architecture]) -> None:
        """Train networks like these from now on."""
        self.rounds.append(list(fronts))

    def get_extra_state(self) -> dict[str, Any]:
        trained, losses = self.trained
        return {
            "rounds": [texts(fronts) for fronts in self.rounds],
            "until": self.until,
            "trained": texts(trained),
            "losses": losses,
        }

    def set_extra_state(self, state: Any) -> None:
        """Go on with the fronts and losses of a checkpoint.

        Raises:
            UserError: they are not networks of the space.
        """
        try:
            self.rounds = [architectures(self._space, fronts) for fronts in state["rounds"]]
            self.until = int(state["until"])
            losses = torch.tensor(state["losses"], dtype=torch.float32)
            self._steps.clear()
            self._steps.extend(zip(architectures(self._space, state["trained"]), losses, strict=True))
            if not self.rounds or not self.rounds[-1]:
                raise ValueError("no fronts")
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the checkpoint of the stage focus is damaged ({error}); delete the run's folder focus") from error

    def draw(self, space: Space, rng: np.random.Generator) -> Architecture:
        """The network of a step."""
        if rng.uniform() >= self.near:
            return space.sample_spread(rng)
        fronts = self.rounds[-1]
        drawn = fronts[int(rng.integers(len(fronts)))]
        if rng.uniform() < self.together:
            drawn = space.sample_kind(rng, drawn)
        return space.sample_near(rng, drawn, self.change)

    @property
    def trained(self) -> tuple[list[Architecture], list[float]]:
        """The networks of the last steps, and their losses; of this process's images."""
        losses = [loss.cpu() for _, loss in self._steps]  # those of a checkpoint are there already
        return [architecture for architecture, _ in self._steps], torch.stack(losses).tolist() if losses else []

    def backward(self, step: Step) -> Losses:
        step.supernet.start_step(1, 1)  # masks and grids are those that ship, not those with which a training begins
        drawn = self.draw(step.supernet.space, step.rng)
        loss, _ = step.on_labels(drawn, smoothing=step.smoothing)
        self._steps.append((drawn, loss))
        return {"drawn": loss}


def texts(fronts: Sequence[Architecture]) -> list[str]:
    """Networks as what files and other processes can take."""
    return [architecture.to_json() for architecture in fronts]


def architectures(space: Space, found: Sequence[str]) -> list[Architecture]:
    """The inverse of `texts`.

    Raises:
        ValueError: they are not networks of the space.
    """
    return [space.architecture(Architecture.from_json(text)) for text in found]


@dataclass(frozen=True)
class Budget:
    """What focusing may take.

    Args:
        macs: multiply-accumulates in all.
        rounds: how often fronts are predicted.
        images: in the training data.
        seed: of the draws by which an epoch's arithmetic is estimated.
    """

    macs: float
    rounds: int
    images: int
    seed: int

    def plan(self, space: Space, strategy: NearFronts, done: int, spent: float) -> int:
        """Plan the round that begins, and all that is left.

        Args:
            space: of the networks.
            strategy: draws them; is told when the round is over.
            done: epochs.
            spent: multiply-accumulates that these took.

        Returns:
            Epochs in all, at least one more than are done.
        """
        rng = np.random.default_rng([self.seed, 7, len(strategy.rounds)])
        mean = float(np.mean([space.network(strategy.draw(space, rng)).macs for _ in range(DRAWS)]))
        rounds = max(1, self.rounds - len(strategy.rounds) + 1)
        epochs = max(1, round((self.macs - spent) / (MACS_PER_TRAINING * mean * self.images)))
        strategy.until = done + max(1, round(epochs / rounds))
        return done + epochs
