"""A new device as a Gaussian process over networks: the linear model with its prior, averaged over how far devices differ.

The covariance between networks is a sum of parts (`Process.factors`): the device's scale, the directions in which known
devices differ (as additive features, or with what is not additive in them), and features that act alike changing together.
How large each part is and how noisy the device is are the cells of a grid; every cell has the evidence of the measurements
as its weight. All values are relative to the mean device's latency.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from predictors.transfer_sources import OUTLIER, Sources

SPANS = (0.0, 0.25, 0.5, 1.0, 2.0)  # how far a new device differs from the mean one, in units of the known devices' covariance
ALIKES = (0.0, 0.01, 0.03, 0.1, 0.3, 0.8)  # how far in features that act alike, standard deviation relative to latency
NOISES = (0.0005, 0.002, 0.005, 0.01, 0.02, 0.04, 0.07, 0.1, 0.14, 0.2)  # standard deviation of a measurement
SCALE_STD = 0.3  # of the scale, beyond the median of the measurements
CELLS = 16  # the likeliest cells, which give a prediction's variance
ROUNDS = 3  # of weighing outliers less

_GRID = [(joint, span, alike) for joint, span, alike in itertools.product((0, 1), SPANS, ALIKES) if span or not joint]
JOINT = np.array([joint for joint, _, _ in _GRID])
VARIANCES = np.array([[SCALE_STD**2, span**2 * (1 - joint), span**2 * joint, alike**2] for joint, span, alike in _GRID])
NOISE_VARIANCES = np.square(NOISES)
SHAPE = len(_GRID), len(NOISES)


@dataclass(frozen=True)
class Process:
    """The prior over `n` networks.

    Args:
        factors: four matrices `(n, *)`, one per column of `VARIANCES`; the covariance is the sum of `variance * factor @
            factor.T`.
        means: prior means without and with what is not additive, `(2, n)`.
    """

    factors: tuple[np.ndarray, ...]
    means: np.ndarray

    @staticmethod
    def of(sources: Sources, devices: np.ndarray, rows: np.ndarray | None = None) -> Process:
        """The prior that some of the known devices teach, for all networks or for those in `rows`."""
        basis, beyond, alike = sources.basis, sources.beyond[:, devices], sources.alike
        if rows is not None:
            basis, beyond, alike = basis[rows], beyond[rows], alike[rows]
        centre, covariance = sources.prior(devices)
        additive = basis @ centre
        count = max(1, len(devices))
        joint = (basis @ (sources.coefficients[:, devices] - centre[:, None]) + beyond) / np.sqrt(count)
        means = np.stack([additive, additive + beyond.sum(axis=1) / count])
        return Process((additive[:, None], basis @ _root(covariance), joint, alike), means)

    def rows(self, rows: np.ndarray) -> Process:
        """The prior of some networks."""
        return Process(tuple(factor[rows] for factor in self.factors), self.means[:, rows])

    def covariances(self, rows: np.ndarray) -> np.ndarray:
        """Of every network with those in `rows`, `(4, n, rows)`, one per factor."""
        return np.stack([factor @ factor[rows].T for factor in self.factors])


def scale_of(process: Process, target: np.ndarray) -> float:
    """The new device's scale: the median ratio to the prior mean."""
    return float(np.median(target / np.maximum(process.means[0], 1e-3)))


@dataclass(frozen=True)
class Evidence:
    """Measurements under every cell.

    Args:
        log: logarithm of the evidence, `SHAPE`.
        alphas: inverse covariance times residuals, `(*SHAPE, m)`.
        out: predicted residual of each measurement from the others, less the measured one, `(*SHAPE, m)`.
        out_variance: its variance, `(*SHAPE, m)`.
    """

    log: np.ndarray
    alphas: np.ndarray
    out: np.ndarray
    out_variance: np.ndarray


def evidence_of(process: Process, target: np.ndarray, inflation: np.ndarray) -> Evidence:
    """Evidence of measurements `(m,)` at the process's networks; `inflation` `(m,)` multiplies the grid's noise variances."""
    count = len(target)
    root = np.sqrt(inflation)
    residuals = ((target - process.means) / root)[JOINT]
    parts = process.covariances(np.arange(count)) / np.outer(root, root)
    values, vectors = np.linalg.eigh(np.einsum("gk,kij->gij", VARIANCES, parts))
    rotated = np.einsum("gij,gi->gj", vectors, residuals)
    spectrum = np.maximum(values, 0.0)[:, None, :] + NOISE_VARIANCES[:, None]
    log = -0.5 * (rotated[:, None, :] ** 2 / spectrum + np.log(spectrum)).sum(axis=2)
    alphas = np.matmul(rotated[:, None, :] / spectrum, vectors.transpose(0, 2, 1))
    diagonal = np.matmul(1.0 / spectrum, (vectors**2).transpose(0, 2, 1))
    return Evidence(log, alphas / root, -alphas / diagonal * root, inflation / diagonal)


