"""How the weights that a mask removes are trained.

A mask says which weights a network computes with; a mask training says what gradient the others receive, how fast the mask
reaches its share, and what happens to stored weights after a step. It is chosen once for a whole supernet by its name, never
by a layer:

    training = create_mask_training("gradual", end=0.6)
    for step in range(steps):
        training.start_step(step, steps)              # the schedules follow the progress
        ...                                           # forward: training.apply(weight, mask); backward
        training.before_step(parameter)               # for every masked parameter
        optimizer.step()
        training.after_step(parameter, mask_function)
    training.start_step(steps, steps)                 # from here `apply` is weight * mask, whatever the training

It holds hyperparameters and its place in the training, no weights and no masks: masks come from the stored weights again each
time, so a training that is resumed needs its step only. The trainings are in `spaces.mask_strategies`; what masks look like
is in `spaces.sparsity`.

Here a mask is a tensor of 0 and 1 in the weight's shape and type, and a mask function turns a weight into the mask in use, of
the share that `share` gives. A pattern that cannot have that share, such as 2:4 of 7/10, takes the next larger one it can.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import ClassVar, TypeVar

import torch

MaskFunction = Callable[[torch.Tensor], torch.Tensor]

Training = TypeVar("Training", bound="type[MaskTraining]")
MASK_TRAININGS: dict[str, type[MaskTraining]] = {}


def mask_training(name: str) -> Callable[[Training], Training]:
    """Register a mask training, a dataclass whose fields are its options, under the name a configuration gives it."""

    def register(cls: Training) -> Training:
        MASK_TRAININGS[name] = cls
        return cls

    return register


@mask_training("masked")
@dataclass(eq=False, kw_only=True)
class MaskTraining:
    """Removed weights receive no gradient and keep their values. The base of the others.

    Attributes:
        one_sparsity: trains one sparsity per layer only: it changes stored weights outside of the mask, which a denser
            network of the same supernet would compute with.
        single_weights: works with patterns only that choose single weights, such as unstructured and n:m.
        step: optimizer steps done when the current one began.
        progress: 0 at the start, 1 at the end of the training.
    """

    one_sparsity: ClassVar[bool] = False
    single_weights: ClassVar[bool] = False
    step: int = field(default=0, init=False)
    progress: float = field(default=0.0, init=False)

    def start_step(self, step: int, steps: int) -> None:
        """Say that `step` of `steps` optimizer steps are done; all of them at the end, before networks are used."""
        self.step, self.progress = step, step / steps

    def share(self, kept: Fraction) -> Fraction:
        """Share of the weights that stay at this progress, where `kept` stay at the end."""
        return kept

    def apply(self, weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The weight to compute with, and through it the gradients; `weight * mask` at progress 1.

        Args:
            weight: `(out, in, ...)`, with gradient.
            mask: 0 or 1, of the same shape and type.
        """
        return weight * mask

    def backward_weight(self, weight: torch.Tensor, mask_function: MaskFunction) -> torch.Tensor | None:
        """The weight for the gradient of the layer's input, `None` for that of the forward pass; without gradient."""
        return None

    def before_step(self, parameter: torch.Tensor) -> None:
        """To be called after the backward pass, before the optimizer's step, for every parameter that is masked."""

    def after_step(self, parameter: torch.Tensor, mask_function: MaskFunction) -> None:
        """To be called after the optimizer's step, while `parameter.grad` is still that of the step; works in place."""
