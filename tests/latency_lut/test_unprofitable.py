"""Which options are nowhere faster: on tables whose times follow a known rule, measured on every layer of a space."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latency_lut.device import Device
from latency_lut.lowering import applicable
from latency_lut.pays import MARGIN, is_integer
from latency_lut.table import LatencyTable, pair_key
from latency_lut.timing import Timing
from latency_lut.unprofitable import LEAST_PAIRS, unprofitable
from spaces.layers import LayerSpec
from spaces.mobile import MobileSpace
from spaces.precision import FLOAT_BITS

Cost = Callable[[LayerSpec, str], float]
REFERENCES = {"precision": "fp32", "sparsity": "dense"}


def layers_of(space: MobileSpace) -> list[LayerSpec]:
    """The layers of a space; by far most networks of the small space are seen."""
    rng = np.random.default_rng(1)
    ends = [space.largest(), space.smallest()]
    networks = [space.network(a) for a in (*ends, *(space.sample(rng) for _ in range(3000)))]
    return list(dict.fromkeys(spec for network in networks for spec in network.layers))


@pytest.fixture(scope="module")
def layers(small_space: MobileSpace) -> list[LayerSpec]:
    return layers_of(small_space)


def table_of(space: MobileSpace, device: Device, layers: list[LayerSpec], cost: Cost) -> LatencyTable:
    """A table of all layers, between whatever neighbours; a lowering that is shared costs what it costs for the dense layer."""
    table = LatencyTable.empty(space, device)
    for spec in layers:
        for name in applicable(spec):
            key = pair_key(spec, name)
            table.entries[key] = Timing(cost(*key), 0.1, 9)
    return table


def beside(spec: LayerSpec) -> bool:
    return min(spec.input_bits, spec.output_bits, spec.skip_bits or FLOAT_BITS) < FLOAT_BITS


def speed(integer: float = 1.0, gathered: float = 1.0, borders: float = 1.0) -> Cost:
    """Times of which only the factors of integer arithmetic, of gathering and of integer neighbours matter."""

    def cost(spec: LayerSpec, name: str) -> float:
        us = 10.0 / (integer if is_integer(spec) else 1.0) / (gathered if name.startswith("gather") else 1.0)
        return us * (borders if beside(spec) and not is_integer(spec) else 1.0)

    return cost


def left(space: MobileSpace, table: LatencyTable) -> set[tuple[str, object]]:
    return {(u.choice, u.option) for u in unprofitable(table, space)}


def everything(space: MobileSpace, *kinds: str) -> set[tuple[str, object]]:
    """All options of choices of some kinds but the dense float ones."""
    chosen = [choice for choice in space.choices if choice.kind in kinds]
    return {(choice.name, option) for choice in chosen for option in choice.options if option != REFERENCES[choice.kind]}


@pytest.mark.parametrize(
    ("cost", "kinds"),
    [
        (speed(integer=0.4, gathered=0.5), ("precision", "sparsity")),
        (speed(integer=0.4, gathered=2.0), ("precision",)),
        (speed(integer=3.0, gathered=0.5), ("sparsity",)),
        (speed(integer=3.0, gathered=2.0), ()),
        (speed(integer=MARGIN - 0.005, gathered=MARGIN - 0.005), ("precision", "sparsity")),
        (speed(integer=MARGIN + 0.005, gathered=MARGIN + 0.005), ()),
    ],
)
def test_what_is_slow_everywhere_is_left_out_and_nothing_else(
    small_space: MobileSpace, x86: Device, layers: list[LayerSpec], cost: Cost, kinds: tuple[str, ...]
) -> None:
    assert left(small_space, table_of(small_space, x86, layers, cost)) == everything(small_space, *kinds)


def test_faster_than_float_beside_integer_layers_is_enough(
    small_space: MobileSpace, x86: Device, layers: list[LayerSpec]
) -> None:
    """Slower than float between float layers, but not than float between integer layers, which pays at both borders."""
    found = left(small_space, table_of(small_space, x86, layers, speed(integer=0.8, gathered=0.5, borders=2.0)))
    # Before the classifier stands a pooling layer, which gives floats to a float classifier.
    assert found == everything(small_space, "sparsity") | {("classifier.precision", "w8a8")}


def test_verdicts_say_what_they_rest_on(small_space: MobileSpace, x86: Device, layers: list[LayerSpec]) -> None:
    verdicts = unprofitable(table_of(small_space, x86, layers, speed(integer=0.4, gathered=0.5)), small_space)
    for verdict in verdicts:
        kind = verdict.choice.rsplit(".", 1)[-1]
        assert verdict.instead == REFERENCES[kind]
        # A sparse layer also runs dense, so it is never slower than that.
        expected = (0.4, 0.4) if kind == "precision" else (1.0, 1.0)
        assert (verdict.lowest_ratio, verdict.highest_ratio) == pytest.approx(expected)
        assert verdict.pairs >= 2
        smaller = {"size", "memory"} if kind == "precision" else {"size", "macs", "parameters"}
        assert verdict.smaller == smaller


def test_an_option_that_pays_in_one_size_class_stays(small_space: MobileSpace, x86: Device, layers: list[LayerSpec]) -> None:
    pointwise = sorted(spec.macs for spec in layers if spec.kind == "pointwise" and spec.sparsity == "dense")
    large = pointwise[round(0.8 * len(pointwise))]

    def cost(spec: LayerSpec, name: str) -> float:
        fast = spec.kind == "pointwise" and spec.macs >= large
        return speed(integer=3.0 if fast else 0.4, gathered=0.5)(spec, name)

    table = table_of(small_space, x86, layers, cost)
    kept = everything(small_space, "precision") - left(small_space, table)
    names = {name for name, _ in kept}
    assert "stage1.block2.expand.precision" in names
    assert not any("depthwise" in name or name.startswith(("stem", "classifier")) for name in names)


def test_an_option_that_pays_with_one_value_of_another_choice_stays(
    small_space: MobileSpace, x86: Device, layers: list[LayerSpec]
) -> None:
    """Gathering bytes is fast here, gathering floats is not: half of all pairs, but every integer one."""

    def cost(spec: LayerSpec, name: str) -> float:
        return speed(gathered=2.0 if is_integer(spec) else 0.5)(spec, name)

    assert not left(small_space, table_of(small_space, x86, layers, cost)) & everything(small_space, "sparsity")


def test_a_few_faster_pairs_do_not_keep_an_option_and_many_do(
    small_space: MobileSpace, x86: Device, layers: list[LayerSpec]
) -> None:
    for every, kept in ((12, False), (2, True)):
        rng = np.random.default_rng(0)
        odd = {spec for spec in layers if spec.kind == "depthwise" and is_integer(spec) and rng.integers(every) == 0}

        def cost(spec: LayerSpec, name: str, odd: set[LayerSpec] = odd) -> float:
            return 2.0 if spec in odd else speed(integer=0.4, gathered=0.5)(spec, name)

        found = left(small_space, table_of(small_space, x86, layers, cost))
        assert (("stage1.block1.depthwise.precision", "w8a8") not in found) is kept


def test_what_was_not_measured_enough_stays(small_space: MobileSpace, x86: Device, layers: list[LayerSpec]) -> None:
    table = table_of(small_space, x86, layers, speed(integer=0.4, gathered=0.5))
    complete = dict(table.entries)
    integers = [pair for pair in complete if is_integer(pair[0]) and pair[0].kind == "depthwise"]
    assert len(integers) > 3 * LEAST_PAIRS
    table.entries = {pair: entry for pair, entry in complete.items() if pair not in integers[LEAST_PAIRS - 1 :]}
    found = left(small_space, table)
    assert not any("depthwise" in name for name, _ in found)
    assert ("head.precision", "w8a8") in found
    # The stem has few layers. All of them are enough, and all but one are not.
    assert ("stem.precision", "w8a8") in found
    stem = [pair for pair in complete if pair[0].kind == "conv" and is_integer(pair[0])]
    assert len(stem) == 4
    table.entries = {pair: entry for pair, entry in complete.items() if pair != stem[0]}
    assert ("stem.precision", "w8a8") not in left(small_space, table)
    assert left(small_space, LatencyTable.empty(small_space, x86)) == set()


def test_a_choice_without_the_dense_float_option_keeps_its_options(x86: Device) -> None:
    space = MobileSpace(
        channels=1,
        classes=10,
        resolutions=[8],
        stem=[8],
        stages=[{"widths": [8], "depths": [1], "stride": 2}],
        expansions=[2],
        kernels=[3],
        head=[16],
        precisions=["w8a8"],
        sparsities=["group@1/2", "group@1/4"],
    )
    table = table_of(space, x86, layers_of(space), speed(integer=0.4, gathered=0.5))
    assert table.entries
    assert left(space, table) == set()


@settings(max_examples=15, deadline=None)
@given(st.floats(0.2, 3.0), st.floats(0.2, 3.0), st.integers(0, 1000))
def test_every_choice_keeps_its_dense_float_option(
    small_space: MobileSpace, x86: Device, layers: list[LayerSpec], integer: float, gathered: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rule = speed(integer, gathered)
    table = table_of(small_space, x86, layers, lambda spec, name: rule(spec, name) * float(rng.lognormal(0.0, 0.02)))
    found = left(small_space, table)
    assert found <= everything(small_space, "precision", "sparsity")
    if integer < 0.9:
        assert ("stem.precision", "w8a8") in found


def test_a_measured_table_is_judged_the_same_every_time(tiny_table: LatencyTable, tiny_space: MobileSpace) -> None:
    verdicts = unprofitable(tiny_table, tiny_space)
    assert verdicts == unprofitable(tiny_table, tiny_space)
    assert all(verdict.lowest_ratio <= verdict.highest_ratio for verdict in verdicts)
