"""Choices and architectures as values: equality, hashing, JSON, refusals."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spaces.choice import Architecture, Choice

CHECKOUT = Path(__file__).resolve().parents[2]

names = st.text(min_size=1, max_size=12)
options = st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=12))
quick = settings(max_examples=40, deadline=None)
values = st.dictionaries(names, options, max_size=8)


@pytest.mark.parametrize("wrong", [(), (3, 3), ("a", "b", "a"), (1, 1.0), (True, 1)])
def test_a_choice_needs_distinct_options(wrong: tuple[int | float | str, ...]) -> None:
    with pytest.raises(ValueError, match=r"stage1\.kernel"):
        Choice("stage1.kernel", wrong)


def test_kind_is_the_last_part_of_the_name() -> None:
    assert Choice("stage1.block2.kernel", (3,)).kind == "kernel"
    assert Choice("resolution", (3,)).kind == "resolution"


def test_choices_are_values() -> None:
    one, same = Choice("a", (1, 2), when=("b", (3,))), Choice("a", (1, 2), when=("b", (3,)))
    assert one == same
    assert hash(one) == hash(same)
    assert one != Choice("a", (2, 1), when=("b", (3,)))
    with pytest.raises(AttributeError):
        one.name = "c"  # type: ignore[misc]


@quick
@given(values)
def test_json_round_trip(mapping: dict[str, int | float | str]) -> None:
    architecture = Architecture(mapping)
    text = architecture.to_json()
    again = Architecture.from_json(text)
    assert again == architecture
    assert hash(again) == hash(architecture)
    assert again.to_json() == text
    assert len(text.splitlines()) == 1
    assert all(type(again[name]) is type(mapping[name]) for name in mapping)


@quick
@given(values, st.randoms())
def test_the_order_of_the_values_does_not_matter(mapping: dict[str, int | float | str], random: object) -> None:
    items = list(mapping.items())
    random.shuffle(items)  # type: ignore[attr-defined]
    one, other = Architecture(mapping), Architecture(dict(items))
    assert one == other
    assert hash(one) == hash(other)
    assert one.to_json() == other.to_json()
    assert list(one) == list(other) == sorted(mapping)


@quick
@given(values, names, options)
def test_another_value_makes_another_architecture(
    mapping: dict[str, int | float | str], name: str, option: int | float | str
) -> None:
    changed = {**mapping, name: option}
    assert (Architecture(changed) == Architecture(mapping)) is (changed == mapping)


def test_an_architecture_is_a_mapping_and_does_not_change() -> None:
    source: dict[str, int | float | str] = {"b": 2, "a": 1}
    architecture = Architecture(source)
    source["a"] = 5
    assert dict(architecture) == {"a": 1, "b": 2}
    assert len(architecture) == 2
    assert "c" not in architecture
    assert architecture.get("c") is None
    with pytest.raises(TypeError):
        architecture["a"] = 3  # type: ignore[index]
    with pytest.raises(AttributeError):
        architecture.extra = 3  # type: ignore[attr-defined]
    with pytest.raises(KeyError):
        architecture["c"]


def test_architectures_serve_as_keys() -> None:
    table = {Architecture({"a": 1, "b": 2}): "x"}
    assert table[Architecture({"b": 2, "a": 1})] == "x"
    assert Architecture({"a": 1}) not in table
    assert Architecture({"a": 1}) != {"a": 1}


def test_integer_refuses_everything_else() -> None:
    architecture = Architecture({"a": 1, "b": "dense", "c": 0.5})
    assert architecture.integer("a") == 1
    for name in "bc":
        with pytest.raises(TypeError, match=f"choice {name}"):
            architecture.integer(name)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        '"a"',
        "null",
        '{"a": null}',
        '{"a": true}',
        '{"a": [1]}',
        '{"a": {"b": 1}}',
        '{"a": NaN}',
        '{"a": Infinity}',
        '{"a": 1e999}',
        '{"a": 1} x',
        "{'a': 1}",
    ],
)
def test_bad_json_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=r".+") as caught:
        Architecture.from_json(text)
    assert len(str(caught.value).splitlines()) == 1


@quick
@given(st.recursive(st.none() | st.booleans() | options, lambda inner: st.lists(inner) | st.dictionaries(names, inner)))
def test_whatever_the_json_holds_it_is_an_architecture_or_a_value_error(content: object) -> None:
    try:
        architecture = Architecture.from_json(json.dumps(content))
    except ValueError:
        return
    assert dict(architecture) == content


def test_equal_after_pickling_into_another_process(tmp_path: Path) -> None:
    """Workers of a pool or of a cluster get architectures pickled, and hash strings with another seed."""
    (tmp_path / "architecture").write_bytes(pickle.dumps(Architecture({"a": 1, "b": "dense"})))
    code = (
        "import pickle, sys; from spaces.choice import Architecture\n"
        "received = pickle.load(open(sys.argv[1], 'rb')); own = Architecture({'a': 1, 'b': 'dense'})\n"
        "print(received == own, received in {own: 0})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "architecture")],
        env={**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["True", "True"]
