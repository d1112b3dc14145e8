"""Saliencies: what they are, and what every registered one has to be for a mask."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spaces.errors import UserError
from spaces.saliency import SALIENCIES, saliency_of
from spaces.sparsity import mask

every_saliency = pytest.mark.parametrize("name", sorted(SALIENCIES))
SHAPE = (8, 12, 3, 3)


def random_weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


@every_saliency
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_gradient", [False, True])
def test_one_number_per_weight_not_negative_without_a_gradient(name: str, dtype: torch.dtype, with_gradient: bool) -> None:
    weight = random_weight().to(dtype).requires_grad_()
    found = saliency_of(name)(weight, random_weight(1).to(dtype) if with_gradient else None)
    assert found.shape == SHAPE
    assert found.dtype.is_floating_point
    assert not found.requires_grad
    assert (found >= 0).all()
    for text in ("2:4", "unstructured@1/4", "block4x1@1/2"):
        assert mask(weight, text, found) is not None


def test_the_magnitude_is_what_a_mask_uses_when_told_nothing() -> None:
    weight = random_weight()
    for text in ("2:4", "unstructured@1/4", "block4x1@1/2", "group@1/2"):
        told, untold = mask(weight, text, saliency_of("magnitude")(weight)), mask(weight, text)
        assert told is not None
        assert untold is not None
        assert torch.equal(told, untold)


def test_taylor_is_the_loss_that_a_weight_makes_to_first_order() -> None:
    """For a linear loss the first order is all: setting weight i to 0 changes the loss by exactly its saliency."""
    weight = random_weight().double().requires_grad_()
    slope = random_weight(1).double()
    loss = (weight * slope).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    found = saliency_of("taylor")(weight, weight.grad)
    for index in [(0, 0, 0, 0), (7, 11, 2, 2), (3, 5, 1, 0)]:
        without = weight.detach().clone()
        without[index] = 0.0
        change = (loss.detach() - (without * slope).sum()).abs()
        assert found[index].item() == pytest.approx(change.item(), rel=1e-9)


def test_taylor_is_the_magnitude_before_the_first_gradient() -> None:
    weight = random_weight()
    assert torch.equal(saliency_of("taylor")(weight, None), weight.abs())
    assert not torch.equal(saliency_of("taylor")(weight, random_weight(1)), weight.abs())


def test_a_gradient_of_the_stored_weight_does_not_fit_a_slice() -> None:
    with pytest.raises(ValueError, match=re.escape("(8, 12, 3, 3)")):
        saliency_of("taylor")(random_weight()[:4], random_weight(1))


def test_random_depends_on_seed_and_shape_alone() -> None:
    random = saliency_of("random")
    assert torch.equal(random(random_weight(0), None, 5), random(random_weight(1), random_weight(2), 5))
    assert not torch.equal(random(random_weight(0), None, 5), random(random_weight(0), None, 6))
    state = torch.random.get_rng_state()
    random(random_weight())
    assert torch.equal(torch.random.get_rng_state(), state)


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 14), st.sampled_from(["unstructured", "group", "block4x1", "block2x2"]))
def test_random_masks_are_nested(seed: int, sixteenths: int, head: str) -> None:
    weight = random_weight()
    ranks = saliency_of("random")(weight, None, seed)
    few, many = (mask(weight, f"{head}@{k}/16", ranks) for k in (sixteenths, sixteenths + 1))
    assert few is not None
    assert many is not None
    assert (few <= many).all()


def test_random_prefers_no_place() -> None:
    """Averaged over seeds every weight stays equally often: within five standard deviations of a half."""
    weight = torch.ones(16, 16)
    kept = torch.zeros(16, 16)
    for seed in range(400):
        keep = mask(weight, "unstructured@1/2", saliency_of("random")(weight, None, seed))
        assert keep is not None
        kept += keep
    assert (kept - 200).abs().max() < 5 * 10


def test_an_unknown_name_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="'size'; allowed are magnitude, taylor, random"):
        saliency_of("size")