@dataclass(frozen=True)
class Posterior:
    """A process after measurements of a new device, at the scale of the mean device.

    Args:
        process: the prior.
        ids: networks that were measured, `(m,)`.
        inflation: of the noise of each measurement, `(m,)`.
        weights: of cells, `SHAPE`; they sum to 1.
        alphas: see `Evidence`.
        left_out: each measurement as predicted from the others, `(m,)`.
        left_out_variance: of these predictions, the measurement's noise included, `(m,)`.
    """

    process: Process
    ids: np.ndarray
    inflation: np.ndarray
    weights: np.ndarray
    alphas: np.ndarray
    left_out: np.ndarray
    left_out_variance: np.ndarray

    @staticmethod
    def of(process: Process, log_weights: np.ndarray, ids: np.ndarray, target: np.ndarray) -> Posterior:
        """Condition a prior, whose cells have `log_weights`, on measurements `target` `(m,)` of networks `ids`."""
        measured = process.rows(ids)
        inflation = np.ones(len(ids))
        for _ in range(ROUNDS):
            evidence = evidence_of(measured, target, inflation)
            log = evidence.log + log_weights
            weights = np.exp(log - log.max())
            weights /= weights.sum()
            deviation = np.sqrt(np.einsum("gs,gsm->m", weights, evidence.out**2 / evidence.out_variance))
            bounded = np.maximum(1.0, deviation * np.sqrt(inflation) / OUTLIER) ** 2
            if len(ids) < 4 or np.allclose(bounded, inflation, rtol=0.1):
                break
            inflation = bounded
        # A cell's weight without measurement i is its weight with it over the density that it gave to it.
        density = np.exp(-0.5 * evidence.out**2 / evidence.out_variance) / np.sqrt(evidence.out_variance)
        without = weights[:, :, None] / (density + 1e-9 * density.max(axis=(0, 1)))
        without /= without.sum(axis=(0, 1))
        off = (without * evidence.out).sum(axis=(0, 1))
        variance = (without * (evidence.out_variance + (evidence.out - off) ** 2)).sum(axis=(0, 1))
        return Posterior(process, ids, inflation, weights, evidence.alphas, target + off, variance)

    def predict(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Means and variances of measurements of networks, `(len(rows),)` each."""
        asked = self.process.rows(rows)
        crossed = [factor @ self.process.factors[k][self.ids].T for k, factor in enumerate(asked.factors)]
        flat = np.argsort(-self.weights, axis=None, kind="stable")[:CELLS]
        cells = list(zip(*np.unravel_index(flat, SHAPE), strict=True))
        share = self.weights.ravel()[flat] / self.weights.ravel()[flat].sum()
        mixed = np.einsum("gs,gsm,gk->km", self.weights, self.alphas, VARIANCES)
        joint = float(self.weights[JOINT == 1].sum())
        mean = asked.means[0] * (1 - joint) + asked.means[1] * joint
        mean = mean + np.sum([crossed[k] @ mixed[k] for k in range(len(crossed))], axis=0)
        prior_variances = np.stack([(factor**2).sum(axis=1) for factor in asked.factors])
        between = self.process.rows(self.ids).covariances(np.arange(len(self.ids)))
        variance = np.zeros(len(rows))
        solved: dict[int, np.ndarray] = {}
        for (g, s), weight in zip(cells, share, strict=True):
            if g not in solved:
                solved[g] = np.sum([v * c for v, c in zip(VARIANCES[g], crossed, strict=True)], axis=0)
            covariance = np.tensordot(VARIANCES[g], between, 1) + np.diag(NOISE_VARIANCES[s] * self.inflation)
            known = np.linalg.solve(np.linalg.cholesky(covariance), solved[g].T)
            own = VARIANCES[g] @ prior_variances - (known**2).sum(axis=0) + NOISE_VARIANCES[s]
            apart = asked.means[JOINT[g]] + solved[g] @ self.alphas[g, s] - mean
            variance += weight * (np.maximum(own, NOISE_VARIANCES[s]) + apart**2)
        return mean, variance


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0.0)))
