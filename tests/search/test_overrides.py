"""What of a run's saved settings applies to a later call on the same folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_dir

from latency_lut.command import CONFIG_FOLDER
from search.overrides import fallen_overrides, merged_overrides

Call = Callable[..., Any]


@pytest.fixture(autouse=True)
def hydra() -> Iterator[None]:
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        yield


def test_what_is_given_now_stands_for_its_namesakes() -> None:
    assert merged_overrides(["seed=1", "+relaxation.held.width=8"], ["seed=2"]) == ["+relaxation.held.width=8", "seed=2"]


@pytest.mark.parametrize(
    ("saved", "given", "fallen"),
    [
        (["supernet.strategy.spread=false", "supernet.epochs=3"], ["supernet=uniform"], [0, 1]),
        (["supernet.strategy.spread=false", "seed=1"], ["supernet=uniform"], [0]),
        (["supernet.strategy.spread=false"], ["supernet=single_path"], []),  # as it was
        (["supernet=sorted", "supernet.strategy.networks=2"], ["supernet=sorted", "supernet.epochs=3"], []),
        (["supernet=sorted", "supernet.strategy.networks=2"], ["supernet=progressive"], [1]),
        (["+relaxation.held.resolution=8", "relaxation.strategy.gates=binary"], ["relaxation=tangle"], [0, 1]),
        (["study.strategy.choose=front", "~study.sampler"], ["study=training_free"], [0, 1]),
        (["devices.x86.threads=2", "seed=1"], ["device=[wasm]"], [0]),
        (["devices.x86.threads=2"], ["device=[x86,wasm]"], []),
        (["space=nni", "name=DARTS", "+space.model.width=4", "supernet.shortest=1"], ["space=mobile"], [1, 2, 3]),
        (["supernet.strategy.spread=false", "study.rounds=2"], ["space=nni"], [0, 1]),  # it chooses training and study too
        (["supernet.strategy.spread=false"], ["supernet.epochs=3"], []),
    ],
)
def test_settings_below_a_group_fall_when_another_option_is_chosen(
    saved: list[str], given: list[str], fallen: list[int]
) -> None:
    found = fallen_overrides(saved, given)
    assert [text for texts in found.values() for text in texts] == [saved[index] for index in fallen]
    assert set(found) <= {given[0]}


def test_another_strategy_on_the_folder_of_a_run(call: Call, finished: Path, tmp_path: Path) -> None:
    """The settings that fall are told in one line, and are no longer settings of the run."""
    shutil.copytree(finished, tmp_path / "run")
    before = json.loads((finished / "overrides.json").read_text())
    ended = call(tmp_path, "run=run", "supernet=uniform", "supernet.epochs=1", "stages=[supernet]")
    assert (ended.status, ended.err) == (0, "")
    told = [line for line in ended.out.splitlines() if "no longer apply" in line]
    gone = [text for text in before if text.startswith("supernet.")]
    assert gone
    assert told == [f"  with supernet=uniform, settings of the run no longer apply: {' '.join(gone)}"]
    after = json.loads((tmp_path / "run" / "overrides.json").read_text())
    assert after == [text for text in before if text not in gone] + ["supernet=uniform", "supernet.epochs=1"]
    assert "no longer apply" not in call(tmp_path, "run=run", "stages=[supernet]").out
