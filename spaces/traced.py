"""A traced module: its layers, and where in the module their weights are.

Traced once, a network can be made from the weights of any module that is built like it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from spaces.layers import LayerSpec, Network
from spaces.plain import PlainLayer, PlainNetwork, plain_operator
from spaces.program import Program, ProgramModule, as_map
from spaces.recording import Made


@dataclass(frozen=True)
class TracedLayer:
    """Where the weights of a layer are in the module.

    Args:
        weights: names of the weight and, where there is one, the bias; or of all weights of a program.
        norm: names of batch norm's scale, shift, mean and variance, if any.
        epsilon: of batch norm.
    """

    weights: tuple[str, ...] = ()
    norm: tuple[str, ...] = ()
    epsilon: float = 0.0


@dataclass(frozen=True)
class Traced:
    """A traced module.

    Args:
        network: its layers.
        layers: for every node where its weights are.
        made: by name, tensors that the module makes itself, in order, of weights and of each other.
    """

    network: Network
    layers: Mapping[str, TracedLayer]
    made: Mapping[str, Made]

    def plain(self, state: Mapping[str, torch.Tensor]) -> PlainNetwork:
        """The network with copies of weights, in evaluation mode.

        Args:
            state: parameters and buffers of the traced module or of one like it.
        """
        tensors = {name: tensor.detach() for name, tensor in state.items()}
        for name, made in self.made.items():
            tensors[name] = made.value(tensors)
        layers = {node.name: self._layer(node.spec, self.layers[node.name], tensors) for node in self.network.nodes}
        return PlainNetwork(self.network, layers).eval()

    @staticmethod
    def _layer(spec: LayerSpec, where: TracedLayer, state: Mapping[str, torch.Tensor]) -> PlainLayer:
        weights = [state[name].detach().clone() for name in where.weights]
        if spec.operator == "traced":
            return PlainLayer(spec, ProgramModule(Program.from_json(spec.program), weights))
        if spec.operator == "global_pool":
            return PlainLayer(spec, nn.AdaptiveAvgPool2d(1))
        norm = None
        if where.norm:
            norm = nn.BatchNorm2d(spec.out_channels, eps=where.epsilon)
            targets = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
            for target, name in zip(targets, where.norm, strict=True):
                if target is not None:
                    target.data.copy_(state[name])
        bias = weights[1] if len(weights) > 1 else None
        return PlainLayer(spec, plain_operator(spec, weights[0], spec.stride, bias), norm)


def traced_spec(program: Program) -> LayerSpec:
    """The layer that a program is."""
    channels, height, width = as_map(program.inputs[0])
    more = 32 if len(program.inputs) > 1 else 0
    return LayerSpec("traced", channels, as_map(program.output)[0], height, width, skip_bits=more, program=program.to_json())
