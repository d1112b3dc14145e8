"""Winners and baselines: who is picked, what they are compared with, and what is written of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latency_lut.device import Device
from latency_lut.table import LatencyTable
from predictors.latency import LatencyPredictor
from search.candidates import Candidate
from search.data import Digits
from search.evaluation import Evaluator, collect
from search.export import Tolerances, sha256
from search.fronts import nondominated
from search.objectives import parse_objectives
from search.winners import Exporter, baselines_of, beaten, feed_back, pick, uniform
from spaces.choice import Architecture
from spaces.mobile import MobileSpace
from spaces.precision import FLOAT
from spaces.supernet import Supernet

OBJECTIVES = parse_objectives(["accuracy", "size"], ["x86"])


def candidate(index: int, accuracy: float, size: float, violation: float = 0.0) -> Candidate:
    return Candidate(Architecture({"index": index}), {"accuracy": accuracy, "size": size}, violation)


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=25, unique=True), st.integers(1, 10))
def test_picked_are_as_many_as_wanted_and_the_front_first(points: list[tuple[int, int]], count: int) -> None:
    # Read back from front.csv, a point says no more than that it is feasible; evaluated, it says by how much.
    evaluated = [candidate(i, a / 8, float(s), violation=-0.25) for i, (a, s) in enumerate(points)]
    front = [candidate(int(str(c.architecture["index"])), *c.values.values()) for c in nondominated(evaluated, OBJECTIVES)]
    picked = [c.architecture for c in pick(front, evaluated, OBJECTIVES, count)]
    assert len(picked) == len(set(picked)) == min(count, len(evaluated))
    assert len(set(picked) & {c.architecture for c in front}) == min(count, len(front))


def test_a_front_priced_again_is_still_the_front() -> None:
    """The latency model is fitted again after an export, so the same networks come with other costs."""
    front = [candidate(0, 0.5, 1.0), candidate(1, 0.9, 2.0)]
    priced_again = [candidate(0, 0.5, 1.1), candidate(1, 0.9, 2.2), candidate(2, 0.4, 3.0)]
    assert [c.architecture["index"] for c in pick(front, priced_again, OBJECTIVES, 3)] == [0, 1, 2]


def test_a_long_front_is_spread_evenly() -> None:
    front = [candidate(i, i / 10, float(i)) for i in range(9)]
    assert [c.architecture["index"] for c in pick(front, [], OBJECTIVES, 3)] == [0, 4, 8]
    assert pick(front, [], OBJECTIVES, 9) == front
    assert len(pick(front, [], OBJECTIVES, 1)) == 1


def test_uniform_baselines_change_nothing_but_precision_and_sparsity(small_space: MobileSpace) -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        architecture = small_space.sample(rng)
        for precision in ("w8a8", FLOAT):
            made = uniform(small_space, architecture, precision)
            assert made.keys() == architecture.keys()
            for name, value in made.items():
                kind = name.rsplit(".", 1)[-1]
                assert value == {"precision": precision, "sparsity": "dense"}.get(kind, architecture[name])
            specs = small_space.layers(made)
            assert {spec.precision for spec in specs if spec.weight_shape} == {precision}


def test_baselines_are_each_there_once_by_family(small_space: MobileSpace) -> None:
    largest = uniform(small_space, small_space.largest(), FLOAT)
    small = small_space.smallest()
    rows = baselines_of(small_space, [largest, small, small], [small])
    families = [row[1] for row in rows]
    assert families.count("largest_float") == families.count("random") == 1
    assert families.count("uniform_int8") == families.count("uniform_float") == 2
    assert len({row[0] for row in rows}) == len(rows)
    assert len({(row[1], row[3]) for row in rows}) == len(rows)
    assert {row[2] for row in rows if row[1] == "uniform_int8"} == {1, 2}


def test_beaten_by_hand() -> None:
    def card(accuracy: float, us: float, family: str = "", width: int = 8) -> dict[str, Any]:
        return {"accuracy_runtime": accuracy, "measured_us": us, "family": family, "architecture": {"width": width}}

    cards = [card(0.8, 10.0, width=16), card(0.9, 20.0, width=32)]
    baselines = [card(0.9, 40.0, "a"), card(0.8, 15.0, "a"), card(0.95, 99.0, "a"), card(0.7, 5.0, "b")]
    families = beaten(cards, baselines)
    assert families["a"] == {"networks": 3, "beaten": 2, "median_speedup": 1.75, "best_speedup": 2.0}
    assert families["b"] == {"networks": 1, "beaten": 0, "median_speedup": None, "best_speedup": None}
    assert beaten([], baselines)["a"]["beaten"] == 0
    itself = card(0.9, 20.1, "c", width=32)  # one network, timed twice
    assert beaten(cards, [itself])["c"] == {"networks": 1, "beaten": 0, "median_speedup": None, "best_speedup": None}


# -- exporting ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def exporter(tiny_space: MobileSpace, tiny_table: LatencyTable, x86: Device, digits: Digits, evaluator: Evaluator) -> Exporter:
    predictor = LatencyPredictor.fit(tiny_table, tiny_space, held_out=4)
    supernet = Supernet(tiny_space)
    test = collect(digits, "test")
    return Exporter(tiny_space, supernet, evaluator, test, x86, predictor, Tolerances(), {"run": "here", "seed": 0})


def test_a_card_tells_the_truth_about_its_model(exporter: Exporter, tiny_space: MobileSpace, tmp_path: Path) -> None:
    architecture = tiny_space.sample(np.random.default_rng(1))
    card = exporter.make(architecture, tmp_path / "1")
    model = (tmp_path / "1" / "model.onnx").read_bytes()
    assert json.loads((tmp_path / "1" / "card.json").read_text()) == json.loads(json.dumps(card))
    assert card["sha256"] == {"model.onnx": sha256(model)}
    assert card["bytes"] == len(model)
    assert tiny_space.architecture(card["architecture"]) == architecture
    network = tiny_space.network(architecture)
    assert (card["macs"], card["parameters"]) == (network.macs, network.parameters)
    assert [layer["name"] for layer in card["layers"]] == [node.name for node in network.nodes]
    assert [layer["lowering"] for layer in card["layers"]] == list(exporter.predictor.plan(network))
    assert card["predicted_us"] == exporter.predictor.predict(network)[0]
    loaded = onnx.load_model_from_string(model)
    onnx.checker.check_model(loaded)
    metadata = {entry.key: entry.value for entry in loaded.metadata_props}
    assert metadata["netwright.architecture"] == architecture.to_json()
    assert card["input_shape"] == [1, 1, 8, 8]
    assert card["provenance"] == {"run": "here", "seed": 0}


def test_what_is_finished_is_kept_and_what_is_damaged_is_made_again(
    exporter: Exporter, tiny_space: MobileSpace, tmp_path: Path
) -> None:
    architecture = tiny_space.largest()
    exporter.make(architecture, tmp_path)
    good = {name: (tmp_path / name).read_bytes() for name in ("model.onnx", "card.json")}
    stamps = {name: (tmp_path / name).stat().st_mtime_ns for name in good}
    exporter.make(architecture, tmp_path)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in good} == stamps
    for name, content in (
        ("model.onnx", good["model.onnx"][:-5]),
        ("card.json", b"{"),
        ("card.json", b"[]"),
        ("card.json", b"null"),
        ("card.json", good["card.json"].replace(b'"here"', b'"elsewhere"')),
    ):
        (tmp_path / name).write_bytes(content)
        exporter.make(architecture, tmp_path)
        assert {name: (tmp_path / name).read_bytes() for name in good} == good
    exporter.make(tiny_space.smallest(), tmp_path)
    assert json.loads((tmp_path / "card.json").read_text())["architecture"] == dict(tiny_space.smallest())


def test_measured_latencies_stand_on_the_cards_and_teach_the_table_once(
    exporter: Exporter, tiny_space: MobileSpace, tiny_tables: Path, tmp_path: Path
) -> None:
    table = LatencyTable.load(tiny_tables / "x86.parquet")
    timed, rng = {n.architecture for n in table.networks}, np.random.default_rng(0)
    architectures = [a for a in dict.fromkeys(tiny_space.sample(rng) for _ in range(20)) if a not in timed][:2]
    folders = [tmp_path / str(i) for i in range(2)]
    cards = [exporter.make(a, folder) for a, folder in zip(architectures, folders, strict=True)]
    complete, speed = exporter.measure(cards, folders, table)
    assert 0.2 < speed < 5
    for card, folder in zip(complete, folders, strict=True):
        assert card["measured_us"] > 0
        error = abs(card["predicted_us"] / card["measured_us"] - 1)
        assert card["within_tolerance"] == (error <= exporter.tolerances.latency)
        assert card["within_tolerance"] == (not any(line.startswith("latency") for line in card["failures"]))
        assert json.loads((folder / "card.json").read_text())["measured_us"] == card["measured_us"]
    again, _ = exporter.measure(complete, folders, table)
    assert all(sum(line.startswith("latency") for line in card["failures"]) <= 1 for card in again)
    before = len(table.networks)
    for _ in range(2):
        feed_back(table, complete, tiny_space)
    assert len(table.networks) == before + 2
    assert [n.source for n in table.networks[before:]] == ["winner"] * 2
    assert [n.us for n in table.networks[before:]] == [card["measured_us"] for card in complete]


def test_a_uniform_network_of_a_space_with_ranks_has_full_rank() -> None:
    stages = [{"widths": [8], "depths": [1], "stride": 2}]
    ranks = MobileSpace(1, 10, [8], [8], stages, [2], [3], [16], ["w8a8", "fp32"], ["dense", "group@1/2"], ["1/4", "full"])
    for seed in range(20):
        made = uniform(ranks, ranks.sample(np.random.default_rng(seed)), "w8a8")
        assert {(spec.rank, spec.sparsity) for spec in ranks.layers(made)} == {(0, "dense")}
