"""Proxies from how differently an untrained network treats the images of a batch: NASWOT and Jacobian covariance."""

from __future__ import annotations

import torch
from torch import nn

from search.proxies.proxy import Trial, proxy
from spaces.plain import PlainLayer

RIDGE = 1e-5
MOST_GRADIENTS = 32  # of images: far fewer than the pixels of the smallest input, or some always depend on others


@proxy("naswot")
@torch.no_grad()
def naswot(trial: Trial) -> float:
    """Log-determinant of how many units agree, on or off, for each pair of images (NASWOT, arXiv:2006.04647).

    A ridge keeps the determinant above 0 where two images switch all units alike.
    """
    count = len(trial.images)
    agreeing = torch.zeros(count, count, dtype=torch.float64)

    def compare(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        active = (output > 0).flatten(1).double()
        agreeing.add_(active @ active.T + (1 - active) @ (1 - active).T)

    for module in trial.network.modules():
        if isinstance(module, PlainLayer) and module.spec.activation != "none":
            module.register_forward_hook(compare)
    trial.network(trial.images)
    return float(torch.linalg.slogdet(agreeing + RIDGE * torch.eye(count)).logabsdet)


@proxy("jacobian_covariance")
def jacobian_covariance(trial: Trial) -> float:
    """How little the images' input gradients correlate (Mellor et al., arXiv:2006.04647v1).

    Minus the sum of `log(v + k) + 1 / (v + k)` over the eigenvalues `v` of the correlation matrix of the images' gradients of
    the summed logits; 0 correlation everywhere gives the maximum.
    """
    images = trial.images[:MOST_GRADIENTS].detach().clone().requires_grad_()
    (jacobian,) = torch.autograd.grad(trial.network(images).sum(), images)
    rows = jacobian.flatten(1).double()
    rows = rows - rows.mean(dim=1, keepdim=True)
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    values = torch.linalg.eigvalsh(rows @ rows.T).clamp_min(0.0) + RIDGE
    return -float((values.log() + 1.0 / values).sum())
