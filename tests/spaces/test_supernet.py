"""The supernet: every architecture that it holds, as trained, as extracted and as shipped."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from latency_lut.device import Device
from latency_lut.lowering import applicable
from search.evaluation import Evaluator, predict
from search.export import export, run_model
from spaces.choice import Architecture
from spaces.mobile import MobileSpace
from spaces.plain import PlainNetwork, resize
from spaces.precision import FLOAT
from spaces.supernet import Supernet

SAMPLES = 12


def sampled(space: MobileSpace, count: int = SAMPLES) -> list[Architecture]:
    rng = np.random.default_rng(11)
    drawn = [space.sample(rng) if i % 2 else space.sample_spread(rng) for i in range(count)]
    return [space.largest(), space.smallest(), *drawn]


def float_only(space: MobileSpace, architecture: Architecture) -> Architecture:
    return space.architecture({**architecture, **{n: FLOAT for n in architecture if n.endswith(".precision")}})


@pytest.fixture(scope="module")
def images(evaluator: Evaluator) -> torch.Tensor:
    return evaluator.split.images


def test_forward_is_the_extracted_network_in_training_mode(
    trained: Supernet, small_space: MobileSpace, images: torch.Tensor
) -> None:
    for architecture in sampled(small_space):
        trained.activate(architecture)
        plain = trained.extract(architecture).train()
        with torch.no_grad():
            expected, found = trained(images[:50]), plain(images[:50])
        assert expected.shape == (50, 10)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_largest_is_active_at_first_and_activate_changes_it(small_space: MobileSpace, images: torch.Tensor) -> None:
    torch.manual_seed(0)
    supernet = Supernet(small_space)
    with torch.no_grad():
        first = supernet(images[:20])
        network = supernet.activate(small_space.smallest())
        other = supernet(images[:20])
        supernet.activate(small_space.largest())
        assert torch.equal(supernet(images[:20]), first)
    assert network == small_space.network(small_space.smallest())
    assert not torch.allclose(first, other)


def test_every_architecture_finds_its_layers(small_space: MobileSpace) -> None:
    supernet = Supernet(small_space)
    rng = np.random.default_rng(0)
    for _ in range(100):
        for node in small_space.network(small_space.sample(rng)).nodes:
            largest = supernet.layer(node.name).spec
            assert all(a <= b for a, b in zip(node.spec.weight_shape, largest.weight_shape, strict=True))


def test_every_parameter_learns_and_nothing_outside_of_an_architecture_does(small_space: MobileSpace) -> None:
    torch.manual_seed(0)
    supernet = Supernet(small_space)
    images = torch.randn(16, 1, 8, 8)
    supernet(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in supernet.parameters())
    supernet.zero_grad()
    supernet.activate(small_space.smallest())
    supernet(images).square().sum().backward()
    used = {n.name for n in small_space.network(small_space.smallest()).nodes}
    for name in (n.name for n in small_space.network(small_space.largest()).nodes):
        touched = any(p.grad is not None for p in supernet.layer(name).parameters())
        assert touched == (name in used and any(True for _ in supernet.layer(name).parameters())), name


def test_recalibration_forgets_what_came_before(trained: Supernet, small_space: MobileSpace, images: torch.Tensor) -> None:
    plain = trained.extract(small_space.sample(np.random.default_rng(4)))
    plain.recalibrate([images[:64], images[64:128]])
    with torch.no_grad():
        expected = plain(images)
    plain.recalibrate([torch.randn_like(images) * 9.0])
    plain.recalibrate([images[:64], images[64:128]])
    assert not plain.training
    with torch.no_grad():
        assert torch.equal(plain(images), expected)


def mixes(plain: PlainNetwork) -> list[list[str]]:
    """As many mixes of lowerings as it takes for every applicable lowering of every layer."""
    names = [applicable(spec) for spec in plain.network.layers]
    return [[options[i % len(options)] for options in names] for i in range(max(map(len, names)))]


def test_exported_models_compute_what_torch_computes(
    trained: Supernet, small_space: MobileSpace, evaluator: Evaluator, x86: Device
) -> None:
    split = evaluator.split
    compared = 0
    for architecture in sampled(small_space):
        for wanted in (architecture, float_only(small_space, architecture)):
            plain = evaluator.plain(trained, wanted)
            expected = predict(plain, split.images).numpy()
            integer = any(spec.integer for spec in plain.network.layers)
            for lowerings in mixes(plain):
                found = run_model(export(plain, lowerings, x86, {}), x86, plain.network, split.images)
                difference = np.abs(found - expected)
                scale = expected.std()
                if integer:
                    agreement = (found.argmax(1) == expected.argmax(1)).mean()
                    assert agreement >= 0.97, (agreement, wanted)
                    assert difference.mean() < 0.03 * scale, (difference.mean(), scale, wanted)
                else:
                    assert difference.max() <= 1e-4, (difference.max(), wanted)
                compared += 1
    assert compared > 3 * SAMPLES


def test_random_images_too(trained: Supernet, small_space: MobileSpace, evaluator: Evaluator, x86: Device) -> None:
    """Images that no calibration has seen: ranges are exceeded, in torch and in the runtime alike."""
    images = 3.0 * torch.randn(200, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    agreements = []
    for architecture in sampled(small_space, 8):
        plain = evaluator.plain(trained, architecture)
        expected = predict(plain, images).numpy()
        found = run_model(export(plain, mixes(plain)[-1], x86, {}), x86, plain.network, images)
        agreements.append((found.argmax(1) == expected.argmax(1)).mean())
    assert np.mean(agreements) >= 0.99
    assert min(agreements) >= 0.97


def test_a_batch_of_several_samples_ships_too(trained: Supernet, small_space: MobileSpace, evaluator: Evaluator) -> None:
    device = Device("x86", batch=5)
    plain = evaluator.plain(trained, small_space.largest())
    images = evaluator.split.images[:13]
    found = run_model(export(plain, mixes(plain)[0], device, {}), device, plain.network, images)
    np.testing.assert_allclose(found, predict(plain, images).numpy(), atol=1e-4)


def test_an_unfolded_network_is_not_exported(trained: Supernet, small_space: MobileSpace, x86: Device) -> None:
    plain = trained.extract(small_space.smallest())
    with pytest.raises(ValueError, match="fold"):
        export(plain, mixes(plain)[0], x86, {})


def test_resizing_keeps_the_size_that_fits_and_constant_images_constant() -> None:
    images = torch.rand(2, 3, 8, 8)
    assert resize(images, 8, 8) is images
    for side in (4, 12, 16):
        resized = resize(torch.full((2, 3, 8, 8), 0.25), side, side)
        assert resized.shape == (2, 3, side, side)
        torch.testing.assert_close(resized, torch.full_like(resized, 0.25))
