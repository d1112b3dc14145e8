"""Networks trained one by one: in parts as in one go, by successive halving, and a whole search over a model space of NNI."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file

from search.data import Digits
from search.evaluation import Evaluator
from search.one_by_one import FreshNetworks, Halving, TrainedNetworks
from search.proxies import ProxyScores
from search.training.alone import AloneSettings
from spaces.choice import Architecture
from spaces.errors import UserError
from spaces.nni import NniSpace

pytest.importorskip("nni")

SETTINGS = AloneSettings(epochs=4, shortest=1, reduction=2)
NNI_JOB = (
    "space=nni",
    "space.model._target_=tests.spaces.nni_spaces.Small",
    "space.model_channels=1",
    "data.resolutions=[8]",
    "data.module.batch_size=256",
    "threads=1",
    "profile.max_pairs=60",
    "profile.networks=10",
    "profile.rounds=3",
    "profile.visit_s=0.00005",
    "supernet.epochs=3",
    "supernet.shortest=1",
    "evaluation.initial=9",
    "evaluation.held_out=3",
    "evaluation.calibration_images=64",
    "study.candidates=40",
    "study.rounds=1",
    "study.evaluations=3",
    "export.winners=2",
    "export.random_winners=1",
)


@pytest.fixture(scope="module")
def space() -> NniSpace:
    return NniSpace({"_target_": "tests.spaces.nni_spaces.Small", "widths": [4], "inputs": False}, 1, 10, [8], 1)


@pytest.fixture(scope="module")
def networks(space: NniSpace) -> list[Architecture]:
    rng = np.random.default_rng(0)
    drawn = {space.largest(): None, space.smallest(): None} | {space.sample(rng): None for _ in range(20)}
    return list(drawn)[:6]


def most_accurate(accuracies: Mapping[Architecture, float], count: int) -> Sequence[Architecture]:
    return sorted(accuracies, key=lambda a: -accuracies[a])[:count]


@pytest.fixture
def halving(space: NniSpace, digits: Digits, evaluator: Evaluator) -> Callable[..., Halving]:
    def make(folder: Path, settings: AloneSettings = SETTINGS, promote: Any = most_accurate, seed: int = 0) -> Halving:
        return Halving(TrainedNetworks(folder, space), settings, digits, evaluator, seed, promote)

    return make


def test_rungs() -> None:
    assert AloneSettings(epochs=12, shortest=2, reduction=3).rungs == (2, 6, 12)
    assert AloneSettings(epochs=4, shortest=4).rungs == (4,)
    assert AloneSettings(epochs=27, shortest=1, reduction=3).rungs == (1, 3, 9, 27)


@pytest.mark.parametrize(
    "wrong", [{"shortest": 5}, {"reduction": 1}, {"learning_rate": 0.0}, {"schedule": "steps"}, {"label_smoothing": 1.0}]
)
def test_settings_that_are_not_possible_are_told(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="supernet"):
        AloneSettings(**{"epochs": 4, "shortest": 1, **wrong})


def test_the_best_are_trained_for_longer(halving: Callable[..., Halving], networks: list[Architecture], tmp_path: Path) -> None:
    workers = halving(tmp_path)
    found = dict(workers.evaluate(networks))
    assert list(found) == networks
    assert sorted((workers.results[a].epochs for a in networks), reverse=True) == [4, 4, 2, 1, 1, 1]
    best = max(networks, key=lambda a: found[a].accuracy)
    assert workers.results[best].epochs == 4
    assert found[best].accuracy > 0.4
    for architecture in networks:  # what is kept is what was measured
        assert workers.evaluator.evaluate(workers.networks, architecture) == found[architecture]
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]  # checkpoints


def test_a_network_trained_in_parts_is_the_one_trained_in_one_go(
    halving: Callable[..., Halving], networks: list[Architecture], tmp_path: Path
) -> None:
    parts, whole = halving(tmp_path / "parts"), halving(tmp_path / "whole", AloneSettings(epochs=4, shortest=4))
    network = networks[:1]
    assert dict(parts.evaluate(network)) == dict(whole.evaluate(network))
    weights, expected = (load_file(w.networks.path(network[0])) for w in (parts, whole))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    other = halving(tmp_path / "other", seed=1)
    assert dict(other.evaluate(network)) != dict(whole.evaluate(network))


def test_what_was_interrupted_goes_on_to_the_same_end(
    halving: Callable[..., Halving], networks: list[Architecture], tmp_path: Path
) -> None:
    expected = dict(halving(tmp_path / "whole").evaluate(networks))
    calls = 0

    def interrupted(accuracies: Mapping[Architecture, float], count: int) -> Sequence[Architecture]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return most_accurate(accuracies, count)

    with pytest.raises(KeyboardInterrupt):
        dict(halving(tmp_path / "run", promote=interrupted).evaluate(networks))
    again = halving(tmp_path / "run")
    assert not again.results
    assert dict(again.evaluate(networks)) == expected
    assert dict(halving(tmp_path / "run").evaluate(networks)) == expected  # out of the file


def test_damaged_files_are_told(halving: Callable[..., Halving], networks: list[Architecture], tmp_path: Path) -> None:
    workers = halving(tmp_path, AloneSettings(epochs=1, shortest=1))
    dict(workers.evaluate(networks[:1]))
    workers.networks.path(networks[0]).write_bytes(b"?")
    with pytest.raises(UserError, match=r"weights .* are missing or damaged"):
        workers.networks.extract(networks[0])
    (tmp_path / "results.json").write_text(json.dumps([[networks[0].to_json(), 1, 7.0, 1.0]]))
    with pytest.raises(UserError, match=r"results.json is damaged"):
        halving(tmp_path)


def test_proxies_rank_networks_before_they_are_trained(
    space: NniSpace, networks: list[Architecture], evaluator: Evaluator, tmp_path: Path
) -> None:
    split = evaluator.split
    scores = [
        ProxyScores(tmp_path / name, space, split.images[:16], split.labels[:16], 0, "key").scores(
            ["naswot", "synflow"], networks
        )
        for name in ("once", "again")
    ]
    assert scores[0].shape == (len(networks), 2)
    assert np.array_equal(scores[0], scores[1])
    assert len(set(scores[0][:, 1])) > 1
    assert FreshNetworks(space, 0).extract(networks[0]).training


# -- a search -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searched(call: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a search that was never disturbed; what it said is in `run.out` beside it."""
    folder = tmp_path_factory.mktemp("nni")
    said = ""
    for stages in ("space,tables,supernet,predictors,study", "export,report"):
        ended = call(folder, *NNI_JOB, "run=run", f"stages=[{stages}]")
        assert (ended.status, ended.err) == (0, "")
        said += ended.out
        if not (folder / "tables").exists():  # an export gives its winners back to the table
            shutil.copytree(folder / "run" / "tables", folder / "tables")
    (folder / "run.out").write_text(said)
    return folder / "run"


