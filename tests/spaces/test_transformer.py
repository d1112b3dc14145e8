"""The space `transformer` and the operators of its blocks, from the order of channels to what onnxruntime computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from latency_lut.device import Device
from latency_lut.lowering import applicable
from search.evaluation import Evaluator, predict
from search.export import export, run_model
from spaces.choice import Architecture
from spaces.elastic import OPERATORS
from spaces.errors import UserError
from spaces.layers import INPUT, LayerSpec, NetworkBuilder
from spaces.plain import PlainNetwork
from spaces.supernet import Supernet
from spaces.tokens import self_attention
from spaces.transformer import TransformerSpace

SAMPLES = 8


def space_of(precisions: list[str]) -> TransformerSpace:
    return TransformerSpace(1, 10, [8], 2, [8, 12], [1, 2], [1, 3], [4, 6], [1, 2], precisions)


FLOATS, MIXED = space_of(["fp32"]), space_of(["w8a8", "fp32"])


def sampled(space: TransformerSpace) -> list[Architecture]:
    rng = np.random.default_rng(2)
    return [space.largest(), space.smallest(), *(space.sample(rng) for _ in range(SAMPLES))]


@pytest.fixture(scope="module")
def images(evaluator: Evaluator) -> torch.Tensor:
    return evaluator.split.images


@pytest.fixture(scope="module")
def taught(images: torch.Tensor, evaluator: Evaluator) -> dict[str, Supernet]:
    """Supernets of both spaces after a few steps."""
    supernets = {}
    for name, space in (("float", FLOATS), ("mixed", MIXED)):
        torch.manual_seed(0)
        supernet, rng = Supernet(space), np.random.default_rng(0)
        optimizer = torch.optim.AdamW(supernet.parameters(), 3e-3)
        for step in range(12):
            supernet.activate(space.sample(rng) if step % 2 else space.largest())
            optimizer.zero_grad()
            F.cross_entropy(supernet(images[:64]), evaluator.split.labels[:64]).backward()
            optimizer.step()
        supernets[name] = supernet
    return supernets


# -- the order of channels ----------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 6), st.integers(1, 3), st.data())
def test_fewer_heads_are_the_first_ones(heads: int, width: int, columns: int, rows: int, data: st.DataObject) -> None:
    fewer = data.draw(st.integers(1, heads))
    x = torch.randn(2, 3 * heads * width, rows, columns, generator=torch.Generator().manual_seed(0))
    found = self_attention(x[:, : 3 * fewer * width], fewer)
    torch.testing.assert_close(found, self_attention(x, heads)[:, : fewer * width])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(2, 6), st.data())
def test_narrower_heads_keep_the_role_of_every_channel(heads: int, width: int, data: st.DataObject) -> None:
    """Values that are constant over tokens come out as they are: a feature's value never lands elsewhere, nor as a query."""
    narrower = data.draw(st.integers(1, width))
    x = torch.randn(1, 3 * heads * width, 1, 5, generator=torch.Generator().manual_seed(1))
    x[:, 2::3] = torch.arange(heads * width).reshape(1, -1, 1, 1).float()
    found = self_attention(x[:, : 3 * heads * narrower], heads)
    torch.testing.assert_close(found, torch.arange(heads * narrower).reshape(1, -1, 1, 1).expand(1, -1, 1, 5).float())


