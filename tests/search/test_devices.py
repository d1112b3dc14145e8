"""A search for another device than x86: winners proved in that device's runtime."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

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


def test_a_search_for_torch_ends_with_verified_programs(
    call: Callable[..., Any], tiny_arguments: tuple[str, ...], tmp_path: Path
) -> None:
    ended = call(tmp_path, *tiny_arguments, "device=[torch_cpu]", "run=run")
    assert ended.status == 0, ended.err
    cards = {path: json.loads(path.read_text()) for path in (tmp_path / "run").glob("winners/torch_cpu/*/card.json")}
    assert cards
    for path, card in cards.items():
        assert card["verified"], card
        assert (card["device"]["runtime"], card["device"]["provider"]) == ("torch", "cpu")
        assert {layer["lowering"] for layer in card["layers"]} <= {"torch_fp32", "torch_gather_fp32", "torch_int8"}
        assert card["measured_us"] > 0
        model = (path.parent / "model.pt2").read_bytes()
        assert card["sha256"] == {"model.pt2": hashlib.sha256(model).hexdigest()}
        logits = torch.export.load(io.BytesIO(model)).module()(torch.zeros(card["input_shape"]))
        assert logits.shape == (1, 10)
