"""The space `nni`: NNI's mutables as our choices, its networks as our layers."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

from latency_lut.device import Device
from latency_lut.lowering import applicable
from latency_lut.models import build_layer, build_model
from latency_lut.network import random_weights
from search.export import layer_weights
from spaces.choice import Architecture
from spaces.errors import UserError
from spaces.layers import LayerSpec
from spaces.nni import NniSpace
from spaces.plain import PlainNetwork
from spaces.program import Program

pytest.importorskip("nni")
HUB = "nni.nas.hub.pytorch"
OWN = "tests.spaces.nni_spaces"


def space_of(target: str, **options: Any) -> NniSpace:
    settings = {"channels": 1, "classes": 10, "resolutions": [8], "model_channels": 1 if target.startswith(OWN) else 3}
    model = {"_target_": target, **options.pop("model", {})}
    return NniSpace(model, **{**settings, **options})


@pytest.fixture(scope="module")
def small() -> NniSpace:
    return space_of(f"{OWN}.Small", resolutions=[8, 12])


def choices(space: NniSpace) -> dict[str, tuple[Any, ...]]:
    return {choice.name: choice.options for choice in space.choices}


def with_statistics(module: nn.Module) -> nn.Module:
    """A module as after a training: batch norm has statistics of its own."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor, low in ((norm.weight, 0.5), (norm.bias, -0.5), (norm.running_mean, -0.5), (norm.running_var, 0.5)):
                assert isinstance(tensor, torch.Tensor)
                nn.init.uniform_(tensor, low, low + 1.0)
    return module.eval()


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def onnx_logits(plain: PlainNetwork, images: torch.Tensor) -> np.ndarray:
    nodes = plain.network.nodes
    weights = {node.name: layer_weights(plain.layer(node.name)) for node in nodes}
    model = build_model(plain.network, [applicable(node.spec)[0] for node in nodes], weights, batch=len(images))
    return np.asarray(ort.InferenceSession(model).run(None, {"input": images.numpy()})[0])


# -- choices ------------------------------------------------------------------------------------------------------------------


def test_mutables_are_choices(small: NniSpace) -> None:
    assert choices(small) == {
        "resolution": (8, 12),
        "width": (4, 8),
        "stem_kernel": (3, 5),
        "depth": (1, 2, 3),
        "block0": ("plain", "gated"),  # by their parameters
        "block1": ("plain", "gated"),
        "block2": ("plain", "gated"),
        "reads": ("0", "1", "0+1"),
    }
    when = {choice.name: choice.when for choice in small.choices}
    assert when["block0"] is None
    assert when["block1"] == ("depth", (2, 3))
    assert when["block2"] == ("depth", (3,))


def test_architectures_are_samples_of_nni_and_back(small: NniSpace) -> None:
    from nni.nas.nn.pytorch import ModelSpace

    model: ModelSpace = small.model_space()
    rng = np.random.default_rng(0)
    for _ in range(20):
        architecture = small.sample(rng)
        sample = small.sample_of(architecture)
        model.validate(sample)
        assert small.architecture_of(sample, architecture.integer("resolution")) == architecture
        assert small.architecture(Architecture.from_json(architecture.to_json())) == architecture


def test_the_hub_space_has_the_choices_that_its_paper_says() -> None:
    space = space_of(f"{HUB}.ProxylessNAS", resolutions=[16])
    found = choices(space)
    assert found["s2_depth"] == (1, 2, 3, 4)
    assert found["s2_i0"] == ("k3e3", "k5e3", "k7e3", "k3e6", "k5e6", "k7e6")
    assert space.size() == sum(6**depth for depth in (1, 2, 3, 4)) ** 5 * 6


# -- networks -----------------------------------------------------------------------------------------------------------------


