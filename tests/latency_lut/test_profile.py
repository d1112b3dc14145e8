"""Profiling a small space for real: which pairs, resuming, networks, timing again later."""

from dataclasses import replace

import numpy as np
import pytest

from latency_lut import profile as profiling
from latency_lut.device import Device
from latency_lut.lowering import applicable
from latency_lut.measuring import MeasuringSettings
from latency_lut.profile import pairs_of, profile
from latency_lut.session import FIRST_NETWORKS, NETWORK_ANCHORS, Session, build_random, retime
from latency_lut.table import LatencyTable, pair_key
from spaces.errors import UserError
from spaces.mobile import MobileSpace

DEVICE = Device("x86")
STAGES = [{"widths": [8, 16], "depths": [1], "stride": 2}]
SPACE = MobileSpace(1, 4, [8], [8], STAGES, [2], [3, 5], [16], ["w8a8", "fp32"], ["dense", "group@1/2"])
QUICK = {"rounds": 3, "visit_s": 0.00005}


def test_all_pairs_of_a_small_space_are_listed():
    pairs, reachable = pairs_of(SPACE, np.random.default_rng(0), max_pairs=10_000)
    assert len(pairs) == len(set(pairs)) == reachable
    rng = np.random.default_rng(1)
    for _ in range(100):
        for spec in SPACE.layers(SPACE.sample(rng)):
            assert {pair_key(spec, name) for name in applicable(spec)} <= set(pairs)


def test_a_limited_choice_prefers_what_networks_contain():
    limit = 30
    pairs, reachable = pairs_of(SPACE, np.random.default_rng(0), max_pairs=limit)
    everything, _ = pairs_of(SPACE, np.random.default_rng(0), max_pairs=10_000)
    assert len(pairs) == limit < reachable
    rng = np.random.default_rng(2)
    needed = [pair_key(s, n) for _ in range(200) for s in SPACE.layers(SPACE.sample(rng)) for n in applicable(s)]
    covered = np.mean([pair in set(pairs) for pair in needed])
    assert covered > 1.2 * limit / len(everything)
    again, _ = pairs_of(SPACE, np.random.default_rng(0), max_pairs=limit)
    assert again == pairs


def test_a_profile_is_resumed_where_it_was_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(profiling, "BATCH_PAIRS", 15)
    path = tmp_path / "x86.parquet"

    class StopError(Exception):
        pass

    def stop_after_two_batches(what, done, total):
        if what == "pairs" and done > 30:
            raise StopError

    with pytest.raises(StopError):
        profile(SPACE, DEVICE, path, MeasuringSettings(max_pairs=60, networks=4, **QUICK), on_progress=stop_after_two_batches)
    before = LatencyTable.load(path)
    assert 30 < len(before.entries) < 60

    table, stats = profile(SPACE, DEVICE, path, MeasuringSettings(max_pairs=60, networks=4, **QUICK))
    assert len(table.entries) == stats.pairs == 60
    assert stats.measured == 60 - len(before.entries)
    assert {pair: table.entries[pair] for pair in before.entries} == before.entries
    assert LatencyTable.load(path) == table

    again, stats = profile(SPACE, DEVICE, path, MeasuringSettings(max_pairs=60, networks=4, **QUICK))
    assert again == table
    assert (stats.measured, stats.networks, stats.pairs_per_min) == (0, 0, 0.0)
    more, stats = profile(SPACE, DEVICE, path, MeasuringSettings(max_pairs=60, networks=6, **QUICK))
    assert (stats.measured, stats.networks) == (0, 2)
    assert more.networks[: len(table.networks)] == table.networks


def test_what_is_measured_makes_sense(tmp_path):
    table, stats = profile(SPACE, DEVICE, tmp_path / "x86.parquet", MeasuringSettings(0, 80, 3, 6, 0.0002))
    table.check(SPACE, DEVICE)
    assert stats.pairs_per_min > 0
    us = np.array([entry.us for entry in table.entries.values()])
    assert (us > 0.5).all()
    assert (us < 5000).all()
    assert np.median([entry.spread_us / entry.us for entry in table.entries.values()]) < 0.3
    for network in table.networks:
        specs = SPACE.layers(network.architecture)
        assert all(name in applicable(spec) for spec, name in zip(specs, network.lowerings, strict=True))
        assert network.us > us.min()


def test_retime_gives_the_speed_of_the_table(tmp_path):
    table, _ = profile(SPACE, DEVICE, tmp_path / "x86.parquet", MeasuringSettings(max_pairs=30, networks=2, **QUICK))
    networks = [SPACE.network(timing.architecture) for timing in table.networks]
    rng = np.random.default_rng(0)
    models = [build_random(n, t.lowerings, rng, DEVICE) for n, t in zip(networks, table.networks, strict=True)]
    timings, speed = retime(models, SPACE, table, DEVICE)
    assert len(timings) == len(table.networks)
    assert speed > 0
    for timing, stored in zip(timings, table.networks, strict=True):
        assert 0.5 < timing.us / stored.us < 2.0


def test_networks_keep_time_for_networks(tmp_path):
    """As if networks had been slow when the table was measured, and layers had not."""
    settings = MeasuringSettings(max_pairs=30, networks=NETWORK_ANCHORS, **QUICK)
    table, _ = profile(SPACE, DEVICE, tmp_path / "x86.parquet", settings)
    table.networks = [replace(network, us=3 * network.us) for network in table.networks]
    stored = table.networks[:8]
    session = Session(table, DEVICE, (), seed=0)
    session.time_networks(SPACE, [(network.architecture, network.lowerings) for network in stored], "chosen")
    again = table.networks[-len(stored) :]
    assert 0.7 < np.median([now.us / before.us for now, before in zip(again, stored, strict=True)]) < 1.4
    few = replace(table, networks=stored)
    session = Session(few, DEVICE, (), seed=0)
    assert session.load_networks(SPACE, [])[0] is session.stopwatch


def test_every_batch_of_networks_is_tied_to_the_same_ones(tmp_path):
    """A chain of batches, each tied to the one before, would add up what each is wrong by."""
    settings = MeasuringSettings(max_pairs=30, networks=NETWORK_ANCHORS, **QUICK)
    table, _ = profile(SPACE, DEVICE, tmp_path / "x86.parquet", settings)
    begin = [replace(table.networks[index % NETWORK_ANCHORS], us=2.0 + index) for index in range(FIRST_NETWORKS)]
    table = replace(table, networks=begin)
    later = replace(table, networks=[*begin, *(replace(network, us=10 * network.us) for network in begin)])
    batches = [Session(each, DEVICE, (), seed=0).load_networks(SPACE, []) for each in (table, later)]
    first, second = (stopwatch.anchors_us for stopwatch, _ in batches)
    assert first.tolist() == second.tolist()
    assert len(first) == NETWORK_ANCHORS


def test_a_table_of_another_space_is_kept(tmp_path):
    path = tmp_path / "x86.parquet"
    profile(SPACE, DEVICE, path, MeasuringSettings(max_pairs=12, networks=0, **QUICK))
    content = path.read_bytes()
    other = MobileSpace(1, 5, [8], [8], STAGES, [2], [3, 5], [16], ["w8a8", "fp32"], ["dense"])
    with pytest.raises(UserError, match="of space mobile"):
        profile(other, DEVICE, path, MeasuringSettings(max_pairs=12, networks=0, **QUICK))
    assert path.read_bytes() == content
