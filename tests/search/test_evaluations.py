"""The file of evaluated networks: nothing is evaluated twice, nothing is lost, nothing damaged is believed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from search.evaluation import Evaluation
from search.evaluations import INITIAL, RANDOM, SAVE_EVERY, Evaluations
from search.workers import one_by_one
from spaces.choice import Architecture
from spaces.errors import UserError
from spaces.mobile import MobileSpace


def drawn(space: MobileSpace, count: int) -> list[Architecture]:
    rng = np.random.default_rng(0)
    return list(dict.fromkeys(space.sample(rng) for _ in range(3 * count)))[:count]


def measure_one(architecture: Architecture) -> Evaluation:
    return Evaluation((hash(architecture) % 997) / 997, 1.5)


measure = one_by_one(measure_one)


@pytest.fixture
def filled(small_space: MobileSpace, tmp_path: Path) -> Evaluations:
    evaluations = Evaluations(tmp_path / "evaluations.parquet", small_space, "key")
    evaluations.evaluate(drawn(small_space, 5), INITIAL, measure)
    return evaluations


def test_what_is_saved_comes_back_in_order(filled: Evaluations, small_space: MobileSpace) -> None:
    filled.evaluate(drawn(small_space, 9)[4:], RANDOM, measure)
    again = Evaluations(filled.path, small_space, "key")
    assert list(again) == list(filled)
    assert [e.architecture for e in again] == drawn(small_space, 9)
    assert [e.source for e in again] == [INITIAL] * 5 + [RANDOM] * 4
    assert [e.architecture for e in again.of(RANDOM)] == drawn(small_space, 9)[5:]
    assert len(again.of(INITIAL, RANDOM)) == len(again) == 9
    assert drawn(small_space, 1)[0] in again
    assert small_space.largest() not in again


def test_nothing_is_evaluated_twice(filled: Evaluations, small_space: MobileSpace) -> None:
    asked: list[Architecture] = []

    def counting(architecture: Architecture) -> Evaluation:
        asked.append(architecture)
        return measure_one(architecture)

    told: list[tuple[int, int]] = []
    architectures = drawn(small_space, 8)
    filled.evaluate(
        [*architectures, *architectures], "round 1", one_by_one(counting), lambda done, total: told.append((done, total))
    )
    assert asked == architectures[5:]
    assert told == [(1, 3), (2, 3), (3, 3)]
    filled.evaluate([], "round 1", one_by_one(counting))
    assert len(asked) == 3


def test_the_order_is_that_of_asking_whoever_did_what(small_space: MobileSpace, tmp_path: Path) -> None:
    architectures = drawn(small_space, 7)
    evaluations = Evaluations(tmp_path / "e.parquet", small_space, "key")
    evaluations.evaluate(architectures[3:5], INITIAL, measure)  # what a killed run left
    evaluations.evaluate(architectures, INITIAL, lambda missing: measure(missing[::-1]))
    assert [e.architecture for e in evaluations] == architectures
    assert [e.architecture for e in Evaluations(evaluations.path, small_space, "key")] == architectures


def test_a_kill_loses_less_than_one_batch(small_space: MobileSpace, tmp_path: Path) -> None:
    architectures = drawn(small_space, SAVE_EVERY * 2 + 3)

    def dies(architecture: Architecture) -> Evaluation:
        if architecture == architectures[-1]:
            raise KeyboardInterrupt
        return measure_one(architecture)

    path = tmp_path / "evaluations.parquet"
    with pytest.raises(KeyboardInterrupt):
        Evaluations(path, small_space, "key").evaluate(architectures, INITIAL, one_by_one(dies))
    assert [e.architecture for e in Evaluations(path, small_space, "key")] == architectures[: SAVE_EVERY * 2]


def rewritten(path: Path, **columns: object) -> None:
    table = pq.read_table(path)
    for name, values in columns.items():
        index = table.column_names.index(name)
        table = table.remove_column(index) if values is None else table.set_column(index, name, pa.array(values))
    pq.write_table(table, path)


def damage(path: Path, how: str, space: MobileSpace) -> None:
    content, count = path.read_bytes(), 5
    texts = [a.to_json() for a in drawn(space, 5)]
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "flipped":
        path.write_bytes(content[:40] + bytes(b ^ 255 for b in content[40:80]) + content[80:])
    elif how == "text":
        path.write_text("architecture,accuracy")
    elif how == "no column":
        rewritten(path, loss=None)
    elif how == "accuracy above 1":
        rewritten(path, accuracy=[1.5] * count)
    elif how == "accuracy nan":
        rewritten(path, accuracy=[float("nan")] * count)
    elif how == "accuracy null":
        rewritten(path, accuracy=pa.nulls(count, pa.float64()))
    elif how == "loss inf":
        rewritten(path, loss=[float("inf")] * count)
    elif how == "not json":
        rewritten(path, architecture=["{"] * count)
    elif how == "other space":
        rewritten(path, architecture=[texts[0].replace("stem", "root")] * count)
    elif how == "no option":
        rewritten(path, architecture=[texts[0].replace('"resolution":', '"resolution":9')] * count)
    elif how == "architecture null":
        rewritten(path, architecture=pa.nulls(count, pa.string()))
    else:
        raise AssertionError(how)


@pytest.mark.parametrize(
    "how",
    [
        *("truncated", "empty", "flipped", "text", "no column", "accuracy above 1", "accuracy nan", "accuracy null"),
        *("loss inf", "not json", "other space", "no option", "architecture null"),
    ],
)
def test_a_damaged_file_is_one_line_and_stays(filled: Evaluations, small_space: MobileSpace, how: str) -> None:
    damage(filled.path, how, small_space)
    content = filled.path.read_bytes()
    with pytest.raises(UserError, match=r"evaluations\.parquet is damaged") as caught:
        Evaluations(filled.path, small_space, "key")
    assert "\n" not in str(caught.value)
    assert filled.path.read_bytes() == content


def test_evaluations_of_another_supernet_are_not_believed(filled: Evaluations, small_space: MobileSpace) -> None:
    assert len(filled) > 0
    assert len(Evaluations(filled.path, small_space, "other")) == 0


def test_a_folder_in_the_way_is_one_line(small_space: MobileSpace, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    evaluations = Evaluations(tmp_path / "file" / "evaluations.parquet", small_space, "key")
    with pytest.raises(UserError, match="cannot write"):
        evaluations.evaluate(drawn(small_space, 1), INITIAL, measure)
