"""A search for another device than x86: winners proved in that device's runtime."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latency_lut.device import Device
from latency_lut.lowering import applicable
from search.data import Digits
from search.evaluation import Evaluator, predict
from search.export import export, run_model
from spaces.mobile import MobileSpace
from spaces.supernet import Supernet

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


@pytest.mark.parametrize("provider", ["cpu", "cpu-fp16"])
def test_a_network_of_8_bit_floats_computes_in_torch_what_it_computed_in_training(
    digits: Digits, evaluator: Evaluator, provider: str
) -> None:
    stages = [{"widths": [8, 16], "depths": [2], "stride": 2}]
    space = MobileSpace(1, 10, [8], [8], stages, [2], [3], [16], ["fp8", "fp32"], ["dense"])
    device = Device("torch_cpu", runtime="torch", provider=provider)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    for architecture in (space.graded(1.0, precision="fp8", sparsity="dense"), space.sample(rng)):
        plain = evaluator.plain(Supernet(space), architecture)
        lowerings = [applicable(spec, device.describe())[-1] for spec in plain.network.layers]
        assert "torch_fp8" in lowerings
        model = export(plain, lowerings, device, {})
        expected = predict(plain, evaluator.split.images).numpy()
        difference = np.abs(run_model(model, device, plain.network, evaluator.split.images) - expected)
        # An input that falls to another 8-bit float moves a logit by some per cent, most move by less.
        assert difference.mean() < 0.02 * np.abs(expected).max()
        assert difference.max() < 0.2 * np.abs(expected).max()


def test_a_format_that_the_device_lacks_is_told_in_one_line(
    call: Callable[..., Any], tiny_arguments: tuple[str, ...], tmp_path: Path
) -> None:
    ended = call(tmp_path, *tiny_arguments, "space.precisions=[fp8,fp32]", "run=run")
    assert ended.status == 2
    assert re.fullmatch(r"error: precision fp8 of layer .* does not run in onnxruntime here; leave fp8 out .*\n", ended.err)
