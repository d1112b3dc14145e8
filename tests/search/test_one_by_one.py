"""Networks trained one by one: in parts as in one go, by successive halving, and a whole search over a model space of NNI."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from search.dask_pool import DaskPool
from search.data import Digits
from search.evaluation import Evaluator
from search.one_by_one import AloneTrainer, FreshNetworks, Halving, Trained, TrainedNetworks
from search.pool import ThisProcess
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
        trainer = AloneTrainer(space, settings, digits, evaluator, seed)
        return Halving(TrainedNetworks(folder, space), trainer, promote, ThisProcess())

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


def test_the_best_are_trained_for_longer(
    halving: Callable[..., Halving], networks: list[Architecture], evaluator: Evaluator, tmp_path: Path
) -> None:
    workers = halving(tmp_path)
    found = dict(workers.evaluate(networks))
    assert list(found) == networks
    assert sorted((workers.results[a].epochs for a in networks), reverse=True) == [4, 4, 2, 1, 1, 1]
    best = max(networks, key=lambda a: found[a].accuracy)
    assert workers.results[best].epochs == 4
    assert found[best].accuracy > 0.4
    for architecture in networks:  # what is kept is what was measured
        assert evaluator.evaluate(workers.networks, architecture) == found[architecture]
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


class DiesOnce(AloneTrainer):
    """A process that ends when it has trained for the first time, before anybody hears of it; a marker says that it did."""

    marker: Path

    def __call__(self, *arguments: Any) -> Trained:
        trained = super().__call__(*arguments)
        if not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return trained


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As workers have, since sums of several threads differ in their last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_workers_of_dask_train_the_same_networks(
    space: NniSpace,
    networks: list[Architecture],
    digits: Digits,
    evaluator: Evaluator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In parts of an epoch, a worker killed in the middle, the asking process stopped and started again."""
    pytest.importorskip("distributed", reason="dask.distributed is not installed (extra `cluster`)")
    monkeypatch.setattr("search.training.parts.PART_S", 0.0)
    here, there = (TrainedNetworks(tmp_path / name, space) for name in ("here", "there"))
    trainer = AloneTrainer(space, SETTINGS, digits, evaluator, 0)
    expected = dict(Halving(here, trainer, most_accurate, ThisProcess()).evaluate(networks))
    dies = DiesOnce(space, SETTINGS, digits, evaluator, 0)
    dies.marker = tmp_path / "died"

    def stop(what: str, done: int, total: int) -> None:
        if what == "training, 4 epochs" and done == 1:
            raise KeyboardInterrupt

    with closing(DaskPool(workers=2)) as pool:
        with pytest.raises(KeyboardInterrupt):
            dict(Halving(there, dies, most_accurate, pool, stop).evaluate(networks))
        assert dies.marker.exists()
        trained: list[int] = []
        again = Halving(there, trainer, most_accurate, pool, lambda what, done, total: trained.append(total - done))
        assert dict(again.evaluate(networks)) == expected
    assert trained == [0, 0, 1, 0]  # what was left in each rung: nothing of the first two, one network of the last
    for architecture in networks:
        assert there.path(architecture).read_bytes() == here.path(architecture).read_bytes()


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


def test_a_search_by_workers_of_dask_is_that_of_one_process(call: Callable[..., Any], searched: Path, tmp_path: Path) -> None:
    job = (*NNI_JOB, "run=run", f"profile.tables={searched.parent / 'tables'}", "stages=[tables,supernet,predictors,study]")
    ended = call(tmp_path, *job, "evaluator=dask", "evaluator.workers=2")
    assert (ended.status, ended.err) == (0, "")
    assert (tmp_path / "run" / "front.csv").read_text() == (searched / "front.csv").read_text()
    failed = call(tmp_path, *job[:-1], "run=other", "evaluator=dask", "evaluator.workers=1", "supernet.learning_rate=1e30")
    assert failed.status == 2
    assert "the loss is not finite in epoch 1; lower supernet.learning_rate" in failed.err
    assert len(failed.err.splitlines()) == 1


def test_evolution_of_nni_is_a_strategy(call: Callable[..., Any], searched: Path, tmp_path: Path) -> None:
    """It evaluates as many networks as any study, each trained to the end, and the same again for the same seed."""
    job = (*NNI_JOB, f"profile.tables={searched.parent / 'tables'}", "stages=[tables,supernet,predictors,study]")
    evolution = ("study=nni_evolution", "study.rounds=2", "study.evaluations=3")
    evolution += ("study.strategy.population_size=3", "study.strategy.sample_size=2")
    found = []
    for run, kill in (("whole", None), ("killed", ["evaluations.parquet", 4])):
        ended = call(tmp_path, *job, *evolution, f"run={run}", kill_before=kill or ["no such", 1])
        if kill:
            assert ended.status == -signal.SIGKILL, ended.err
            ended = call(tmp_path, *job, *evolution, f"run={run}")
        assert (ended.status, ended.err) == (0, "")
        rows = pq.read_table(tmp_path / run / "evaluations.parquet").to_pylist()
        results = json.loads(next((tmp_path / run / "supernet").rglob("results.json")).read_text())
        epochs = {architecture: done for architecture, done, *_ in results}
        chosen = [row["architecture"] for row in rows if row["source"].startswith("round")]
        assert len(chosen) == 6
        assert {epochs[architecture] for architecture in chosen} == {3}
        found.append(rows)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("supernet=sandwich",), "space Small does not share weights between networks; allowed is supernet=one_by_one"),
        (("stages=[finish]",), "stage finish needs a supernet, and Small does not share weights"),
        (("stages=[relax]",), "stage relax needs a supernet, and Small does not share weights"),
        (("study.storage=sqlite:///a.db",), "study.storage is sqlite:///a.db, allowed is null, with evaluator=dask"),
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
    for arguments, told in (
        (("supernet=one_by_one",), "space mobile shares weights between networks; allowed is supernet=single_path"),
        (("study=nni_evolution",), "strategy nni_evolution needs a space of NNI"),
    ):
        ended = call(tmp_path, *arguments, "run=run")
        assert ended.status == 2
        assert told in ended.err
