"""Shares of layers under one share of the network, and widths at the dense layer's cost."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spaces.errors import UserError
from spaces.layers import LayerSpec
from spaces.sparsity import kept_weights, parse
from spaces.sparsity_budget import SHARE_RULES, WIDTH_STEP, Bottleneck, iso_flop_hidden, layer_shares

MOBILE = [(16, 3, 3, 3), (64, 16, 1, 1), (64, 1, 5, 5), (24, 64, 1, 1), (192, 96, 1, 1), (10, 192)]
shapes_strategy = st.lists(
    st.tuples(st.integers(1, 64), st.integers(1, 64)).flatmap(
        lambda channels: st.sampled_from([channels, *[(*channels, side, side) for side in (1, 3, 5)]])
    ),
    min_size=1,
    max_size=12,
)
kept_strategy = st.fractions(Fraction(1, 50), 1, max_denominator=100)


def rigl_densities(shapes: list[tuple[int, ...]], kept: float) -> list[float]:
    """ERK as in the code of RigL: one layer more is set dense in each round, the one of the largest raw probability."""
    dense: set[int] = set()
    while True:
        divisor, wanted = 0.0, 0.0
        for i, shape in enumerate(shapes):
            count = math.prod(shape)
            if i in dense:
                wanted -= count * (1 - kept)
            else:
                wanted += count * kept
                divisor += sum(shape) / count * count
        factor = wanted / divisor
        raw = {i: sum(shape) / math.prod(shape) for i, shape in enumerate(shapes) if i not in dense}
        largest = max(raw, key=lambda i: raw[i])
        if factor * raw[largest] <= 1:
            return [1.0 if i in dense else factor * raw[i] for i in range(len(shapes))]
        dense.add(largest)


@pytest.mark.parametrize("rule", SHARE_RULES)
@given(shapes=shapes_strategy, kept=kept_strategy)
def test_shares_are_possible_and_add_up_to_the_wanted_one(rule: str, shapes: list[tuple[int, ...]], kept: Fraction) -> None:
    shares = layer_shares(shapes, kept, rule)
    weights = [math.prod(shape) for shape in shapes]
    assert all(0 < share <= 1 for share in shares)
    total = sum(share * count for share, count in zip(shares, weights, strict=True))
    tiny = sum(share * count == 1 for share, count in zip(shares, weights, strict=True))
    assert abs(total - kept * sum(weights)) <= Fraction(len(shapes), 2) + tiny


@pytest.mark.parametrize("kept", [Fraction(1, 20), Fraction(1, 4), Fraction(1, 2), Fraction(9, 10)])
def test_kernel_shares_are_those_of_rigl(kept: Fraction) -> None:
    shares = layer_shares(MOBILE, kept, "erdos_renyi_kernel")
    for share, shape, expected in zip(shares, MOBILE, rigl_densities(MOBILE, float(kept)), strict=True):
        assert abs(float(share) - expected) <= 0.51 / math.prod(shape)


def test_small_layers_stay_dense_and_large_ones_pay() -> None:
    shares = layer_shares(MOBILE, Fraction(1, 4), "erdos_renyi_kernel")
    weights = [math.prod(shape) for shape in MOBILE]
    assert min(shares) == shares[weights.index(max(weights))] < Fraction(1, 4)
    dense = [share == 1 for share in layer_shares(MOBILE, Fraction(1, 2), "erdos_renyi_kernel")]
    assert dense == [True, True, False, True, False, True]


@pytest.mark.parametrize("rule", SHARE_RULES)
def test_a_share_is_what_the_unstructured_mask_keeps(rule: str) -> None:
    kept = Fraction(3, 10)
    layers = zip(layer_shares(MOBILE, kept, rule), MOBILE, strict=True)
    total = sum(kept_weights(parse("unstructured@1/2").with_share(share), shape) for share, shape in layers)
    assert abs(total - kept * sum(map(math.prod, MOBILE))) <= len(MOBILE) / 2


@pytest.mark.parametrize("rule", SHARE_RULES)
def test_the_whole_share_leaves_every_layer_dense(rule: str) -> None:
    assert layer_shares(MOBILE, Fraction(1), rule) == (Fraction(1),) * len(MOBILE)
    assert layer_shares([], Fraction(1, 2), rule) == ()


def test_unknown_rules_and_impossible_shares_are_refused() -> None:
    with pytest.raises(UserError, match="'largest' for the shares of layers; allowed are uniform, erdos_renyi_kernel"):
        layer_shares(MOBILE, Fraction(1, 2), "largest")
    for kept in (Fraction(0), Fraction(-1), Fraction(3, 2)):
        with pytest.raises(UserError, match=f"kept share {kept}"):
            layer_shares(MOBILE, kept, "uniform")


blocks_strategy = st.builds(
    lambda width, expansion, out, kernel, side, stride: Bottleneck(
        width, width * expansion, out, kernel, side**2, ((side - 1) // stride + 1) ** 2
    ),
    st.sampled_from([8, 16, 24, 40]),
    st.integers(2, 6),
    st.sampled_from([8, 16, 24, 40]),
    st.sampled_from([1, 3, 5]),
    st.integers(1, 20),
    st.integers(1, 2),
)
patterns_strategy = st.sampled_from(["dense", "group@1/2", "1:4", "3:4", "block4x1@1/2", "unstructured@1/3", "group@1/8"])


def macs_of(block: Bottleneck, hidden: int, expand: str, project: str) -> int:
    """Through layer specifications."""
    into = LayerSpec("conv2d", block.inputs, hidden, 1, block.input_positions, sparsity=expand)
    depthwise = LayerSpec("conv2d", hidden, hidden, 1, block.output_positions, block.kernel, groups=hidden)
    out_of = LayerSpec("conv2d", hidden, block.outputs, 1, block.output_positions, sparsity=project)
    return into.macs + depthwise.macs + out_of.macs


def fits(block: Bottleneck, hidden: int, expand: str, project: str) -> bool:
    try:
        return macs_of(block, hidden, expand, project) <= macs_of(block, block.hidden, "dense", "dense")
    except UserError:
        return False


@given(blocks_strategy, patterns_strategy, patterns_strategy)
def test_a_sparse_block_is_as_wide_as_the_dense_ones_macs_allow(block: Bottleneck, expand: str, project: str) -> None:
    found = iso_flop_hidden(block, expand, project)
    assert found >= block.hidden
    assert found == block.hidden or (found % WIDTH_STEP == 0 and fits(block, found, expand, project))
    wider = range(found // WIDTH_STEP * WIDTH_STEP + WIDTH_STEP, 9 * block.hidden, WIDTH_STEP)
    assert not any(fits(block, hidden, expand, project) for hidden in wider)


def test_a_quarter_of_the_weights_makes_a_block_nearly_four_times_as_wide() -> None:
    """Nearly, because the depthwise convolution grows with it: 49 MACs per inner channel become 19."""
    assert iso_flop_hidden(Bottleneck(16, 64, 24, 3, 49, 49), "1:4", "1:4") == 160 == 64 * 49 // 19 // 8 * 8
    assert iso_flop_hidden(Bottleneck(16, 64, 24, 1, 49, 49), "1:4", "1:4") == 232
    assert iso_flop_hidden(Bottleneck(16, 64, 24, 3, 49, 49), "dense", "dense") == 64
