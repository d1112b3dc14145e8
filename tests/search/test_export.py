"""Verification: an export that is right passes, and one that is wrong in any way fails."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from latency_lut.device import Device
from latency_lut.lowering import applicable
from search.evaluation import Evaluator, Split
from search.export import Tolerances, export, layer_weights, run_model, sha256, verify
from spaces.choice import Architecture
from spaces.mobile import MobileSpace
from spaces.plain import PlainNetwork
from spaces.precision import FLOAT
from spaces.supernet import Supernet

# Logits of a network that was trained for seconds lie close together: a rounding flips a class now and then.
QUICKLY_TRAINED = Tolerances(agreement=0.985)


def uniform(space: MobileSpace, precision: str) -> Architecture:
    values = {c.name: precision if c.kind == "precision" else c.options[-1] for c in space.choices}
    return space.architecture(values)


@pytest.fixture(scope="module", params=["w8a8", FLOAT])
def plain(request: pytest.FixtureRequest, trained: Supernet, small_space: MobileSpace, evaluator: Evaluator) -> PlainNetwork:
    return evaluator.plain(trained, uniform(small_space, request.param))


def shipped(plain: PlainNetwork, device: Device) -> bytes:
    return export(plain, first_lowerings(plain), device, {"note": "kept"})


def first_lowerings(plain: PlainNetwork) -> list[str]:
    return [applicable(spec)[0] for spec in plain.network.layers]


def test_a_right_export_is_verified(plain: PlainNetwork, x86: Device, evaluator: Evaluator) -> None:
    check = verify(plain, first_lowerings(plain), shipped(plain, x86), x86, evaluator.split, QUICKLY_TRAINED)
    assert check.failures == []
    assert check.to_dict()["verified"] is True
    assert check.accuracy_runtime == pytest.approx(check.accuracy_torch, abs=0.01)
    assert check.accuracy_torch > 0.3
    assert check.agreement > 0.99
    assert check.integer_layers in (0, sum(bool(spec.weight_shape) for spec in plain.network.layers))


def test_the_same_network_gives_the_same_bytes(plain: PlainNetwork, x86: Device) -> None:
    assert sha256(shipped(plain, x86)) == sha256(shipped(plain, x86))


def test_other_weights_are_found_out(
    plain: PlainNetwork, trained: Supernet, small_space: MobileSpace, evaluator: Evaluator, x86: Device
) -> None:
    precision = max(spec.precision for spec in plain.network.layers)
    other = evaluator.plain(trained, uniform(small_space, precision))
    with torch.no_grad():
        other.layer("classifier").arithmetic.bias[3] += 3.0  # type: ignore[operator, index]
    check = verify(plain, first_lowerings(plain), shipped(other, x86), x86, evaluator.split, Tolerances())
    assert len(check.failures) == 1
    assert check.to_dict()["verified"] is False


def test_another_precision_is_found_out_in_the_graph(
    trained: Supernet, small_space: MobileSpace, evaluator: Evaluator, x86: Device
) -> None:
    integer, real = (evaluator.plain(trained, uniform(small_space, precision)) for precision in ("w8a8", FLOAT))
    loose = Tolerances(float_max_abs_diff=1e9, agreement=0.0)
    for network, model in ((integer, shipped(real, x86)), (real, shipped(integer, x86))):
        failures = verify(network, first_lowerings(network), model, x86, evaluator.split, loose).failures
        assert len(failures) == 2
        assert all("integer kernels" in line for line in failures)


def test_outputs_that_are_not_finite_are_found_out(
    trained: Supernet, small_space: MobileSpace, evaluator: Evaluator, x86: Device
) -> None:
    broken = evaluator.plain(trained, uniform(small_space, FLOAT))
    model_of = evaluator.plain(trained, uniform(small_space, FLOAT))
    with torch.no_grad():
        model_of.layer("classifier").arithmetic.bias[0] = float("nan")  # type: ignore[operator]
    check = verify(broken, first_lowerings(broken), shipped(model_of, x86), x86, evaluator.split, Tolerances())
    assert any("not finite" in line for line in check.failures)
    assert check.to_dict()["verified"] is False


def test_a_batch_that_does_not_divide_the_images(plain: PlainNetwork, evaluator: Evaluator, x86: Device) -> None:
    images = evaluator.split.images[:11]
    several = Device("x86", batch=4)
    expected = run_model(shipped(plain, x86), x86, plain.network, images)
    np.testing.assert_allclose(run_model(shipped(plain, several), several, plain.network, images), expected, atol=0.05)


def test_weights_of_an_unfolded_layer_are_refused(trained: Supernet, small_space: MobileSpace) -> None:
    with pytest.raises(ValueError, match="fold the network"):
        layer_weights(trained.extract(small_space.largest()).layer("stem"))


def test_labels_count(plain: PlainNetwork, evaluator: Evaluator, x86: Device) -> None:
    split = Split(evaluator.split.images, (evaluator.split.labels + 1) % 10)
    check = verify(plain, first_lowerings(plain), shipped(plain, x86), x86, split, QUICKLY_TRAINED)
    assert check.accuracy_runtime < 0.2
    assert check.failures == []
