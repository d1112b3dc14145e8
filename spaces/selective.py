"""Selective activation: of the weights that a mask removes, the last are chosen so that more of a ReLU's outputs are active.

A pruned network suffers from ReLU's zeros, which the source counts as the dynamic dead neuron rate: the share of outputs of a
ReLU that are 0, over nodes and inputs. So of the removed weights a tenth is not chosen by saliency: among those that saliency
leaves, the negative ones that moved least since the training began go, and with inputs that are not negative (another ReLU's)
their nodes are active more often. The network is one of plain ReLUs and costs as much as without.

Source: AP (Activate-while-Pruning), Liu et al. 2023, arXiv:2212.06145; share and criterion as in the authors' program, which
takes 2 of the 20 % that a pruning cycle removes, over the whole network and cycle by cycle. Here it is for each set of a
pattern, and the cycle is the whole training. A removed weight without a gradient does not move and so stays out: in a supernet
denser networks move it; for one network alone take a mask training that does (`straight_through`) or prunes late (`gradual`).
"""

from __future__ import annotations

import torch

REMOVED_SHARE = 0.1
STILL = 1e-6  # weights that did not move at all, as before the first step, go by this part of their magnitude


def removed_last(removed: int) -> int:
    """How many of so many removed units of a set are chosen for the activations; at least one where one is removed."""
    return min(removed, max(1, round(REMOVED_SHARE * removed)))


def selective_saliency(weight: torch.Tensor, start: torch.Tensor | None = None) -> torch.Tensor:
    """The order in which weights go when saliency has had its part: zeros, negative weights by movement, others by magnitude.

    Negative weights have less than 1, positive ones more, so that what patterns add up over a unit counts the latter first.

    Args:
        weight: any shape; weights that are removed already are 0.
        start: the weight when its training began, of the same shape; zeros when left out.

    Returns:
        Float32 of the weight's shape, not negative, without gradient.
    """
    weight = weight.detach().float()
    size = weight.abs()
    moved = size if start is None else (weight - start.detach().float()).abs() + STILL * size
    return torch.where(weight > 0, 1.0 + _below_one(size), _below_one(moved)) * (size > 0)


def _below_one(x: torch.Tensor) -> torch.Tensor:
    """Numbers that are not negative, in the same order, from just above 0 to 1/2."""
    largest = x.max() if x.numel() else x.sum()
    return 0.5 * x / largest.clamp_min(torch.finfo(x.dtype).tiny) + torch.finfo(x.dtype).tiny
