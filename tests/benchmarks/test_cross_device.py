"""Winners of each device on every device: what is compared with what, and the whole matrix of a tiny run."""

from __future__ import annotations

import csv
import io
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks.cross_device import Winner, cross, levels_of, opened, per_layer
from latency_lut.table import LatencyTable
from predictors.latency import LatencyPredictor
from search.winners import uniform
from spaces.mobile import MobileSpace

WINNERS = (
    Winner("x86", 0.90, {"x86": 0.90, "wasm": 0.90}, {"x86": 10.0, "wasm": 60.0}),
    Winner("x86", 0.95, {"x86": 0.95, "wasm": 0.95}, {"x86": 20.0, "wasm": 90.0}),
    Winner("wasm", 0.92, {"x86": 0.92, "wasm": 0.92}, {"x86": 16.0, "wasm": 40.0}),
    Winner("wasm", 0.99, {"x86": 0.99, "wasm": 0.99}, {"x86": 60.0, "wasm": 80.0}),
)


def test_winners_are_compared_at_each_accuracy_that_both_devices_reach() -> None:
    rows = {name: levels_of(WINNERS, name) for name in ("x86", "wasm")}
    found = {name: [(r["accuracy_from"], r["home_us"], r["guest_us"]) for r in of_device] for name, of_device in rows.items()}
    assert found == {
        "x86": [(0.9, 10.0, 16.0), (0.92, 20.0, 16.0), (0.95, 20.0, 60.0)],
        "wasm": [(0.9, 40.0, 60.0), (0.92, 40.0, 90.0), (0.95, 80.0, 90.0)],
    }
    assert [row["home_speedup"] for row in rows["x86"]] == [1.6, 0.8, 3.0]


def test_precisions_per_layer_are_predicted_to_be_no_slower_than_any_uniform_one(
    tiny_space: MobileSpace, tiny_table: LatencyTable
) -> None:
    predictor = LatencyPredictor.fit(tiny_table, tiny_space)

    def us(architecture: object) -> float:
        return predictor.predict(tiny_space.network(architecture))[0]

    shape = uniform(tiny_space, tiny_space.sample(np.random.default_rng(0)), "fp32")
    found = per_layer(tiny_space, predictor, shape)
    assert tiny_space.replaced(found, precision="fp32") == shape
    assert us(found) <= min(us(uniform(tiny_space, shape, precision)) for precision in ("fp32", "w8a8"))


def test_the_matrix_of_a_run_on_two_devices_is_measured(
    both_finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latency_lut.session.NETWORK_VISIT_S", 0.0002)
    run = shutil.copytree(both_finished, tmp_path / "run")
    result = cross(opened(run), tmp_path / "exports", 3, 2)
    assert set(result["home_speedup"]) == {"x86", "two"}
    fronts = Counter(row["device"] for row in csv.DictReader(io.StringIO((run / "front.csv").read_text())))
    assert result["winners"] == {name: min(count, 2) for name, count in fronts.items()}
    assert result["not_verified"] == {"x86": 0, "two": 0}
    for rows in result["levels"].values():
        assert all(row["guest_us"] > 0 and row["home_us"] > 0 for row in rows)
        assert rows[0]["accuracy_from"] <= rows[-1]["accuracy_from"] <= 1
    for name, values in result["home_speedup_range"].items():
        assert 0 < values[0] <= result["home_speedup"][name] <= values[1]
    for figures in result["precisions"].values():
        assert figures["per_layer_speedup"] > 0
        assert 0 <= figures["int8_slower"] <= 1
