"""Every format of weights: what holds for all of them, and each one against a plain reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spaces.errors import UserError
from spaces.precision import parse_precision
from spaces.quantizers import (
    WEIGHT_QUANTIZERS,
    EncodedWeight,
    QuantizerSettings,
    WeightQuantizer,
    quantizer_of,
    stored_bytes,
)
from spaces.quantizers.integer import ANNEALING_BOUNDARY, IntegerWeights, last_level
from spaces.quantizers.nonuniform import GAUSSIAN_CODEBOOKS, PowerWeights, nearest
from spaces.quantizers.scales import GAUSSIAN_STEPS, group_shape, group_sizes, grouped, spread

RULES = ("maximum", "percentile", "statistics", "learned")
INTEGER = ("w8", "w4", "w3", "w2", "w8@tensor", "w4@inputs", "w4@16", "w2@32", "w4@128")
CODED = ("power2", "power3", "power4", "codebook2", "codebook3", "codebook4")
CASES = [
    *((text, QuantizerSettings(scale=rule, percentile=0.95)) for text in INTEGER for rule in RULES),
    *((text, QuantizerSettings(binary=rule)) for text in ("binary",) for rule in ("straight_through", "reste", "biper")),
    *((text, QuantizerSettings()) for text in ("ternary", *CODED, "partial@1/8", "fp8")),
    *((text, QuantizerSettings(scale="statistics")) for text in ("power3", "power4")),
]
SHAPES = [(12, 8, 3, 3), (10, 40), (6, 1, 7, 7), (1, 5)]
quick = settings(max_examples=40, deadline=None)

formats = pytest.mark.parametrize(("text", "choice"), CASES, ids=[f"{text}-{c.scale}-{c.binary}" for text, c in CASES])
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def weight_of(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng) * torch.rand(shape[0], *[1] * (len(shape) - 1), generator=rng)


def made(text: str, shape: tuple[int, ...], choice: QuantizerSettings = QuantizerSettings()) -> WeightQuantizer:  # noqa: B008
    quantizer = quantizer_of(parse_precision(text), shape, choice)
    assert quantizer is not None
    return quantizer


def groups(x: torch.Tensor, text: str) -> list[torch.Tensor]:
    """The weights of each scale, by loops, row after row."""
    scales = parse_precision(text).scales
    if scales == "tensor":
        return [x.flatten()]
    if scales == "inputs":
        return [x[:, i].flatten() for i in range(x.shape[1])]
    if scales == "channel":
        return [row.flatten() for row in x]
    return [row.flatten()[i : i + int(scales)] for row in x for i in range(0, row.numel(), int(scales))]


# -- all formats --------------------------------------------------------------------------------------------------------------


def test_every_registered_format_is_tested_here() -> None:
    assert {parse_precision(text).weights for text, _ in CASES} == set(WEIGHT_QUANTIZERS)
    assert quantizer_of(parse_precision("fp32"), (3, 4)) is None


@formats
@shapes
def test_decoding_gives_the_forward_to_the_bit(text: str, choice: QuantizerSettings, shape: tuple[int, ...]) -> None:
    weight, quantizer = weight_of(shape), made(text, shape, choice)
    values = quantizer(weight)
    encoded = quantizer.encode(weight)
    assert values.shape == shape
    if encoded is None:
        assert text.startswith(("partial", "fp8"))
        return
    assert torch.equal(encoded.decode(), values)
    assert encoded.codes.dtype == torch.int8
    assert encoded.codes.shape == shape
    assert encoded.scales.dtype == torch.float32
    assert encoded.scales.shape == group_shape(shape, parse_precision(text).scales)
    assert (encoded.scales > 0).all()
    assert encoded.bits == parse_precision(text).weight_bits
    assert not encoded.scales.requires_grad
    if encoded.codebook is not None:
        assert encoded.codebook.shape == (2**encoded.bits,)
        assert not encoded.codebook.requires_grad
        assert encoded.codes.min() >= 0
        assert encoded.codes.max() < 2**encoded.bits
    elif encoded.bits > 1:
        assert int(encoded.codes.abs().max()) <= last_level(encoded.bits)


@formats
@shapes
def test_a_group_has_no_more_values_than_levels(text: str, choice: QuantizerSettings, shape: tuple[int, ...]) -> None:
    precision = parse_precision(text)
    levels = {"partial": 2**8, "ternary": 3}.get(precision.weights, 2**precision.weight_bits)
    for values in groups(made(text, shape, choice)(weight_of(shape)).detach(), text):
        assert len(set(values.tolist())) <= levels


@formats
@shapes
def test_the_same_weight_gives_the_same_values(text: str, choice: QuantizerSettings, shape: tuple[int, ...]) -> None:
    weight, quantizer = weight_of(shape), made(text, shape, choice)
    first = quantizer(weight)
    assert torch.equal(quantizer(weight), first)
    assert torch.equal(made(text, shape, choice)(weight), first)


@formats
@shapes
def test_masked_weights_and_dead_channels_stay_zero(text: str, choice: QuantizerSettings, shape: tuple[int, ...]) -> None:
    weight = weight_of(shape)
    keep = (torch.rand(shape, generator=torch.Generator().manual_seed(7)) < 0.5).float()
    keep[-1] = 0.0
    masked = (weight * keep).requires_grad_()
    quantizer = made(text, shape, choice)
    values = quantizer(masked)
    values.sum().backward()
    assert masked.grad is not None
    assert values.isfinite().all()
    assert masked.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in quantizer.parameters())
    assert not values[keep == 0].any()
    encoded = quantizer.encode(masked)
    assert encoded is None or not encoded.decode()[keep == 0].any()
    assert not made(text, shape, choice)(torch.zeros(shape)).any()


@formats
def test_a_slice_of_the_largest_is_quantized_as_a_weight_of_its_own(text: str, choice: QuantizerSettings) -> None:
    """Nothing but learned steps hangs on the other weights; those have a test of their own."""
    if choice.scale == "learned":
        return
    shape, small = (12, 8, 5, 5), (7, 5, 3, 3)
    weight, quantizer = weight_of(shape), made(text, shape, choice)
    part = weight[:7, :5, 1:4, 1:4]
    assert torch.equal(quantizer(part), made(text, small, choice)(part.clone()))
    encoded = quantizer.encode(part)
    assert encoded is None or torch.equal(encoded.decode(), quantizer(part))


@formats
@shapes
def test_gradients_reach_the_weight_and_what_is_learned(text: str, choice: QuantizerSettings, shape: tuple[int, ...]) -> None:
    weight, quantizer = weight_of(shape).requires_grad_(), made(text, shape, choice)
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    (quantizer(weight) * gradient).sum().backward()
    assert weight.grad is not None
    if text != "binary" and choice.scale != "learned":
        assert torch.equal(weight.grad, gradient)
    for parameter in quantizer.parameters():
        assert parameter.grad is not None
    assert bool(list(quantizer.parameters())) == (choice.scale == "learned" or text in CODED)


@formats
@shapes
def test_a_factor_of_the_channels_goes_into_the_encoding(text: str, choice: QuantizerSettings, shape: tuple[int, ...]) -> None:
    encoded = made(text, shape, choice).encode(weight_of(shape))
    if encoded is None:
        return
    factor = torch.linspace(-2.3, 1.7, shape[0])
    folded = encoded.times(factor)
    expected = encoded.decode() * factor.view(-1, *[1] * (len(shape) - 1))
    torch.testing.assert_close(folded.decode(), expected, rtol=3e-7, atol=0)
    assert (folded.scales >= 0).all() or encoded.codebook is not None
    assert folded.codes.dtype == torch.int8


@pytest.mark.parametrize("text", ["w8", "w4", "w3", "w4@tensor", "w8@inputs", "w4@16", "power3", "power4", "fp8"])
@shapes
def test_quantizing_twice_by_the_maximum_changes_nothing(text: str, shape: tuple[int, ...]) -> None:
    quantizer = made(text, shape)
    once = quantizer(weight_of(shape)).detach()
    torch.testing.assert_close(quantizer(once), once, rtol=3e-7, atol=0)


@pytest.mark.parametrize("shape", [(16, 64, 3, 3), (64, 1, 7, 7), (32, 192)], ids=str)
def test_more_bits_have_less_error(shape: tuple[int, ...]) -> None:
    weight = weight_of(shape)

    def error(text: str, rule: str) -> float:
        return float((made(text, shape, QuantizerSettings(scale=rule))(weight) - weight).detach().square().mean())

    for rule in RULES:
        errors = [error(text, rule) for text in ("binary", "w2", "w3", "w4", "w8")]
        assert errors == sorted(errors, reverse=True)
        assert error("w4@32", rule) < error("w4@tensor", rule)
    assert error("ternary", "maximum") == pytest.approx(error("w2", "maximum"), rel=0.05)
    assert error("partial@1/8", "maximum") < error("partial@1/16", "maximum") < error("binary", "maximum")
    assert error("codebook2", "maximum") < error("w2", "statistics")
    assert error("codebook4", "maximum") < error("w4", "statistics")
    assert error("power3", "maximum") < error("w3", "maximum")
    assert error("w8", "statistics") <= error("w8", "maximum")


@formats
def test_stored_bytes_are_those_of_the_encoding(text: str, choice: QuantizerSettings) -> None:
    for shape in SHAPES:
        encoded = made(text, shape, choice).encode(weight_of(shape))
        if encoded is None:
            continue
        codebook = 0 if encoded.codebook is None else encoded.codebook.numel()
        packed = math.ceil(math.prod(shape) * encoded.bits / 8)
        expected = packed + 4 * encoded.scales.numel() + 4 * codebook
        assert stored_bytes(parse_precision(text), shape, math.prod(shape)) == expected


def test_stored_bytes_of_sparse_float_and_partial_weights() -> None:
    assert stored_bytes(parse_precision("fp32"), (8, 16), 64) == 256
    assert stored_bytes(parse_precision("w4"), (8, 16), 64) == 32 + 32
    assert stored_bytes(parse_precision("w4@32"), (8, 48), 8 * 48) == 192 + 4 * 8 * 2
    assert stored_bytes(parse_precision("partial@1/8"), (8, 16), 128) == (7 * 16 + 128 + 128) // 8 + 4 * 16


@pytest.mark.parametrize("wrong", [{"scale": "largest"}, {"percentile": 99.9}, {"percentile": 0.0}, {"binary": "sign"}])
def test_settings_that_do_not_exist_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match="allowed"):
        QuantizerSettings(**wrong)  # type: ignore[arg-type]


# -- scale groups -------------------------------------------------------------------------------------------------------------


@quick
@given(st.sampled_from(SHAPES), st.sampled_from(("w4", "w4@tensor", "w4@inputs", "w4@16", "w4@32", "w4@1024")))
def test_groups_sizes_and_spread_agree_with_loops(shape: tuple[int, ...], text: str) -> None:
    scales = parse_precision(text).scales
    weight = weight_of(shape)
    expected = groups(weight, text)
    rows, columns = group_shape(shape, scales)
    assert rows * columns == len(expected)
    assert group_sizes(shape, scales).tolist() * rows == [len(group) for group in expected]
    found = grouped(weight, scales)
    for group, row in zip(expected, found.reshape(rows * columns, -1), strict=True):
        assert torch.equal(row[: len(group)], group)
        assert not row[len(group) :].any()
    numbers = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns)
    each = spread(numbers, shape, scales).expand(shape)
    for number, group in enumerate(groups(each, text)):
        assert (group == number).all()


# -- integer ------------------------------------------------------------------------------------------------------------------


@quick
@given(st.integers(0, 10_000), st.sampled_from(SHAPES))
def test_8_bits_by_the_maximum_are_what_torch_computes(seed: int, shape: tuple[int, ...]) -> None:
    weight = weight_of(shape, seed)
    scales = weight.abs().flatten(1).amax(1) / 127
    zeros = torch.zeros(shape[0], dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(weight, scales, zeros, 0, -127, 127)
    assert torch.equal(made("w8", shape)(weight), expected)


def reference_step(group: np.ndarray, limit: int, rule: str, percentile: float) -> float:
    magnitudes = np.sort(np.abs(group))[::-1]
    dropped = int(np.floor((1 - percentile) * len(group) + 1e-9)) if rule == "percentile" and limit > 1 else 0
    largest = magnitudes[dropped]
    step = largest * 2 / 3 if limit == 1 else largest / limit
    if (rule == "statistics" and limit in GAUSSIAN_STEPS) or limit == 1:
        step = min(step, magnitudes.mean() * GAUSSIAN_STEPS[limit])
    return float(step)


@pytest.mark.parametrize("rule", RULES[:3])
@pytest.mark.parametrize("text", INTEGER)
@shapes
def test_integer_weights_equal_a_loop_over_the_groups(text: str, rule: str, shape: tuple[int, ...]) -> None:
    weight, precision = weight_of(shape), parse_precision(text)
    limit = 2 ** (precision.weight_bits - 1) - 1
    encoded = made(text, shape, QuantizerSettings(scale=rule, percentile=0.8)).encode(weight)
    assert encoded is not None
    codes = groups(encoded.codes, text)
    for i, group in enumerate(groups(weight, text)):
        step = reference_step(group.double().numpy(), limit, rule, 0.8)
        assert float(encoded.scales.flatten()[i]) == pytest.approx(step, rel=1e-6)
        exact = group.double().numpy() / step
        sure = np.abs(np.abs(exact % 1) - 0.5) > 1e-4  # at a threshold either level is right
        assert (np.clip(np.rint(exact), -limit, limit) == codes[i].numpy())[sure].all()
    unsigned = encoded.codes.int() + 2 ** (precision.weight_bits - 1)
    assert 0 <= int(unsigned.min()) <= int(unsigned.max()) < 2**precision.weight_bits


def test_a_percentile_of_a_sparse_channel_leaves_a_step() -> None:
    weight = torch.zeros(1, 100)
    weight[0, :3] = torch.tensor([1.0, -0.5, 0.25])
    encoded = made("w8", (1, 100), QuantizerSettings(scale="percentile", percentile=0.9)).encode(weight)
    assert encoded is not None
    assert float(encoded.scales) == pytest.approx(1 / 127)


def test_the_statistical_steps_are_the_best_for_normally_distributed_weights() -> None:
    x = np.linspace(-8, 8, 200_001)
    density = np.exp(-(x**2) / 2)
    mean = math.sqrt(2 / math.pi)

    def error(step: float, limit: int) -> float:
        return float((density * (np.clip(np.rint(x / step), -limit, limit) * step - x) ** 2).sum())

    for limit, step in GAUSSIAN_STEPS.items():
        assert error(step * mean, limit) < min(error(step * mean * 0.98, limit), error(step * mean * 1.02, limit))


def lsq_gradients(weight: np.ndarray, gradient: np.ndarray, step: float, limit: int) -> tuple[np.ndarray, float]:
    """Equations 2 to 5 of the paper, one weight after the other."""
    of_weight, of_step = np.zeros_like(weight), 0.0
    for i, (w, g) in enumerate(zip(weight, gradient, strict=True)):
        if w / step <= -limit:
            of_step -= g * limit
        elif w / step >= limit:
            of_step += g * limit
        else:
            of_step += g * (np.rint(w / step) - w / step)
            of_weight[i] = g
    return of_weight, of_step / math.sqrt(len(weight) * limit)


@pytest.mark.parametrize("text", ["w2", "w3", "w4", "w4@tensor", "w4@inputs", "w3@16", "w2@32"])
@shapes
def test_learned_steps_have_the_gradients_of_the_paper(text: str, shape: tuple[int, ...]) -> None:
    weight = weight_of(shape).requires_grad_()
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    quantizer = made(text, shape, QuantizerSettings(scale="learned"))
    quantizer(weight)
    (steps,) = quantizer.parameters()
    with torch.no_grad():
        steps *= 0.7  # so that more than a few weights lie outside
    (quantizer(weight) * gradient).sum().backward()
    assert weight.grad is not None
    assert steps.grad is not None
    limit = last_level(parse_precision(text).weight_bits)
    rows = zip(groups(weight.detach(), text), groups(gradient, text), groups(weight.grad, text), strict=True)
    for i, (w, g, found) in enumerate(rows):
        of_weight, of_step = lsq_gradients(w.double().numpy(), g.double().numpy(), float(steps.flatten()[i].detach()), limit)
        assert found.numpy() == pytest.approx(of_weight, rel=1e-5)
        assert float(steps.grad.flatten()[i]) == pytest.approx(of_step, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("text", ["w4", "w4@tensor", "w4@inputs", "w4@16"])
def test_learned_steps_are_sliced_with_the_weight(text: str) -> None:
    shape = (12, 8, 3, 3)
    weight, quantizer = weight_of(shape), made(text, shape, QuantizerSettings(scale="learned"))
    quantizer(weight)
    (steps,) = quantizer.parameters()
    part = weight[:7, :4]
    encoded = quantizer.encode(part)
    assert encoded is not None
    rows, columns = group_shape(part.shape, parse_precision(text).scales)
    assert torch.equal(encoded.scales, steps[:rows, :columns])
    assert torch.equal(encoded.decode(), quantizer(part))
    quantizer(part).sum().backward()
    assert steps.grad is not None
    assert steps.grad[:rows, :columns].any()
    assert not steps.grad[rows:].any()
    assert not steps.grad[:, columns:].any()


def test_a_block_of_a_smaller_kernel_takes_the_step_of_its_first_weight() -> None:
    shape = (3, 8, 5, 5)
    weight, quantizer = weight_of(shape), made("w4@16", shape, QuantizerSettings(scale="learned"))
    quantizer(weight)
    (steps,) = quantizer.parameters()
    encoded = quantizer.encode(weight[:, :6, 1:4, 1:4])
    assert encoded is not None
    for block in range(4):  # 6 * 3 * 3 weights in blocks of 16
        channel, place = divmod(block * 16, 9)
        row, column = divmod(place, 3)
        largest = (channel * 25 + (row + 1) * 5 + column + 1) // 16
        assert torch.equal(encoded.scales[:, block], steps[:, largest])


def test_learned_steps_start_with_the_part_that_is_seen_and_start_again_when_lost() -> None:
    weight, quantizer = weight_of((6, 20)), made("w3", (6, 20), QuantizerSettings(scale="learned"))
    assert isinstance(quantizer, IntegerWeights)
    quantizer(weight[:4])
    assert (quantizer.steps[:4] > 0).all()
    assert not quantizer.steps[4:].any()
    with torch.no_grad():
        quantizer.steps[0] = -0.1
        kept = quantizer.steps[1:4].clone()
    quantizer(weight)
    assert (quantizer.steps > 0).all()
    assert torch.equal(quantizer.steps[1:4], kept)
    quantizer.start(2 * weight)
    other = made("w3", (6, 20), QuantizerSettings(scale="learned"))
    other(2 * weight)
    assert torch.equal(quantizer.steps, next(other.parameters()))


def test_annealing_leaves_only_the_weights_near_a_threshold_to_learn() -> None:
    """The largest weight lies outside of the grid, where there is no threshold any more."""
    quantizer = made("w3", (1, 7), QuantizerSettings(scale="percentile", percentile=0.85, annealing=True))
    near, far = 0.4 * ANNEALING_BOUNDARY, 3 * ANNEALING_BOUNDARY
    weight = torch.tensor([[3.5, 3.0, 0.5 + near, -1.5 + near, 0.5 + far, 1.0, 0.0]]).requires_grad_()
    for progress, expected in ((0.5, [1] * 7), (0.95, [0, 0, 1, 1, 0, 0, 0])):
        quantizer.progress = progress
        weight.grad = None
        values = quantizer(weight)
        values.sum().backward()
        assert weight.grad is not None
        assert weight.grad[0].tolist() == expected
        assert values[0].tolist() == [3, 3, 1, -1, 1, 1, 0]


# -- ternary, binary, partial -------------------------------------------------------------------------------------------------


@shapes
def test_ternary_weights_equal_the_paper(shape: tuple[int, ...]) -> None:
    weight = weight_of(shape)
    values = made("ternary", shape)(weight)
    for row, found in zip(weight.flatten(1).double().numpy(), values.flatten(1).numpy(), strict=True):
        kept = np.abs(row) > 0.7 * np.abs(row).mean()
        np.testing.assert_allclose(found, np.sign(row) * kept * np.abs(row[kept]).mean(), rtol=1e-5)


def binary_values(weight: torch.Tensor, choice: QuantizerSettings, progress: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    quantizer = made("binary", tuple(weight.shape), choice)
    quantizer.progress = progress
    weight = weight.clone().requires_grad_()
    values = quantizer(weight)
    values.sum().backward()
    assert weight.grad is not None
    return values.detach(), weight.grad


@shapes
def test_binary_weights_are_the_sign_times_the_mean_magnitude(shape: tuple[int, ...]) -> None:
    weight = weight_of(shape)
    for binary in ("straight_through", "reste"):
        values, _ = binary_values(weight, QuantizerSettings(binary=binary))
        expected = weight.sign() * weight.abs().flatten(1).mean(1).view(-1, *[1] * (len(shape) - 1))
        torch.testing.assert_close(values, expected)


def test_the_gradient_of_the_sign_ends_at_three_means() -> None:
    weight = torch.tensor([[0.1, -0.2, 0.1, -0.1, 0.1, 0.1, -0.1, 8.0]])
    _, slope = binary_values(weight, QuantizerSettings())
    assert slope[0].tolist() == [1, 1, 1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_reste_has_the_slope_of_the_power_function(progress: float) -> None:
    weight = weight_of((3, 200))
    _, slope = binary_values(weight, QuantizerSettings(binary="reste"), progress)
    o = 1 + (1 - math.cos(progress * math.pi / 2)) * 2
    z = (weight / weight.abs().mean(1, keepdim=True)).double().abs().numpy()
    tangent = ((z + 1e-6) ** (1 / o) - (z - 1e-6).clip(0) ** (1 / o)) / 2e-6
    expected = np.where(z <= 0.1, 0.1 ** (1 / o) / 0.1, tangent) * (z <= 3)
    np.testing.assert_allclose(slope.numpy(), expected, rtol=1e-4)
    if progress == 0:
        assert torch.equal(slope, binary_values(weight, QuantizerSettings())[1])


def test_biper_has_the_sign_and_the_slope_of_a_sine() -> None:
    weight = weight_of((3, 200))
    weight[:, 0] = 5 * weight.abs().mean()  # past the half period
    values, slope = binary_values(weight, QuantizerSettings(binary="biper"))
    scale = weight.abs().mean(1, keepdim=True)
    z = (weight / scale).double()
    torch.testing.assert_close(values.double(), torch.sign(torch.sin(0.8 * z)) * scale.double())
    assert (values[:, 0] < 0).any()
    numeric = (torch.sin(0.8 * (z + 1e-6)) - torch.sin(0.8 * (z - 1e-6))) / 2e-6
    torch.testing.assert_close(slope.double(), numeric, rtol=1e-4, atol=1e-5)


@shapes
def test_partial_weights_keep_the_largest_in_8_bits(shape: tuple[int, ...]) -> None:
    weight = weight_of(shape)
    values = made("partial@1/8", shape)(weight)
    order = weight.abs().flatten().argsort(descending=True)
    salient = torch.zeros(weight.numel(), dtype=torch.bool)
    salient[order[: weight.numel() // 8]] = True
    for row, keep, found in zip(weight.flatten(1), salient.view(shape).flatten(1), values.flatten(1), strict=True):
        step = row.abs().max() / 127
        assert ((found - row)[keep].abs() <= 0.501 * step).all()
        if not keep.all():
            torch.testing.assert_close(found[~keep], row[~keep].sign() * row[~keep].abs().mean())


# -- power, codebook ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [0.4, 0.75, 1.0, 1.3])
@shapes
def test_power_weights_are_uniform_on_the_curve(exponent: float, shape: tuple[int, ...]) -> None:
    weight, quantizer = weight_of(shape), made("power4", shape)
    assert isinstance(quantizer, PowerWeights)
    with torch.no_grad():
        quantizer.exponent.fill_(exponent)
    scale = weight.abs().flatten(1).amax(1).view(-1, *[1] * (len(shape) - 1)).double()
    curve = (weight.double() / scale).abs() ** exponent * 7
    expected = weight.sign() * (curve.round() / 7) ** (1 / exponent) * scale
    sure = ((curve % 1) - 0.5).abs() > 1e-4
    torch.testing.assert_close(quantizer(weight).double()[sure], expected[sure], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("exponent", [0.5, 0.75, 1.2])
def test_the_exponent_gets_the_gradient_of_the_curve_with_its_rounding_taken_straight_through(exponent: float) -> None:
    choice = QuantizerSettings(scale="percentile", percentile=0.9)  # some weights lie outside
    weight, quantizer = weight_of((6, 40)), made("power4", (6, 40), choice)
    assert isinstance(quantizer, PowerWeights)
    with torch.no_grad():
        quantizer.exponent.fill_(exponent)
    gradient = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    (quantizer(weight) * gradient).sum().backward()
    assert quantizer.exponent.grad is not None
    encoded = quantizer.encode(weight)
    assert encoded is not None
    counts = encoded.codes != 8
    a = torch.tensor(exponent, dtype=torch.float64, requires_grad=True)
    z = (weight.double().abs() / encoded.scales)[counts]
    curve = (z**a * 7).clamp(max=7)
    rounded = curve + (curve.round() - curve).detach()
    values = (rounded / 7) ** (1 / a) * (weight.sign() * encoded.scales)[counts]
    (values * gradient[counts]).sum().backward()
    assert a.grad is not None
    assert float(quantizer.exponent.grad) == pytest.approx(float(a.grad) / math.sqrt(240 * 7), rel=1e-3)


@quick
@given(st.lists(st.floats(-4, 4, width=32), min_size=16, max_size=16), st.integers(1, 4), st.integers(0, 1000))
def test_nearest_finds_the_nearest_entry(entries: list[float], bits: int, seed: int) -> None:
    table = torch.tensor(entries[: 2**bits]).sort().values
    x = torch.randn(7, 9, generator=torch.Generator().manual_seed(seed)) * 3
    distance = (x.double() - table.double()[nearest(x, table).long()]).abs()
    best = (x.double().unsqueeze(-1) - table.double()).abs().amin(-1)
    torch.testing.assert_close(distance, best, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codebooks_start_at_the_best_values_for_normally_distributed_weights(bits: int) -> None:
    """Each is the mean of the weights that take it (Lloyd's condition), but for the 0."""
    x = np.linspace(-8, 8, 200_001) / math.sqrt(2 / math.pi)
    density = np.exp(-(np.linspace(-8, 8, 200_001) ** 2) / 2)
    table = np.sort([0.0, *GAUSSIAN_CODEBOOKS[bits]])
    taken = np.abs(x[:, None] - table).argmin(1)
    for code, value in enumerate(table):
        if value:
            assert np.average(x[taken == code], weights=density[taken == code]) == pytest.approx(value, abs=2e-3)


def test_codebook_values_get_the_gradients_of_the_weights_that_take_them() -> None:
    weight, quantizer = weight_of((6, 40)), made("codebook3", (6, 40))
    gradient = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    (quantizer(weight) * gradient).sum().backward()
    encoded = quantizer.encode(weight)
    (values,) = quantizer.parameters()
    assert isinstance(encoded, EncodedWeight)
    assert encoded.codebook is not None
    assert values.grad is not None
    for value, found in zip(values.tolist(), values.grad.tolist(), strict=True):
        code = encoded.codebook.tolist().index(value)
        expected = (gradient * encoded.scales)[encoded.codes == code].sum() / math.sqrt(240 * 4)
        assert found == pytest.approx(float(expected), rel=1e-4, abs=1e-7)
