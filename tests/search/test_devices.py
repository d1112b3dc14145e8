"""A search for another device than x86: objectives that follow the devices, and winners proved in that device's runtime."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from search.__main__ import default_objectives
from search.objectives import parse_objectives

NODE_MISSING = shutil.which("node") is None or shutil.which("npm") is None


def test_objectives_default_to_accuracy_and_every_devices_latency() -> None:
    devices = ["x86", "wasm"]
    objectives = parse_objectives(default_objectives(devices), devices)
    assert [objective.name for objective in objectives] == ["accuracy", "latency@x86", "latency@wasm"]


@pytest.mark.skipif(NODE_MISSING, reason="Node.js with npm is not installed")
def test_a_search_for_webassembly_ends_with_verified_winners(
    call: Callable[..., Any], tiny_arguments: tuple[str, ...], tmp_path: Path
) -> None:
    ended = call(tmp_path, *tiny_arguments, "device=[wasm]", "run=run")
    assert ended.status == 0, ended.err
    with (tmp_path / "run" / "front.csv").open() as file:
        assert next(csv.reader(file)) == ["accuracy", "latency@wasm", "architecture"]
    cards = [json.loads(path.read_text()) for path in (tmp_path / "run").glob("winners/wasm/*/card.json")]
    assert cards
    for card in cards:
        assert card["verified"], card
        assert card["device"]["runtime"] == "onnxruntime_web"
        assert card["device"]["host"].startswith("Node ")