def test_a_search_ends_with_verified_models(searched: Path) -> None:
    summary = json.loads((searched / "summary.json").read_text())
    assert len(summary["winners"]) == 2
    for winner in summary["winners"]:
        assert winner["verified"]
        model = searched / winner["path"]
        assert ort.InferenceSession(model).get_inputs()[0].shape == [1, 1, 8, 8]
    assert {baseline["family"] for baseline in summary["baselines"]} <= {"largest_float", "random"}
    assert max(point["accuracy"] for point in summary["front"]) > 0.3
    said = (searched.parent / "run.out").read_text()
    assert "networks of Small are trained one by one, and compared after 1, 3 epochs" in said
    report = (searched / "report.html").read_text()
    assert "supernet's weights" not in report
    assert "trained one by one" in report


def test_a_search_that_is_killed_ends_the_same(call: Callable[..., Any], searched: Path, tmp_path: Path) -> None:
    job = (*NNI_JOB, "run=run", f"profile.tables={searched.parent / 'tables'}", "stages=[tables,supernet,predictors,study]")
    for before, number in (("results.json", 1), (".safetensors", 3), ("results.json", 1), ("evaluations.parquet", 1)):
        killed = call(tmp_path, *job, kill_before=[before, number])
        assert killed.status == -signal.SIGKILL, killed.err
    ended = call(tmp_path, *job)
    assert (ended.status, ended.err) == (0, "")
    assert (tmp_path / "run" / "front.csv").read_text() == (searched / "front.csv").read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("supernet=sandwich",), "space Small does not share weights between networks; allowed is supernet=one_by_one"),
        (("stages=[finish]",), "stage finish needs a supernet, and Small does not share weights"),
        (("stages=[relax]",), "stage relax needs a supernet, and Small does not share weights"),
        (("evaluator=dask",), "networks of Small are trained in this process"),
        (("supernet.shortest=13",), "supernet.shortest is 13, supernet.epochs 12"),
        (("space.model._target_=tests.spaces.nni_spaces.Unknown",), "Unknown uses aten.cumsum.default"),
    ],
)
def test_mistakes_are_one_line(call: Callable[..., Any], tmp_path: Path, arguments: tuple[str, ...], told: str) -> None:
    ended = call(tmp_path, *NNI_JOB[:4], "run=run", *arguments)
    assert ended.status == 2
    assert told in ended.err
    assert len(ended.err.strip().splitlines()) == 1


def test_a_space_with_shared_weights_is_not_trained_one_by_one(call: Callable[..., Any], tmp_path: Path) -> None:
    ended = call(tmp_path, "supernet=one_by_one", "run=run")
    assert ended.status == 2
    assert "space mobile shares weights between networks; allowed is supernet=sandwich" in ended.err
