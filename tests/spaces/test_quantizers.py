"""Integer grids: torch against numpy, weights against levels, gradients straight through."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from spaces.precision import parse_precision
from spaces.quantizers import (
    ACTIVATION_LEVELS,
    QuantizerSettings,
    WeightQuantizer,
    activation_grid,
    quantize_activation,
    quantizer_of,
)

weights = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=4, max_side=6),
    elements=st.floats(-64, 64, width=32).filter(lambda value: value == 0 or abs(value) > 1e-6),
)
WEIGHT_LIMIT = 127
quick = settings(max_examples=40, deadline=None)
bounds = st.floats(-1000, 1000, width=32)


def int8() -> WeightQuantizer:
    quantizer = quantizer_of(parse_precision("w8a8"), (1, 1), QuantizerSettings())
    assert quantizer is not None
    return quantizer


def quantize_weight(weight: torch.Tensor) -> torch.Tensor:
    quantized: torch.Tensor = int8()(weight)
    return quantized


def weight_scales(weight: torch.Tensor) -> torch.Tensor:
    encoded = int8().encode(weight)
    assert encoded is not None
    return encoded.scales[:, 0]


def weight_levels(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    encoded = int8().encode(torch.from_numpy(weight))
    assert encoded is not None
    return encoded.codes.numpy(), encoded.scales[:, 0].numpy()


def per_channel(scales: np.ndarray, ndim: int) -> np.ndarray:
    return scales.reshape(-1, *[1] * (ndim - 1))


def fake_quantized(x: np.ndarray, scale: np.float32, zero_point: int) -> np.ndarray:
    """Plain reference in double precision."""
    levels = np.clip(np.rint(x.astype(np.float64) / np.float64(scale)) + zero_point, 0, ACTIVATION_LEVELS)
    return np.asarray((levels - zero_point) * np.float64(scale))


# -- weights ------------------------------------------------------------------------------------------------------------------


@quick
@given(weights)
def test_weight_levels_times_scale_is_the_quantized_weight(weight: np.ndarray) -> None:
    levels, scales = weight_levels(weight)
    assert levels.dtype == np.int8
    assert scales.dtype == np.float32
    assert levels.shape == weight.shape
    assert np.abs(levels.astype(int)).max() <= WEIGHT_LIMIT
    assert np.array_equal(levels * per_channel(scales, weight.ndim), quantize_weight(torch.from_numpy(weight)).numpy())


def test_weight_levels_round_like_torch_half_way_between_two_levels() -> None:
    """Exactly half-way the result hangs on how the division is done; both must do it alike."""
    rng = np.random.default_rng(0)
    scales = rng.uniform(0.001, 0.1, (500, 1)).astype(np.float32)
    weight = (rng.integers(-126, 126, (500, 16)).astype(np.float32) + np.float32(0.5)) * scales
    weight[:, :1] = WEIGHT_LIMIT * scales
    levels, found = weight_levels(weight)
    differs = levels * found[:, None] != quantize_weight(torch.from_numpy(weight)).numpy()
    assert differs.mean() == 0


@quick
@given(weights)
def test_quantizing_a_weight_twice_changes_nothing(weight: np.ndarray) -> None:
    once = quantize_weight(torch.from_numpy(weight))
    twice = quantize_weight(once)
    assert np.array_equal(weight_levels(once.numpy())[0], weight_levels(weight)[0])
    assert torch.equal(twice, once)


@quick
@given(weights)
def test_weight_error_is_at_most_half_a_step_and_zero_stays(weight: np.ndarray) -> None:
    quantized = quantize_weight(torch.from_numpy(weight)).numpy()
    scales = per_channel(weight_scales(torch.from_numpy(weight)).numpy(), weight.ndim)
    assert (np.abs(quantized - weight) <= scales * 0.5001).all()
    assert (quantized[weight == 0] == 0).all()


@quick
@given(weights)
def test_the_largest_weight_of_a_channel_lies_on_the_last_level(weight: np.ndarray) -> None:
    largest = np.abs(weight).reshape(len(weight), -1).max(axis=1)
    top = np.abs(weight_levels(weight)[0].astype(int)).reshape(len(weight), -1).max(axis=1)
    assert (top[largest > 0] == WEIGHT_LIMIT).all()
    assert (top[largest == 0] == 0).all()


def test_weight_channels_have_their_own_scale() -> None:
    weight = torch.tensor([[1.0, 0.5], [100.0, 0.5]])
    assert weight_scales(weight).tolist() == pytest.approx([1 / 127, 100 / 127])
    assert quantize_weight(weight)[0].tolist() == pytest.approx([1.0, 64 / 127])
    assert quantize_weight(weight)[1].tolist() == pytest.approx([100.0, 100 / 127])


def test_a_dead_channel_stays_zero() -> None:
    weight = np.zeros((3, 4), np.float32)
    assert not quantize_weight(torch.from_numpy(weight)).any()
    levels, scales = weight_levels(weight)
    assert not levels.any()
    assert (scales > 0).all()


def test_weight_gradients_go_straight_through() -> None:
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    gradient = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(1))
    quantize_weight(weight).backward(gradient)  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert torch.equal(weight.grad, gradient)


# -- activations --------------------------------------------------------------------------------------------------------------


@quick
@given(bounds, bounds)
def test_the_activation_grid_holds_zero_and_covers_the_range(one: float, other: float) -> None:
    low, high = min(one, other), max(one, other)
    scale, zero_point = activation_grid(low, high)
    assert isinstance(scale, np.float32)
    assert scale > 0
    assert isinstance(zero_point, int)
    assert 0 <= zero_point <= ACTIVATION_LEVELS
    assert fake_quantized(np.zeros(1), scale, zero_point) == 0
    for bound in (low, high):
        assert abs(fake_quantized(np.array([bound]), scale, zero_point)[0] - bound) <= 0.5001 * scale


@quick
@given(st.floats(0, 1000, width=32))
def test_after_a_relu_the_zero_point_is_zero(high: float) -> None:
    """Otherwise the runtime cannot absorb the ReLU."""
    assert activation_grid(0.0, high)[1] == 0
    assert activation_grid(high / 2, high)[1] == 0


@quick
@given(bounds, bounds, st.integers(0, 1000))
def test_torch_quantizes_activations_like_the_reference(one: float, other: float, seed: int) -> None:
    low, high = min(one, other, 0.0), max(one, other, 0.0)
    if high - low < 1e-3:
        return
    scale, zero_point = activation_grid(low, high)
    x = np.random.default_rng(seed).uniform(low - 1, high + 1, 64).astype(np.float32)
    offset = np.abs(x / np.float64(scale) % 1 - 0.5)
    x = x[offset > 1e-3]  # half-way between two levels either is right
    result = quantize_activation(torch.from_numpy(x), torch.tensor(low), torch.tensor(high)).numpy()
    np.testing.assert_allclose(result, fake_quantized(x, scale, zero_point), rtol=1e-5, atol=1e-6 * (high - low))


@quick
@given(st.floats(2**-10, 1000, width=32))
def test_torch_and_the_runtime_agree_on_the_grid_of_a_symmetric_range(high: float) -> None:
    """The zero point of `[-a, a]` is 127.5: rounding errors decide, so both sides must compute it in the same precision."""
    scale, zero_point = activation_grid(-high, high)
    lowest = quantize_activation(torch.tensor([-3 * high]), torch.tensor(-high), torch.tensor(high))
    assert lowest.item() == pytest.approx(-zero_point * float(scale), rel=1e-5)


@quick
@given(st.integers(1, 254), st.floats(2**-10, 100, width=32))
def test_quantizing_an_activation_twice_changes_nothing(zero_point: int, scale: float) -> None:
    low, high = torch.tensor(-zero_point * scale), torch.tensor((ACTIVATION_LEVELS - zero_point) * scale)
    x = torch.linspace(1.2 * low.item(), 1.2 * high.item(), 301)
    once = quantize_activation(x, low, high)
    assert torch.equal(quantize_activation(once, low, high), once)
    assert len(set(once.tolist())) <= ACTIVATION_LEVELS + 1


def test_activation_gradients_pass_inside_the_range_only() -> None:
    x = torch.tensor([-5.0, -0.9, 0.0, 0.5, 2.9, 5.0], requires_grad=True)
    quantize_activation(x, torch.tensor(-1.0), torch.tensor(3.0)).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 0]


def test_an_empty_range_gives_zeros() -> None:
    assert not quantize_activation(torch.zeros(4), torch.tensor(0.0), torch.tensor(0.0)).any()
    scale, zero_point = activation_grid(0.0, 0.0)
    assert scale > 0
    assert zero_point == 0
