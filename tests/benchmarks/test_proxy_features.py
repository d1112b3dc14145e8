"""Taus of the accuracy predictor with and without proxies, on a tiny run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.cross_device import opened
from benchmarks.proxy_features import compared, taus_of


def test_differences_are_those_of_the_same_held_out_sets() -> None:
    found = compared([0.5, 0.6, 0.7], [0.6, 0.6, 0.9])
    assert found == {"tau": 0.7, "gain": 0.1, "gain_standard_error": pytest.approx(0.0577), "better": 2}


def test_every_network_is_held_out_once_for_each_seed(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    found = taus_of(opened(tmp_path / "run"), {"naswot": ("naswot",)}, seeds=2)
    assert (found["held_out_sets"], found["held_out"], found["networks_per_seed"]) == (6, 4, 12)
    assert -1.0 <= float(str(found["tau_without"])) <= 1.0
    again = taus_of(opened(tmp_path / "run"), {"naswot": ("naswot",)}, seeds=2)  # nothing is evaluated or scored again
    assert {**again, "score_ms_per_network": 0} == {**found, "score_ms_per_network": 0}
