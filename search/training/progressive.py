"""Progressive shrinking: the largest network first, then a phase per dimension (Once-for-All, arXiv:1908.09791)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from search.training.distillation import Distillation, Lesson
from search.training.strategy import Losses, Step, Strategy
from spaces.choice import Architecture, Option
from spaces.errors import UserError
from spaces.space import Space
from spaces.supernet import Outputs, Supernet

# Once-for-All's order, with what it does not have (how a layer is stored and computed) at the end.
PHASES = (("resolution",), ("kernel",), ("depth",), ("width", "expansion", "heads", "head_width", "ratio"))


class Progressive(Strategy):
    """The largest network alone, then with each phase further kinds of choices opened, from their largest options down.

    Within a phase the options of a choice open one after the other. Networks drawn among what is open learn from the largest
    network as it was when the first phase ended, which is kept, and by `labels` of the distillation from the labels.
    Kinds that no phase names open in a last one.

    Args:
        networks: drawn per step.
        largest_share: share of the training for the largest network alone.
        phases: kinds of choices that open together, in order.

    Raises:
        UserError: a value that is not allowed.
    """

    def __init__(self, networks: int = 2, largest_share: float = 0.25, phases: Sequence[Sequence[str]] = PHASES) -> None:
        super().__init__()
        if type(networks) is not int or networks < 1 or not 0.0 < largest_share < 1.0:
            found = f"supernet.strategy.networks is {networks!r} and largest_share {largest_share!r}"
            raise UserError(f"{found}; allowed are integers from 1 and shares between 0 and 1")
        self.networks, self.largest_share = networks, largest_share
        self.phases = tuple(tuple(phase) for phase in phases)

    def check(self, space: Space, distillation: Distillation) -> None:
        if distillation.needs_largest:
            why = "the teacher that the strategy progressive keeps has no maps"
            distillation.refuse(["attention"], why, "each network in float as its teacher: supernet.distillation.teacher=float")

    def prepare(self, supernet: Supernet, distillation: Distillation) -> None:
        kinds = supernet.space.kinds
        named = {kind for phase in self.phases for kind in phase}
        rest = tuple(kind for kind in kinds if kind not in named)
        self._order = [phase for phase in (*self.phases, rest) if any(kind in kinds for kind in phase)]
        # Weights come when the first phase ends, or from a checkpoint.
        self.teacher = supernet.extract(supernet.space.largest()).requires_grad_(False)
        self.taught = nn.Buffer(torch.zeros((), dtype=torch.bool))

    def backward(self, step: Step) -> Losses:
        space = step.supernet.space
        if step.progress < self.largest_share:
            return {"largest": step.on_labels(space.largest(), smoothing=step.smoothing)[0]}
        if not self.taught:
            self.teacher.load_state_dict(step.supernet.extract(space.largest()).state_dict())
            self.taught.fill_(True)
        opened = self.opened(space, (step.progress - self.largest_share) / (1.0 - self.largest_share))
        lesson = self._lesson(step)
        scale = 1.0 / self.networks
        losses = [step.on_lesson(draw_among(space, opened, step), lesson, scale) for _ in range(self.networks)]
        return {"drawn": sum(losses[1:], losses[0]) / self.networks}

    def _lesson(self, step: Step) -> Lesson:
        if not step.distillation.needs_largest:
            return step.distillation.lesson(step.supernet, step.images, None)
        with torch.no_grad():  # in training mode: normalised by the batch, like the students
            said = self.teacher.train()(step.images)
        step.supernet.macs_done += len(step.images) * self.teacher.network.macs
        return Lesson(step.distillation, step.supernet, step.images, Outputs(said, {}))

    def opened(self, space: Space, position: float) -> dict[str, tuple[Option, ...]]:
        """The options of each choice that are open.

        Args:
            space: of the choices.
            position: from 0, when the first kinds begin to open, to 1, when all are open.
        """
        at = position * len(self._order)
        options = {}
        for choice in space.choices:
            phase = next(i for i, kinds in enumerate(self._order) if choice.kind in kinds)
            share = min(1.0, max(0.0, 2.0 * (at - phase)))  # all open by the middle of the phase
            count = 1 + round(share * (len(choice.options) - 1)) if at >= phase else 1
            options[choice.name] = choice.options[-count:]
        return options


def draw_among(space: Space, options: dict[str, tuple[Option, ...]], step: Step) -> Architecture:
    """A random architecture with the given options only."""
    return space.completed({name: allowed[int(step.rng.integers(len(allowed)))] for name, allowed in options.items()})
