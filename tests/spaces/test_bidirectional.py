"""Operators with a weight of their own for the input's gradient, against autograd with either weight."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from spaces.bidirectional import bidirectional_conv2d, bidirectional_linear


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("height", "width"), [(5, 5), (8, 7)])
def test_convolution_takes_the_input_gradient_of_the_other_weight(kernel: int, stride: int, height: int, width: int) -> None:
    x, padding = random(3, 4, height, width, seed=0).requires_grad_(), kernel // 2
    weight = random(6, 4, kernel, kernel, seed=1).requires_grad_()
    other = random(6, 4, kernel, kernel, seed=2).requires_grad_()
    expected = F.conv2d(x, weight, stride=stride, padding=padding)
    found = bidirectional_conv2d(x, weight, other, stride, padding)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    gradient = random(*expected.shape, seed=3)
    (weight_gradient,) = torch.autograd.grad(expected, weight, gradient)
    (x_gradient,) = torch.autograd.grad(F.conv2d(x, other, stride=stride, padding=padding), x, gradient)
    found.backward(gradient)
    torch.testing.assert_close(x.grad, x_gradient)
    torch.testing.assert_close(weight.grad, weight_gradient)
    assert other.grad is None


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4)], ids=str)
def test_linear_layer_takes_the_input_gradient_of_the_other_weight(shape: tuple[int, ...]) -> None:
    x, bias = random(*shape, seed=0).requires_grad_(), random(6, seed=4).requires_grad_()
    weight, other = random(6, 4, seed=1).requires_grad_(), random(6, 4, seed=2).requires_grad_()
    expected = F.linear(x, weight, bias)
    found = bidirectional_linear(x, weight, other, bias)
    torch.testing.assert_close(found, expected)
    gradient = random(*expected.shape, seed=3)
    weight_gradient, bias_gradient = torch.autograd.grad(expected, (weight, bias), gradient)
    (x_gradient,) = torch.autograd.grad(F.linear(x, other), x, gradient)
    found.backward(gradient)
    torch.testing.assert_close((x.grad, weight.grad, bias.grad), (x_gradient, weight_gradient, bias_gradient))
    assert other.grad is None


def test_gradients_are_only_computed_for_what_needs_them() -> None:
    x, weight, other = torch.randn(2, 4, 5, 5), torch.randn(6, 4, 3, 3, requires_grad=True), torch.randn(6, 4, 3, 3)
    bidirectional_conv2d(x, weight, other, 1, 1).sum().backward()
    assert x.grad is None
    assert weight.grad is not None
    x, weight = torch.randn(2, 4, requires_grad=True), torch.randn(6, 4)
    bidirectional_linear(x, weight, torch.zeros(6, 4)).sum().backward()
    torch.testing.assert_close(x.grad, torch.zeros(2, 4))
