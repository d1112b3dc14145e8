"""The examples in docs/extending.md, run as they stand there."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from optuna.samplers import RandomSampler

from latency_lut.device import Device
from latency_lut.lowering import applicable
from latency_lut.network import build_layer
from predictors.accuracy import Ridge
from search.data import Digits
from search.evaluation import Evaluation, Evaluator, training_sample
from search.evaluations import INITIAL, Evaluations
from search.export import Tolerances, export, layer_weights, verify
from search.objectives import Goal, parse_objectives
from search.predicted import PredictedValues
from search.proxies import PROXIES, gradients, score
from search.relaxation import ExpectedCost, RelaxationSettings, search_member
from search.strategies import guided
from search.study import StudySettings, run_studies
from search.training import SupernetTraining, train
from search.workers import one_by_one
from spaces import precision, sparsity
from spaces.choice import Architecture
from spaces.elastic import OPERATORS
from spaces.layers import LayerSpec
from spaces.mobile import MobileSpace
from spaces.quantizers import scales, weights
from spaces.quantizers.straight_through import straight_through
from spaces.supernet import Supernet

SEARCHING = (Path(__file__).parents[1] / "docs" / "searching.md").read_text(encoding="utf-8")
EXTENDING = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")


def example(heading: str, text: str = EXTENDING) -> str:
    """The first block of Python below a heading."""
    section = text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None, heading
    return found[1]


def test_the_space_is_trainable_and_ships(evaluator: Evaluator, x86: Device) -> None:
    names: dict[str, Any] = {"__name__": "spaces.chain"}
    exec(compile(example("A space").replace("from __future__ import annotations\n", ""), "chain.py", "exec"), names)
    space = names["ChainSpace"](channels=1, classes=10, resolutions=[8], widths=[8, 16], depth=2)
    supernet = Supernet(space)
    for seed in range(4):
        architecture = space.sample(np.random.default_rng(seed))
        supernet.activate(architecture)
        supernet(torch.randn(4, 1, 8, 8)).sum().backward()
        plain = evaluator.plain(supernet, architecture)
        lowerings = [applicable(spec)[0] for spec in plain.network.layers]
        model = export(plain, lowerings, x86, {})
        assert verify(plain, lowerings, model, x86, evaluator.split, Tolerances(agreement=0.95)).failures == []


def test_the_training_strategy_trains(tiny_space: MobileSpace, evaluator: Evaluator, digits: Digits, tmp_path: Path) -> None:
    names: dict[str, Any] = {"__name__": "search.training.ends"}
    exec(compile(example("A training strategy"), "ends.py", "exec"), names)
    torch.manual_seed(0)
    training = SupernetTraining(Supernet(tiny_space), names["Ends"](), 3, 0.02, 0.0, 0, evaluator, curve_points=1)
    train(training, digits, tmp_path)
    assert all(training.curve[-1][name] < training.curve[0][name] for name in ("largest_loss", "smallest_loss"))


def test_the_proxy_scores(tiny_space: MobileSpace, digits: Digits) -> None:
    try:
        exec(compile(example("Zero-cost proxies", SEARCHING), "proxies.py", "exec"), {**vars(gradients), "__name__": "own"})
        torch.manual_seed(0)
        supernet, sample = Supernet(tiny_space), training_sample(digits, 16, 0)
        values = [
            score(
                "input_gradient",
                supernet.extract(tiny_space.sample(np.random.default_rng(seed))),
                sample.images,
                sample.labels,
                0,
            )
            for seed in range(3)
        ]
        assert len(set(values)) == 3
        assert min(values) > 0.0
    finally:
        del PROXIES["input_gradient"]


def test_the_search_strategy_searches(tiny_space: MobileSpace, tmp_path: Path) -> None:
    names = {**vars(guided), "np": np, "__name__": "search.strategies.nearby"}
    exec(compile(example("To add a strategy", SEARCHING), "nearby.py", "exec"), names)

    def measure(architecture: Architecture) -> Evaluation:
        return Evaluation(min(1.0, tiny_space.network(architecture).weight_bytes / 1e4), 1.0)

    objectives = parse_objectives(["accuracy", "parameters"], [])
    goal = Goal((), tuple(objectives), ())
    evaluations = Evaluations(tmp_path / "evaluations.parquet", tiny_space, "key")
    evaluations.evaluate([tiny_space.smallest()], INITIAL, one_by_one(measure))
    predicted = PredictedValues(tiny_space, goal.values, {}, device="x86")
    settings = StudySettings(40, 3, 6, 0)
    search = (Ridge, lambda seed: RandomSampler(seed=seed), one_by_one(measure), settings)
    result = run_studies({goal: predicted}, evaluations, *search, new_strategy=names["Nearby"])[goal]
    assert all(0 < len(evaluations.of(f"round {n}")) <= 6 for n in (1, 2, 3))
    volumes = list(result.hypervolumes.values())
    assert volumes[0] < volumes[-1]


def test_the_gradient_strategy_searches(tiny_space: MobileSpace, digits: Digits, tmp_path: Path) -> None:
    names: dict[str, Any] = {"__name__": "search.relaxation.likeliest"}
    exec(compile(example("A gradient strategy"), "likeliest.py", "exec"), names)
    torch.manual_seed(0)
    settings = RelaxationSettings(names["Likeliest"](), [0.0], epochs=1, learning_rate=0.3)
    cost = ExpectedCost.fit(tiny_space, lambda a: 1.0 + float(np.nansum(tiny_space.positions([a]))), {}, 100, 0)
    member = search_member(Supernet(tiny_space), settings, cost, digits, 30.0, 0, tmp_path / "state.ckpt")
    assert member.architecture == tiny_space.smallest()


@pytest.fixture
def own_inputs() -> Any:
    exec(compile(example("A sparsity pattern"), "sparsity.py", "exec"), vars(sparsity))
    yield
    del sparsity.PATTERNS["own_inputs"]
    sparsity.parse.cache_clear()


def test_the_sparsity_pattern_is_there_for_every_layer(own_inputs: None) -> None:
    spec = LayerSpec("conv2d", 8, 6, 5, 5, 3, sparsity="own_inputs@1/4")
    layer = OPERATORS["conv2d"](spec)
    plain = layer.extract(spec)
    kept = plain.arithmetic.get_parameter("weight").abs().sum(dim=(2, 3)) > 0
    assert kept.sum(dim=1).tolist() == [2] * 6
    assert spec.kept_weights == 6 * 2 * 9
    assert applicable(spec) == ("fp32",)
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(plain.train()(x), layer(spec, x))


@pytest.fixture
def shift() -> Any:
    names = {**vars(weights), **vars(scales), "straight_through": straight_through, "__name__": "spaces.quantizers.shift"}
    source = "from __future__ import annotations\nfrom spaces.precision import Kind\n" + example("A quantizer")
    exec(compile(source, "shift.py", "exec"), names)
    yield
    for registry in (weights.WEIGHT_QUANTIZERS, precision.KINDS):
        del registry["shift"]
    precision.parse_precision.cache_clear()


@pytest.mark.parametrize("lowering", ["fp32", "gather_groups"])
def test_the_quantizer_trains_and_ships(shift: None, lowering: str) -> None:
    spec = LayerSpec("conv2d", 64, 64, 5, 5, precision="shift4", sparsity="group@1/2")
    layer = OPERATORS["conv2d"](spec)
    x = torch.randn(2, 64, 5, 5)
    layer(spec, x).square().sum().backward()
    assert layer.get_parameter("weight.values").grad is not None
    plain = layer.extract(spec)
    torch.testing.assert_close(plain.train()(x), layer(spec, x))
    plain.eval().fold()
    encoded = plain.codes[0]
    assert encoded is not None
    assert set((encoded.decode() / encoded.scales[:, :, None, None]).unique().tolist()) <= {
        sign * 0.5**k for k in range(7) for sign in (-1, 0, 1)
    }
    filled = replace(layer_weights(plain), output_range=None)
    model = build_layer(spec, lowering, filled, batch=2)
    device = Device("x86", batch=2)
    output = device.load_runtime().load(model, device).run({"input": x.numpy()})
    np.testing.assert_allclose(output, plain(x).detach().numpy(), atol=1e-4)