NETWORKS = (
    pytest.param(f"{OWN}.Small", {}, id="own"),
    pytest.param(f"{HUB}.ProxylessNAS", {"width_mult": 0.25}, id="ProxylessNAS"),
    pytest.param(f"{HUB}.MobileNetV3Space", {"base_widths": [8] * 8 + [16]}, id="MobileNetV3"),
    pytest.param(f"{HUB}.ShuffleNetSpace", {}, id="ShuffleNet"),
    pytest.param(f"{HUB}.NasBench201", {"stem_out_channels": 4, "num_modules_per_stack": 1}, id="NasBench201"),
    pytest.param(f"{HUB}.DARTS", {"width": 4, "num_cells": 3, "dataset": "cifar"}, id="DARTS"),
    pytest.param(
        f"{HUB}.AutoFormer",
        {"search_embed_dim": [16, 24], "search_num_heads": [1, 2], "search_depth": [1, 2], "img_size": 16, "patch_size": 4},
        id="AutoFormer",
    ),
)


@pytest.mark.parametrize(("target", "model"), NETWORKS)
def test_what_ships_computes_what_nni_computes(target: str, model: dict[str, Any]) -> None:
    space = space_of(target, model=model, resolutions=[16])
    images = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    for seed in range(2):
        architecture = space.sample(np.random.default_rng(seed))
        torch.manual_seed(seed)
        module = with_statistics(space.module(architecture))
        plain = space.plain(architecture, state_of(module))
        with torch.no_grad():
            expected, unfolded = module(images), plain(images)
            plain.fold()
            folded = plain(images)
        scale = float(expected.abs().max())
        assert scale > 0
        torch.testing.assert_close(unfolded, expected, rtol=0, atol=1e-5 * scale)
        torch.testing.assert_close(folded, expected, rtol=0, atol=1e-5 * scale)
        np.testing.assert_allclose(onnx_logits(plain, images), expected.numpy(), rtol=0, atol=1e-5 * scale)
        assert plain.network == space.network(architecture)
        assert all(not norm.training for norm in plain.modules())


def test_a_module_is_the_same_for_the_same_seed(small: NniSpace) -> None:
    architecture = small.largest()
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(small.module(architecture).state_dict()["model.stem.weight"])
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_known_operations_are_layers_and_the_rest_is_joined(small: NniSpace) -> None:
    values = {"resolution": 8, "width": 8, "stem_kernel": 3, "depth": 2, "block0": "plain", "block1": "gated", "reads": "1"}
    network = small.network(small.architecture(values))
    assert network.nodes[0].spec.operator == "traced"  # unpadded stem
    plain = next(node.spec for node in network.nodes if node.spec.depthwise)
    assert (plain.activation, plain.skip_bits) == ("relu6", 32)
    joined = {node.spec.traced.operations for node in network.nodes if node.spec.program}
    assert "sigmoid, mul, reshape, transpose, reshape" in joined
    gated, module = small.architecture({**values, "block0": "gated"}), small.module(small.architecture(values))
    assert sum(p.numel() for p in module.parameters()) == pytest.approx(network.parameters, abs=32)  # statistics of batch norm
    assert small.network(gated).macs > network.macs


def test_a_network_that_cannot_be_cut_is_one_layer() -> None:
    space = space_of(f"{OWN}.TokensFirst")
    network = space.network(space.smallest())
    assert [node.spec.operator for node in network.nodes] == ["traced"]
    module = space.module(space.smallest()).eval()
    images = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        expected = module(images)
        plain = space.plain(space.smallest(), state_of(module))
        torch.testing.assert_close(plain(images), expected)
    np.testing.assert_allclose(onnx_logits(plain, images), expected.numpy(), atol=1e-5)
    assert network.macs == 3 * 4 * 9 * 64 + 40


def test_equal_pieces_are_equal_keys_of_a_table_and_can_be_timed_alone(small: NniSpace) -> None:
    layers = {spec for seed in range(6) for spec in small.layers(small.sample(np.random.default_rng(seed))) if spec.program}
    assert 3 < len(layers) < 40
    for spec in layers:
        assert LayerSpec.from_json(spec.to_json()) == spec
        model = build_layer(spec, "traced", random_weights(spec, np.random.default_rng(0)), batch=2)
        session = ort.InferenceSession(model)
        inputs = {i.name: np.ones(i.shape, np.float32) for i in session.get_inputs()}
        assert session.run(None, inputs)[0].shape == (2, *spec.traced.output)


