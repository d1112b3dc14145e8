"""Bayesian regression of relative errors, its strictness chosen by leave-one-out, its intervals calibrated by it.

Latencies are explained as rows times coefficients; the errors that count are relative. The prior of the coefficients is
normal around what is expected, with given scales times a common factor; columns that say how alike layers are have a factor of
their own. How large the factors are decides the leave-one-out error, which a linear model has in closed form. The quantile of
the leave-one-out errors, in predicted standard deviations, makes the intervals (the jackknife of Barber et al., "Predictive
inference with the jackknife+", 2021, without its recentring).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import norm

STRICTNESS = (1e4, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
ALIKE_FACTORS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
ALWAYS_STRICTNESS = 1e-2
CLEARLY = 2.0  # standard errors
TURNS = 2  # of choosing one factor while the other one stays
COVERAGE = 0.9
LEAST_ERROR = 0.003
USUAL_ERROR = 0.02  # of a network whose latency was measured

_Fit = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Regression:
    """A fitted linear model of latencies.

    Args:
        coefficients: `(columns,)`.
        covariance: `(columns, columns)`, theirs, when what is left has a relative variance of 1.
        error: relative standard deviation of what is left.
        widening: by what standard deviations are multiplied so that 90 % of networks lie within 1.645 of them.
        strictness: of the prior that leave-one-out chose.
        loo_error: mean absolute relative error, leave-one-out.
        alike_factor: of the prior of the columns that say how alike layers are, likewise; 0 without any.
        left_out: `(n,)`, relative errors, leave-one-out, of the networks that it was fitted to.
    """

    coefficients: np.ndarray
    covariance: np.ndarray
    error: float
    widening: float
    strictness: float
    loo_error: float
    alike_factor: float = 0.0
    left_out: np.ndarray = field(default_factory=lambda: np.empty(0), compare=False)

    def clearly_better(self, other: Regression) -> bool:
        """Whether it left smaller errors, leave-one-out, than another one of the same networks, by more than chance."""
        gain = np.abs(other.left_out) - np.abs(self.left_out)
        return float(gain.mean()) > CLEARLY * float(gain.std(ddof=1)) / math.sqrt(len(gain))

    def variance_us2(self, row: np.ndarray, us: float, layers_variance_us2: float, unlike_us2: float = 0.0) -> float:
        """Variance of a prediction, calibrated.

        Args:
            row: `(columns,)`.
            us: the prediction.
            layers_variance_us2: variance of the sum of the layers' prices.
            unlike_us2: see `predictors.likeness.Likeness.unlike_us2`.
        """
        relative = self.error**2 * (us**2 + float(row @ self.covariance @ row) + self.alike_factor**2 * unlike_us2)
        return self.widening**2 * (relative + float(self.coefficients[0]) ** 2 * layers_variance_us2)


def fit_regression(
    rows: np.ndarray,
    measured_us: np.ndarray,
    layers_variance_us2: np.ndarray,
    expected: np.ndarray,
    scales: np.ndarray,
    always: int,
    relative_stds: np.ndarray | None = None,
    alike: int = 0,
) -> Regression:
    """Fit to networks.

    Args:
        rows: `(n, columns)`.
        measured_us: `(n,)`.
        layers_variance_us2: `(n,)`, variance of the sums of the layers' prices.
        expected: `(columns,)`, prior means.
        scales: `(columns,)`, prior standard deviations up to a common factor.
        always: the first so many columns have a wide prior whatever leave-one-out says.
        relative_stds: `(n,)`, of latencies that are uncertain themselves, which then count less.
        alike: the last so many columns say how alike layers are; their prior has a factor of its own.
    """
    weights = np.ones(len(rows)) if relative_stds is None else 1.0 / np.sqrt(1.0 + (relative_stds / USUAL_ERROR) ** 2)
    relative = rows / measured_us[:, None]

    def fitted(strictness: float, factor: float) -> _Fit:
        prior = _prior(scales, always, strictness)
        prior[len(scales) - alike :] = factor * scales[len(scales) - alike :]
        return _fit(relative, weights, expected, prior)

    strictness, factor = STRICTNESS[len(STRICTNESS) // 2], ALIKE_FACTORS[len(ALIKE_FACTORS) // 2] if alike else 0.0
    for _ in range(TURNS if alike else 1):
        strictness = min(STRICTNESS, key=lambda tried: _loss(fitted(tried, factor)))
        if alike:
            factor = min(ALIKE_FACTORS, key=lambda tried: _loss(fitted(strictness, tried)))
    coefficients, covariance, residuals, leverage = best = fitted(strictness, factor)
    layers = (weights * coefficients[0] / measured_us) ** 2 * layers_variance_us2
    # A leave-one-out residual varies by 1 / (1 - leverage) of what the noise varies.
    spread = 1.0 / (1.0 - leverage)
    error = max(LEAST_ERROR, math.sqrt(max(0.0, float(np.mean((residuals**2 - layers) / spread)))))
    ratios = np.sort(np.abs(residuals) / np.sqrt(error**2 * spread + layers))
    rank = min(len(ratios), math.ceil(COVERAGE * (len(ratios) + 1)))
    widening = float(ratios[rank - 1] / norm.ppf(0.5 + COVERAGE / 2))
    return Regression(coefficients, covariance, error, widening, strictness, _loss(best), factor, residuals)


def _prior(scales: np.ndarray, always: int, strictness: float) -> np.ndarray:
    """Prior standard deviations in units of the relative error that is left."""
    factors = np.full(len(scales), strictness**-0.5)
    factors[:always] = ALWAYS_STRICTNESS**-0.5
    return np.asarray(scales * factors)


def _loss(fit: _Fit) -> float:
    return float(np.abs(fit[2]).mean())


def _fit(rows: np.ndarray, weights: np.ndarray, expected: np.ndarray, prior: np.ndarray) -> _Fit:
    """Coefficients, their covariance, leave-one-out residuals of the target 1 times the weights, leverages."""
    x = rows * weights[:, None] * prior
    inverse = np.linalg.inv(x.T @ x + np.eye(x.shape[1]))
    left = weights * (1.0 - rows @ expected)
    solution = inverse @ (x.T @ left)
    leverage = np.minimum(np.einsum("ij,ij->i", x @ inverse, x), 1.0 - 1e-9)
    residuals = (left - x @ solution) / (1.0 - leverage)
    return expected + prior * solution, prior[:, None] * inverse * prior, residuals, leverage
