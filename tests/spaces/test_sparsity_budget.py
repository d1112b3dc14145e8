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
from spaces.sparsity_budget import SHARE_RULES, iso_flop_width, layer_shares

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
        with pytest.raises(UserError, match=f"kept share {kept}"):
            iso_flop_width(8, 8, kept)
    with pytest.raises(UserError, match="divisor 0"):
        iso_flop_width(8, 8, Fraction(1, 2), divisor=0)


@given(st.integers(1, 2048), st.integers(1, 2048), kept_strategy, st.sampled_from([1, 4, 8, 16]))
def test_a_sparse_wide_layer_costs_at_most_the_dense_one(inputs: int, outputs: int, kept: Fraction, divisor: int) -> None:
    wide_in, wide_out = iso_flop_width(inputs, outputs, kept, divisor)
    assert kept * wide_in * wide_out <= inputs * outputs
    for width, wide in ((inputs, wide_in), (outputs, wide_out)):
        assert wide == width or wide % divisor == 0
        assert wide >= width
        assert max(wide, wide // divisor * divisor + divisor) ** 2 * kept > width**2  # one step more would cost more


def test_a_quarter_of_the_weights_doubles_both_widths_at_equal_macs() -> None:
    assert iso_flop_width(24, 64, Fraction(1, 4)) == (48, 128)
    dense = LayerSpec("conv2d", 24, 64, 7, 7, 3)
    assert LayerSpec("conv2d", 48, 128, 7, 7, 3, sparsity="1:4").macs == dense.macs
