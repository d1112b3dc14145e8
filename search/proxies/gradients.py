"""Proxies from the gradient of the loss at initialisation: gradient norm, SNIP, GraSP.

The network is the one that would be trained: weights that a sparsity removes take no part, and gradients go straight through
rounding.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from search.proxies.proxy import Trial, proxy
from spaces.plain import PlainNetwork
from spaces.sparsity import DENSE


@proxy("grad_norm")
def grad_norm(trial: Trial) -> float:
    """Sum over the layers of the Euclidean norm of the weights' gradient (Abdelfattah et al. 2021, arXiv:2101.08134)."""
    weights, kept = weights_of(trial.network)
    gradients = torch.autograd.grad(_loss(trial), weights)
    return total([(g * mask).norm() for g, mask in zip(gradients, kept, strict=True)])


@proxy("snip")
def snip(trial: Trial) -> float:
    """What removing single weights would change: the sum of |weight * gradient| (SNIP, arXiv:1810.02340)."""
    weights, _ = weights_of(trial.network)
    gradients = torch.autograd.grad(_loss(trial), weights)
    return total([(w * g).abs() for w, g in zip(weights, gradients, strict=True)])


@proxy("grasp")
def grasp(trial: Trial) -> float:
    """Gradient flow that removing weights would take away: minus the sum of weight * (Hessian gradient).

    GraSP, arXiv:2002.07376, with the sign with which arXiv:2101.08134 ranks networks and without its temperature.
    """
    weights, kept = weights_of(trial.network)
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no second derivative
        gradients = torch.autograd.grad(_loss(trial), weights, create_graph=True)
        norms = [(g * (g.detach() * mask)).sum() for g, mask in zip(gradients, kept, strict=True)]
        products = torch.autograd.grad(torch.stack(norms).sum(), weights)
    return -total([w * p for w, p in zip(weights, products, strict=True)])


def weights_of(network: PlainNetwork) -> tuple[list[nn.Parameter], list[torch.Tensor]]:
    """The weights of convolutions and linear layers, and masks of those that their sparsity keeps."""
    weights, kept = [], []
    for node in network.network.nodes:
        for module in network.layer(node.name).modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                weight = module.get_parameter("weight")
                weights.append(weight)
                kept.append(torch.ones_like(weight) if node.spec.sparsity == DENSE else (weight != 0).to(weight.dtype))
    return weights, kept


def total(tensors: list[torch.Tensor]) -> float:
    """The sum of all elements of all tensors."""
    return float(sum(tensor.detach().sum().item() for tensor in tensors))


def _loss(trial: Trial) -> torch.Tensor:
    return F.cross_entropy(trial.network(trial.images), trial.labels)
