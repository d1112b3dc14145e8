"""What the known devices teach about a new one: how latency depends on features, and how that differs between devices.

Every device has a scale of its own, so latencies are taken relative to the device's mean over all networks, and errors
relative to the mean device (`base`): a device is then a curve around 1. Three things are learned from the curves: the mean
and the covariance of the coefficients of additive features over the devices, each device weighed by its own noise (a
hierarchical linear model, fitted by expectation maximization: Gelman et al., Bayesian Data Analysis, chapter 15); which
features act alike on all devices, so that a new device probably treats them alike too; and what of a device is not
additive, by trees, where those predict held-out residuals.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.ensemble import ExtraTreesRegressor
from threadpoolctl import threadpool_limits

FEW_ROWS = 3  # a device measured on fewer networks teaches nothing
MAX_ROWS = 4000  # measured networks that a device's coefficients are fitted to
MAX_TREE_ROWS = 2000
MAX_DIMENSIONS = 256
PRIOR_DEVICES = 2.0  # devices that the prior covariance counts for
PRIOR_STD = 0.02  # of a direction of features, relative to latency
PRIOR_SCALE_STD = 0.05
LEAST_NOISE = 1e-4
ALIKE = 0.3  # features act alike where their profiles differ by this share of what profiles usually differ by
PROFILE_NOISE = 0.02
LEAST_GAIN = 0.04  # of the variance of residuals, held out, that trees must explain
OUTLIER = 3.0  # robust standard deviations
LOWEST = 0.05  # of the mean device's latency: no prediction is below it


@dataclass(frozen=True)
class Sources:
    """The known devices, as curves over `n` networks relative to the mean device.

    Args:
        base: `(n,)`, latency of the mean device; its mean is 1.
        basis: `(n, q)`, features relative to `base`, in orthogonal directions, a constant first.
        coefficients: `(q, d)` of the devices.
        uncertain: `(q, q, d)`, covariances of what is not known of the devices' coefficients.
        noise: `(d,)`, variance of a measurement relative to `base`.
        beyond: `(n, d)`, what is not additive in the devices' curves.
        alike: `(n, k)`, factor of the covariance between networks when features that act alike on the known devices change
            together; rows have a mean square of 1.
    """

    base: np.ndarray
    basis: np.ndarray
    coefficients: np.ndarray
    uncertain: np.ndarray
    noise: np.ndarray
    beyond: np.ndarray
    alike: np.ndarray

    def prior(self, devices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean `(q,)` and covariance `(q, q)` of a new device's coefficients, as some of the devices teach them."""
        return _over_devices(self.coefficients[:, devices], self.uncertain[:, :, devices])

    @property
    def curves(self) -> np.ndarray:
        """`(n, d)`: the devices' latencies, completed and smoothed, relative to `base`."""
        return np.asarray(np.maximum(self.basis @ self.coefficients + self.beyond, LOWEST))


def learn_sources(features: np.ndarray, latency: np.ndarray, seed: int = 0) -> Sources:
    """Fit the known devices.

    Args:
        features: `(n, f)`, finite.
        latency: `(n, d)`, positive, NaN where not measured; a device with fewer than `FEW_ROWS` measurements is left out.
        seed: draws rows where there are very many, and the trees.
    """
    rng = np.random.default_rng(seed)
    scaled = _scaled(features)
    directions = _orthogonal(scaled)
    basis = np.hstack([np.ones((len(features), 1)), directions])
    measured = [np.flatnonzero(~np.isnan(column)) for column in latency.T]
    known = [(rows, latency[rows, j]) for j, rows in enumerate(measured) if len(rows) >= FEW_ROWS]
    known = [(rows, y) if len(rows) <= MAX_ROWS else _drawn(rng, rows, y, MAX_ROWS) for rows, y in known]
    first = [_robust_fit(basis[rows], y) for rows, y in known]
    raw = np.array([c / max(c[0], LOWEST * np.median(y)) for (_, y), (c, _) in zip(known, first, strict=True)]).T
    base = np.ones(len(features))
    if known:
        base = np.maximum(basis @ raw.mean(axis=1), LOWEST)
        base = base / base.mean()
    basis = basis / base[:, None]
    relative, weights = [], []
    for (rows, y), coefficients in zip(known, raw.T if known else [], strict=True):
        fitted = basis[rows] @ coefficients
        curve = y / base[rows] / np.median(y / base[rows] / np.maximum(fitted, LOWEST))
        residual = np.abs(curve - fitted)
        relative.append(curve)
        weights.append(1.0 / np.maximum(1.0, residual / (OUTLIER * 1.4826 * np.median(residual) + LEAST_NOISE)))
    rows_of = [rows for rows, _ in known]
    coefficients, uncertain, noise = _hierarchy(basis, rows_of, relative, weights, raw, [s for _, s in first])
    beyond = np.zeros((len(features), len(known)))
    for j, (rows, curve) in enumerate(zip(rows_of, relative, strict=True)):
        beyond[:, j] = _beyond(features, rows, curve - basis[rows] @ coefficients[:, j], rng)
    alike = _alike(scaled, basis @ coefficients * base[:, None], noise) / base[:, None]
    alike = alike / max(float(np.sqrt((alike**2).sum(axis=1).mean())), 1e-12)
    return Sources(base, basis, coefficients, uncertain, noise, beyond, alike)


