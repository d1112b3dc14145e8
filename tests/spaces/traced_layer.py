"""A layer of the operator `traced`, for tests of what is done with layers."""

from __future__ import annotations

import torch
from torch import nn

from spaces.layers import LayerSpec
from spaces.tracing import trace


def traced_layer(*operations: nn.Module) -> LayerSpec:
    """Operations of a foreign network that are of no other operator, as a layer."""
    with torch.device("meta"):
        module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *operations, nn.Flatten(), nn.Linear(128, 10))
    (spec,) = (node.spec for node in trace(module, (3, 8, 8)).network.nodes if node.spec.operator == "traced")
    return spec
