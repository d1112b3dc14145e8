"""Measuring what a model wishes, on a small space for real: limits, steps, the curve, going on later."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from latency_lut import refine as refining
from latency_lut.device import Device
from latency_lut.lowering import applicable
from latency_lut.measuring import MeasuringSettings
from latency_lut.profile import pairs_of, profile
from latency_lut.refine import Refinement
from latency_lut.table import LatencyTable
from predictors.wishes import wishes_of
from spaces.errors import UserError
from spaces.mobile import MobileSpace

DEVICE = Device("x86")
STAGES = [{"widths": [8, 16], "depths": [1], "stride": 2}]
SPACE = MobileSpace(1, 4, [8], [8], STAGES, [2], [3, 5], [16], ["w8a8", "fp32"], ["dense", "group@1/2"])
QUICK = MeasuringSettings(rounds=3, visit_s=0.00005, networks=8)


@dataclass
class Wish:
    error: float
    pairs: list
    networks: list


def in_order(table, space, seed):
    """A model whose error is one over the pairs in the table, and that wants what sampled networks contain, in its order."""
    pairs, _ = pairs_of(space, np.random.default_rng(seed), 10_000)
    rng = np.random.default_rng([seed, len(table.networks)])
    drawn = [space.sample(rng) for _ in range(5)]
    networks = [(a, tuple(applicable(spec)[0] for spec in space.layers(a))) for a in drawn]
    return Wish(1.0 / len(table.entries), [pair for pair in pairs if pair not in table.entries], networks)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(refining, "STEP_PAIRS", 12)
    monkeypatch.setattr(refining, "STEP_NETWORKS", 2)
    monkeypatch.setattr("latency_lut.profile.SPREAD_PAIRS", 20)
    monkeypatch.setattr("latency_lut.session.NETWORK_ROUNDS", 4)
    monkeypatch.setattr("latency_lut.session.NETWORK_VISIT_S", 0.0002)


def test_measuring_stops_at_the_wanted_error_and_goes_on_to_a_smaller_one(tmp_path):
    path = tmp_path / "x86.parquet"
    table, stats = profile(SPACE, DEVICE, path, QUICK, refinement=Refinement(in_order, target_error=1 / 40))
    start = table.curve[0]
    assert start.pairs < 40 <= len(table.entries) < 40 + 12
    assert [point.pairs for point in table.curve] == [start.pairs + 12 * step for step in range(len(table.curve))]
    assert [point.networks for point in table.curve] == [start.networks + 2 * step for step in range(len(table.curve))]
    assert [point.error for point in table.curve] == [1.0 / point.pairs for point in table.curve]
    assert (stats.measured, stats.networks) == (len(table.entries), len(table.networks))
    assert sum(network.source == "random" for network in table.networks) == 8
    assert sum(network.source == "chosen" for network in table.networks) == 2 * (len(table.curve) - 1)
    assert LatencyTable.load(path) == table

    same, stats = profile(SPACE, DEVICE, path, QUICK, refinement=Refinement(in_order, target_error=1 / 40))
    assert (same, stats.measured, stats.networks) == (table, 0, 0)
    more, stats = profile(SPACE, DEVICE, path, QUICK, refinement=Refinement(in_order, target_error=1 / 60))
    assert len(more.entries) >= 60
    assert stats.measured == len(more.entries) - len(table.entries)
    assert more.curve[: len(table.curve)] == table.curve
    seconds = [point.seconds for point in more.curve]
    assert seconds == sorted(seconds)


def test_measuring_stops_when_the_time_is_over_or_nothing_is_left(tmp_path, monkeypatch):
    short = Refinement(in_order, budget_s=1e-3)
    table, _ = profile(SPACE, DEVICE, tmp_path / "short.parquet", QUICK, refinement=short)
    assert len(table.curve) == 1
    limited = Refinement(in_order, target_error=1e-9, budget_s=100.0)
    monkeypatch.setattr(refining, "MOST_NETWORKS", 0)
    table, _ = profile(SPACE, DEVICE, tmp_path / "limited.parquet", replace(QUICK, max_pairs=50), refinement=limited)
    assert len(table.entries) == 50


def test_a_real_model_gets_what_it_wishes(tmp_path, monkeypatch):
    monkeypatch.setattr(refining, "MOST_NETWORKS", 54)
    path = tmp_path / "x86.parquet"
    table, _ = profile(SPACE, DEVICE, path, QUICK, refinement=Refinement(wishes_of, 1e-6))
    assert len(table.networks) == 54
    assert len(table.curve) > 1
    assert all(0 < point.error < 1 for point in table.curve)
    assert {network.source for network in table.networks} == {"random", "graded", "chosen"}


def test_a_curve_that_says_something_impossible_is_refused(tmp_path):
    table, _ = profile(SPACE, DEVICE, tmp_path / "x86.parquet", replace(QUICK, max_pairs=20))
    replace(table, curve=[refining.CurvePoint(20, 8, float("nan"), 0.1)]).save(tmp_path / "nan.parquet")
    with pytest.raises(UserError, match="damaged"):
        LatencyTable.load(tmp_path / "nan.parquet")


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ((None, None), "both null"),
        ((0.0, None), "target_error is 0.0"),
        ((2, None), "target_error is 2"),
        (("small", None), "target_error is 'small'"),
        ((None, -1.0), "budget_s is -1.0"),
        ((None, True), "budget_s is True"),
    ],
)
def test_limits_out_of_range_are_told(limits, said):
    with pytest.raises(UserError, match=said):
        Refinement(in_order, *limits)


def test_too_few_networks_for_a_model_are_told(tmp_path):
    with pytest.raises(UserError, match="networks is 3"):
        profile(SPACE, DEVICE, tmp_path / "x86.parquet", MeasuringSettings(networks=3), refinement=Refinement(in_order, 0.1))
