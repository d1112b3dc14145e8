"""The house: which room may import which, what files may be called, and that the packages are this checkout's."""

from __future__ import annotations

import ast
import importlib
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
ROOMS = ("spaces", "latency_lut", "predictors", "search")  # from the bottom to the top
VAGUE = {"utils", "util", "helpers", "helper", "manager", "managers", "common"}


def imported_modules(source: str) -> Iterator[tuple[int, str]]:
    """Line and absolute module name of every import, also of those inside functions; a relative import is named `.`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." if node.level else str(node.module)


def breaches(room: str, source: str) -> list[str]:
    """Imports of `source` in `room` that point upwards, to the tests, or are relative."""
    above = {*ROOMS[ROOMS.index(room) + 1 :], "tests", "benchmarks", "."}
    return [f"line {line} imports {name}" for line, name in imported_modules(source) if (name.split(".")[0] or ".") in above]


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((CHECKOUT / folder).rglob("*.py"))]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_rooms_below_it(room: str) -> None:
    files = python_files(room)
    assert files
    found = {str(path.relative_to(CHECKOUT)): breaches(room, path.read_text(encoding="utf-8")) for path in files}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("room", "source", "allowed"),
    [
        ("latency_lut", "from spaces.layers import LayerSpec", True),
        ("spaces", "import numpy\nfrom spaces import choice", True),
        ("search", "import predictors, latency_lut.graph, spaces", True),
        ("spaces", "import latency_lut", False),
        ("spaces", "def f():\n    from latency_lut.graph import Tensor", False),
        ("latency_lut", "import numpy, predictors.accuracy as p", False),
        ("predictors", "if True:\n    import search", False),
        ("spaces", "from . import choice", False),
        ("spaces", "from .choice import Choice", False),
        ("search", "from tests import anything", False),
    ],
)
def test_the_import_check_sees_breaches(room: str, source: str, allowed: bool) -> None:
    assert (breaches(room, source) == []) is allowed


@pytest.mark.parametrize("room", ROOMS)
def test_each_room_comes_from_this_checkout(room: str) -> None:
    module = importlib.import_module(room)
    assert module.__file__ is not None
    assert Path(module.__file__).resolve().parent == CHECKOUT / room


def test_names_say_what_a_module_is() -> None:
    paths = [path.relative_to(CHECKOUT) for path in python_files(*ROOMS, "conf", "benchmarks", "tests")]
    parts = [(path, part) for path in paths for part in (*path.parent.parts, path.stem)]
    assert [str(path) for path, part in parts if part.lower() in VAGUE or set(part.lower().split("_")) & VAGUE] == []


def test_every_package_is_declared_for_installation() -> None:
    declared = set(tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"])
    inits = [path for path in python_files(*ROOMS) if path.name == "__init__.py"]
    packages = {".".join(path.parent.relative_to(CHECKOUT).parts) for path in inits}
    assert packages <= declared


def test_tests_mirror_the_rooms() -> None:
    folders = {path.relative_to(CHECKOUT / "tests").parts[0] for path in python_files("tests") if path.parent.name != "tests"}
    assert folders <= {*ROOMS, "benchmarks", "cluster", "conf", "end_to_end"}
