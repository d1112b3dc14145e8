"""Knowledge distillation: what a student learns from a teacher, as a part of its own beside the strategies.

The teacher is the largest network of the same step (`in_place`, BigNAS, arXiv:2003.11142), a module of the user's own, or the
student itself in float (`float`, after quantized distillation, arXiv:1802.05668). A student learns the teacher's predictions,
softened by a temperature (arXiv:1503.02531), and if wanted its maps of spatial attention (arXiv:1612.03928, equation 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from spaces.choice import Architecture
from spaces.errors import UserError
from spaces.precision import FLOAT
from spaces.supernet import Outputs, Supernet

IN_PLACE = "in_place"
OWN_FLOAT = "float"


class Distillation(nn.Module):
    """How students learn.

    Args:
        teacher: `in_place`, `float`, or a module from images `(n, channels, height, width)` to logits `(n, classes)`.
        labels: share of the labels in a student's loss, from 0 to 1.
        temperature: by which logits of teacher and student are divided.
        attention: weight of the attention maps; not with a module as teacher, whose layers are unknown.

    Raises:
        UserError: a value that is not allowed.
    """

    def __init__(
        self, teacher: str | nn.Module = IN_PLACE, labels: float = 0.0, temperature: float = 1.0, attention: float = 0.0
    ) -> None:
        super().__init__()
        if not isinstance(teacher, nn.Module) and teacher not in (IN_PLACE, OWN_FLOAT):
            raise UserError(f"distillation.teacher is {teacher!r}; allowed are {IN_PLACE}, {OWN_FLOAT} and a torch module")
        if not 0.0 <= labels <= 1.0 or not temperature > 0.0 or not attention >= 0.0:
            found = f"distillation.labels is {labels}, temperature {temperature}, attention {attention}"
            raise UserError(f"{found}; allowed are a share from 0 to 1, a value above 0 and a value from 0")
        if attention and isinstance(teacher, nn.Module):
            raise UserError("distillation.attention needs the maps of the teacher; allowed is 0 with a module as teacher")
        self.kind = "module" if isinstance(teacher, nn.Module) else teacher
        self.teacher = teacher.eval().requires_grad_(False) if isinstance(teacher, nn.Module) else None
        self.labels, self.temperature, self.attention = labels, temperature, attention

    def train(self, mode: bool = True) -> Distillation:
        """A teacher stays in evaluation mode."""
        return super().train(False)

    @property
    def settings(self) -> dict[str, str | float]:
        """What was given, by name; a module of the user's own is called `module`."""
        return {
            "teacher": self.kind,
            "labels": self.labels,
            "temperature": self.temperature,
            "attention": self.attention,
        }

    def refuse(self, unused: Sequence[str], why: str, instead: str) -> None:
        """For a strategy that would ignore settings.

        Args:
            unused: their names.
            why: it ignores them.
            instead: what to do to have them used.

        Raises:
            UserError: one of them is not at its default.
        """
        usual = Distillation().settings
        for name in unused:
            if self.settings[name] != usual[name]:
                raise UserError(
                    f"distillation.{name} is {self.settings[name]}, but {why}; allowed is {usual[name]}, or {instead}"
                )

    @property
    def needs_largest(self) -> bool:
        """Whether the teacher is the largest network of the step."""
        return self.kind == IN_PLACE

    def lesson(self, supernet: Supernet, images: torch.Tensor, largest: Outputs | None) -> Lesson:
        """What all students of a step learn from.

        Args:
            supernet: of the students.
            images: `(n, channels, height, width)`.
            largest: outputs of the largest network on them, where it was run; without gradients or with.
        """
        if self.kind == IN_PLACE:
            said = _detached(largest) if largest else self.run(supernet, supernet.space.largest(), images)
            return Lesson(self, supernet, images, said)
        if self.teacher is not None:
            with torch.no_grad():
                return Lesson(self, supernet, images, Outputs(self.teacher(images), {}))
        return Lesson(self, supernet, images, None)

    @staticmethod
    def run(supernet: Supernet, architecture: Architecture, images: torch.Tensor) -> Outputs:
        """Outputs of a network of the supernet, without gradients."""
        with torch.no_grad():
            supernet.activate(architecture)
            return supernet.outputs(images)


@dataclass(frozen=True)
class Lesson:
    """A teacher's outputs on the images of a step; `said` is `None` where each student has a teacher of its own."""

    distillation: Distillation
    supernet: Supernet
    images: torch.Tensor
    said: Outputs | None

    def loss(self, architecture: Architecture, student: Outputs, labels: torch.Tensor) -> torch.Tensor:
        """A student's loss, a scalar."""
        how = self.distillation
        said = self.said
        if said is None:
            said = how.run(self.supernet, self.supernet.space.replaced(architecture, precision=FLOAT), self.images)
        if said.logits.shape != student.logits.shape:
            raise UserError(
                f"the teacher's outputs have the shape {tuple(said.logits.shape)}; allowed is {tuple(student.logits.shape)}"
            )
        soft = (said.logits / how.temperature).softmax(dim=1)
        # The gradients of softened predictions shrink with the square of the temperature (arXiv:1503.02531, section 2).
        loss = F.cross_entropy(student.logits / how.temperature, soft) * how.temperature**2
        if how.labels:
            loss = (1.0 - how.labels) * loss + how.labels * F.cross_entropy(student.logits, labels)
        if how.attention:
            loss = loss + how.attention * attention_distance(said, student)
        return loss


def attention_distance(teacher: Outputs, student: Outputs) -> torch.Tensor:
    """Mean squared distance of the attention maps of two networks at the scales that both have, a scalar.

    A map is the mean over channels of the squared activations, scaled to length 1 per image (arXiv:1612.03928, section 3.1).
    Where the networks work at different resolutions, the finer map is averaged down.
    """
    total = student.logits.new_zeros(())
    for scale in teacher.maps.keys() & student.maps.keys():
        a, b = attention_map(teacher.maps[scale]), attention_map(student.maps[scale])
        size = (min(a.shape[-2], b.shape[-2]), min(a.shape[-1], b.shape[-1]))
        a, b = (F.normalize(F.adaptive_avg_pool2d(m, size).flatten(1), dim=1) for m in (a, b))
        total = total + (a - b).square().sum(dim=1).mean()
    return total


def attention_map(activations: torch.Tensor) -> torch.Tensor:
    """Activations `(n, channels, height, width)` to `(n, height, width)`."""
    return activations.square().mean(dim=1)


def _detached(outputs: Outputs) -> Outputs:
    return Outputs(outputs.logits.detach(), {scale: value.detach() for scale, value in outputs.maps.items()})
