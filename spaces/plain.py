"""Plain networks: one architecture taken out of a supernet as ordinary torch modules.

A `PlainNetwork` computes what will ship. Its weights are final (sliced, masked, on their grid). In training mode batch norm
and activation ranges follow the batch and are averaged; in evaluation mode they are fixed. `recalibrate` does the first and
ends in the second, `fold` then merges batch norm into the convolutions, and exporters read the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from spaces.errors import DivergedError
from spaces.layers import INPUT, LayerSpec, Network, Node
from spaces.precision import FLOAT_BITS
from spaces.quantizers import (
    EncodedWeight,
    activation_grid,
    quantize_activation,
    quantize_by_sample,
    quantize_to_float8,
    quantize_to_own_range,
)
from spaces.quantizers.integer_layer import fine_levels, with_bias


class ActivationQuantizer(nn.Module):
    """8-bit activations. Training mode: the range of the batch, averaged over batches. Evaluation mode: that average, fixed."""

    low: torch.Tensor
    high: torch.Tensor
    batches: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("low", "high", "batches"):
            self.register_buffer(name, torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return quantize_activation(x, *self.range())
        y, low, high = quantize_to_own_range(x)
        self.batches += 1
        self.low += (low - self.low) / self.batches
        self.high += (high - self.high) / self.batches
        return y

    def range(self) -> tuple[float, float]:
        """The fixed range, `(low, high)`."""
        return float(self.low), float(self.high)

    def scale(self) -> np.float32:
        """The step of the fixed grid."""
        return activation_grid(*self.range())[0]

    def reset(self) -> None:
        """Forget the batches seen."""
        for buffer in (self.low, self.high, self.batches):
            buffer.zero_()


def enter_layer(spec: LayerSpec, x: torch.Tensor, quantize_input: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """What precedes a layer's arithmetic, for elastic and plain layers alike: flatten, quantize."""
    if spec.operator == "linear":
        x = x.flatten(1)
    if spec.integer and spec.input_bits == FLOAT_BITS:
        return quantize_input(x)
    precision = spec.arithmetic
    if precision.activations == "float8":
        return quantize_to_float8(x)
    if precision.activations == "dynamic":
        return quantize_by_sample(x, precision.scales if isinstance(precision.scales, int) else None)
    return x


