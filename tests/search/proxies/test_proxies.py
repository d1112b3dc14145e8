"""Every registered proxy: the contract of all, and each against a plain reference or a property that its source states."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from search.data import Digits
from search.evaluation import Split, training_sample
from search.proxies import PROXIES, ProxyScores, ProxySettings, compressed, score
from search.proxies.activations import MOST_GRADIENTS, RIDGE
from spaces.errors import UserError
from spaces.mobile import MobileSpace
from spaces.plain import PlainNetwork
from spaces.supernet import Supernet
from spaces.transformer import TransformerSpace

ALL = {"grad_norm", "snip", "grasp", "synflow", "jacobian_covariance", "naswot", "zen", "macs", "parameters"}
WITHOUT_DATA = ("synflow", "zen", "macs", "parameters")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def sample(digits: Digits) -> Split:
    return training_sample(digits, 32, 0)


@pytest.fixture(scope="module")
def networks(small_space: MobileSpace) -> list[PlainNetwork]:
    """The ends of the small space and random networks with every precision and sparsity, as before training."""
    torch.manual_seed(0)
    supernet, rng = Supernet(small_space), np.random.default_rng(0)
    drawn = [small_space.smallest(), small_space.largest(), *(small_space.sample(rng) for _ in range(4))]
    return [supernet.extract(architecture) for architecture in drawn]


def chain(width: int = 8, depth: int = 2) -> PlainNetwork:
    """A dense float network without skips, whose layers are convolution, batch norm and ReLU."""
    stages = [{"widths": [width], "depths": [1], "stride": 2} for _ in range(depth)]
    space = MobileSpace(1, 10, [8], [width], stages, [2], [3], [width], ["fp32"], ["dense"])
    torch.manual_seed(1)
    return Supernet(space).extract(space.largest())


def test_these_are_there() -> None:
    assert PROXIES.keys() == ALL
    assert all((function.__doc__ or "").strip() for function in PROXIES.values())


@pytest.mark.parametrize("name", PROXIES)
def test_it_is_finite_follows_the_seed_and_changes_nothing(name: str, networks: list[PlainNetwork], sample: Split) -> None:
    values = []
    for network in networks:
        before = {key: value.clone() for key, value in network.state_dict().items()}
        training, drawn = network.training, torch.random.get_rng_state()
        first = score(name, network, sample.images, sample.labels, 3)
        assert isinstance(first, float)
        assert math.isfinite(first)
        assert score(name, network, sample.images, sample.labels, 3) == first
        assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
        assert not any(module._forward_hooks for module in network.modules())
        assert all(parameter.grad is None for parameter in network.parameters())
        assert network.training == training
        assert torch.equal(torch.random.get_rng_state(), drawn)
        values.append(first)
    assert len(set(values)) > 3  # it tells networks apart


@pytest.mark.parametrize("name", PROXIES)
def test_it_works_on_transformers(name: str, sample: Split) -> None:
    space = TransformerSpace(
        channels=1,
        classes=10,
        resolutions=[8],
        patch=4,
        widths=[16],
        depths=[1, 2],
        heads=[2],
        head_widths=[8],
        ratios=[2],
        precisions=["w8a8", "fp32"],
    )
    torch.manual_seed(0)
    network = Supernet(space).extract(space.largest())
    assert math.isfinite(score(name, network, sample.images, sample.labels, 0))


@pytest.mark.parametrize("name", WITHOUT_DATA)
def test_what_looks_at_no_images_does_not_depend_on_them(name: str, networks: list[PlainNetwork], sample: Split) -> None:
    other = torch.randn_like(sample.images), sample.labels.flip(0)
    for network in networks:
        assert score(name, network, *other, 0) == score(name, network, sample.images, sample.labels, 0)


@pytest.mark.parametrize("name", ["synflow", "zen", "macs", "parameters"])
def test_it_grows_with_width_and_depth(name: str, sample: Split) -> None:
    def of(network: PlainNetwork) -> float:
        return score(name, network, sample.images, sample.labels, 0)

    assert of(chain(8)) < of(chain(16)) < of(chain(32))
    assert of(chain(16, 1)) < of(chain(16, 2)) < of(chain(16, 3))


def test_naswot_grows_with_what_units_tell_apart(sample: Split) -> None:
    values = [score("naswot", chain(width), sample.images, sample.labels, 0) for width in (4, 16, 64)]
    assert values == sorted(values)
    same = sample.images[:1].expand(8, -1, -1, -1)
    assert score("naswot", chain(16), same, sample.labels[:8], 0) < 8 * math.log(RIDGE) / 2


# -- plain references ---------------------------------------------------------------------------------------------------------


def plain_forward(network: PlainNetwork, images: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """The chain written out, in the precision of the images."""
    x = images
    for node in network.network.nodes:
        spec = node.spec
        if spec.operator == "global_pool":
            x = x.mean(dim=(2, 3))
        elif spec.operator == "linear":
            x = x @ weights[node.name].T
        else:
            x = F.conv2d(x, weights[node.name], None, spec.stride, spec.kernel // 2, groups=spec.groups)
            mean, variance = x.mean(dim=(0, 2, 3), keepdim=True), x.var(dim=(0, 2, 3), keepdim=True, unbiased=False)
            x = (x - mean) / (variance + 1e-5).sqrt()
            x = x.clamp_min(0) if spec.activation == "relu" else x
    return x


def weights_in_double(network: PlainNetwork) -> dict[str, torch.Tensor]:
    return {
        node.name: network.layer(node.name).arithmetic.get_parameter("weight").detach().double().requires_grad_()
        for node in network.network.nodes
        if node.spec.weight_shape
    }


def gradient_of(network: PlainNetwork, sample: Split, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    loss = F.cross_entropy(plain_forward(network, sample.images.double(), weights), sample.labels)
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


def test_gradient_norm_and_snip_are_those_of_the_written_out_network(sample: Split) -> None:
    network = chain()
    weights = weights_in_double(network)
    gradients = gradient_of(network, sample, weights)
    norm = sum(float(g.square().sum().sqrt()) for g in gradients.values())
    assert score("grad_norm", network, sample.images, sample.labels, 0) == pytest.approx(norm, rel=1e-3)
    # SNIP asks for the gradient of a factor on each weight
    factors = {name: torch.ones_like(w, requires_grad=True) for name, w in weights.items()}
    scaled = {name: weights[name].detach() * factors[name] for name in weights}
    loss = F.cross_entropy(plain_forward(network, sample.images.double(), scaled), sample.labels)
    sensitivity = sum(float(g.abs().sum()) for g in torch.autograd.grad(loss, list(factors.values())))
    assert score("snip", network, sample.images, sample.labels, 0) == pytest.approx(sensitivity, rel=1e-3)


def test_grasp_is_the_difference_of_two_gradients(sample: Split) -> None:
    network, step = chain(), 1e-5
    weights = weights_in_double(network)
    gradients = gradient_of(network, sample, weights)
    moved = [
        {name: (w + sign * step * gradients[name]).detach().requires_grad_() for name, w in weights.items()} for sign in (1, -1)
    ]
    plus, minus = (gradient_of(network, sample, values) for values in moved)
    expected = -sum(float((weights[n].detach() * (plus[n] - minus[n])).sum()) / (2 * step) for n in weights)
    assert score("grasp", network, sample.images, sample.labels, 0) == pytest.approx(expected, rel=0.01)


def test_removed_weights_take_no_part_in_the_gradient_norm(networks: list[PlainNetwork], sample: Split) -> None:
    """The norm of the gradient to factors that no removed weight has a share in."""
    network = next(n for n in networks if any(spec.sparsity != "dense" for spec in n.network.layers))
    whole = copy.deepcopy(network)
    parameters = [m.weight for m in whole.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    loss = F.cross_entropy(whole.train()(sample.images), sample.labels)
    norm = sum(float(g.norm()) for g in torch.autograd.grad(loss, parameters))
    assert score("grad_norm", network, sample.images, sample.labels, 0) < 0.999 * norm


def test_synflow_is_the_number_of_layers_times_the_flow() -> None:
    """The flow through a chain is a product of its layers; each one's weights times gradients sum up to it (Euler)."""
    network = chain()
    x, layers = torch.ones(1, 1, 8, 8, dtype=torch.float64), 0
    for node in network.network.nodes:
        spec, arithmetic = node.spec, network.layer(node.name).arithmetic
        if spec.operator == "global_pool":
            x = x.mean(dim=(2, 3))
            continue
        weight = arithmetic.get_parameter("weight").detach().double().abs()
        x = (
            x @ weight.T
            if spec.operator == "linear"
            else F.conv2d(x, weight, None, spec.stride, spec.kernel // 2, 1, spec.groups)
        )
        layers += 1
    expected = math.log(layers * float(x.sum()))
    found = score("synflow", network, torch.randn(2, 1, 8, 8), torch.zeros(2).long(), 0)
    assert found == pytest.approx(expected, rel=1e-9)


def test_naswot_counts_agreeing_units_pair_by_pair(sample: Split) -> None:
    network, images = chain(), sample.images[:12]
    x, active = images, []
    for node in network.network.nodes:
        x = copy.deepcopy(network.layer(node.name)).train()(x)
        if node.spec.activation == "relu":
            active.append((x > 0).flatten(1).numpy())
    on = np.hstack(active)
    kernel = np.array([[(a == b).sum() for b in on] for a in on], dtype=float)
    expected = np.linalg.slogdet(kernel + RIDGE * np.eye(12))[1]
    assert score("naswot", network, images, sample.labels[:12], 0) == pytest.approx(expected, rel=1e-9)


def test_the_jacobian_covariance_is_that_of_numpy(sample: Split) -> None:
    network = chain().train()
    images = sample.images[:MOST_GRADIENTS].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(copy.deepcopy(network)(images).sum(), images)
    values = np.linalg.eigvalsh(np.corrcoef(gradient.flatten(1).double().numpy()))
    expected = -float((np.log(values + RIDGE) + 1 / (values + RIDGE)).sum())
    assert score("jacobian_covariance", network, sample.images, sample.labels, 0) == pytest.approx(expected, rel=1e-3)
    # Images whose gradients point apart are better than images that are nearly the same.
    alike = sample.images[:1] + 0.01 * sample.images
    assert score("jacobian_covariance", network, alike, sample.labels, 0) < expected


def test_zen_does_not_depend_on_the_scale_of_weights(sample: Split) -> None:
    """It draws its own, so what a network was initialised with does not matter, only its shape."""
    network, scaled = chain(), chain()
    with torch.no_grad():
        for module in scaled.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.mul_(7.0)
    of = [score("zen", n, sample.images, sample.labels, 0) for n in (network, scaled)]
    assert of[1] == of[0]


# -- scores of architectures --------------------------------------------------------------------------------------------------


def scores_in(path: Path, space: MobileSpace, sample: Split, key: str = "key", seed: int = 0) -> ProxyScores:
    return ProxyScores(path, space, sample.images, sample.labels, seed, key)


def test_scores_are_kept_by_network(small_space: MobileSpace, sample: Split, tmp_path: Path) -> None:
    rng, path, names = np.random.default_rng(2), tmp_path / "proxies.parquet", ["synflow", "parameters", "zen"]
    architectures = [small_space.sample(rng) for _ in range(5)]
    first, told = scores_in(path, small_space, sample), []
    found = first.scores(names, architectures, lambda done, total: told.append((done, total)))
    assert told == [(i, 5) for i in range(1, 6)]
    assert found[:, 1].tolist() == [small_space.network(a).parameters for a in architectures]
    first.save()
    again = scores_in(path, small_space, sample)
    assert np.array_equal(again.scores(names[::-1], architectures, lambda done, total: pytest.fail("known"))[:, ::-1], found)
    told.clear()
    more = again.scores([*names, "macs"], architectures[:2], lambda done, total: told.append((done, total)))
    assert np.array_equal(more[:, :3], found[:2])
    assert len(told) == 2
    told.clear()
    scores_in(path, small_space, sample, "other").scores(names, architectures, lambda done, total: told.append((done, total)))
    assert len(told) == 5
    assert first.scores([], architectures).shape == (5, 0)
    assert not np.array_equal(scores_in(tmp_path / "x", small_space, sample, seed=1).scores(names, architectures), found)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet at all"])
def test_a_damaged_file_is_told(content: bytes, small_space: MobileSpace, sample: Split, tmp_path: Path) -> None:
    path = tmp_path / "proxies.parquet"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"is damaged .*; delete it and run again"):
        scores_in(path, small_space, sample)


def test_settings_that_are_not_allowed_are_told() -> None:
    with pytest.raises(UserError, match=r"proxies.features is \['sinflow'\]; allowed is a list of"):
        ProxySettings(["sinflow"])
    with pytest.raises(UserError, match="each once"):
        ProxySettings(["zen", "zen"])
    with pytest.raises(UserError, match="integers from 2"):
        ProxySettings([], 1)


def test_features_keep_the_order_of_scores() -> None:
    scores = np.array([-1e6, -3.0, 0.0, 0.5, 2.0, 1e9])
    features = compressed(scores)
    assert (np.diff(features) > 0).all()
    assert features[2] == 0.0
    assert abs(features).max() < 25
