"""The mask trainings that a supernet can choose from, each with its source.

All of them compute with `weight * mask` at the end of the training; they differ in how they get there: `straight_through`,
`sr_ste` and `bidirectional` in gradients, `decaying_flow` in how hard the mask is, `gradual` in how much it removes, and
`iterative_shrinkage` and `granet` in what they do to stored weights. `masked` is the interface's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import Any, ClassVar

import torch

from spaces.errors import UserError
from spaces.mask_training import MASK_TRAININGS, MaskFunction, MaskTraining, mask_training

SHARE_STEPS = 1000  # a schedule's shares are multiples of this part, so that few different masks arise
REGROWN_MAGNITUDE = 1e-12  # above zero, so that a mask by magnitude keeps it, and below any trained weight


def create_mask_training(name: str, **options: Any) -> MaskTraining:
    """The mask training of a name, with its options.

    Raises:
        UserError: unknown name or option, or a value that is not allowed.
    """
    if name not in MASK_TRAININGS:
        raise UserError(f"mask training {name!r}; allowed are {', '.join(MASK_TRAININGS)}")
    allowed = [option.name for option in fields(MASK_TRAININGS[name]) if option.init]
    for option in options:
        if option not in allowed:
            raise UserError(f"mask training {name} has no option {option!r}; it has {', '.join(allowed) or 'none'}")
    return MASK_TRAININGS[name](**options)


def _check_range(option: str, value: object, lowest: float, highest: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not lowest <= value <= highest:  # type: ignore[operator]
        raise UserError(f"mask training option {option} is {value!r}; allowed is a number from {lowest:g} to {highest:g}")


@mask_training("straight_through")
@dataclass(eq=False, kw_only=True)
class StraightThrough(MaskTraining):
    """Removed weights receive the gradient of the masked weight, so they can grow until the mask takes them back.

    Source: the straight-through estimator, Bengio et al. 2013, arXiv:1308.3432; for masks, dynamic network surgery, Guo et
    al. 2016, arXiv:1608.04493.
    """

    def apply(self, weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return _straight_through(weight, mask, 0.0)


@mask_training("sr_ste")
@dataclass(eq=False, kw_only=True)
class SparseRefined(MaskTraining):
    """Straight-through, with removed weights pulled to zero so that the mask comes to rest.

    The gradient of the weight is `g + decay * (1 - mask) * weight`, once for every network of a step that masks it. Adam scales
    the second term like the first; it was proposed for SGD (see STEP, arXiv:2302.01172).

    Args:
        decay: lambda_W of the source.

    Source: SR-STE, Zhou et al. 2021, arXiv:2102.04010.
    """

    decay: float = 2e-4

    def __post_init__(self) -> None:
        _check_range("decay", self.decay, 0.0, 1.0)

    def apply(self, weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return _straight_through(weight, mask, self.decay)


@mask_training("bidirectional")
@dataclass(eq=False, kw_only=True)
class Bidirectional(StraightThrough):
    """The gradient of a layer's input is computed with the weight masked along its outputs, its output along its inputs.

    The weight's gradient is dense and goes to all weights. The operators are in `spaces.bidirectional`. The pattern has to fit
    the transposed weight: for 2:4, output channels divisible by 4.

    Source: BDWP, Fang et al. 2023, arXiv:2309.13015.
    """

    def backward_weight(self, weight: torch.Tensor, mask_function: MaskFunction) -> torch.Tensor:
        weight = weight.detach()
        return weight * mask_function(weight.transpose(0, 1)).transpose(0, 1)


@dataclass(eq=False, kw_only=True)
class _Scheduled(MaskTraining):
    begin: float = 0.0
    end: float = 0.75

    def __post_init__(self) -> None:
        _check_range("begin", self.begin, 0.0, 1.0)
        _check_range("end", self.end, self.begin, 1.0)

    @property
    def elapsed(self) -> float:
        """Part of the schedule that is done: 0 until `begin`, 1 from `end` on."""
        if self.progress >= self.end:
            return 1.0
        if self.progress <= self.begin:
            return 0.0
        return (self.progress - self.begin) / (self.end - self.begin)


@mask_training("decaying_flow")
@dataclass(eq=False, kw_only=True)
class DecayingFlow(_Scheduled):
    """Removed weights count with a factor that falls from 1 to 0, in the forward pass and so in their gradient.

    The weight is `weight * (mask + (1 - mask) * factor)`, dense until `begin` and masked from `end` on; in between a network is
    not sparse yet. The gradient is this expression's own; the authors' program passes the whole gradient instead.

    Args:
        begin: progress until which training is dense.
        end: progress from which the mask is hard.
        decay: `linear`, or `exponential` with `exp(-rate * elapsed)` and 0 at the end.
        rate: of the exponential decay, over the whole schedule.

    Source: MdGf, Bambhaniya et al. 2024, arXiv:2402.04744.
    """

    decay: str = "exponential"
    rate: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decay not in ("linear", "exponential"):
            raise UserError(f"mask training option decay is {self.decay!r}; allowed are linear and exponential")
        _check_range("rate", self.rate, 0.0, 100.0)

    @property
    def factor(self) -> float:
        """What a removed weight is multiplied by."""
        elapsed = self.elapsed
        if self.decay == "linear" or elapsed == 1.0:
            return 1.0 - elapsed
        return math.exp(-self.rate * elapsed)

    def apply(self, weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        factor = self.factor
        if factor in (0.0, 1.0):
            return weight * mask if factor == 0.0 else weight
        return weight * mask.clamp_min(factor)


@mask_training("gradual")
@dataclass(eq=False, kw_only=True)
class Gradual(_Scheduled):
    """The kept share falls from `initial_share` to its target, quickly first: the rest of the way shrinks with its cube.

    Removed weights receive no gradient, but stay stored: denser networks of the supernet go on with them.

    Args:
        begin: progress at which pruning starts.
        end: progress from which the share is the target.
        initial_share: at the start; one below the target counts as the target.

    Source: Zhu & Gupta 2017, arXiv:1710.01878, equation 1.
    """

    initial_share: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_range("initial_share", self.initial_share, 0.0, 1.0)

    def share(self, kept: Fraction) -> Fraction:
        start, rest = max(kept, Fraction(self.initial_share)), (1.0 - self.elapsed) ** 3
        if rest == 1.0:
            return start
        share = float(kept) + (float(start) - float(kept)) * rest
        return max(kept, Fraction(math.floor(share * SHARE_STEPS), SHARE_STEPS))


@mask_training("iterative_shrinkage")
@dataclass(eq=False, kw_only=True)
class IterativeShrinkage(Gradual):
    """After each step, weights outside of the mask are multiplied by `shrink` instead of being removed, so they can return.

    Until `end` a network computes with all weights, shrunk ones included, and all receive their gradient; from then on it
    computes with the mask. Trains one sparsity per layer. The source takes the target share from the start on, which
    `initial_share=0` gives.

    Args:
        begin: progress until which nothing shrinks, unless the initial share is below 1.
        end: progress from which the mask is hard and the share the target.
        initial_share: of `Gradual`.
        shrink: factor per step; 0 is iterative hard thresholding.

    Source: ISS-P, Wang et al. 2023, arXiv:2303.09650; the schedule is Zhu & Gupta's.
    """

    one_sparsity: ClassVar[bool] = True
    shrink: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_range("shrink", self.shrink, 0.0, 1.0)

    def apply(self, weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return weight * mask if self.elapsed == 1.0 else weight

    @torch.no_grad()
    def after_step(self, parameter: torch.Tensor, mask_function: MaskFunction) -> None:
        parameter.mul_(mask_function(parameter).clamp_min(self.shrink))


@mask_training("granet")
@dataclass(eq=False, kw_only=True)
class GraNet(Gradual):
    """Gradual pruning with regeneration: now and then some kept weights are exchanged for removed ones of large gradient.

    The removed weights are the zeros of the stored parameter. After every `every`-th step the smallest kept weights are set to
    zero too, and as many zeros of the largest gradient, those just removed included, get `REGROWN_MAGNITUDE` against the sign
    of their gradient: so small that the function does not change, yet a mask by magnitude keeps exactly them. The exchanged
    share falls along a cosine to 0 at the end, and never exceeds what is removed.

    Trains one sparsity per layer, at its full width, and only with patterns that choose single weights: unstructured, and n:m,
    where a weight regrows within its m. A group or block that keeps some of its weights would keep its place and lose the rest.

    Args:
        begin: progress at which pruning and regeneration start.
        end: progress from which the share is the target; regeneration goes on.
        initial_share: 1 trains dense to sparse, less from sparse to sparser.
        every: steps between regenerations.
        regrown_share: of the kept weights, exchanged at the beginning.

    Source: GraNet, Liu et al. 2021, arXiv:2106.10404.
    """

    one_sparsity: ClassVar[bool] = True
    single_weights: ClassVar[bool] = True
    every: int = 100
    regrown_share: float = 0.5
    # Which weights were kept when the step began: between `before_step` and `after_step` only, as the optimizer moves zeros.
    _kept: dict[torch.Tensor, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_range("regrown_share", self.regrown_share, 0.0, 1.0)
        if type(self.every) is not int or self.every < 1:
            raise UserError(f"mask training option every is {self.every!r}; allowed is a whole number of steps from 1")

    def apply(self, weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return _straight_through(weight, mask, 0.0)  # regeneration needs the gradient of removed weights

    def before_step(self, parameter: torch.Tensor) -> None:
        self._kept[parameter] = parameter.detach() != 0

    @torch.no_grad()
    def after_step(self, parameter: torch.Tensor, mask_function: MaskFunction) -> None:
        parameter.mul_(self._kept.pop(parameter))
        keep = mask_function(parameter)
        parameter.mul_(keep)
        if parameter.grad is None or self.progress < self.begin or (self.step + 1) % self.every:
            return
        kept = keep != 0
        stay = int(kept.sum())
        exchanged = round(self.regrown_share * 0.5 * (1.0 + math.cos(math.pi * self.progress)) * stay)
        exchanged = min(exchanged, kept.numel() - stay)
        smallest = parameter.abs().masked_fill_(~kept, math.inf).flatten().topk(exchanged, largest=False).indices
        survives = kept.flatten().index_fill(0, smallest, False).view_as(kept)
        size = parameter.grad.abs()
        keep = mask_function(torch.where(survives, 2.0 * size.max() + 1.0, size))
        regrown = torch.full_like(parameter, REGROWN_MAGNITUDE).copysign_(-parameter.grad)
        parameter.copy_(torch.where(survives, parameter, regrown * keep))


def _straight_through(weight: torch.Tensor, mask: torch.Tensor, decay: float) -> torch.Tensor:
    result: torch.Tensor = _StraightThrough.apply(weight, mask, decay)  # type: ignore[no-untyped-call]
    return result


class _StraightThrough(torch.autograd.Function):
    """Masked weight whose gradient goes to all weights, with a decay of the removed ones added."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, mask: torch.Tensor, decay: float) -> torch.Tensor:
        ctx.decay = decay
        if decay:
            ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        if ctx.decay:
            weight, mask = ctx.saved_tensors
            gradient = torch.addcmul(gradient, 1 - mask, weight, value=ctx.decay)
        return gradient, None, None
