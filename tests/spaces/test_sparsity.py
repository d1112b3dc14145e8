"""Sparsity patterns: the kept share, structure, idempotence, refusals. Every registered pattern takes the contract tests."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spaces.errors import UserError
from spaces.sparsity import GROUP_BLOCKS, PATTERNS, group_channels, kept_inputs, mask, parse

SHARES = ["1/8", "1/4", "1/3", "1/2", "3/4", "0.5", "7/8"]
SHAPES = [(2, 4, 1, 1), (4, 1, 1, 1), (6, 5, 3, 3), (8, 16, 1, 1), (10, 12), (16, 3, 1, 1)]

every_pattern = pytest.mark.parametrize("name", sorted(PATTERNS))
every_share = pytest.mark.parametrize("share", SHARES)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def random_weight(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kept_mask(weight: torch.Tensor, sparsity: str) -> torch.Tensor:
    keep = mask(weight, sparsity)
    assert keep is not None
    return keep


@every_pattern
@every_share
@every_shape
def test_every_output_channel_keeps_the_stated_share(name: str, share: str, shape: tuple[int, ...]) -> None:
    keep = kept_mask(random_weight(shape), f"{name}@{share}")
    assert keep.shape == shape
    assert set(keep.flatten().tolist()) <= {0.0, 1.0}
    per_channel = keep.flatten(1).sum(dim=1)
    window = keep[0, 0].numel()
    expected = max(1, round(shape[1] * Fraction(share))) * window
    assert per_channel.tolist() == [expected] * shape[0]
    assert kept_inputs(f"{name}@{share}", shape[1]) * window == expected


@every_pattern
@every_share
@every_shape
def test_a_masked_weight_gives_the_same_mask(name: str, share: str, shape: tuple[int, ...]) -> None:
    weight = random_weight(shape)
    keep = kept_mask(weight, f"{name}@{share}")
    assert torch.equal(kept_mask(weight * keep, f"{name}@{share}"), keep)


@every_pattern
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_ties_do_not_break_idempotence(name: str, data: st.DataObject) -> None:
    """Weights from few values, zeros and whole dead channels among them, have equal saliencies everywhere."""
    out, inputs = 2 * data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    elements = data.draw(st.lists(st.sampled_from([-1.0, 0.0, 0.0, 1.0, 2.0]), min_size=out * inputs, max_size=out * inputs))
    weight = torch.tensor(elements).reshape(out, inputs, 1, 1)
    keep = kept_mask(weight, f"{name}@1/2")
    again = kept_mask(weight * keep, f"{name}@1/2")
    assert torch.equal(weight * keep * again, weight * keep)
    assert again.sum() == keep.sum()


@every_pattern
def test_masks_carry_the_weights_type_and_no_gradient(name: str) -> None:
    weight = random_weight((4, 8, 1, 1)).double().requires_grad_()
    keep = kept_mask(weight, f"{name}@1/2")
    assert keep.dtype == torch.float64
    assert not keep.requires_grad
    (weight * keep).sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert torch.equal(weight.grad, keep)


@every_pattern
def test_the_mask_does_not_depend_on_the_scale(name: str) -> None:
    weight = random_weight((8, 12, 3, 3))
    assert torch.equal(kept_mask(weight * 1e-3, f"{name}@1/4"), kept_mask(weight, f"{name}@1/4"))


def test_group_blocks_share_their_channels_and_keep_the_strongest() -> None:
    weight = random_weight((6, 10, 3, 3))
    keep = kept_mask(weight, "group@3/10")
    for block in range(GROUP_BLOCKS):
        rows = slice(block * 6 // GROUP_BLOCKS, (block + 1) * 6 // GROUP_BLOCKS)
        assert (keep[rows] == keep[rows.start, :, :1, :1]).all()
        strength = weight[rows].abs().sum(dim=(0, 2, 3))
        chosen = keep[rows.start, :, 0, 0].bool()
        assert strength[chosen].min() >= strength[~chosen].max()
        assert group_channels(weight, 3)[block].tolist() == chosen.nonzero().flatten().tolist()


def test_group_blocks_choose_for_themselves() -> None:
    weight = torch.zeros(4, 4, 1, 1)
    weight[:2, 0], weight[2:, 3] = 1.0, 1.0
    keep = kept_mask(weight, "group@1/4").flatten(1)
    assert keep.tolist() == [[1, 0, 0, 0]] * 2 + [[0, 0, 0, 1]] * 2


def test_group_refuses_channels_that_do_not_divide() -> None:
    with pytest.raises(UserError, match="divisible by 2, got 5"):
        mask(torch.randn(5, 4, 1, 1), "group@1/2")


def test_dense_has_no_mask_and_keeps_everything() -> None:
    assert mask(torch.randn(5, 4, 1, 1), "dense") is None
    assert parse("dense") == ("dense", Fraction(1))
    assert kept_inputs("dense", 7) == 7


@settings(deadline=None)
@given(st.sampled_from(SHARES), st.integers(1, 4096))
def test_kept_inputs_is_the_nearest_count_and_at_least_one(share: str, inputs: int) -> None:
    kept = kept_inputs(f"group@{share}", inputs)
    assert 1 <= kept <= inputs
    assert kept == 1 or abs(kept - inputs * Fraction(share)) <= Fraction(1, 2)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "@",
        "Dense",
        "dense@1/2",
        "group",
        "group@",
        "group@0",
        "group@1",
        "group@2",
        "group@-1/2",
        "group@1/0",
        "group@half",
        "group@nan",
        "group@inf",
        "group@1/2@1/2",
        "Group@1/2",
        "nothing@1/2",
        "line\nbreak@1/2",
    ],
)
def test_what_cannot_be_parsed_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(text)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert repr(text) in message
    assert "group@1/2" in message