def test_networks_run_in_torch_too(small: NniSpace) -> None:
    """As programs of `torch.export`, for the runtime torch."""
    device = Device("torch_cpu", runtime="torch", provider="cpu")
    architecture = small.largest()
    plain = small.plain(architecture, state_of(with_statistics(small.module(architecture))))
    plain.fold()
    images = torch.randn(1, 1, 12, 12)
    nodes = plain.network.nodes
    lowerings = [applicable(node.spec, device.describe())[0] for node in nodes]
    weights = {node.name: layer_weights(plain.layer(node.name)) for node in nodes}
    model = build_model(plain.network, lowerings, weights)
    found = device.load_runtime().load(model, device).run({"input": images.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found.reshape(1, -1), plain(images).numpy(), atol=1e-4)
    spec = next(node.spec for node in nodes if node.spec.program and node.spec.skip_bits)
    alone = build_layer(spec, applicable(spec, device.describe())[0], random_weights(spec, np.random.default_rng(0)))
    assert device.load_runtime().load(alone, device) is not None


@pytest.mark.parametrize(
    "text",
    [
        '[[[4,2,2]],[],[["system.default",[{"value":0}],{}]]]',
        '[[[4,2,2]],[],[["relu.default",[{"value":1}],{}]]]',
        '[[[4,2,2]],[],[["add.Tensor",[{"value":0},{"open":0}],{}]]]',
        '[[[4,2,-2]],[],[["relu.default",[{"value":0}],{}]]]',
        '[[[4,2,2]],[],[["mm.default",[{"value":0},{"value":0}],{}]]]',
        "[[[4,2,2]],[],[]]",
        "{}",
    ],
)
def test_a_program_from_a_file_is_checked(text: str) -> None:
    with pytest.raises(ValueError, match="not a program"):
        Program.from_json(text)


# -- mistakes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "options", "told"),
    [
        (f"{HUB}.Proxyless", {}, "no model space nni.nas.hub.pytorch.Proxyless .*NNI's hub has .*ProxylessNAS"),
        ("no_such_module.Space", {}, "no model space no_such_module.Space"),
        ("torch.nn.Linear", {}, "torch.nn.Linear is no .*ModelSpace"),
        (f"{OWN}.Small", {"model": {"depth": 3}}, "cannot make .*Small .*depth"),
        (f"{OWN}.Small", {"channels": 3}, "images have 3 channels and the model reads 1; .*space.model_channels=3"),
        (f"{OWN}.Endless", {}, "share is .*allowed are nni.choice"),
    ],
)
def test_mistakes_are_told_in_one_line(target: str, options: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        space_of(target, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("target", "options", "told"),
    [
        (f"{OWN}.Unknown", {}, "Unknown uses aten.cumsum.default, which cannot be exported"),
        (f"{OWN}.Drawn", {}, "Drawn uses aten.rand.default, which cannot be exported"),
        (f"{OWN}.Small", {"resolutions": [3]}, "Small cannot be traced with images"),
        (f"{OWN}.Small", {"model": {"classes": 12}}, "gives 12 classes, the data has 10"),
    ],
)
def test_networks_that_do_not_fit_are_told_in_one_line(target: str, options: dict[str, Any], told: str) -> None:
    space = space_of(target, **options)
    with pytest.raises(UserError, match=told) as error:
        space.network(space.largest())
    assert "\n" not in str(error.value)


def test_without_nni_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "nni" or name.startswith("nni.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nni", None)
    with pytest.raises(UserError, match=r"NNI 3, which is not installed here .*pip install"):
        space_of(f"{HUB}.ProxylessNAS")
