"""The depthwise convolution of our own against torch's."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from spaces.depthwise import depthwise_conv2d


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 4), (8, 8), (16, 16)])
@pytest.mark.parametrize("stride", [1, 2])
def test_outputs_and_gradients_are_those_of_torch(kernel: int, height: int, width: int, stride: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 6, height, width, dtype=torch.double, generator=generator)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(6, 1, kernel, kernel, dtype=torch.double, generator=generator, requires_grad=True)
    expected = F.conv2d(x, weight, stride=stride, padding=kernel // 2, groups=6)
    found = depthwise_conv2d(x, weight, stride)
    torch.testing.assert_close(found, expected)
    gradient = torch.randn(expected.shape, dtype=torch.double, generator=generator)
    torch.testing.assert_close(
        torch.autograd.grad(found, (x, weight), gradient), torch.autograd.grad(expected, (x, weight), gradient)
    )


def test_gradients_are_only_computed_for_what_needs_them() -> None:
    x, weight = torch.randn(2, 4, 5, 5), torch.randn(4, 1, 5, 5, requires_grad=True)
    depthwise_conv2d(x, weight, 1).sum().backward()
    assert x.grad is None
    assert weight.grad is not None
