"""Proxies that look at the network alone, without data and without rounding: SynFlow and the Zen score."""

from __future__ import annotations

import math

import torch
from torch import nn

from search.proxies.gradients import total, weights_of
from search.proxies.proxy import Trial, proxy
from spaces.layers import INPUT, Node
from spaces.plain import PlainLayer, PlainNetwork, run_network
from spaces.tokens import LayerNorm

ZEN_REPEATS = 4
ZEN_IMAGES = 16
ZEN_STEP = 0.01


@proxy("synflow")
def synflow(trial: Trial) -> float:
    """Logarithm of the sum of weight * gradient of the summed outputs, all weights positive, the input all ones.

    SynFlow, arXiv:2006.05467. It grows with the number of paths from input to output. Without normalisation, so that
    nothing is subtracted; in double precision and as a logarithm, since it is a product over the layers.
    """
    network = without_rounding(trial.network).double()
    for layer in layers_of(network):
        layer.norm = None
        if isinstance(layer.arithmetic, LayerNorm):
            layer.arithmetic = nn.Identity()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.abs_()
    weights, _ = weights_of(network)
    flow = network(torch.ones_like(trial.images[:1], dtype=torch.float64)).sum()
    gradients = torch.autograd.grad(flow, weights)
    return math.log(max(total([w * g for w, g in zip(weights, gradients, strict=True)]), 1e-300))


@proxy("zen")
@torch.no_grad()
def zen(trial: Trial) -> float:
    """How much the features before pooling move when random inputs do, as a logarithm (Zen-NAS, arXiv:2102.01063).

    Weights and inputs are drawn from a normal distribution; weights that the sparsity removes stay 0. Batch norm would undo the
    scale of what precedes it, so the logarithms of its standard deviations are added again. A layer norm's are not.
    """
    network = without_rounding(trial.network)
    sizes = (ZEN_IMAGES, *trial.images.shape[1:])
    weights, kept = weights_of(network)
    summed = 0.0
    for _ in range(ZEN_REPEATS):
        for weight, mask in zip(weights, kept, strict=True):
            weight.copy_(torch.randn_like(weight) * mask)
        images = torch.randn(sizes)
        moved = images + ZEN_STEP * torch.randn(sizes)
        before, scales = _features(network, images)
        after, _ = _features(network, moved)
        change = (before - after).abs().flatten(1).sum(dim=1).mean()
        summed += math.log(max(float(change), 1e-12)) + scales
    return summed / ZEN_REPEATS


def without_rounding(network: PlainNetwork) -> PlainNetwork:
    """The network itself, its activations no longer quantized."""
    for layer in layers_of(network):
        layer.quantize_input = layer.quantize_sum = layer.quantize_output = nn.Identity()
    return network


def layers_of(network: PlainNetwork) -> list[PlainLayer]:
    """The layers of a network in the order in which they run."""
    return [network.layer(node.name) for node in network.network.nodes]


def _features(network: PlainNetwork, images: torch.Tensor) -> tuple[torch.Tensor, float]:
    """What enters the last pooling (or the last layer, where nothing pools), and the batch norms' scales, summed logarithms."""
    tensors, scales = {INPUT: images}, []

    def keep(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: object) -> None:
        variances = inputs[0].var(dim=(0, 2, 3), unbiased=False)
        scales.append(0.5 * math.log(max(float(variances.mean()), 1e-12)))

    hooks = [layer.norm.register_forward_hook(keep) for layer in layers_of(network) if layer.norm is not None]

    def call(node: Node, x: torch.Tensor, skip: torch.Tensor | None) -> torch.Tensor:
        y: torch.Tensor = network.layer(node.name)(x, skip)
        tensors[node.name] = y
        return y

    run_network(network.network, images, call)
    for hook in hooks:
        hook.remove()
    nodes = network.network.nodes
    ends = next((node for node in reversed(nodes) if node.spec.operator == "global_pool"), nodes[-1])
    return tensors[ends.inputs[0]], sum(scales)
