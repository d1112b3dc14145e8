"""Every precision, sparsity and rank together, from shared weights to the runtime: what torch computes is what ships."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

from latency_lut.device import Device
from latency_lut.lowering import applicable
from latency_lut.network import build_layer, random_weights
from search.evaluation import Evaluator, predict
from search.export import Tolerances, export, run_model, verify
from spaces.errors import UserError
from spaces.layers import LayerSpec
from spaces.mask_strategies import create_mask_training
from spaces.mobile import MobileSpace
from spaces.plain import Factors
from spaces.quantizers import QuantizerSettings
from spaces.supernet import Supernet
from spaces.weights import Estimators

PATTERNS = ["dense", "group@1/2", "2:4", "block4x1@1/2", "unstructured@1/4"]
WITH_ZERO = ["w8a8", "w7a8", "w4a8", "w4", "w2@16", "w4@inputs", "ternary_a8", "power4", "fp32"]
WITHOUT_ZERO = ["binary", "binary_a8", "codebook4", "partial@1/8", "w3a8", "w8d8", "w4@tensor"]
# Untrained networks have logits that lie close together.
LOOSE = Tolerances(agreement=0.96)


def space(precisions: list[str], sparsities: list[str], **options: list[str]) -> MobileSpace:
    stages = [{"widths": [16, 24], "depths": [1, 2], "stride": 2}]
    return MobileSpace(1, 10, [8], [8], stages, [2], [3, 5], [32], precisions, sparsities, **options)


SPACES = {
    "sparse": space(WITH_ZERO, PATTERNS, ranks=["1/4", "1/2", "full"], activations=["relu", "selective", "hard_swish"]),
    "dense": space(WITHOUT_ZERO, ["dense"]),
}


@pytest.mark.parametrize("settings", [QuantizerSettings(), QuantizerSettings(scale="learned", binary="reste")], ids=str)
@pytest.mark.parametrize("name", SPACES)
def test_any_network_ships_as_torch_computes_it(
    name: str, settings: QuantizerSettings, evaluator: Evaluator, x86: Device
) -> None:
    torch.manual_seed(0)
    rng, kinds = np.random.default_rng(1), SPACES[name]
    supernet = Supernet(kinds, Estimators(quantizers=settings))
    optimizer = torch.optim.SGD(supernet.parameters(), 1e-3)
    for _ in range(5):
        architecture = kinds.sample(rng)
        supernet.activate(architecture)
        supernet(torch.randn(16, 1, 8, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        plain = evaluator.plain(supernet, architecture)
        lowerings = [str(rng.choice(applicable(spec))) for spec in plain.network.layers]
        model = export(plain, lowerings, x86, {})
        assert verify(plain, lowerings, model, x86, evaluator.split, LOOSE).failures == []


def shipped(model: bytes) -> dict[str, np.ndarray]:
    """What the DequantizeLinear nodes of weights and biases give, by `LAYER/weight` and `LAYER/bias`."""
    graph = onnx.load_model_from_string(model).graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            levels, scales = constants[node.input[0]], constants[node.input[1]]
            values = levels.astype(np.float64) * scales.reshape(-1, *[1] * (levels.ndim - 1))
            found[node.input[0]] = values.astype(np.float32)
    return found


@pytest.mark.parametrize(
    ("precision", "rank"), [("w8a8", "full"), ("w8a8", "1/2"), ("w4a8", "full"), ("ternary_a8", "full"), ("binary_a8", "full")]
)
def test_torch_computes_with_the_integers_that_ship(precision: str, rank: str, evaluator: Evaluator, x86: Device) -> None:
    torch.manual_seed(0)
    kinds = space([precision], ["dense"], ranks=[rank])
    supernet = Supernet(kinds)
    with torch.no_grad():
        for name, parameter in supernet.named_parameters():
            if name.endswith(("norm_bias", "bias")):
                parameter.normal_()
            if name.endswith("norm_weight"):
                parameter[1] = 1e-12  # switched off: its bias does not fit the weight's own grid
    plain = evaluator.plain(supernet, kinds.largest())
    before = predict(plain, evaluator.split.images)
    lowerings = [applicable(spec)[0] for spec in plain.network.layers]
    model = export(plain, lowerings, x86, {})
    found = shipped(model)
    integer = [node for node in plain.network.nodes if node.spec.integer]
    assert len(integer) > 5
    for node in integer:
        arithmetic = plain.layer(node.name).arithmetic
        last = arithmetic.second if isinstance(arithmetic, Factors) else arithmetic
        for name in ("weight", "bias"):
            values, stated = last.get_parameter(name).detach().numpy(), found[f"{node.name}/{name}"]
            np.testing.assert_allclose(values, stated, rtol=3e-7, atol=0, err_msg=f"{name} of {node.name}")
    plain.fold()
    assert torch.equal(predict(plain, evaluator.split.images), before)
    runtime = run_model(model, x86, plain.network, evaluator.split.images)
    assert (runtime.argmax(1) == before.numpy().argmax(1)).mean() > 0.99


def test_weights_in_few_bits_make_a_small_file() -> None:
    layer = LayerSpec("conv2d", 128, 128, 4, 4)
    sizes = {
        precision: len(build_layer(spec, "fp32", random_weights(spec, np.random.default_rng(0))))
        for precision in ("fp32", "w8", "w4", "w2", "binary")
        for spec in [replace(layer, precision=precision)]
    }
    for precision, bits in (("w8", 8), ("w4", 4), ("w2", 2), ("binary", 1)):
        assert sizes["fp32"] - sizes[precision] > layer.parameters * (32 - bits) / 8 - 3000, precision


@pytest.mark.parametrize(
    ("masks", "sparsities", "told"),
    [
        ("granet", ["dense", "2:4"], "one sparsity per layer"),
        ("iterative_shrinkage", ["dense", "2:4"], "one sparsity per layer"),
        ("granet", ["group@1/2"], "single weights"),
    ],
)
def test_a_mask_training_that_does_not_fit_the_space_is_refused(masks: str, sparsities: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        Supernet(space(["fp32"], sparsities), Estimators(masks=create_mask_training(masks)))


@pytest.mark.parametrize(
    "options", [{"precisions": ["binary"], "sparsities": ["2:4"]}, {"precisions": ["w8d8"], "ranks": ["1/2"]}]
)
def test_what_does_not_go_together_is_refused(options: dict[str, list[str]]) -> None:
    with pytest.raises(UserError, match="allowed beside it"):
        space(**({"precisions": ["fp32"], "sparsities": ["dense"]} | options))
