"""Contracts that every elastic operator keeps; an operator that is registered is tested without being named here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from spaces.elastic import OPERATORS, ElasticLayer
from spaces.layers import LayerSpec
from spaces.plain import ActivationQuantizer
from spaces.precision import FLOAT, FLOAT_BITS
from spaces.sparsity import mask
from spaces.weights import effective_weight

MAXIMUM = {
    "conv2d": [
        LayerSpec("conv2d", 8, 12, 7, 7, 5, stride=2, activation="relu"),
        LayerSpec("conv2d", 8, 8, 6, 6, 5, groups=8, activation="relu"),
    ],
    "linear": [LayerSpec("linear", 12, 10)],
    "global_pool": [LayerSpec("global_pool", 12, 12, 5, 5)],
    "layer_norm": [LayerSpec("layer_norm", 12, 12, 5, 4)],
    "attention": [LayerSpec("attention", 36, 12, 3, 5, heads=3)],
}


def smaller(largest: LayerSpec) -> Iterator[LayerSpec]:
    """The largest form and smaller ones, in every precision, sparsity and surrounding that the operator has."""
    shapes = [largest]
    if largest.depthwise:
        shapes.append(replace(largest, in_channels=6, out_channels=6, groups=6, kernel=3))
    elif largest.operator == "global_pool":
        shapes.append(replace(largest, in_channels=4, out_channels=4, height=3, width=3))
    elif largest.operator == "layer_norm":
        shapes.append(replace(largest, in_channels=5, out_channels=5, height=1, width=7))
    elif largest.operator == "attention":
        shapes.append(replace(largest, in_channels=24, out_channels=8, heads=2))
        shapes.append(replace(largest, in_channels=18, out_channels=6, height=1, width=7))
    elif largest.operator == "conv2d":
        shapes += [replace(largest, in_channels=5, out_channels=8, kernel=3), replace(largest, kernel=1, stride=1)]
    else:
        shapes.append(replace(largest, in_channels=7))
    for spec in shapes:
        yield spec
        if not spec.weight_shape:
            yield replace(spec, input_bits=8, output_bits=8)
            if spec.operator != "global_pool":
                yield replace(spec, skip_bits=FLOAT_BITS, activation="relu")
            continue
        yield replace(spec, precision="w8a8", input_bits=8, output_bits=8)
        yield replace(spec, precision="w8a8")
        if spec.operator == "conv2d" and not spec.depthwise:
            yield replace(spec, sparsity="group@1/2")
            yield replace(spec, sparsity="unstructured@1/2+selective")
            yield replace(spec, precision="w8a8", input_bits=8, output_bits=8, sparsity="group@1/4")
            yield replace(spec, skip_bits=FLOAT_BITS, activation="none")
            yield replace(spec, precision="w8a8", skip_bits=8, input_bits=8, output_bits=8)


CASES = [
    pytest.param(largest, spec, id=f"{spec}") for name in OPERATORS for largest in MAXIMUM[name] for spec in smaller(largest)
]


def layer_of(largest: LayerSpec) -> ElasticLayer:
    torch.manual_seed(3)
    layer = OPERATORS[largest.operator](largest)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    return layer


def inputs_of(spec: LayerSpec, seed: int = 0, n: int = 6) -> tuple[torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, spec.in_channels, spec.height, spec.width, generator=generator)
    skip = torch.randn(n, spec.out_channels, spec.out_height, spec.out_width, generator=generator)
    return x, skip if spec.skip_bits else None


def stored(layer: ElasticLayer) -> torch.Tensor:
    weight = layer.get_parameter("weight.values")
    assert isinstance(weight, torch.Tensor)
    return weight


def levels(y: torch.Tensor) -> int:
    return len(np.unique(y.detach().numpy()))


def test_every_operator_has_a_largest_form_here() -> None:
    assert set(OPERATORS) == set(MAXIMUM)


FLOAT_CASES = [
    c for c in CASES if isinstance(s := c.values[1], LayerSpec) and s.precision == FLOAT and s.output_bits == FLOAT_BITS
]


@pytest.mark.parametrize(("largest", "spec"), FLOAT_CASES)
def test_the_slice_is_the_plain_torch_operator(largest: LayerSpec, spec: LayerSpec) -> None:
    layer = layer_of(largest)
    x, skip = inputs_of(spec)
    if spec.operator == "global_pool":
        expected = F.adaptive_avg_pool2d(x, 1)
    elif spec.operator == "layer_norm":
        gain, bias = (layer.get_parameter(name)[: spec.out_channels] for name in ("weight", "bias"))
        expected = torch.stack([F.layer_norm(token, gain.shape, gain, bias) for token in x.flatten(2).unbind(2)], 2)
        expected = expected.reshape(x.shape)
    elif spec.operator == "attention":
        query, key, value = (x[:, role::3].flatten(2).unflatten(1, (spec.heads, -1)).transpose(2, 3) for role in range(3))
        expected = F.scaled_dot_product_attention(query, key, value).transpose(2, 3).flatten(1, 2)
        expected = expected.reshape(len(x), spec.out_channels, spec.height, spec.width)
    else:
        out, per_group = spec.weight_shape[:2]
        weight = stored(layer)[:out, :per_group]
        if spec.operator == "conv2d":
            middle = largest.kernel // 2
            reach = slice(middle - spec.kernel // 2, middle + spec.kernel // 2 + 1)
            weight = weight[:, :, reach, reach]
        keep = mask(weight, spec.sparsity)
        weight = weight if keep is None else weight * keep
        if spec.operator == "linear":
            expected = F.linear(x.flatten(1), weight, layer.get_parameter("bias")[:out])
        else:
            expected = F.conv2d(x, weight, stride=spec.stride, padding=spec.kernel // 2, groups=spec.groups)
            gain, bias = (layer.get_parameter(name)[:out] for name in ("norm_weight", "norm_bias"))
            expected = F.batch_norm(expected, None, None, gain, bias, training=True)
    expected = expected if skip is None else expected + skip
    expected = expected.relu() if spec.activation == "relu" else expected
    y = layer(spec, x, skip)
    assert y.flatten(1).shape == (len(x), spec.output_elements)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("largest", "spec"), CASES)
def test_gradients_stay_inside_the_slice(largest: LayerSpec, spec: LayerSpec) -> None:
    layer = layer_of(largest)
    if not list(layer.parameters()):
        return
    x, skip = inputs_of(spec)
    layer(spec, x, skip).pow(2 if spec.weight_shape else 3).sum().backward()  # of normed tokens, squares have a constant sum
    if not spec.weight_shape:
        for parameter in layer.parameters():
            assert parameter.grad is not None
            assert parameter.grad[spec.out_channels :].abs().sum() == 0
            assert (parameter.grad[: spec.out_channels] != 0).all()
        return
    gradient = stored(layer).grad
    assert gradient is not None
    inside = torch.zeros_like(gradient, dtype=torch.bool)
    out, per_group, *kernel = spec.weight_shape
    if kernel:
        first = (largest.kernel - spec.kernel) // 2
        inside[:out, :per_group, first : first + spec.kernel, first : first + spec.kernel] = True
    else:
        inside[:out, :per_group] = True
    assert gradient[~inside].abs().sum() == 0
    assert gradient[inside].abs().sum() > 0
    keep = mask(stored(layer)[inside].reshape(spec.weight_shape), spec.sparsity)
    if keep is not None:
        reached = gradient[inside].reshape(spec.weight_shape)
        assert reached[keep == 0].abs().sum() == 0
        assert (reached[keep == 1] != 0).double().mean() > 0.8
    for name, parameter in layer.named_parameters():
        if parameter.dim() == 1:
            assert parameter.grad is not None, name
            assert parameter.grad[out:].abs().sum() == 0


@pytest.mark.parametrize("largest", [spec for name in OPERATORS for spec in MAXIMUM[name] if spec.weight_shape])
def test_the_largest_dense_float_form_uses_the_parameter_itself(largest: LayerSpec) -> None:
    weight = stored(layer_of(largest))
    assert effective_weight(weight, largest) is weight


@pytest.mark.parametrize(("largest", "spec"), CASES)
def test_extraction_in_training_mode_is_the_elastic_layer(largest: LayerSpec, spec: LayerSpec) -> None:
    layer = layer_of(largest)
    plain = layer.extract(spec).train()
    for seed in range(2):
        x, skip = inputs_of(spec, seed)
        torch.testing.assert_close(plain(x, skip), layer(spec, x, skip), rtol=0, atol=0)


@pytest.mark.parametrize(("largest", "spec"), CASES)
def test_extraction_copies(largest: LayerSpec, spec: LayerSpec) -> None:
    layer = layer_of(largest)
    plain = layer.extract(spec)
    before = [p.clone() for p in plain.parameters()]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, plain.parameters(), strict=True))


@pytest.mark.parametrize(("largest", "spec"), CASES)
def test_calibrated_and_folded_it_computes_the_same(largest: LayerSpec, spec: LayerSpec) -> None:
    plain = layer_of(largest).extract(spec).train()
    x, skip = inputs_of(spec, n=40)
    for module in plain.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        trained = plain(x, skip)
        plain.eval()
        before = plain(x, skip)
        plain.fold()
        after = plain(x, skip)
    assert plain.norm is None
    plain.fold()
    # The batch that calibrated is the batch that is computed; its variance differs by n / (n - 1) alone.
    torch.testing.assert_close(trained, before, rtol=0.02, atol=0.02 * float(before.abs().max()))
    step = 1e-5
    if spec.output_bits < FLOAT_BITS:
        assert isinstance(plain.quantize_output, ActivationQuantizer)
        low, high = plain.quantize_output.range()
        step = 1.001 * (max(high, 0.0) - min(low, 0.0)) / 255
    torch.testing.assert_close(after, before, rtol=1e-5, atol=step)


@pytest.mark.parametrize(("largest", "spec"), CASES)
def test_quantized_values_lie_on_a_grid(largest: LayerSpec, spec: LayerSpec) -> None:
    layer = layer_of(largest)
    x, skip = inputs_of(spec)
    plain = layer.extract(spec)
    if spec.integer:
        weight = effective_weight(stored(layer), spec).detach().flatten(1)
        ratio = weight / (weight.abs().amax(dim=1, keepdim=True) / 127)
        torch.testing.assert_close(ratio, ratio.round(), rtol=0, atol=1e-3)
        assert levels(weight[0]) > 1
    if spec.output_bits < FLOAT_BITS:
        for output in (layer(spec, x, skip), plain.train()(x, skip), plain.eval()(x, skip)):
            y = output.detach()
            assert levels(y) <= 256
            assert y.max() > y.min()
        low, high = plain.quantize_output.range()  # type: ignore[operator]
        scale = (max(high, 0.0) - min(low, 0.0)) / 255
        steps = y / scale
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=2e-3)
    elif spec.weight_shape and spec.precision == FLOAT:
        assert levels(layer(spec, x, skip)) > min(256, x.shape[0] * spec.output_elements // 3)
    if spec.activation == "relu":
        assert layer(spec, x, skip).min() >= 0


def test_an_integer_layer_after_a_float_one_quantizes_its_input() -> None:
    spec = LayerSpec("linear", 12, 10, precision="w8a8")
    layer = layer_of(MAXIMUM["linear"][0])
    x, _ = inputs_of(spec, n=64)
    scale = (x.max() - x.min()) / 255
    zero = torch.round(-x.min() / scale)
    on_grid = (torch.clamp(torch.round(x / scale) + zero, 0, 255) - zero) * scale
    expected = F.linear(on_grid.flatten(1), effective_weight(stored(layer), spec), layer.get_parameter("bias"))
    torch.testing.assert_close(layer(spec, x), expected, rtol=1e-4, atol=1e-4)


def test_folding_without_statistics_is_refused() -> None:
    spec = MAXIMUM["conv2d"][0]
    plain = layer_of(spec).extract(spec)
    assert plain.norm is not None
    plain.norm.running_mean = None
    with pytest.raises(ValueError, match="no statistics"):
        plain.fold()
