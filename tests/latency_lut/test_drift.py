"""Drift, for real: tables whose entries or descriptions were changed are noticed, others hold."""

import copy
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

from latency_lut.__main__ import DRIFT_STATUS
from latency_lut.__main__ import check as check_command
from latency_lut.command import run_hydra
from latency_lut.device import Device
from latency_lut.drift import Drift, Moved, age_days, check, spread_pairs
from latency_lut.table import LatencyTable
from spaces.errors import UserError

WIDE = 3.0  # neighbours of a test may slow the machine severalfold


@pytest.fixture
def table(tiny_table):
    return copy.deepcopy(tiny_table)


def scale(table, pairs, factor):
    for pair in pairs:
        entry = table.entries[pair]
        table.entries[pair] = replace(entry, us=entry.us * factor, spread_us=0.0)


def test_a_table_of_this_machine_holds(table, x86):
    drift = check(table, x86, tolerance=WIDE)
    assert len(drift.checked) == 20
    assert not drift.changed
    assert not drift.drifted, drift.sentences()


def test_entries_that_moved_are_told_with_their_factor(table, x86):
    scaled = spread_pairs(table, 20)[::5]
    scale(table, scaled, 1 / 20)
    drift = check(table, x86, tolerance=WIDE)
    assert drift.drifted
    first = drift.moved[: len(scaled)]
    assert {moved.pair for moved in first} == set(scaled)
    for moved in first:
        assert moved.was_us == table.entries[moved.pair].us
        assert 5 < moved.factor < 80
    assert drift.moved[0] == drift.worst
    assert str(drift.worst.pair[0]) in drift.sentences()[-1]


def test_a_machine_that_became_slower_as_a_whole_is_told(table, x86):
    scale(table, table.entries, 1 / 20)
    drift = check(table, x86, tolerance=WIDE)
    assert drift.speed_changed
    assert 5 < drift.common_factor < 80
    assert len(drift.moved) > 10


@pytest.mark.parametrize("name", ["runtime_version", "cpu"])
def test_what_the_device_says_otherwise_is_drift(table, x86, name):
    now, table.device[name] = table.device[name], "another"
    drift = check(table, x86, pairs=2, tolerance=9.0)
    assert drift.drifted
    assert drift.changed == {name: ("another", now)}
    assert f"{name} was 'another', is '{now}'" in drift.sentences()


def test_other_settings_are_refused(table):
    with pytest.raises(UserError, match="was measured with batch 1, not 2; run: python -m latency_lut device=x86"):
        check(table, Device("x86", batch=2))


def test_a_table_without_pairs_is_refused(table, x86):
    table.entries.clear()
    with pytest.raises(UserError, match="no pairs to check"):
        check(table, x86)


@pytest.mark.parametrize(
    ("values", "said"),
    [({"pairs": 0}, "check.pairs is 0"), ({"pairs": 2.0}, "check.pairs is 2.0")]
    + [({"tolerance": value}, f"check.tolerance is {value!r}") for value in (0, float("nan"), "much", True)],
)
def test_numbers_out_of_range_are_told(table, x86, values, said):
    with pytest.raises(UserError, match=said):
        check(table, x86, **values)


def test_pairs_are_of_all_kinds_and_sizes(table):
    chosen = spread_pairs(table, 20)
    assert len(set(chosen)) == len(chosen) == 20
    kinds = {(spec.kind, lowering) for spec, lowering in table.entries}
    assert {(spec.kind, lowering) for spec, lowering in chosen} == kinds
    for kind in kinds:
        members = [spec.macs for spec, lowering in table.entries if (spec.kind, lowering) == kind]
        taken = [spec.macs for spec, lowering in chosen if (spec.kind, lowering) == kind]
        assert np.median(taken) <= np.quantile(members, 0.75) or len(taken) == 1
        assert len(taken) >= min(len(members), 20 // len(kinds))
    assert set(spread_pairs(table, 10_000)) == set(table.entries)


def drift_of(factors, error=0.0, tolerance=0.1):
    return Drift({}, tuple(Moved((None, "fp32"), 100.0, 100.0 * factor, error) for factor in factors), tolerance)


def test_a_passing_slowness_within_the_tolerance_is_taken_out():
    assert not drift_of([1.08] * 19 + [1.15]).drifted
    drift = drift_of([1.08] * 19 + [1.3])
    assert [moved.factor for moved in drift.moved] == [pytest.approx(1.3)]
    assert drift_of([1.3] * 19 + [1.0]).speed_changed


def test_what_may_be_chance_is_no_drift():
    assert drift_of([1.0] * 19 + [1.3], error=0.01).drifted
    assert not drift_of([1.0] * 19 + [1.3], error=0.1).drifted


def test_the_age_of_a_table(table):
    table.created = "2024-01-01T00:00:00+00:00"
    assert age_days(table, datetime(2024, 1, 11, 12, tzinfo=UTC)) == 10.5
    table.created = "2024-01-01"
    assert age_days(table, datetime(2024, 1, 3, tzinfo=UTC)) == 2.0
    table.created = "long ago"
    assert age_days(table) == float("inf")


def test_the_command_says_by_its_status_whether_a_table_holds(table, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tables" / "x86.parquet"

    def status(*arguments):
        monkeypatch.setattr("sys.argv", ["latency_lut", "check", *arguments])
        try:
            run_hydra(lambda config: None, "latency_lut", {"check": check_command})
        except SystemExit as stop:
            return stop.code
        return 0

    assert status("device=x86") == 2
    assert "no table tables/x86.parquet; run: python -m latency_lut device=x86" in capsys.readouterr().err
    table.save(path)
    content = path.read_bytes()
    assert status("device=x86", f"check.tolerance={WIDE}") == 0
    assert "still holds" in capsys.readouterr().out
    assert path.read_bytes() == content
    scale(table, spread_pairs(table, 20)[:3], 1 / 20)
    table.save(path)
    assert LatencyTable.load(path).entries == table.entries
    assert status("device=x86", f"check.tolerance={WIDE}") == DRIFT_STATUS
    told = capsys.readouterr().out
    for text in ("entries that moved", "x86.parquet", "has drifted", f"3 of 20 pairs moved by more than {WIDE:.0%}"):
        assert text in told
