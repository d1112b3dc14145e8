"""Mask trainings against written-out references, and whether each of them learns scikit-learn's digits."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from functools import cache, partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch.nn import functional as F

from spaces.bidirectional import bidirectional_linear
from spaces.errors import UserError
from spaces.mask_strategies import REGROWN_MAGNITUDE, create_mask_training
from spaces.mask_training import MASK_TRAININGS, MaskTraining

every_training = pytest.mark.parametrize("name", sorted(MASK_TRAININGS))
kept_shares = st.fractions(min_value=Fraction(1, 16), max_value=1, max_denominator=16)
progresses = st.floats(0.0, 1.0)


def largest_share(weight: torch.Tensor, share: Fraction) -> torch.Tensor:
    """Unstructured: the given share of the weights, those of largest magnitude."""
    kept = weight.detach().abs().flatten().topk(round(share * weight.numel())).indices
    return torch.zeros_like(weight).flatten().index_fill(0, kept, 1.0).view_as(weight)


def largest_of_four(weight: torch.Tensor, share: Fraction) -> torch.Tensor:
    """n:4 along the second dimension, n the share's next larger."""
    groups = weight.detach().abs().movedim(1, -1).unflatten(-1, (-1, 4))
    mask = torch.zeros_like(groups).scatter_(-1, groups.topk(math.ceil(share * 4), dim=-1).indices, 1.0)
    return mask.flatten(-2).movedim(-1, 1)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def applied(training: MaskTraining, weight: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Value, and gradient of the weight where that of the value is `random(..., seed=9)`."""
    leaf = weight.clone().requires_grad_()
    value = training.apply(leaf, mask)
    (gradient,) = torch.autograd.grad(value, leaf, random(*weight.shape, seed=9))
    return value.detach(), gradient


@every_training
@given(seed=st.integers(0, 1000), kept=kept_shares)
@settings(max_examples=20, deadline=None)
def test_at_the_end_a_network_computes_with_the_masked_weight(name: str, seed: int, kept: Fraction) -> None:
    training, weight = create_mask_training(name), random(6, 4, 3, 3, seed=seed).float()
    training.start_step(100, 100)
    assert training.share(kept) == kept
    mask = largest_share(weight, kept)
    assert torch.equal(training.apply(weight, mask), weight * mask)


@every_training
@given(kept=kept_shares, first=progresses, second=progresses)
@settings(max_examples=50, deadline=None)
def test_the_kept_share_never_grows_and_ends_at_its_target(name: str, kept: Fraction, first: float, second: float) -> None:
    training = create_mask_training(name)
    shares = []
    for progress in [0.0, *sorted([first, second]), 1.0]:
        training.progress = progress
        shares.append(training.share(kept))
    assert all(earlier >= later for earlier, later in pairwise(shares))
    assert shares[-1] == kept
    assert shares[0] <= 1


@every_training
def test_trainings_give_the_same_each_time(name: str) -> None:
    def trained() -> list[torch.Tensor]:
        return train_digits(create_mask_training(name), largest_share, Fraction(1, 4), steps=12)

    assert all(torch.equal(one, other) for one, other in zip(trained(), trained(), strict=True))


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_gradients_of_masked_and_straight_through_and_sr_ste(progress: float) -> None:
    weight, gradient = random(6, 8), random(6, 8, seed=9)
    mask = largest_of_four(weight, Fraction(1, 2))
    expected = {
        "masked": gradient * mask,
        "gradual": gradient * mask,
        "straight_through": gradient,
        "bidirectional": gradient,
        "granet": gradient,
        "sr_ste": gradient + 0.3 * (1 - mask) * weight,
    }
    for name, wanted in expected.items():
        training = create_mask_training(name, **{"decay": 0.3} if name == "sr_ste" else {})
        training.progress = progress
        value, found = applied(training, weight, mask)
        assert torch.equal(value, weight * mask), name
        torch.testing.assert_close(found, wanted, msg=name)


@pytest.mark.parametrize("decay", ["linear", "exponential"])
@given(progress=progresses)
@settings(max_examples=30, deadline=None)
def test_decaying_flow_weighs_removed_weights_and_their_gradient(decay: str, progress: float) -> None:
    training = create_mask_training("decaying_flow", begin=0.2, end=0.8, decay=decay, rate=4.0)
    training.progress = progress
    elapsed = min(1.0, max(0.0, (progress - 0.2) / 0.6))
    factor = 1 - elapsed if decay == "linear" else math.exp(-4.0 * elapsed) * (elapsed < 1)
    weight = random(6, 8)
    mask = largest_share(weight, Fraction(1, 4))
    value, gradient = applied(training, weight, mask)
    torch.testing.assert_close(value, torch.where(mask == 1, weight, factor * weight))
    torch.testing.assert_close(gradient, random(6, 8, seed=9) * (mask + (1 - mask) * factor))


@given(progress=progresses, kept=kept_shares)
@settings(max_examples=50, deadline=None)
def test_the_gradual_share_is_the_cubic_one(progress: float, kept: Fraction) -> None:
    training = create_mask_training("gradual", begin=0.1, end=0.7, initial_share=0.5)
    training.progress = progress
    start = max(0.5, float(kept))
    elapsed = min(1.0, max(0.0, (progress - 0.1) / 0.6))
    assert float(training.share(kept)) == pytest.approx(float(kept) + (start - float(kept)) * (1 - elapsed) ** 3, abs=1.001e-3)


def test_a_schedule_may_begin_where_it_ends() -> None:
    training = create_mask_training("gradual", begin=0.5, end=0.5)
    shares = []
    for step in range(4):
        training.start_step(step, 4)
        shares.append(training.share(Fraction(1, 4)))
    assert shares == [1, 1, Fraction(1, 4), Fraction(1, 4)]


def test_masks_of_the_backward_pass_lie_along_outputs() -> None:
    weight = random(8, 12, 3, 3).requires_grad_()
    found = create_mask_training("bidirectional").backward_weight(weight, partial(largest_of_four, share=Fraction(1, 2)))
    assert found is not None
    assert not found.requires_grad
    for block in range(2):
        four = weight.detach()[4 * block : 4 * block + 4]
        least = four.abs().sort(dim=0, descending=True).values[1]
        assert torch.equal(found[4 * block : 4 * block + 4], torch.where(four.abs() >= least, four, 0.0))
    for name in MASK_TRAININGS.keys() - {"bidirectional"}:
        assert create_mask_training(name).backward_weight(weight, torch.ones_like) is None


@given(seed=st.integers(0, 1000), kept=kept_shares, shrink=st.floats(0.0, 1.0))
@settings(max_examples=40, deadline=None)
def test_iterative_shrinkage_scales_removed_weights_only(seed: int, kept: Fraction, shrink: float) -> None:
    training = create_mask_training("iterative_shrinkage", shrink=shrink)
    before = random(6, 8, seed=seed)
    parameter = torch.nn.Parameter(before.clone())
    training.after_step(parameter, partial(largest_share, share=kept))
    inside = largest_share(before, kept) == 1
    assert torch.equal(parameter[inside], before[inside])
    assert torch.equal(parameter[~inside], before[~inside] * shrink)


def test_iterative_shrinkage_computes_softly_until_its_end() -> None:
    weight, gradient = random(6, 8), random(6, 8, seed=9)
    mask = largest_share(weight, Fraction(1, 4))
    training = create_mask_training("iterative_shrinkage", end=0.5)
    assert all(torch.equal(*pair) for pair in zip(applied(training, weight, mask), (weight, gradient), strict=True))
    training.progress = 0.5
    assert all(
        torch.equal(*pair) for pair in zip(applied(training, weight, mask), (weight * mask, gradient * mask), strict=True)
    )


def stepped(
    training: MaskTraining, parameter: torch.nn.Parameter, mask_function: Callable[..., Any], move: torch.Tensor
) -> None:
    """One step of an optimizer that moves every weight."""
    training.before_step(parameter)
    with torch.no_grad():
        parameter.add_(move)
    training.after_step(parameter, mask_function)


@pytest.mark.parametrize("pattern", [largest_share, largest_of_four])
@given(seed=st.integers(0, 1000), progress=st.floats(0.0, 0.99), offset=st.sampled_from([0.0, -5.0]))
@settings(max_examples=30, deadline=None)
def test_granet_keeps_the_number_and_regrows_the_largest_gradients(
    pattern: Callable[[torch.Tensor, Fraction], torch.Tensor], seed: int, progress: float, offset: float
) -> None:
    training = create_mask_training("granet", every=1, regrown_share=0.5, initial_share=0.0)
    training.progress = progress
    mask_function = partial(pattern, share=Fraction(1, 4))
    dense = random(8, 16, seed=seed)
    kept = mask_function(dense) == 1
    parameter = torch.nn.Parameter(dense * kept)
    parameter.grad = random(8, 16, seed=seed + 1) + offset
    move = 0.5 * random(8, 16, seed=seed + 2)
    stepped(training, parameter, mask_function, move)

    moved = (dense + move) * kept
    exchanged = round(0.25 * (1 + math.cos(math.pi * progress)) * 32)
    ranked = moved.abs().masked_fill(~kept, math.inf).flatten().argsort()
    survives = kept.flatten().clone()
    survives[ranked[:exchanged]] = False
    survives = survives.view_as(kept)
    candidates = parameter.grad.abs().masked_fill(survives, math.inf)
    wanted = pattern(candidates, Fraction(1, 4)) == 1

    found = parameter.detach()
    assert torch.equal(mask_function(found) == 1, wanted)
    assert torch.equal(found != 0, wanted)
    assert int(wanted.sum()) == int(kept.sum())
    assert torch.equal(found[survives], moved[survives])
    regrown = wanted & ~survives
    assert torch.equal(found[regrown], -REGROWN_MAGNITUDE * parameter.grad.sign()[regrown])
    if pattern is largest_share and exchanged:
        assert parameter.grad.abs()[regrown].min() >= parameter.grad.abs()[~survives & ~regrown].max()


@every_training
def test_only_trainings_of_one_sparsity_change_removed_weights(name: str) -> None:
    training, dense = create_mask_training(name), random(8, 16)
    parameter = torch.nn.Parameter(dense.clone())
    stepped(training, parameter, partial(largest_share, share=Fraction(1, 4)), torch.zeros(8, 16).double())
    inside = largest_share(dense, Fraction(1, 4)) == 1
    assert torch.equal(parameter[inside], dense[inside])
    assert torch.equal(parameter[~inside], dense[~inside]) is not training.one_sparsity


def test_granet_holds_removed_weights_at_zero_between_regenerations() -> None:
    training = create_mask_training("granet", every=4, begin=0.05)
    mask_function = partial(largest_share, share=Fraction(1, 4))
    dense = random(8, 16)
    kept = largest_share(dense, Fraction(1, 4)) == 1
    parameter = torch.nn.Parameter(dense * kept)
    changes = []
    for step in range(12):
        training.start_step(step, 24)
        parameter.grad = random(8, 16, seed=step)
        before = parameter.detach() != 0
        # Removed weights move further than kept ones are large: a mask of the moved weights alone would take them.
        stepped(training, parameter, mask_function, torch.where(before, 0.0, 100.0).double())
        changes.append(not torch.equal(parameter.detach() != 0, before))
    assert [step for step, changed in enumerate(changes) if changed] == [3, 7, 11]


def test_granet_prunes_along_its_schedule_and_never_exchanges_what_is_not_removed() -> None:
    training, kept = create_mask_training("granet", every=1, end=0.5), Fraction(1, 4)
    parameter = torch.nn.Parameter(random(10, 10))
    parameter.grad = random(10, 10, seed=1)
    dense = parameter.detach().clone()
    counts = []
    for step in range(8):
        training.start_step(step, 8)
        stepped(training, parameter, partial(largest_share, share=training.share(kept)), torch.zeros(10, 10).double())
        if step == 0:
            assert torch.equal(parameter.detach(), dense)
        counts.append(int((parameter != 0).sum()))
    assert counts == [100, 57, 34, 26, 25, 25, 25, 25]


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("unheard", {}, "'unheard'; allowed are .*masked.*granet"),
        ("masked", {"decay": 1}, "masked has no option 'decay'; it has none"),
        ("gradual", {"start": 0.1}, "gradual has no option 'start'; it has begin, end, initial_share"),
        ("sr_ste", {"decay": -1e-3}, "decay is -0.001; allowed is a number from 0 to 1"),
        ("sr_ste", {"decay": math.nan}, "decay is nan"),
        ("sr_ste", {"decay": "2e-4"}, "decay is '2e-4'"),
        ("gradual", {"begin": 0.5, "end": 0.4}, "end is 0.4; allowed is a number from 0.5 to 1"),
        ("gradual", {"initial_share": 1.5}, "initial_share is 1.5"),
        ("decaying_flow", {"decay": "cosine"}, "decay is 'cosine'; allowed are linear and exponential"),
        ("decaying_flow", {"rate": -1}, "rate is -1"),
        ("iterative_shrinkage", {"shrink": 1.01}, "shrink is 1.01"),
        ("granet", {"every": 0}, "every is 0; allowed is a whole number"),
        ("granet", {"every": 2.5}, "every is 2.5"),
        ("granet", {"every": True}, "every is True"),
        ("granet", {"regrown_share": True}, "regrown_share is True"),
    ],
)
def test_wrong_options_are_told_in_one_line(name: str, options: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        create_mask_training(name, **options)
    assert "\n" not in str(error.value)


@cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)


def linear(training: MaskTraining, x: torch.Tensor, weight: torch.Tensor, mask_function: Callable[..., Any]) -> torch.Tensor:
    """A masked layer as an elastic one computes it."""
    masked = training.apply(weight, mask_function(weight))
    other = training.backward_weight(weight, mask_function)
    return F.linear(x, masked) if other is None else bidirectional_linear(x, masked, other)


def train_digits(
    training: MaskTraining, pattern: Callable[[torch.Tensor, Fraction], torch.Tensor], kept: Fraction, steps: int
) -> list[torch.Tensor]:
    """Weights of a perceptron, 64-64-64 masked and then 10 outputs, after so many steps."""
    images, labels = digits()
    generator = torch.Generator().manual_seed(0)
    shapes = [(64, 64), (64, 64), (10, 64)]
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator) * math.sqrt(2 / 64)) for shape in shapes]
    optimizer = torch.optim.Adam(weights, lr=3e-3)
    for step in range(steps):
        training.start_step(step, steps)
        mask_function = partial(pattern, share=training.share(kept))
        rows = torch.randint(0, 1200, (128,), generator=generator)
        x = images[rows]
        for weight in weights[:2]:
            x = linear(training, x, weight, mask_function).relu()
        optimizer.zero_grad()
        F.cross_entropy(F.linear(x, weights[2]), labels[rows]).backward()
        for weight in weights[:2]:
            training.before_step(weight)
        optimizer.step()
        for weight in weights[:2]:
            training.after_step(weight, mask_function)
    training.start_step(steps, steps)
    return [weight.detach() for weight in weights]


def digits_accuracy(
    training: MaskTraining, pattern: Callable[[torch.Tensor, Fraction], torch.Tensor], kept: Fraction, steps: int = 250
) -> float:
    """Accuracy on the last third of the digits, other writers' than the first's, with masks as a network ships them."""
    *masked, last = train_digits(training, pattern, kept, steps)
    x, labels = digits()
    for weight in masked:
        x = F.relu(F.linear(x, training.apply(weight, pattern(weight, training.share(kept)))))
    return float((F.linear(x, last).argmax(dim=1) == labels)[1200:].float().mean())


@cache
def dense_accuracy() -> float:
    return digits_accuracy(create_mask_training("masked"), largest_share, Fraction(1))


OPTIONS: dict[str, dict[str, Any]] = {"granet": {"every": 20}}


@every_training
@pytest.mark.parametrize(("pattern", "kept"), [(largest_share, Fraction(1, 4)), (largest_of_four, Fraction(1, 2))])
def test_digits_are_learnt_about_as_well_as_densely(
    name: str, pattern: Callable[[torch.Tensor, Fraction], torch.Tensor], kept: Fraction
) -> None:
    training = create_mask_training(name, **OPTIONS.get(name, {}))
    accuracy = digits_accuracy(training, pattern, kept)
    print(f"{name:20} {pattern.__name__}@{kept}: {accuracy:.3f}, dense {dense_accuracy():.3f}")
    assert accuracy > dense_accuracy() - 0.04