def finish_layer(
    spec: LayerSpec,
    y: torch.Tensor,
    skip: torch.Tensor | None,
    quantize_sum: Callable[[torch.Tensor], torch.Tensor],
    quantize_output: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """What follows a layer's arithmetic, for elastic and plain layers alike: add the skip, activate, quantize."""
    if spec.quantizes_sum:
        y = quantize_sum(y)
    if skip is not None:
        y = y + skip
    if spec.activation == "relu":
        y = F.relu(y)
    elif spec.activation == "hard_swish":
        y = F.hardswish(y)
    elif spec.activation == "relu6":
        y = F.relu6(y)
    return quantize_output(y) if spec.output_bits < FLOAT_BITS else y


class Factors(nn.Module):
    """Two operators, one after the other, in place of one: a layer of low rank.

    Args:
        first: from the input to the rank.
        second: from the rank to the output.
        integer: whether what is between them is quantized.
    """

    def __init__(self, first: nn.Module, second: nn.Module, integer: bool) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.quantize_middle = ActivationQuantizer() if integer else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(self.quantize_middle(self.first(x)))
        return y


def plain_operator(spec: LayerSpec, weight: torch.Tensor, stride: int, bias: torch.Tensor | None = None) -> nn.Module:
    """`nn.Conv2d` or `nn.Linear` around a weight that nobody else holds, with a copy of a bias."""
    out_channels, in_channels, *kernel = weight.shape
    module: nn.Conv2d | nn.Linear
    with torch.device("meta"):
        if kernel:
            sizes = (in_channels * spec.groups, out_channels, kernel[0], stride, kernel[0] // 2)
            module = nn.Conv2d(*sizes, groups=spec.groups, bias=False)
        else:
            module = nn.Linear(in_channels, out_channels, bias=False)
    module.weight = nn.Parameter(weight)
    if bias is not None:
        module.bias = nn.Parameter(bias.detach().clone())
    return module


class PlainLayer(nn.Module):
    """One layer: arithmetic, batch norm, skip, activation, quantization.

    Args:
        spec: the layer.
        arithmetic: `nn.Conv2d`, `nn.Linear`, `Factors` of them or a pooling module, with final weights.
        norm: batch norm that follows it, if any.
        codes: how the weights are stored, in the order in which they are applied; `None` for floats.
    """

    norm: nn.BatchNorm2d | None

    def __init__(
        self,
        spec: LayerSpec,
        arithmetic: nn.Module,
        norm: nn.BatchNorm2d | None = None,
        codes: tuple[EncodedWeight | None, ...] = (),
    ) -> None:
        super().__init__()
        self.spec, self.arithmetic, self.norm, self.codes = spec, arithmetic, norm, codes
        self.quantize_input = ActivationQuantizer() if spec.integer and spec.input_bits == FLOAT_BITS else nn.Identity()
        self.quantize_sum = ActivationQuantizer() if spec.quantizes_sum else nn.Identity()
        self.quantize_output = ActivationQuantizer() if spec.output_bits < FLOAT_BITS else nn.Identity()

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        """Input `(n, in_channels, height, width)`, or anything that flattens to `(n, in_channels)` for a linear layer."""
        if self.spec.operator == "traced":
            traced: torch.Tensor = self.arithmetic(x) if skip is None else self.arithmetic(x, skip)
            return traced
        y = self.arithmetic(enter_layer(self.spec, x, self.quantize_input))
        if self.norm is not None:
            y = self.norm(y)
        return finish_layer(self.spec, y, skip, self.quantize_sum, self.quantize_output)

    def fold(self) -> None:
        """Merge batch norm into the convolution, in evaluation mode exactly the same function.

        The factor is per output channel, as is the grid of integer weights: folded weights stay on a grid.
        """
        conv = self.arithmetic.second if isinstance(self.arithmetic, Factors) else self.arithmetic
        if self.norm is None or not isinstance(conv, nn.Conv2d):
            return
        norm = self.norm
        if norm.running_mean is None or norm.running_var is None:
            raise ValueError("batch norm has no statistics to fold")
        factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        bias = norm.bias - norm.running_mean * factor
        with torch.no_grad():
            encoded = self.codes[-1] if self.codes else None
            if encoded is None:
                conv.weight.mul_(factor.reshape(-1, 1, 1, 1))
            else:
                encoded = encoded.times(factor)
                conv.weight.copy_(encoded.decode())
                self.codes = (*self.codes[:-1], encoded)
            conv.bias = nn.Parameter(bias if conv.bias is None else bias + conv.bias * factor)
        self.norm = None

    @torch.no_grad()
    def round_bias(self, input_scale: np.float32) -> None:
        """Give a folded layer of integer arithmetic the bias that ships, and the weight where that changes with it.

        Args:
            input_scale: step of the grid on which the layer's input arrives.
        """
        last, encoded = self.arithmetic, self.codes[-1] if self.codes else None
        if isinstance(last, Factors):
            last, middle = last.second, last.quantize_middle
            input_scale = middle.scale() if isinstance(middle, ActivationQuantizer) else input_scale
        if encoded is None or not isinstance(last, nn.Conv2d | nn.Linear) or last.bias is None:
            return
        levels, scales = fine_levels(encoded)
        stored, widened, bias, bias_scales = with_bias(levels, scales, last.bias.cpu().numpy(), input_scale)
        last.bias.copy_(torch.from_numpy(bias * bias_scales.astype(np.float64)))
        if not np.array_equal(scales, widened):
            last.weight.copy_(torch.from_numpy(stored * widened.reshape(-1, *[1] * (stored.ndim - 1))))


class PlainNetwork(nn.Module):
    """A network of plain layers, called with images of any size: they are resized to the network's input."""

    def __init__(self, network: Network, layers: Mapping[str, PlainLayer]) -> None:
        super().__init__()
        self.network = network
        self.layers = nn.ModuleDict({module_key(name): layer for name, layer in layers.items()})

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(n, channels, any height, any width)` to logits `(n, classes)`."""
        return run_network(self.network, images, lambda node, x, skip: self.layer(node.name)(x, skip))

    def layer(self, name: str) -> PlainLayer:
        """The layer of a node."""
        layer = self.layers[module_key(name)]
        if not isinstance(layer, PlainLayer):
            raise TypeError(f"{name} is not a plain layer")
        return layer

    def recalibrate(self, batches: Iterable[torch.Tensor]) -> None:
        """Set batch-norm statistics and activation ranges from images, then switch to evaluation mode.

        Averages over batches instead of a moving average: the precise batch norm of arXiv:2105.07576, section 3.

        Args:
            batches: image tensors; a few hundred images are enough.

        Raises:
            DivergedError: statistics or ranges are not finite, as after a training that diverged.
        """
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.momentum = None
            elif isinstance(module, ActivationQuantizer):
                module.reset()
        self.train()
        with torch.no_grad():
            for images in batches:
                self(images)
        self.eval()
        for name, value in self.named_buffers():
            if not value.isfinite().all():
                raise DivergedError(
                    f"{name} is not finite after recalibration: the weights diverged; lower supernet.learning_rate"
                )

    def fold(self) -> None:
        """Merge every batch norm into its convolution, and round biases of integer layers as they ship (evaluation mode)."""
        for node in self.network.nodes:
            self.layer(node.name).fold()
        for node in self.network.nodes:
            if node.spec.integer:
                layer = self.layer(node.name)
                arrives = node.spec.input_bits == FLOAT_BITS
                grid = layer.quantize_input if arrives else self.layer(node.inputs[0]).quantize_output
                if isinstance(grid, ActivationQuantizer):
                    layer.round_bias(grid.scale())


def module_key(name: str) -> str:
    """A node's name as torch accepts it in a `ModuleDict`."""
    return name.replace(".", "/")


def resize(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Images `(n, c, h, w)` resized bilinearly (antialiased when they shrink) to `(n, c, height, width)`."""
    if images.shape[-2:] == (height, width):
        return images
    shrinks = images.shape[-2] > height or images.shape[-1] > width
    return F.interpolate(images, size=(height, width), mode="bilinear", align_corners=False, antialias=shrinks)


def run_network(
    network: Network, images: torch.Tensor, call: Callable[[Node, torch.Tensor, torch.Tensor | None], torch.Tensor]
) -> torch.Tensor:
    """Run a network's layers in order. `call(node, input, skip)` computes one; used by plain networks and supernets.

    Tensors are kept in channels-last order: on CPUs the gradient of a depthwise weight is three to six times faster in it.
    """
    tensors = {INPUT: resize(images, network.input_shape[1], network.input_shape[2])}
    for node in network.nodes:
        skip = tensors[node.inputs[1]] if node.spec.skip_bits else None
        y = call(node, tensors[node.inputs[0]], skip)
        tensors[node.name] = y.contiguous(memory_format=torch.channels_last) if y.dim() == 4 else y
    return tensors[network.nodes[-1].name].flatten(1)
