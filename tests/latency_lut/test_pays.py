"""What pays: ratios by hand, and nothing said of what was not measured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from latency_lut.device import Device
from latency_lut.lowering import applicable
from latency_lut.pays import BESIDE, MARGIN, Pays, never_pays, size_bounds, size_class, what_pays
from latency_lut.table import LatencyTable, pair_key
from latency_lut.timing import Timing
from spaces.layers import LayerSpec
from spaces.mobile import MobileSpace
from spaces.precision import FLOAT_BITS

DENSE = LayerSpec("conv2d", 32, 32, 8, 8, activation="relu")
INT8 = replace(DENSE, precision="w8a8", input_bits=8, output_bits=8)
GROUP = replace(DENSE, sparsity="group@1/2")


def table_of(space: MobileSpace, device: Device, times_us: dict[tuple[LayerSpec, str], float]) -> LatencyTable:
    table = LatencyTable.empty(space, device)
    table.entries = {pair_key(spec, name): Timing(us, 0.1, 9) for (spec, name), us in times_us.items()}
    return table


def rows_of(space: MobileSpace, device: Device, times_us: dict[tuple[LayerSpec, str], float]) -> dict[str, Pays]:
    return {row.choice: row for row in what_pays(table_of(space, device, times_us))}


def test_ratios_by_hand(tiny_space: MobileSpace, x86: Device) -> None:
    times_us = {
        (DENSE, "fp32"): 12.0,
        (INT8, "qdq_u8"): 4.0,
        (GROUP, "gather_groups"): 16.0,
    }
    rows = rows_of(tiny_space, x86, times_us)
    assert rows["int8"].median_ratio == pytest.approx(3.0)
    assert (rows["int8"].kind, rows["int8"].pairs, rows["int8"].share_faster) == ("pointwise", 1, 1.0)
    assert rows["int8"].pays
    # The gathered form is slower, but the sparse layer also runs dense: it costs what dense costs, and does not pay.
    assert rows["group@1/2"].median_ratio == pytest.approx(1.0)
    assert not rows["group@1/2"].pays
    assert never_pays(list(rows.values())) == ["group@1/2 pointwise: 1.00 to 1.00 times the speed of dense float in every size"]


def test_the_fastest_lowering_counts(tiny_space: MobileSpace, x86: Device) -> None:
    rows = rows_of(tiny_space, x86, {(DENSE, "fp32"): 12.0, (GROUP, "gather_groups"): 6.0})
    assert rows["group@1/2"].median_ratio == pytest.approx(2.0)
    assert rows["group@1/2"].share_faster == 1.0


def test_a_layer_without_all_its_lowerings_or_without_its_reference_says_nothing(tiny_space: MobileSpace, x86: Device) -> None:
    assert rows_of(tiny_space, x86, {(GROUP, "gather_groups"): 6.0}) == {}
    assert rows_of(tiny_space, x86, {(INT8, "qdq_u8"): 6.0}) == {}
    assert rows_of(tiny_space, x86, {(DENSE, "fp32"): 6.0}) == {}
    assert what_pays(LatencyTable.empty(tiny_space, x86)) == []
    assert never_pays([]) == []


def test_a_gain_within_the_noise_does_not_pay(tiny_space: MobileSpace, x86: Device) -> None:
    barely = rows_of(tiny_space, x86, {(DENSE, "fp32"): 100.0, (INT8, "qdq_u8"): 100.0 / (MARGIN - 0.005)})["int8"]
    clearly = rows_of(tiny_space, x86, {(DENSE, "fp32"): 100.0, (INT8, "qdq_u8"): 100.0 / (MARGIN + 0.005)})["int8"]
    assert barely.share_faster == 1.0
    assert not barely.pays
    assert clearly.pays


def test_medians_and_shares_over_several_layers_of_one_size(tiny_space: MobileSpace, x86: Device) -> None:
    times_us: dict[tuple[LayerSpec, str], float] = {}
    for index, ratio in enumerate([0.5, 2.0, 4.0]):
        spec = replace(DENSE, activation=("relu", "none", "relu")[index], skip_bits=(0, 0, FLOAT_BITS)[index])
        times_us[spec, "fp32"] = 10.0
        integer = replace(spec, precision="w8a8", input_bits=8, output_bits=8)
        times_us[integer, "qdq_u8"] = 10.0 / ratio
    row = rows_of(tiny_space, x86, times_us)["int8"]
    assert row.pairs == 3
    assert [row.median_ratio, row.share_faster] == pytest.approx([2.0, 2 / 3])


def test_a_choice_that_pays_in_one_size_is_not_called_useless(tiny_space: MobileSpace, x86: Device) -> None:
    times_us: dict[tuple[LayerSpec, str], float] = {}
    for width, ratio in ((8, 0.5), (32, 0.8), (128, 3.0)):
        spec = replace(DENSE, in_channels=width, out_channels=width)
        times_us[spec, "fp32"] = 10.0
        times_us[replace(spec, precision="w8a8", input_bits=8, output_bits=8), "qdq_u8"] = 10.0 / ratio
    rows = what_pays(table_of(tiny_space, x86, times_us))
    assert {row.size_class.split(" ")[0]: row.pays for row in rows} == {"small": False, "medium": False, "large": True}
    assert never_pays(rows) == []
    assert len(never_pays([row for row in rows if not row.pays])) == 1


def test_a_sparse_float_layer_is_compared_between_the_neighbours_that_it_has(tiny_space: MobileSpace, x86: Device) -> None:
    """Beside integer layers every float layer converts its tensors; that is not the fault of the sparsity."""
    dense = replace(DENSE, input_bits=8, output_bits=8)
    rows = rows_of(
        tiny_space,
        x86,
        {(DENSE, "fp32"): 10.0, (dense, "fp32"): 20.0, (replace(dense, sparsity="group@1/2"), "gather_groups"): 10.0},
    )
    assert rows["group@1/2"].median_ratio == pytest.approx(2.0)
    assert rows[BESIDE].median_ratio == pytest.approx(0.5)


def test_a_float_layer_beside_integer_ones_is_no_choice(tiny_space: MobileSpace, x86: Device) -> None:
    rows = rows_of(tiny_space, x86, {(DENSE, "fp32"): 10.0, (replace(DENSE, input_bits=8), "fp32"): 20.0})
    assert list(rows) == [BESIDE]
    assert never_pays(list(rows.values())) == []


def test_tables_share_size_classes_when_they_share_bounds(tiny_space: MobileSpace, x86: Device) -> None:
    def table(widths: tuple[int, ...]) -> LatencyTable:
        times_us: dict[tuple[LayerSpec, str], float] = {}
        for width in widths:
            spec = replace(DENSE, in_channels=width, out_channels=width)
            times_us |= {(spec, "fp32"): 9.0, (replace(spec, precision="w8a8", input_bits=8, output_bits=8), "qdq_u8"): 3.0}
        return table_of(tiny_space, x86, times_us)

    small, large = table((8, 12, 16)), table((64, 96, 128))
    assert {row.size_class for row in what_pays(small)}.isdisjoint(row.size_class for row in what_pays(large))
    bounds = size_bounds([small, large])
    classes = [{row.size_class.split(" ")[0] for row in what_pays(one, bounds)} for one in (small, large)]
    assert classes == [{"small", "medium"}, {"medium", "large"}]
    sparse = replace(GROUP, in_channels=128, out_channels=128)
    assert size_class(sparse, bounds) == size_class(replace(sparse, sparsity="dense"), bounds) == 2
    assert not what_pays(LatencyTable.empty(tiny_space, x86), bounds)


def test_a_measured_table_gives_finite_rows_of_what_it_holds(tiny_table: LatencyTable) -> None:
    rows = what_pays(tiny_table)
    specs = {spec for spec, _ in tiny_table.entries}
    assert rows
    assert all(row.pairs >= 1 and row.median_ratio > 0 and 0 <= row.share_faster <= 1 for row in rows)
    assert {row.kind for row in rows} <= {spec.kind for spec in specs}
    assert {row.choice.split()[-1] for row in rows} >= {"int8"}
    assert all(len(applicable(spec)) >= 1 for spec in specs)
