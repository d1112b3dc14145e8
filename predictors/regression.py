"""Bayesian regression of relative errors, its strictness chosen by leave-one-out, its intervals calibrated by it.

Latencies are explained as rows times coefficients; the errors that count are relative. The prior of the coefficients is
normal around what is expected, with given scales times one common factor. How large that factor is decides the leave-one-out
error, which a linear model has in closed form. The quantile of the leave-one-out errors, in predicted standard deviations,
makes the intervals (the jackknife of Barber et al., "Predictive inference with the jackknife+", 2021, without its
recentring).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

STRICTNESS = (1e4, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
ALWAYS_STRICTNESS = 1e-2
COVERAGE = 0.9
LEAST_ERROR = 0.003
USUAL_ERROR = 0.02  # of a network whose latency was measured


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
    """

    coefficients: np.ndarray
    covariance: np.ndarray
    error: float
    widening: float
    strictness: float
    loo_error: float

    def variance_us2(self, row: np.ndarray, us: float, layers_variance_us2: float) -> float:
        """Variance of a prediction, calibrated.

        Args:
            row: `(columns,)`.
            us: the prediction.
            layers_variance_us2: variance of the sum of the layers' prices.
        """
        relative = self.error**2 * (us**2 + float(row @ self.covariance @ row))
        return self.widening**2 * (relative + float(self.coefficients[0]) ** 2 * layers_variance_us2)


def fit_regression(
    rows: np.ndarray,
    measured_us: np.ndarray,
    layers_variance_us2: np.ndarray,
    expected: np.ndarray,
    scales: np.ndarray,
    always: int,
    relative_stds: np.ndarray | None = None,
) -> Regression:
    """Fit to networks.

    Args:
        rows: `(n, columns)`.
        measured_us: `(n,)`.
        layers_variance_us2: `(n,)`, variance of the sums of the layers' prices.
        expected: `(columns,)`, prior means.
        scales: `(columns,)`, prior standard deviations up to a common factor.
        always: the first so many columns have a wide prior whatever leave-one-out says.
        relative_stds: `(n,)`, of latencies that are predictions themselves, which then count less.
    """
    weights = np.ones(len(rows)) if relative_stds is None else 1.0 / np.sqrt(1.0 + (relative_stds / USUAL_ERROR) ** 2)
    relative = rows / measured_us[:, None]
    fits = [_fit(relative, weights, expected, _prior(scales, always, strictness)) for strictness in STRICTNESS]
    losses = [float(np.abs(residuals).mean()) for _, _, residuals, _ in fits]
    best = int(np.argmin(losses))
    coefficients, covariance, residuals, leverage = fits[best]
    layers = (weights * coefficients[0] / measured_us) ** 2 * layers_variance_us2
    # A leave-one-out residual varies by 1 / (1 - leverage) of what the noise varies.
    spread = 1.0 / (1.0 - leverage)
    error = max(LEAST_ERROR, math.sqrt(max(0.0, float(np.mean((residuals**2 - layers) / spread)))))
    ratios = np.sort(np.abs(residuals) / np.sqrt(error**2 * spread + layers))
    rank = min(len(ratios), math.ceil(COVERAGE * (len(ratios) + 1)))
    widening = float(ratios[rank - 1] / norm.ppf(0.5 + COVERAGE / 2))
    return Regression(coefficients, covariance, error, widening, STRICTNESS[best], losses[best])


def _prior(scales: np.ndarray, always: int, strictness: float) -> np.ndarray:
    """Prior standard deviations in units of the relative error that is left."""
    factors = np.full(len(scales), strictness**-0.5)
    factors[:always] = ALWAYS_STRICTNESS**-0.5
    return np.asarray(scales * factors)


def _fit(
    rows: np.ndarray, weights: np.ndarray, expected: np.ndarray, prior: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Coefficients, their covariance, leave-one-out residuals of the target 1 times the weights, leverages."""
    x = rows * weights[:, None] * prior
    inverse = np.linalg.inv(x.T @ x + np.eye(x.shape[1]))
    left = weights * (1.0 - rows @ expected)
    solution = inverse @ (x.T @ left)
    leverage = np.minimum(np.einsum("ij,jk,ik->i", x, inverse, x), 1.0 - 1e-9)
    residuals = (left - x @ solution) / (1.0 - leverage)
    return expected + prior * solution, prior[:, None] * inverse * prior, residuals, leverage
