"""A new device's measurements, fitted: the linear model's posterior stacked with combinations of the known devices."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls
from scipy.stats import norm, t

from predictors.transfer_process import Posterior, Process, scale_of
from predictors.transfer_sources import LOWEST, OUTLIER

RIDGES = (0.003, 0.03, 0.3)  # of the combinations of devices, towards their mean
LEAST_DEVICES = 3  # fewer say nothing about how devices differ
LEAST_STACKED = 4  # measurements; fewer cannot weigh the parts
PRIOR_MEASUREMENTS = 4  # for which counts, among errors of measurements, what is expected of them
PROCESS_SHARE = 0.5  # weight of the linear model before there are measurements


@dataclass(frozen=True)
class Fitted:
    """What measurements of a new device say.

    Args:
        base: `(n,)`, latency of the mean device.
        curves: `(n, d)`, the known devices relative to it.
        scale: of the new device.
        posterior: of the linear model.
        combinations: weights of the known devices, `(d, len(RIDGES))`.
        variances: of the combinations' relative errors.
        shares: weights of posterior and combinations.
        left_out: what they predict of each measurement without it, in its unit.
        widening: by what standard deviations are multiplied.
    """

    base: np.ndarray
    curves: np.ndarray
    scale: float
    posterior: Posterior
    combinations: np.ndarray
    variances: np.ndarray
    shares: np.ndarray
    left_out: np.ndarray
    widening: float

    @staticmethod
    def of(
        process: Process, log_weights: np.ndarray, base: np.ndarray, curves: np.ndarray, ids: np.ndarray, values: np.ndarray
    ) -> Fitted:
        """Fit measurements `values` `(m,)` of networks `ids`; `log_weights` are of the cells of the process's grid."""
        target = values / base[ids]
        scale = scale_of(process.rows(ids), target)
        target = target / scale
        posterior = Posterior.of(process, log_weights, ids, target)
        measured, count = curves[ids], len(ids)
        ridges = RIDGES if measured.shape[1] and count >= LEAST_STACKED else ()
        predicted = np.array([posterior.left_out, *(_left_out(measured, target, ridge) for ridge in ridges)])
        errors = np.array([_mean_square(p / target - 1.0) for p in predicted])
        prior = np.array([PROCESS_SHARE, *[(1 - PROCESS_SHARE) / len(RIDGES)] * len(ridges)])
        shares = prior * (errors / errors.min()) ** (-0.5 * count)
        shares = shares / shares.sum()
        combinations = np.zeros((measured.shape[1], len(ridges)))
        for column, ridge in enumerate(ridges):
            combinations[:, column] = _combination(measured, target, ridge)
        # That an error is small among few measurements may be chance, the more so as it is one of several.
        errors = (count * errors + PRIOR_MEASUREMENTS * errors.mean()) / (count + PRIOR_MEASUREMENTS)
        variances = np.array([posterior.left_out_variance, *(errors[1:, None] * predicted[1:] ** 2)])
        left_out, variance = _mixed(shares, predicted, variances)
        widening = widening_of((left_out - target) / np.sqrt(variance), measured.shape[1])
        unit = scale * base[ids]
        return Fitted(base, curves, scale, posterior, combinations, errors[1:], shares, left_out * unit, widening)

    def predict(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Means and standard deviations of measurements of networks, `(len(rows),)` each, in the unit of those fitted."""
        mean, variance = self.posterior.predict(rows)
        combined = self.combinations.T @ self.curves[rows].T
        means = np.array([np.maximum(mean, LOWEST), *combined])
        mixed, spread = _mixed(self.shares, means, np.array([variance, *(self.variances[:, None] * combined**2)]))
        unit = self.scale * self.base[rows]
        return mixed * unit, self.widening * np.sqrt(spread) * unit


def _combination(curves: np.ndarray, target: np.ndarray, ridge: float) -> np.ndarray:
    """Non-negative weights of devices, `(d,)`, for relative errors, shrunk towards equal ones."""
    count, devices = curves.shape
    strength = np.sqrt(ridge * count)
    rows = np.vstack([curves / target[:, None], strength * np.eye(devices)])
    return np.asarray(nnls(rows, np.concatenate([np.ones(count), np.full(devices, strength / devices)]))[0])


def _left_out(curves: np.ndarray, target: np.ndarray, ridge: float) -> np.ndarray:
    """Each measurement as a combination fitted to the others, `(m,)`; beyond 100, as one fitted to nine tenths."""
    count = len(target)
    predicted = np.empty(count)
    folds = np.arange(count) % min(count, 10 if count > 100 else count)
    for fold in np.unique(folds):
        out = folds == fold
        predicted[out] = curves[out] @ _combination(curves[~out], target[~out], ridge)
    return predicted


def _mixed(shares: np.ndarray, means: np.ndarray, variances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of mixtures, `(n,)` each, of parts `(parts, n)`."""
    mean = shares @ means
    return mean, shares @ (variances + (means - mean) ** 2)


def widening_of(deviations: np.ndarray, devices: int) -> float:
    """By what standard deviations are to be multiplied, so that 90 % of networks lie within 1.645 of them.

    The deviations `(m,)` of left-out measurements, in predicted standard deviations, show how far off these are, and
    `PRIOR_MEASUREMENTS` that are as they should be count with them; where there are too few known devices to have learned from
    what is usual, they narrow nothing. The quantile of Student's distribution makes up for how few measurements and known
    devices there are (Gelman et al., Bayesian Data Analysis, section 3.2).
    """
    squares = np.minimum(np.abs(deviations), OUTLIER) ** 2
    square = (PRIOR_MEASUREMENTS + float(squares.sum())) / (PRIOR_MEASUREMENTS + len(squares))
    freedom = max(1, len(squares) + min(PRIOR_MEASUREMENTS, devices - 1))
    quantile = float(t.ppf(0.95, freedom) / norm.ppf(0.95))
    return math.sqrt(square if devices >= LEAST_DEVICES else max(1.0, square)) * quantile


def bounded_mean(errors: np.ndarray) -> float:
    """Mean of absolute errors, outliers bounded; above 0."""
    return float(np.mean(_bounded(errors))) + 1e-10


def _mean_square(errors: np.ndarray) -> float:
    """Mean square, outliers bounded."""
    return float(np.mean(_bounded(errors) ** 2)) + 1e-10


def _bounded(errors: np.ndarray) -> np.ndarray:
    absolute = np.abs(errors)
    return np.minimum(absolute, 2 * OUTLIER * float(np.median(absolute)))
