"""Sparsity patterns against plain loops, and what holds for all: counts, structure, idempotence, nestedness, refusals.

Every registered pattern takes the contract tests with the shares and shapes that it divides.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spaces import sparsity as sparsity_module
from spaces.cut import COLUMNS, PAIRED_UNITS, POSITIONS, Cut
from spaces.errors import UserError
from spaces.sparsity import (
    GROUP_BLOCKS,
    PATTERNS,
    Pattern,
    Sparsity,
    check_sparsity,
    group_channels,
    kept_inputs,
    kept_weights,
    mask,
    parse,
    pattern,
)

SHARES = ["1/8", "1/4", "1/3", "1/2", "3/4", "0.5", "7/8"]
SHAPES = [
    (2, 4, 1, 1),
    (4, 1, 1, 1),
    (6, 5, 3, 3),
    (8, 16, 1, 1),
    (10, 12),
    (16, 3, 1, 1),
    (16, 32, 3, 3),
    (48, 48),
    (12, 12, 5),
]
BLOCKS = ["block1x4", "block4x1", "block4x4", "block16x1", "block2x3", "block1x1"]
N_OF_M = ["2:4", "1:4", "3:4", "4:8", "1:2", "5:6", "7:16", "3:24"]
TEXTS = [f"{head}@{share}" for head in ["group", *BLOCKS, "unstructured"] for share in ("1/8", "1/2", "0.7")] + N_OF_M


def divides(text: str, shape: tuple[int, ...]) -> bool:
    """Whether a pattern fits a shape, read from its text."""
    numbers = [int(number) for number in re.findall(r"\d+", text.partition("@")[0])]
    if ":" in text:
        return shape[1] % numbers[1] == 0
    rows, columns = numbers or [GROUP_BLOCKS if text.startswith("group") else 1, 1]
    return shape[0] % rows == 0 and shape[1] % columns == 0


CASES = [(text, shape) for text in TEXTS for shape in SHAPES if divides(text, shape)]

every_case = pytest.mark.parametrize(("text", "shape"), CASES, ids=str)
every_example = pytest.mark.parametrize("text", [p.example for p in PATTERNS.values()])


def units(text: str, shape: tuple[int, ...]) -> Iterator[list[list[tuple[int, int, int]]]]:
    """The sets of a pattern, each a list of units, each a list of (output, input, kernel position). Plain loops."""
    outputs, inputs, positions = shape[0], shape[1], math.prod(shape[2:])
    numbers = [int(number) for number in re.findall(r"\d+", text.partition("@")[0])]
    if ":" in text:
        for o in range(outputs):
            for first in range(0, inputs, numbers[1]):
                for p in range(positions):
                    yield [[(o, i, p)] for i in range(first, first + numbers[1])]
    elif text.startswith("group"):
        half = outputs // 2
        for block in range(2):
            rows = range(block * half, (block + 1) * half)
            yield [[(o, i, p) for o in rows for p in range(positions)] for i in range(inputs)]
    elif text.startswith("block"):
        height, width = numbers
        for top in range(0, outputs, height):
            rows = range(top, top + height)
            for p in range(positions):
                yield [[(o, i, p) for o in rows for i in range(left, left + width)] for left in range(0, inputs, width)]
    else:
        yield [[(o, i, p)] for o in range(outputs) for i in range(inputs) for p in range(positions)]


def share_of(text: str) -> Fraction:
    return Fraction(text.replace(":", "/") if ":" in text else text.partition("@")[2])


def reference(text: str, saliency: torch.Tensor) -> torch.Tensor:
    """The mask by plain loops: in every set the units of the largest sum, between equals the first."""
    keep = torch.zeros(*saliency.shape[:2], math.prod(saliency.shape[2:]))
    values = saliency.double().reshape(keep.shape).tolist()
    for group in units(text, tuple(saliency.shape)):
        kept = max(1, round(len(group) * share_of(text)))
        sums = [sum(values[o][i][p] for o, i, p in unit) for unit in group]
        for index in sorted(range(len(group)), key=lambda u: (-sums[u], u))[:kept]:
            for o, i, p in group[index]:
                keep[o, i, p] = 1.0
    return keep.reshape(saliency.shape)


def random_weight(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kept_mask(weight: torch.Tensor, sparsity: str | Sparsity, saliency: torch.Tensor | None = None) -> torch.Tensor:
    keep = mask(weight, sparsity, saliency)
    assert keep is not None
    return keep


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, torch.Tensor]:
    """A pattern and a weight that it divides, of a few small whole numbers: sums are exact, ties and zeros abound."""
    head = draw(st.sampled_from(["group", "n:m", "block", "unstructured"]))
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    if head == "n:m":
        rows, columns = 1, draw(st.integers(2, 20))
        text = f"{draw(st.integers(1, columns - 1))}:{columns}"
    else:
        share = Fraction(draw(st.integers(1, 15)), 16)
        rows, columns = (2, 1) if head == "group" else (rows, columns) if head == "block" else (1, 1)
        text = f"{head}{rows}x{columns}@{share}" if head == "block" else f"{head}@{share}"
    kernel = draw(st.sampled_from([(), (1, 1), (3, 3), (2,)]))
    shape = (rows * draw(st.integers(1, 4)), columns * draw(st.integers(1, 4)), *kernel)
    largest = draw(st.sampled_from([0, 1, 3, 100]))
    seed = draw(st.integers(0, 2**31))
    return text, torch.randint(-largest, largest + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


# -- what holds for every pattern ----------------------------------------------------------------------------------------------


def test_every_registered_pattern_is_among_the_cases() -> None:
    assert {parse(text).pattern for text, _ in CASES} == set(PATTERNS)
    assert any(":" in text and int(text.partition(":")[2]) > PAIRED_UNITS for text, _ in CASES)


@every_case
def test_a_mask_is_of_zeros_and_ones_and_as_many_as_stated(text: str, shape: tuple[int, ...]) -> None:
    keep = kept_mask(random_weight(shape), text)
    assert keep.shape == shape
    assert keep.unique().tolist() in ([0.0, 1.0], [1.0])
    assert kept_weights(text, shape) == keep.sum()


@settings(deadline=None, max_examples=300)
@given(cases())
def test_the_mask_is_that_of_plain_loops(case: tuple[str, torch.Tensor]) -> None:
    text, weight = case
    keep = kept_mask(weight, text)
    assert torch.equal(keep, reference(text, weight.abs()))
    assert kept_weights(text, tuple(weight.shape)) == keep.sum()


@pytest.mark.parametrize("text", ["unstructured@1/2", "2:4", "9:20"])
def test_weights_next_to_each_other_in_float32_are_told_apart(text: str) -> None:
    steps = torch.randperm(8 * 40 * 9, generator=torch.Generator().manual_seed(0)).reshape(8, 40, 3, 3).float()
    assert torch.equal(kept_mask(1 + steps * torch.finfo(torch.float32).eps, text), reference(text, steps))


@settings(deadline=None, max_examples=100)
@given(cases(), st.integers(0, 2**31))
def test_a_saliency_decides_instead_of_the_magnitude(case: tuple[str, torch.Tensor], seed: int) -> None:
    text, weight = case
    saliency = torch.randint(0, 9, weight.shape, generator=torch.Generator().manual_seed(seed)).float()
    assert torch.equal(kept_mask(weight, text, saliency), reference(text, saliency))


@settings(deadline=None, max_examples=200)
@given(cases())
def test_a_masked_weight_has_the_same_mask_ties_and_zeros_included(case: tuple[str, torch.Tensor]) -> None:
    text, weight = case
    keep = kept_mask(weight, text)
    assert torch.equal(kept_mask(weight * keep, text), keep)


@every_case
def test_a_masked_weight_of_real_numbers_has_the_same_mask(text: str, shape: tuple[int, ...]) -> None:
    weight = random_weight(shape)
    keep = kept_mask(weight, text)
    assert torch.equal(kept_mask(weight * keep, text), keep)


@every_case
def test_equal_weights_keep_as_many_as_any_others(text: str, shape: tuple[int, ...]) -> None:
    keeps = [kept_mask(torch.full(shape, value), text) for value in (0.0, -0.0, 1.0, -3.5, math.inf, math.nan)]
    assert keeps[0].sum() == kept_weights(text, shape)
    assert all(torch.equal(keep, keeps[0]) for keep in keeps)


@every_case
def test_weights_that_are_no_numbers_do_not_change_the_count(text: str, shape: tuple[int, ...]) -> None:
    """A training that diverged must not end in an error about shapes somewhere else."""
    weight = random_weight(shape)
    weight[weight > 0.3] = math.nan
    assert kept_mask(weight, text).sum() == kept_weights(text, shape)


@every_case
def test_other_types_have_the_mask_of_their_values_in_float32(text: str, shape: tuple[int, ...]) -> None:
    weight = random_weight(shape).bfloat16()  # 8 bits: ties among many
    expected = kept_mask(weight.float(), text)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        keep = kept_mask(weight.to(dtype), text)
        assert keep.dtype == dtype
        assert torch.equal(keep.to(torch.float32), expected)


@every_example
def test_masks_carry_no_gradient(text: str) -> None:
    weight = random_weight((4, 8, 1, 1)).requires_grad_()
    keep = kept_mask(weight, text)
    assert not keep.requires_grad
    (weight * keep).sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert torch.equal(weight.grad, keep)
    saliency = torch.rand(4, 8, 1, 1, requires_grad=True)
    assert not kept_mask(weight, text, saliency).requires_grad


@every_example
def test_neither_scale_nor_memory_order_matter(text: str) -> None:
    weight = random_weight((8, 12, 3, 3))
    assert torch.equal(kept_mask(weight * 2**-10, text), kept_mask(weight, text))
    assert torch.equal(kept_mask(weight.to(memory_format=torch.channels_last), text), kept_mask(weight, text))
    wide = random_weight((16, 24, 5, 5))
    assert torch.equal(kept_mask(wide[:8, :12, 1:4, 1:4], text), kept_mask(wide[:8, :12, 1:4, 1:4].clone(), text))


@settings(deadline=None, max_examples=200)
@given(cases(), st.fractions(Fraction(1, 16), 1), st.fractions(Fraction(1, 16), 1))
def test_a_smaller_share_keeps_a_subset(case: tuple[str, torch.Tensor], one: Fraction, other: Fraction) -> None:
    text, weight = case
    few, many = (kept_mask(weight, parse(text).with_share(share)) for share in sorted([one, other]))
    assert (few <= many).all()


def test_a_smaller_share_keeps_a_subset_by_text() -> None:
    weight = random_weight((16, 16, 3, 3))
    for few, many in [("unstructured@1/4", "unstructured@1/2"), ("1:4", "2:4"), ("group@1/4", "group@1/2")]:
        assert (kept_mask(weight, few) <= kept_mask(weight, many)).all()


# -- what each pattern is ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", N_OF_M)
@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 3)])
def test_n_of_m_consecutive_inputs_stay_at_every_output_and_position(text: str, kernel: tuple[int, ...]) -> None:
    n, m = map(int, text.split(":"))
    keep = kept_mask(random_weight((6, 3 * m, *kernel)), text).reshape(6, 3 * m, -1)
    assert (keep.unfold(1, m, m).sum(dim=-1) == n).all()
    assert parse(text).kept == Fraction(n, m)


def test_two_of_four_are_the_two_largest() -> None:
    weight = torch.tensor([[0.1, -4.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0], [5.0, 0.0, 0.0, -6.0, 0.0, 0.0, 0.0, 2.0]])
    assert kept_mask(weight, "2:4").tolist() == [[0, 1, 1, 0, 1, 1, 0, 0], [1, 0, 0, 1, 1, 0, 0, 1]]


@pytest.mark.parametrize("head", BLOCKS)
@pytest.mark.parametrize("share", SHARES)
def test_blocks_are_whole_and_every_output_keeps_as_many_inputs(head: str, share: str) -> None:
    rows, columns = map(int, head.removeprefix("block").split("x"))
    keep = kept_mask(random_weight((2 * rows, 6 * columns, 3, 3)), f"{head}@{share}")
    blocks = keep.unfold(0, rows, rows).unfold(1, columns, columns)
    assert (blocks == blocks[..., :1, :1]).all()
    assert (keep.sum(dim=1) == max(1, round(6 * Fraction(share))) * columns).all()


@pytest.mark.parametrize("share", SHARES)
def test_unstructured_keeps_the_largest_of_the_whole_tensor(share: str) -> None:
    weight = random_weight((6, 5, 3, 3))
    keep = kept_mask(weight, f"unstructured@{share}").bool()
    assert weight.abs()[keep].min() > weight.abs()[~keep].max()
    assert keep.sum() == round(6 * 5 * 9 * Fraction(share))


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


@pytest.mark.parametrize(("text", "shape"), [case for case in CASES if case[0].startswith("group")], ids=str)
def test_group_channels_are_those_of_the_mask_also_after_it_was_applied(text: str, shape: tuple[int, ...]) -> None:
    """The lowering sees the masked weight, whatever saliency has made the mask."""
    weight, kept = random_weight(shape), kept_inputs(text, shape[1])
    keep = kept_mask(weight, text, random_weight(shape, seed=1).abs())
    channels = group_channels(weight * keep, kept)
    assert channels.shape == (GROUP_BLOCKS, kept)
    for block, rows in enumerate(keep.chunk(GROUP_BLOCKS)):
        assert channels[block].tolist() == rows.reshape(len(rows), shape[1], -1)[0, :, 0].nonzero().flatten().tolist()


def test_group_blocks_choose_for_themselves() -> None:
    weight = torch.zeros(4, 4, 1, 1)
    weight[:2, 0], weight[2:, 3] = 1.0, 1.0
    keep = kept_mask(weight, "group@1/4").flatten(1)
    assert keep.tolist() == [[1, 0, 0, 0]] * 2 + [[0, 0, 0, 1]] * 2


@pytest.mark.parametrize("text", ["group@1/2", "unstructured@1/2", "block4x1@1/2"])
def test_depthwise_weights_keep_at_least_one_unit_per_set(text: str) -> None:
    keep = kept_mask(random_weight((8, 1, 3, 3)), text)
    assert keep.sum() == kept_weights(text, (8, 1, 3, 3)) == (36 if text.startswith("unstructured") else 72)


def test_dense_has_no_mask_and_keeps_everything() -> None:
    assert mask(torch.randn(5, 4, 1, 1), "dense") is None
    assert parse("dense") == Sparsity("dense", "dense", Fraction(1))
    assert kept_inputs("dense", 7) == 7
    assert kept_weights("dense", (5, 4, 3, 3)) == 180
    assert parse("dense").with_share(Fraction(1, 2)) == parse("dense")
    check_sparsity("dense", (5, 3, 1, 1))


@settings(deadline=None)
@given(st.sampled_from(SHARES), st.integers(1, 4096))
def test_kept_inputs_is_the_nearest_count_and_at_least_one(share: str, inputs: int) -> None:
    kept = kept_inputs(f"group@{share}", inputs)
    assert 1 <= kept <= inputs
    assert kept == 1 or abs(kept - inputs * Fraction(share)) <= Fraction(1, 2)


def test_a_pattern_of_ones_own_is_one_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparsity_module, "PATTERNS", dict[str, Pattern]())

    @pattern("own_inputs", "own_inputs@1/2")
    def own_inputs(sizes: tuple[int, ...], outputs: int, inputs: int, positions: int) -> Cut:
        return Cut((outputs, 1, 1, inputs, positions), units=(COLUMNS,), members=(POSITIONS,))

    weight = random_weight((5, 7, 3, 3))
    keep = kept_mask(weight, "own_inputs@2/7")
    strongest = weight.abs().sum(dim=(2, 3)).topk(2).indices.sort().values
    assert keep[:, :, 1, 1].nonzero()[:, 1].reshape(5, 2).tolist() == strongest.tolist()
    assert keep.sum() == 5 * 2 * 9


# -- texts and refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("group@1/2", ("group", Fraction(1, 2), ())),
        ("2:4", ("n:m", Fraction(1, 2), (2, 4))),
        ("1:16", ("n:m", Fraction(1, 16), (1, 16))),
        ("block4x1@1/4", ("block", Fraction(1, 4), (4, 1))),
        ("block16x1@0.75", ("block", Fraction(3, 4), (16, 1))),
        ("unstructured@1/10", ("unstructured", Fraction(1, 10), ())),
    ],
)
def test_a_text_is_taken_apart(text: str, parts: tuple[str, Fraction, tuple[int, ...]]) -> None:
    found = parse(text)
    assert (found.pattern, found.kept, found.sizes, found.text) == (*parts, text)


def test_two_spellings_are_equal_and_two_patterns_are_not() -> None:
    assert len({parse("group@1/2"), parse("group@2/4"), parse("group@0.5")}) == 1
    assert len({parse("2:4"), parse("1:2"), parse("4:8"), parse("block1x4@1/2"), parse("block4x1@1/2")}) == 5


@pytest.mark.parametrize(
    ("text", "share", "expected"),
    [
        ("2:4", Fraction(7, 10), "3:4"),
        ("2:4", Fraction(1, 2), "2:4"),
        ("1:4", Fraction(1, 100), "1:4"),
        ("group@1/4", Fraction(3, 5), "group@3/5"),
        ("block4x1@1/4", Fraction(1, 3), "block4x1@1/3"),
    ],
)
def test_another_share_of_the_same_pattern(text: str, share: Fraction, expected: str) -> None:
    assert parse(text).with_share(share) == parse(expected)
    assert parse(text).with_share(share).text == expected


@every_example
def test_the_whole_share_keeps_everything_and_no_share_is_refused(text: str) -> None:
    assert kept_mask(random_weight((8, 8, 3, 3)), parse(text).with_share(Fraction(1))).all()
    for share in (Fraction(0), Fraction(-1, 2), Fraction(9, 8)):
        with pytest.raises(ValueError, match=re.escape(str(share))):
            parse(text).with_share(share)


@pytest.mark.parametrize(
    ("text", "shape", "message"),
    [
        ("group@1/2", (5, 4, 1, 1), "group sparsity needs output channels divisible by 2, got 5"),
        ("2:4", (8, 6, 3, 3), "2:4 sparsity needs input channels divisible by 4, got 6"),
        ("2:4", (8, 1, 3, 3), "2:4 sparsity needs input channels divisible by 4, got 1"),
        ("block4x1@1/2", (6, 8), "block4x1 sparsity needs output channels divisible by 4, got 6"),
        ("block1x4@1/2", (6, 9), "block1x4 sparsity needs input channels divisible by 4, got 9"),
    ],
)
def test_channels_that_do_not_divide_are_refused_in_one_line(text: str, shape: tuple[int, ...], message: str) -> None:
    for refuse in (
        lambda: mask(torch.randn(shape), text),
        lambda: check_sparsity(text, shape),
        lambda: kept_weights(text, shape),
    ):
        with pytest.raises(UserError, match=message) as caught:
            refuse()
        assert len(str(caught.value).splitlines()) == 1
    if text.startswith("group"):
        with pytest.raises(UserError, match=message):
            group_channels(torch.randn(shape), 2)


def test_a_saliency_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("(4, 8, 1, 1)")):
        mask(torch.randn(4, 8, 1, 1), "2:4", torch.rand(4, 8))


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
        "group@ 1/2",
        "group@1/2\n",
        "Group@1/2",
        "group2x2@1/2",
        "nothing@1/2",
        "line\nbreak@1/2",
        "n:m",
        "n:m@1/2",
        "2:4@1/2",
        "0:4",
        "4:4",
        "5:4",
        "1:0",
        "-1:4",
        "2:4:8",
        "2 : 4",
        "block@1/2",
        "block4@1/2",
        "block4x@1/2",
        "block4x4x4@1/2",
        "block0x4@1/2",
        "block4x0@1/2",
        "block4x4",
        "block4x4@1",
        "unstructured",
        "unstructured4x4@1/2",
        f"1:{'9' * 5000}",
    ],
)
def test_what_cannot_be_parsed_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(text)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert repr(text) in message
    assert all(p.example in message for p in PATTERNS.values())
