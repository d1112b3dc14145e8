"""Expected cost: a gradient from the cost of networks to the probabilities of options.

Latency on a device comes from a table and a predictor, which have no gradient. So a sum over the options of an architecture is
fitted to what the predictor says of sampled ones; its expectation under independent choices is the same sum over their
probabilities (ProxylessNAS, arXiv:1812.00332, equation 5, which has measured blocks as terms). Fitted to the cost or to its
logarithm, whichever is closer on architectures that were held out: costs multiply along choices such as widths and add up along
others such as depths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import spearmanr

from spaces.choice import Architecture, Option
from spaces.errors import UserError
from spaces.space import Space

RIDGE = 1e-3
HELD_OUT_SHARE = 0.25
LEAST_SAMPLES = 32


@dataclass(frozen=True)
class CostFit:
    """How close the sum is to the cost that it stands for, on architectures that it was not fitted to.

    Args:
        mape: mean of the absolute relative errors.
        spearman: rank correlation.
        logarithm: whether the logarithm of the cost is what adds up.
        n: architectures.
    """

    mape: float
    spearman: float
    logarithm: bool
    n: int


class ExpectedCost:
    """The expected cost of relaxed choices. Make one with `fit`.

    Args:
        weights: of every option, `(len(space.feature_names),)`.
        constant: added to their sum.
        reference: a cost that counts as 1.
        fit: how close it is.
    """

    def __init__(self, weights: np.ndarray, constant: float, reference: float, fit: CostFit) -> None:
        self.weights = torch.from_numpy(weights).double()
        self.constant, self.reference, self.quality = constant, reference, fit

    @classmethod
    def fit(
        cls,
        space: Space,
        cost: Callable[[Architecture], float],
        held: Mapping[str, Option],
        samples: int,
        seed: int,
    ) -> ExpectedCost:
        """Fit to sampled architectures.

        Args:
            space: of the architectures.
            cost: of an architecture, positive.
            held: by kind of choice, the option at which it stays.
            samples: architectures; a quarter of them tests.
            seed: of the samples.

        Raises:
            UserError: too few samples, or a cost that is not positive.
        """
        if samples < LEAST_SAMPLES:
            raise UserError(f"relaxation.cost_samples is {samples}; allowed are integers from {LEAST_SAMPLES}")
        rng = np.random.default_rng([seed, 31])
        draw = (space.sample, space.sample_spread)  # the middle of the space, where a search begins, and its ends
        architectures = [space.replaced(draw[i % 2](rng), **held) for i in range(samples)]
        costs = np.array([cost(a) for a in architectures])
        if not (np.isfinite(costs).all() and (costs > 0.0).all()):
            raise UserError(f"a sampled network costs {costs[~(costs > 0.0)][:1]}; allowed are values above 0")
        features = space.encode(architectures).astype(np.float64)
        reference = cost(space.graded(1.0, **held))
        kept = round(samples * (1.0 - HELD_OUT_SHARE))
        found = [_fitted(features, costs / reference, kept, logarithm) for logarithm in (False, True)]
        weights, constant, quality = min(found, key=lambda f: f[2].mape)
        return cls(weights, constant, reference, quality)

    def expected(self, marginals: torch.Tensor) -> torch.Tensor:
        """The expected cost, of the logarithm its exponential, a scalar with gradient; in the cost's own unit.

        Args:
            marginals: of `Relaxed.marginals`, or one row of `Space.encode` for the cost of one architecture.
        """
        return self.log_expected(marginals).exp() * self.reference

    def log_expected(self, marginals: torch.Tensor) -> torch.Tensor:
        """The logarithm of the expected cost relative to that of the largest network: what a loss adds, times a weight."""
        total = marginals.double() @ self.weights + self.constant
        # Far from all samples a sum can go below 0; there is nothing to gain from going further down.
        return total if self.quality.logarithm else torch.nn.functional.softplus(total, beta=200.0).add(1e-6).log()


def _fitted(features: np.ndarray, costs: np.ndarray, kept: int, logarithm: bool) -> tuple[np.ndarray, float, CostFit]:
    target = np.log(costs) if logarithm else costs
    # Weighted so that relative errors count, as they do in the logarithm.
    scale = np.ones(kept) if logarithm else 1.0 / costs[:kept]
    centre, offset = np.average(features[:kept], axis=0, weights=scale**2), np.average(target[:kept], weights=scale**2)
    x, y = (features[:kept] - centre) * scale[:, None], (target[:kept] - offset) * scale
    weights = np.linalg.solve(x.T @ x + RIDGE * kept * np.eye(x.shape[1]), x.T @ y)
    constant = float(offset - centre @ weights)
    predicted = features[kept:] @ weights + constant
    predicted = np.exp(predicted) if logarithm else predicted
    errors = np.abs(predicted / costs[kept:] - 1.0)
    rank = float(spearmanr(predicted, costs[kept:]).statistic) if len(set(costs[kept:])) > 1 else 0.0
    fit = CostFit(float(errors.mean()), 0.0 if math.isnan(rank) else rank, logarithm, len(errors))
    return weights, constant, fit