def _drawn(rng: np.random.Generator, rows: np.ndarray, values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    kept = np.sort(rng.choice(len(rows), count, replace=False))
    return rows[kept], values[kept]


def _scaled(features: np.ndarray) -> np.ndarray:
    """Features without their means, each divided by its range, so that units do not matter; constant ones left out."""
    low, high = features.min(axis=0), features.max(axis=0)
    varies = high - low > 1e-12 * np.maximum(np.abs(low), np.abs(high))
    scaled = (features[:, varies] - low[varies]) / (high - low)[varies]
    return np.asarray(scaled - scaled.mean(axis=0))


def _orthogonal(scaled: np.ndarray) -> np.ndarray:
    """Principal directions of features, `(n, q)`, those without variance left out; rows have a mean square of 1."""
    if not scaled.shape[1]:
        return scaled
    if len(scaled) < scaled.shape[1]:
        left, singular, _ = np.linalg.svd(scaled, full_matrices=False)
        rotated = left * singular
        squares = singular**2
    else:
        squares, vectors = np.linalg.eigh(scaled.T @ scaled)
        squares, rotated = squares[::-1], scaled @ vectors[:, ::-1]
    kept = np.flatnonzero(squares > 1e-9 * squares[0])[:MAX_DIMENSIONS]
    return np.asarray(rotated[:, kept] / np.sqrt((rotated[:, kept] ** 2).sum(axis=1).mean()))


def _robust_fit(basis: np.ndarray, latency: np.ndarray) -> tuple[np.ndarray, float]:
    """Coefficients for relative errors, outliers weighed less, ridge by generalized cross-validation; noise variance."""
    scale = float(np.median(latency))
    target, count = latency / scale, len(latency)
    weight, coefficients, noise = np.ones(count), np.zeros(basis.shape[1]), LEAST_NOISE
    for _ in range(6):
        squares, vectors = np.linalg.eigh((basis * weight[:, None]).T @ basis)
        rotated = vectors.T @ (basis.T @ (weight * target))
        squares = np.maximum(squares, 0.0)
        best = np.inf
        for ridge in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
            shrunk = rotated / (squares + ridge * count)
            used = float((squares / (squares + ridge * count)).sum())
            candidate = vectors @ shrunk
            error = float((weight * (target - basis @ candidate) ** 2).mean()) / max(1.0 - used / count, 0.02) ** 2
            if error < best:
                best, coefficients = error, candidate
        predicted = np.maximum(basis @ coefficients, LOWEST)
        residual = np.abs(target / predicted - 1.0)
        spread = OUTLIER * 1.4826 * float(np.median(residual)) + LEAST_NOISE
        weight = 1.0 / predicted**2 / np.maximum(1.0, residual / spread)
        noise = max(best, LEAST_NOISE**2)
    return coefficients * scale, noise


def _hierarchy(
    basis: np.ndarray,
    rows_of: list[np.ndarray],
    relative: list[np.ndarray],
    weights: list[np.ndarray],
    start: np.ndarray,
    noise_start: list[float],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coefficients of the devices, what is not known of them, and the devices' noise, by expectation maximization."""
    size, devices = basis.shape[1], len(rows_of)
    if not devices:
        return np.zeros((size, 0)), np.zeros((size, size, 0)), np.zeros(0)
    designs = [basis[rows] for rows in rows_of]
    grams = [(x * w[:, None]).T @ x for x, w in zip(designs, weights, strict=True)]
    moments = [x.T @ (w * y) for x, w, y in zip(designs, weights, relative, strict=True)]
    coefficients, noise = start.copy(), np.maximum(np.array(noise_start), LEAST_NOISE**2)
    uncertain = np.zeros((size, size, devices))
    for _ in range(10 if size <= 100 else 5):
        mean, covariance = _over_devices(coefficients, uncertain)
        precision = np.linalg.inv(covariance)
        for j in range(devices):
            uncertain[:, :, j] = np.linalg.inv(grams[j] / noise[j] + precision)
            coefficients[:, j] = uncertain[:, :, j] @ (moments[j] / noise[j] + precision @ mean)
            squares = weights[j] * (relative[j] - designs[j] @ coefficients[:, j]) ** 2
            unexplained = float(squares.sum() + np.sum(grams[j] * uncertain[:, :, j])) / len(relative[j])
            noise[j] = max(unexplained, LEAST_NOISE**2)
    return coefficients, uncertain, noise


def _over_devices(coefficients: np.ndarray, uncertain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean `(q,)` and covariance `(q, q)` of coefficients over devices; without any, those of the mean device."""
    size, devices = coefficients.shape
    prior = PRIOR_STD**2 * np.eye(size)
    prior[0, 0] = PRIOR_SCALE_STD**2
    if not devices:
        return np.eye(size)[0], prior
    mean = coefficients.mean(axis=1)
    spread = coefficients - mean[:, None]
    covariance = (spread @ spread.T + uncertain.sum(axis=2) + PRIOR_DEVICES * prior) / (devices + PRIOR_DEVICES)
    return mean, covariance


def _beyond(features: np.ndarray, rows: np.ndarray, residual: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What trees (extremely randomized: Geurts 2006) say of residuals, `(n,)`; zero if they do not predict those left out."""
    nothing = np.zeros(len(features))
    if len(rows) < 60 or not features.shape[1]:
        return nothing
    if len(rows) > MAX_TREE_ROWS:
        rows, residual = _drawn(rng, rows, residual, MAX_TREE_ROWS)
    robust = OUTLIER * 1.4826 * float(np.median(np.abs(residual))) + LEAST_NOISE
    spread = max(robust / OUTLIER, float(np.sqrt(np.mean(np.clip(residual, -robust, robust) ** 2))))
    target = np.clip(residual, -4 * spread, 4 * spread)
    seed = int(rng.integers(2**31))
    trees = ExtraTreesRegressor(60, min_samples_leaf=2, max_features=0.5, bootstrap=True, oob_score=True, random_state=seed)
    with threadpool_limits(1):
        trees.fit(features[rows], target)
        out = trees.oob_prediction_
        share = float(np.clip(out @ target / max(out @ out, 1e-12), 0.0, 1.0))
        gain = 1.0 - float(np.mean((target - share * out) ** 2)) / max(float(np.mean(target**2)), 1e-12)
        if gain <= LEAST_GAIN:
            return nothing
        predicted = trees.predict(features)
        if len(rows) < len(features):
            predicted[rows] = out  # of what they were fitted to trees know more than of the other networks
        return np.asarray(share * predicted)


def _alike(scaled: np.ndarray, curves: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Factor `(n, k)` of a covariance: coefficients of features vary together when the devices treat them alike."""
    count = scaled.shape[1]
    kernel = np.eye(count)
    if curves.shape[1] and count:
        ridge = 1e-3 * float((scaled**2).mean()) * len(scaled)
        centred = curves - curves.mean(axis=0)
        profiles = np.linalg.solve(scaled.T @ scaled + ridge * np.eye(count), scaled.T @ centred)
        profiles = profiles / np.sqrt(noise + PROFILE_NOISE**2)
        squares = (profiles**2).sum(axis=1)
        distances = np.maximum(squares[:, None] + squares - 2 * profiles @ profiles.T, 0.0)
        usual = float(profiles.var(axis=0).sum())
        if usual > 0:
            kernel = np.exp(-distances / (2 * ALIKE**2 * usual))
    values, vectors = np.linalg.eigh(kernel)
    kept = values > 1e-6 * max(float(values.max(initial=0.0)), 1e-12)
    return np.asarray(scaled @ (vectors[:, kept] * np.sqrt(values[kept])))
