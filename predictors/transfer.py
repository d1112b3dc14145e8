"""Latency on a new device, predicted from a few measurements there and many on known devices.

Works on plain arrays: additive features of networks (counts of operators by position, sums over layers, ...) and what the
known devices take. Two ideas are combined. One is a Bayesian linear model whose prior, mean and covariance of the
coefficients, is learned over the known devices (`predictors.transfer_sources`); how far a device may differ from it, and
how noisy its measurements are, is averaged over a grid, whose weights are learned by leaving known devices out
(`predictors.transfer_process`). The other is a non-negative combination of the known devices. They are stacked by how well
they predict measurements of the new device that are left out. The task, a new device from ten measurements, is that of HELP
(Lee et al. 2021).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls
from scipy.stats import norm, t

from predictors.transfer_design import most_telling
from predictors.transfer_process import SHAPE, Posterior, Process, evidence_of, scale_of
from predictors.transfer_sources import FEW_ROWS, LOWEST, OUTLIER, learn_sources
from spaces.errors import UserError

RIDGES = (0.003, 0.03, 0.3)  # of the combinations of devices, towards their mean
TASK_SIZES = (5, 10, 20)
TASKS = 180  # of each size
LEAST_DEVICES = 3  # fewer say nothing about how devices differ
LEAST_STACKED = 4  # measurements; fewer cannot weigh the parts
PRIOR_MEASUREMENTS = 4  # for which counts, among errors of measurements, what is expected of them
MAX_MEASURED = 1000  # measurements that are used, drawn from more
MAX_CANDIDATES = 2000
MAX_TARGETS = 100
PROCESS_SHARE = 0.5  # weight of the linear model before there are measurements


@dataclass(frozen=True)
class _Fitted:
    """After `fit`: the scale of the device, the posterior, weights of the combinations `(d, len(RIDGES))` with the variances of
    their relative errors, the weights of posterior and combinations, what they predict of each measurement without it, and by
    what standard deviations are multiplied.
    """

    scale: float
    posterior: Posterior
    combinations: np.ndarray
    variances: np.ndarray
    shares: np.ndarray
    left_out: np.ndarray
    widening: float


class TransferPredictor:
    """Predicts what networks take on a new device.

    Args:
        features: `(n, f)`, of all networks; latency should be roughly additive in them. Units do not matter.
        source_latency: `(n, d)`, of known devices, each in a unit of its own; NaN where not measured. `d` may be 0. A device
            with fewer than three measurements is not used.
        seed: same seed, same result.

    Raises:
        UserError: shapes that do not fit, features that are not finite, a latency that is not positive.
    """

    def __init__(self, features: np.ndarray, source_latency: np.ndarray, seed: int = 0) -> None:
        features, latency = _checked_sources(features, source_latency)
        latency = latency[:, np.isfinite(latency).sum(axis=0) >= FEW_ROWS]
        self._n, self._seed = len(features), seed
        self.sources = learn_sources(features, latency, seed)
        self._curves = self.sources.curves
        self._process = Process.of(self.sources, np.arange(latency.shape[1]))
        self._log_weights = self._learn_weights(latency)
        self._fitted: _Fitted | None = None

    def _learn_weights(self, latency: np.ndarray) -> np.ndarray:
        """Logarithms of the weights of cells: how many of the known devices, each left out, are like that."""
        devices = latency.shape[1]
        uniform = np.full(SHAPE, 1.0 / np.prod(SHAPE))
        if devices < LEAST_DEVICES:
            return np.asarray(np.log(uniform))
        rng = np.random.default_rng(self._seed)
        logs = []
        for device in range(devices):
            rows = np.flatnonzero(np.isfinite(latency[:, device]))
            draws = [
                rng.choice(rows, min(size, len(rows)), replace=False)
                for size in TASK_SIZES
                for _ in range(max(3, TASKS // devices))
            ]
            used = np.unique(np.concatenate(draws))
            others = Process.of(self.sources, np.delete(np.arange(devices), device), used)
            for ids in draws:
                process = others.rows(np.searchsorted(used, ids))
                target = latency[ids, device] / self.sources.base[ids]
                relative = target / scale_of(process, target)
                bounded = np.clip(relative, LOWEST, process.means[0] + 0.6)  # an outlier is not how a device differs
                logs.append(evidence_of(process, bounded, np.ones(len(ids))).log)
        log = np.array(logs)
        likelihood = np.exp(log - log.max(axis=(1, 2), keepdims=True))
        weights = uniform
        for _ in range(20):
            shares = likelihood * weights
            shares /= shares.sum(axis=(1, 2), keepdims=True)
            weights = (shares.mean(axis=0) * devices + 2.0 * uniform) / (devices + 2.0)
        return np.asarray(np.log(weights))

    # -- a new device -------------------------------------------------------------------------------------------------------

    def fit(self, ids: Sequence[int] | np.ndarray, latency: Sequence[float] | np.ndarray) -> None:
        """Learn from all measurements of the new device; those of an earlier call are forgotten.

        Args:
            ids: rows of the features, `(m,)`, at least one; a network may stand there repeatedly.
            latency: `(m,)`, in any unit.

        Raises:
            UserError: ids that do not exist, another number of latencies, one that is not positive and finite.
        """
        ids = self._checked_ids(ids)
        values = _numbers(latency, "latency")
        if values.shape != ids.shape:
            raise UserError(f"latency has shape {values.shape}; allowed is one per network measured, {ids.shape}")
        if not len(ids):
            raise UserError("no measurement; allowed is at least 1")
        bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        if len(bad):
            raise UserError(f"latency of network {ids[bad[0]]} is {values[bad[0]]}; allowed are finite numbers above 0")
        if len(ids) > MAX_MEASURED:
            kept = np.sort(np.random.default_rng(self._seed).choice(len(ids), MAX_MEASURED, replace=False))
            ids, values = ids[kept], values[kept]
        target = values / self.sources.base[ids]
        scale = scale_of(self._process.rows(ids), target)
        target = target / scale
        posterior = Posterior.of(self._process, self._log_weights, ids, target)
        curves, count = self._curves[ids], len(ids)
        ridges = RIDGES if curves.shape[1] and count >= LEAST_STACKED else ()
        predicted = np.array([posterior.left_out, *(_left_out(curves, target, ridge) for ridge in ridges)])
        errors = np.array([_mean_square(p / target - 1.0) for p in predicted])
        prior = np.array([PROCESS_SHARE, *[(1 - PROCESS_SHARE) / len(RIDGES)] * len(ridges)])
        shares = prior * (errors / errors.min()) ** (-0.5 * count)
        shares = shares / shares.sum()
        combinations = np.zeros((curves.shape[1], len(ridges)))
        for column, ridge in enumerate(ridges):
            combinations[:, column] = _combination(curves, target, ridge)
        # That an error is small among few measurements may be chance, the more so as it is one of several.
        errors = (count * errors + PRIOR_MEASUREMENTS * errors.mean()) / (count + PRIOR_MEASUREMENTS)
        variances = np.array([posterior.left_out_variance, *(errors[1:, None] * predicted[1:] ** 2)])
        left_out, variance = _mixed(shares, predicted, variances)
        widening = widening_of((left_out - target) / np.sqrt(variance), curves.shape[1])
        unit = scale * self.sources.base[ids]
        self._fitted = _Fitted(scale, posterior, combinations, errors[1:], shares, left_out * unit, widening)

    def left_out(self) -> np.ndarray:
        """Each measurement as the others predict it, `(m,)`, in their unit; the scale and the stacking's weights are of all.

        Raises:
            RuntimeError: before `fit`.
        """
        if self._fitted is None:
            raise RuntimeError("the transfer predictor is not fitted")
        return self._fitted.left_out

    def forget(self) -> None:
        """Forget the new device, to go on with another one."""
        self._fitted = None

    def predict(self, ids: Sequence[int] | np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Latency of networks on the new device, in the unit of its measurements.

        Args:
            ids: rows of the features; by default all.

        Returns:
            Mean and standard deviation of a measurement, `(len(ids),)` each; 90 % are meant to lie within 1.645 of these.

        Raises:
            UserError: ids that do not exist.
            RuntimeError: before `fit`.
        """
        if self._fitted is None:
            raise RuntimeError("the transfer predictor is not fitted")
        fitted = self._fitted
        rows = np.arange(self._n) if ids is None else self._checked_ids(ids)
        mean, variance = fitted.posterior.predict(rows)
        combined = fitted.combinations.T @ self._curves[rows].T
        means = np.array([np.maximum(mean, LOWEST), *combined])
        mixed, spread = _mixed(fitted.shares, means, np.array([variance, *(fitted.variances[:, None] * combined**2)]))
        unit = fitted.scale * self.sources.base[rows]
        return mixed * unit, fitted.widening * np.sqrt(spread) * unit

    def propose(self, count: int, candidates: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Which networks to measure next: those that leave the least expected error over all networks, one after another.

        Args:
            count: how many.
            candidates: rows of the features; by default all. Networks measured already are not proposed again.

        Returns:
            Rows of the features, `(count,)`, all different, the most telling first.

        Raises:
            UserError: fewer candidates than asked for, or ids that do not exist.
        """
        if not isinstance(count, (int, np.integer)) or isinstance(count, bool) or count < 1:
            raise UserError(f"count is {count!r}; allowed are integers from 1")
        pool = np.arange(self._n) if candidates is None else np.unique(self._checked_ids(candidates))
        measured = self._fitted.posterior.ids if self._fitted is not None else np.zeros(0, dtype=int)
        pool = np.setdiff1d(pool, measured)
        if len(pool) < count:
            raise UserError(f"count is {count}; there are {len(pool)} candidates that are not measured")
        rng = np.random.default_rng(self._seed)
        if len(pool) > max(MAX_CANDIDATES, count):
            pool = np.sort(rng.choice(pool, max(MAX_CANDIDATES, count), replace=False))
        targets = rng.permutation(self._n)[:MAX_TARGETS]
        weights = np.exp(self._log_weights) if self._fitted is None else self._fitted.posterior.weights
        return most_telling(self._process, weights, measured, pool, targets, int(count))

    def _checked_ids(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        rows = np.asarray(ids)
        if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iu"):
            raise UserError(f"ids are {rows.dtype} of shape {rows.shape}; allowed is a sequence of integers")
        rows = rows.astype(int)
        unknown = rows[(rows < 0) | (rows >= self._n)]
        if len(unknown):
            raise UserError(f"id {unknown[0]}; allowed are 0 to {self._n - 1}")
        return rows


def _numbers(values: object, what: str) -> np.ndarray:
    try:
        return np.array(values, dtype=float)
    except (TypeError, ValueError) as error:
        raise UserError(f"{what} is not an array of numbers ({error})") from error


def _checked_sources(features: object, latency: object) -> tuple[np.ndarray, np.ndarray]:
    x, y = _numbers(features, "features"), _numbers(latency, "source_latency")
    if x.ndim != 2 or not len(x):
        raise UserError(f"features have shape {x.shape}; allowed is (networks, features), with at least one network")
    if y.ndim != 2 or len(y) != len(x):
        raise UserError(f"source_latency has shape {y.shape}; allowed is ({len(x)}, devices), a row per row of the features")
    if not np.isfinite(x).all():
        row, column = np.argwhere(~np.isfinite(x))[0]
        raise UserError(f"feature {column} of network {row} is {x[row, column]}; allowed are finite numbers")
    wrong = np.argwhere(~np.isnan(y) & ~(np.isfinite(y) & (y > 0)))
    if len(wrong):
        row, device = wrong[0]
        raise UserError(f"latency of network {row} on device {device} is {y[row, device]}; allowed are numbers above 0, or NaN")
    return x, y


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


def _mean_square(errors: np.ndarray) -> float:
    """Mean square, outliers bounded."""
    bound = 2 * OUTLIER * float(np.median(np.abs(errors)))
    return float(np.mean(np.minimum(np.abs(errors), bound) ** 2)) + 1e-10
