"""A search for a device that ssh reaches: measured there over a real sshd on loopback, from the table to the winners."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from latency_lut.device import Device
from latency_lut.remote import Watch
from latency_lut.table import LatencyTable
from latency_lut.transports import Ssh
from predictors.latency import LatencyPredictor
from search.data import Digits
from search.elsewhere import measure_elsewhere
from search.evaluation import Evaluator, collect
from search.export import Tolerances
from search.winners import Exporter
from spaces.mobile import MobileSpace
from spaces.supernet import Supernet
from tests.latency_lut import loopback_sshd

pytestmark = pytest.mark.skipif(bool(loopback_sshd.missing()), reason=loopback_sshd.missing())

TWIN = f"this machine, in onnxruntime {onnxruntime.__version__}"
QUICK_TIMING = {"latency_lut.bundle.NETWORK_VISIT_S": 0.0002, "latency_lut.there.NETWORK_VISIT_S": 0.0002}
COMPARED = ("accuracy_runtime", "max_abs_diff", "agreement")


def reached(folder: Path) -> tuple[str, ...]:
    return "device=[pi]", f"devices.pi.reach.folder={folder}/there", f"devices.pi.reach.python={sys.executable}"


def cards_of(run: Path, kind: str = "winners") -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(run.glob(f"{kind}/pi/*/card.json"))]


def test_a_search_ends_with_winners_that_were_measured_on_the_device(
    call: Callable[..., Any], sshd: loopback_sshd.Sshd, tiny_arguments: tuple[str, ...], x86: Device, tmp_path: Path
) -> None:
    how = {"environment": {"PATH": sshd.path}, "constants": QUICK_TIMING}
    ended = call(tmp_path, *tiny_arguments, *reached(tmp_path), "run=run", **how)
    assert ended.status == 0, ended.err
    run = tmp_path / "run"
    cards = cards_of(run) + cards_of(run, "baselines")
    assert len(cards) > 2
    for card in cards:
        assert card["measured_on"] == {"latency": "ssh host pi", "accuracy": "ssh host pi", "graph": TWIN}
        assert {name: card["device"][name] for name in x86.describe()} == x86.describe()
        assert card["measured_us"] > 0
        assert card["verified"], card["failures"]
        assert [card[name] for name in COMPARED] == [card["same_runtime_here"][name] for name in COMPARED]
    assert "outputs and accuracy in the runtime on ssh host pi" in (run / "report.html").read_text()
    assert f"the optimized graph on {TWIN}" in ended.out.replace("\n", " ")
    assert [path.name for path in (run / "tables").iterdir()] == ["pi.parquet"]
    assert [path for path in (tmp_path / "there").rglob("*") if path.is_file()] == []
    table = LatencyTable.load(run / "tables" / "pi.parquet")
    assert table.device == x86.describe()
    assert {network.source for network in table.networks} == {"random", "graded", "winner"}
    again = call(tmp_path, *tiny_arguments, *reached(tmp_path), "run=run", environment={"PATH": "/nowhere"})
    assert again.status == 0, again.err  # everything is there: nothing is asked of the device
    assert cards_of(run) + cards_of(run, "baselines") == cards


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["objectives=[accuracy,peak_memory]"],
            "device pi is elsewhere; measuring memory works on this machine's devices only",
        ),
        (["objectives=[accuracy,energy]"], "device pi is elsewhere; reading a meter works on this machine's devices only"),
        (["devices.pi.reach=bundle"], "device pi is elsewhere and nothing reaches it, so winners cannot be timed there; name"),
        (["profile.budget_s=9"], "device pi is elsewhere; profile.target_error and profile.budget_s choose here"),
        (["devices.pi.provider=CUDAExecutionProvider"], "models for device pi are checked in the same runtime on this machine"),
    ],
)
def test_what_cannot_be_had_elsewhere_is_told_in_one_line(
    call: Callable[..., Any], tiny_arguments: tuple[str, ...], tmp_path: Path, arguments: list[str], said: str
) -> None:
    ended = call(tmp_path, *tiny_arguments, "device=[pi]", *arguments, "run=run")
    assert ended.status == 2
    assert len(ended.err.splitlines()) == 1
    assert said in ended.err
    assert not (tmp_path / "run").exists()


@pytest.fixture
def exporter(
    sshd: loopback_sshd.Sshd,
    tiny_space: MobileSpace,
    tiny_table: LatencyTable,
    digits: Digits,
    evaluator: Evaluator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Exporter:
    monkeypatch.setenv("PATH", sshd.path)
    monkeypatch.setattr("latency_lut.there.NETWORK_VISIT_S", 0.0002)
    monkeypatch.setattr("latency_lut.remote.LONGEST_PAUSE_S", 0.1)
    pi = Device("pi", reach=Ssh("cut", str(tmp_path / "there"), sys.executable))
    predictor = LatencyPredictor.fit(tiny_table, tiny_space, held_out=4)
    parts = Supernet(tiny_space), evaluator, collect(digits, "test")
    return Exporter(tiny_space, *parts, pi, predictor, Tolerances(), {"seed": 0})


def test_a_link_that_is_cut_while_winners_are_timed_changes_nothing_but_the_clock(
    exporter: Exporter, sshd: loopback_sshd.Sshd, tiny_table: LatencyTable, tmp_path: Path
) -> None:
    rng, folders = np.random.default_rng(3), [tmp_path / "1", tmp_path / "2"]
    cards = [exporter.make(exporter.space.sample_spread(rng), folder) for folder in folders]
    said: list[str] = []
    came: list[str] = []

    def watch(what: str, done: int, total: int) -> None:
        came.append(what)
        if came.count("models") in (4, 9):
            sshd.link.cut()

    way = tiny_table, tmp_path / "tables", Watch(watch, said.append)
    complete, speed = measure_elsewhere(exporter, cards, folders, [None, None], *way)
    assert sum("the connection broke" in sentence for sentence in said) >= 1
    assert speed > 0
    for card, made, folder in zip(complete, cards, folders, strict=True):
        assert card["measured_us"] > 0
        assert card["visits"] == 25
        assert [card[name] for name in COMPARED] == [made[name] for name in COMPARED]
        assert json.loads((folder / "card.json").read_text()) == json.loads(json.dumps(card))
    again = [
        exporter.make(exporter.space.architecture(card["architecture"]), f) for card, f in zip(cards, folders, strict=True)
    ]
    once_more, _ = measure_elsewhere(exporter, again, folders, [None, None], *way)
    for first, second in zip(complete, once_more, strict=True):
        assert second["same_runtime_here"] == first["same_runtime_here"]
        assert second["verified"] == first["verified"]


def test_where_images_are_too_large_to_be_sent_the_card_says_so(
    exporter: Exporter, tiny_table: LatencyTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.elsewhere.MOST_BYTES", 1000)
    card = exporter.make(exporter.space.smallest(), tmp_path / "1")
    (complete,), _ = measure_elsewhere(exporter, [card], [tmp_path / "1"], [None], tiny_table, tmp_path / "tables", Watch())
    assert complete["measured_on"] == {"latency": "ssh host cut", "accuracy": TWIN, "graph": TWIN}
    assert complete["accuracy_runtime"] == card["accuracy_runtime"]
    assert "same_runtime_here" not in complete
