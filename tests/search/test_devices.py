"""A search for another device than x86: winners proved in that device's runtime."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

NODE_MISSING = shutil.which("node") is None or shutil.which("npm") is None


@pytest.mark.skipif(NODE_MISSING, reason="Node.js with npm is not installed")
def test_a_search_for_webassembly_ends_with_verified_winners(
    call: Callable[..., Any], tiny_arguments: tuple[str, ...], tmp_path: Path
) -> None:
    ended = call(tmp_path, *tiny_arguments, "device=[wasm]", "run=run")
    assert ended.status == 0, ended.err
    with (tmp_path / "run" / "front.csv").open() as file:
        assert next(csv.reader(file)) == ["device", "accuracy", "latency@wasm", "architecture"]
    cards = [json.loads(path.read_text()) for path in (tmp_path / "run").glob("winners/wasm/*/card.json")]
    assert cards
    for card in cards:
        assert card["verified"], card
        assert card["device"]["runtime"] == "onnxruntime_web"
        assert card["device"]["host"].startswith("Node ")
