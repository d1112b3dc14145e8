"""Finishing: one network trained further, in the code and as a stage of a run that may be killed."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from search.data import Digits
from search.evaluation import Evaluator
from search.training.finishing import FinishSettings, RememberingTeacher, architecture_key, finish_network, finishing_epochs
from spaces.choice import Architecture
from spaces.errors import UserError
from spaces.mobile import MobileSpace
from spaces.supernet import Supernet

Call = Callable[..., Any]
Job = tuple[str, ...]


def test_it_improves_the_network_and_leaves_the_supernet_alone(
    trained: Supernet, small_space: MobileSpace, digits: Digits, evaluator: Evaluator, tmp_path: Path
) -> None:
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    architecture = small_space.graded(0.5, precision="w8a8", sparsity="group@1/2")
    inherited = evaluator.evaluate(trained, architecture)
    teacher = RememberingTeacher(evaluator.plain(trained, small_space.largest()))
    settings = FinishSettings(learning_rate=0.01)
    own = finish_network(trained, architecture, teacher, evaluator, digits, 4, settings, 0, tmp_path / "a")
    assert evaluator.evaluate(own, architecture).loss < inherited.loss
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    asked = teacher.macs_done
    images = sum(len(labels) for _, labels in digits.train_dataloader())
    assert asked == 4 * images * small_space.network(small_space.largest()).macs
    other = finish_network(trained, small_space.smallest(), teacher, evaluator, digits, 4, settings, 0, tmp_path / "b")
    assert teacher.macs_done == asked  # the second network saw the same batches
    assert 0 < other.macs_done < own.macs_done


def test_what_may_be_spent_is_spent(small_space: MobileSpace) -> None:
    smallest, largest = small_space.smallest(), small_space.largest()
    big = small_space.network(largest).macs
    assert finishing_epochs(small_space, largest, 100, 4 * big * 100 * 7, 1) == 7
    assert finishing_epochs(small_space, largest, 100, 3.5 * big * 100 * 7, 2) == 7
    assert finishing_epochs(small_space, smallest, 100, 4 * big * 100 * 7, 1) > 7
    assert finishing_epochs(small_space, largest, 100, 1.0, 1) == 1


@pytest.mark.parametrize(
    "values", [{"share": 0.0}, {"share": 1.5}, {"learning_rate": 0.0}, {"labels": 1.5}, {"temperature": 0.0}]
)
def test_settings_that_are_not_allowed(values: dict[str, float]) -> None:
    with pytest.raises(UserError, match="allowed"):
        FinishSettings(**values)


def stage(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "stages.json").read_text())["finish"])


SETTINGS = ("finish.share=1", "finish.learning_rate=0.03", "finish.labels=1")


def test_workers_of_dask_finish_the_same_winners(call: Call, finished: Path, tmp_path: Path) -> None:
    """In parts of an epoch; the search is killed and started again."""
    pytest.importorskip("distributed", reason="dask.distributed is not installed (extra `cluster`)")
    for name in ("here", "there"):
        shutil.copytree(finished, tmp_path / name)
    command = ("stages=[finish]", "threads=1", *SETTINGS)  # as many as workers have
    assert call(tmp_path, "run=here", *command).status == 0
    dask = ("run=there", *command, "evaluator=dask", "evaluator.workers=2")
    constants = {"search.training.parts.PART_S": 0.0}
    killed = call(tmp_path, *dask, constants=constants, kill_before=["finished/", 3])
    assert killed.status == -signal.SIGKILL
    assert len(list((tmp_path / "there" / "finished").glob("*/last.ckpt"))) >= 1
    ended = call(tmp_path, *dask, constants=constants)
    assert ended.status == 0, ended.err
    here, there = ([{**n, "seconds": 0} for n in stage(tmp_path / name)["facts"]["networks"]] for name in ("here", "there"))
    assert here == there
    files = [[path.read_bytes() for path in sorted((tmp_path / n).glob("finished/*.safetensors"))] for n in ("here", "there")]
    assert files[0] == files[1] != []
    assert not list((tmp_path / "there" / "finished").glob("*/last.ckpt"))


def test_the_stage_finishes_winners_and_they_ship(call: Call, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    settings = (*SETTINGS, "export.tolerances.agreement=0.98")
    command = ("run=run", "stages=[finish,export,report]", *settings)
    killed = call(tmp_path, *command, kill_before=["finished/", 3])
    assert killed.status == -signal.SIGKILL
    ended = call(tmp_path, *command)
    assert ended.status == 0, ended.err
    assert "winners finished" in ended.out
    networks = stage(run)["facts"]["networks"]
    cards = [json.loads(path.read_text()) for path in sorted(run.glob("winners/x86/*/card.json"))]
    assert len(networks) == len(cards) == 2
    kept = {Architecture(n["architecture"]): n["kept"] == "finished" for n in networks}
    assert any(kept.values())  # three epochs teach a supernet little, so there is something to gain
    for card in cards:
        assert card["finished"] == kept[Architecture(card["architecture"])]
        assert card["verified"], card["failures"]
    for network in networks:
        file = run / network["file"]
        assert file.stem == architecture_key(Architecture(network["architecture"]))
        assert file.exists() == (network["kept"] == "finished")
        if network["kept"] == "finished":
            assert network["accuracy_after"] > network["accuracy_before"]
            assert all(value.isfinite().all() for value in load_file(file).values() if value.is_floating_point())
    summary = json.loads((run / "summary.json").read_text())
    assert summary["supernet"]["winner_finishing_macs"] > 0
    assert "winners were finished" in (run / "report.html").read_text()

    whole = tmp_path / "whole"
    shutil.copytree(finished, whole)
    assert call(tmp_path, "run=whole", *command[1:]).status == 0
    for network, other in zip(networks, stage(whole)["facts"]["networks"], strict=True):
        assert {**network, "seconds": 0} == {**other, "seconds": 0}

    again = call(tmp_path, *command)
    assert "finish: done before" in again.out


def test_without_the_stage_nothing_is_finished(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["finish"] == []
    assert summary["supernet"]["pays_from_winners"] > 0
    assert not any(card["finished"] for card in summary["winners"])