def test_one_head_is_the_textbook_formula() -> None:
    x = torch.randn(1, 12, 2, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    query, key, value = (x[0, role::3].flatten(1).T for role in range(3))
    expected = torch.softmax(query @ key.T / 2.0, dim=1) @ value
    torch.testing.assert_close(self_attention(x, 1)[0].flatten(1).T, expected)


def test_torchs_own_layer_in_the_order_of_the_documentation() -> None:
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(12, 3, batch_first=True)
    x = torch.randn(2, 12, 2, 5)
    tokens = x.flatten(2).mT
    expected = theirs(tokens, tokens, tokens, need_weights=False)[0].mT.reshape(x.shape)
    weight = theirs.in_proj_weight.reshape(3, 12, -1).transpose(0, 1).reshape(36, -1)
    found = self_attention(F.conv2d(x, weight[:, :, None, None]), 3)
    torch.testing.assert_close(F.conv2d(found, theirs.out_proj.weight[:, :, None, None]), expected, rtol=1e-4, atol=1e-5)


def test_memory_order_does_not_matter() -> None:
    x = torch.randn(2, 24, 3, 4)
    torch.testing.assert_close(self_attention(x.contiguous(memory_format=torch.channels_last), 2), self_attention(x, 2))


# -- the operators in a network -----------------------------------------------------------------------------------------------


def test_attention_takes_a_third_of_the_channels_and_stays_float() -> None:
    net = NetworkBuilder(4, 3, 3)
    x = net.add("norm", "layer_norm", INPUT)
    x = net.add("qkv", "conv2d", x, 18, precision="w8a8")
    x = net.add("attention", "attention", x, heads=2)
    net.add("out", "conv2d", x, 4, precision="w8a8", skip=INPUT)
    norm, _, attention, _ = net.build().layers
    assert attention == LayerSpec("attention", 18, 6, 3, 3, input_bits=8, output_bits=8, heads=2)
    assert norm == LayerSpec("layer_norm", 4, 4, 3, 3, output_bits=8)


def test_attention_has_nothing_to_learn_and_passes_gradients_to_its_input_only() -> None:
    spec = LayerSpec("attention", 18, 6, 2, 2, heads=2)
    layer = OPERATORS["attention"](LayerSpec("attention", 36, 12, 2, 2, heads=4))
    assert not list(layer.parameters())
    x = torch.randn(3, 18, 2, 2, requires_grad=True)
    layer(spec, x).square().sum().backward()
    assert x.grad is not None
    assert (x.grad != 0).all()


# -- the space ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [FLOATS, MIXED], ids=["float", "mixed"])
def test_every_architecture_finds_its_layers_and_no_choice_is_idle(space: TransformerSpace) -> None:
    supernet = Supernet(space)
    networks = {}
    for architecture in sampled(space) * 5:
        network = networks[architecture] = space.network(architecture)
        for node in network.nodes:
            largest = supernet.layer(node.name).spec
            assert node.spec.operator == largest.operator
            assert node.spec.in_channels <= largest.in_channels
            assert node.spec.out_channels <= largest.out_channels
    assert len({network.fingerprint for network in networks.values()}) == len(networks)


def test_options_are_checked() -> None:
    with pytest.raises(UserError, match="head_width is"):
        TransformerSpace(1, 10, [8], 2, [8], [1], [1], [], [1], ["fp32"])
    with pytest.raises(UserError, match="precision 'w9'"):
        TransformerSpace(1, 10, [8], 2, [8], [1], [1], [4], [1], ["w9"])
    with pytest.raises(UserError, match="patch is 0"):
        TransformerSpace(1, 10, [8], 0, [8], [1], [1], [4], [1], ["fp32"])


def test_everything_learns_and_only_what_is_used(images: torch.Tensor) -> None:
    torch.manual_seed(0)
    supernet = Supernet(FLOATS)
    supernet(images[:32]).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in supernet.parameters())
    supernet.zero_grad()
    network = supernet.activate(FLOATS.smallest())
    supernet(images[:32]).square().sum().backward()
    norm, qkv = (next(n.spec for n in network.nodes if n.name == f"block1.{name}") for name in ("norm1", "qkv"))
    for name, spec in (("block1.norm1", norm), ("block1.qkv", qkv)):
        for parameter in supernet.layer(name).parameters():
            assert parameter.grad is not None
            assert parameter.grad[spec.out_channels :].abs().sum() == 0
            assert parameter.grad[: spec.out_channels].abs().sum() > 0
    assert all(p.grad is None for p in supernet.layer("block2.norm1").parameters())


@pytest.mark.parametrize("name", ["float", "mixed"])
def test_extracted_networks_train_like_the_supernet(taught: dict[str, Supernet], name: str, images: torch.Tensor) -> None:
    supernet = taught[name]
    for architecture in sampled(FLOATS if name == "float" else MIXED):
        supernet.activate(architecture)
        with torch.no_grad():
            expected, found = supernet(images[:50]), supernet.extract(architecture).train()(images[:50])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_evaluation_is_training_but_for_the_variance_of_a_batch(taught: dict[str, Supernet], images: torch.Tensor) -> None:
    """Calibrated with the very batch, batch norm differs by n / (n - 1); layer norm and attention have no modes."""
    supernet = taught["float"]
    for architecture in sampled(FLOATS):
        supernet.activate(architecture)
        plain = supernet.extract(architecture)
        plain.recalibrate([images[:200]])
        with torch.no_grad():
            expected, found = supernet(images[:200]), plain(images[:200])
            plain.fold()
            folded = plain(images[:200])
        torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01 * float(expected.abs().max()))
        torch.testing.assert_close(folded, found, rtol=1e-4, atol=1e-4)


def mixes(plain: PlainNetwork) -> list[list[str]]:
    names = [applicable(spec) for spec in plain.network.layers]
    return [[options[i % len(options)] for options in names] for i in range(max(map(len, names)))]


def test_exported_models_compute_what_torch_computes(taught: dict[str, Supernet], evaluator: Evaluator, x86: Device) -> None:
    images = evaluator.split.images
    for architecture in sampled(FLOATS):
        plain = evaluator.plain(taught["float"], architecture)
        expected = predict(plain, images).numpy()
        for lowerings in mixes(plain):
            found = run_model(export(plain, lowerings, x86, {}), x86, plain.network, images)
            assert np.abs(found - expected).max() <= 1e-4


def test_exported_integer_models_agree_with_torch(taught: dict[str, Supernet], evaluator: Evaluator, x86: Device) -> None:
    images = evaluator.split.images
    for architecture in sampled(MIXED):
        plain = evaluator.plain(taught["mixed"], architecture)
        expected = predict(plain, images).numpy()
        for lowerings in mixes(plain):
            found = run_model(export(plain, lowerings, x86, {}), x86, plain.network, images)
            assert (found.argmax(1) == expected.argmax(1)).mean() >= 0.97
            assert np.abs(found - expected).mean() < 0.03 * expected.std()
