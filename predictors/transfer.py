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

from collections.abc import Sequence

import numpy as np

from predictors.transfer_design import most_telling, with_noise
from predictors.transfer_fitted import LEAST_DEVICES, Fitted, bounded_mean
from predictors.transfer_process import SHAPE, Process, evidence_of, scale_of
from predictors.transfer_sources import FEW_ROWS, LOWEST, learn_sources
from spaces.errors import UserError

TASK_SIZES = (5, 10, 20)
TASKS = 180  # of each size
MAX_MEASURED = 1000  # measurements that are used, drawn from more
MAX_CANDIDATES = 2000
MAX_TARGETS = 100
DESIGN_NOISES = (0.002, 0.005, 0.02, 0.07)  # for which networks to measure are chosen, beside the average over all noises
JUDGED_DESIGNS = 2  # of each noise, for different draws of the networks over which the error is expected
JUDGED_DEVICES, JUDGED_ROWS = 24, 300  # known devices and networks on which they are, drawn from more


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
        self._latency = latency
        self._process = Process.of(self.sources, np.arange(latency.shape[1]))
        self._log_weights = self._learn_weights(latency)
        self._fitted: Fitted | None = None

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
        self._fitted = Fitted.of(self._process, self._log_weights, self.sources.base, self._curves, ids, values)

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
        return self._fitted.predict(np.arange(self._n) if ids is None else self._checked_ids(ids))

    def propose(self, count: int, candidates: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Which networks to measure next: those that leave the least expected error over all networks, one after another.

        What is expected depends on how noisy the device is taken to be. Before there are measurements this is the noise for
        which as many networks, chosen from part of the candidates, predict the known devices best, each by the others.

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
        if self._fitted is not None:
            return most_telling(self._process, self._fitted.posterior.weights, measured, pool, targets, int(count))
        weights = np.exp(self._log_weights)
        if self._latency.shape[1] >= LEAST_DEVICES:
            cells = [weights, *(with_noise(weights, noise) for noise in DESIGN_NOISES)]
            aims = [targets, *(rng.permutation(self._n)[:MAX_TARGETS] for _ in range(JUDGED_DESIGNS - 1))]
            designs = [most_telling(self._process, w, measured, pool, aim, int(count)) for w in cells for aim in aims]
            errors = self._left_out_errors(designs).reshape(len(cells), len(aims))
            return designs[len(aims) * int(np.argmin(errors.mean(axis=1)))]
        return most_telling(self._process, weights, measured, pool, targets, int(count))

    def _left_out_errors(self, designs: Sequence[np.ndarray]) -> np.ndarray:
        """Log error with which each design predicts known devices from the others, mean over these, `(designs,)`."""
        latency, rng = self._latency, np.random.default_rng([self._seed, 3])
        devices, proposed = latency.shape[1], np.unique(np.concatenate(designs))
        logs = []
        for device in np.sort(rng.permutation(devices)[:JUDGED_DEVICES]):
            known = np.flatnonzero(np.isfinite(latency[:, device]))
            judged = rng.permutation(np.setdiff1d(known, proposed))[:JUDGED_ROWS]
            measured = [np.intersect1d(design, known) for design in designs]
            if not len(judged) or not all(map(len, measured)):
                continue
            used, others = np.union1d(judged, proposed), np.delete(np.arange(devices), device)
            process = Process.of(self.sources, others, used)
            parts = process, self._log_weights, self.sources.base[used], self._curves[used][:, others]
            at, errors = np.searchsorted(used, judged), []
            for ids in measured:
                fitted = Fitted.of(*parts, np.searchsorted(used, ids), latency[ids, device])
                errors.append(bounded_mean(fitted.predict(at)[0] / latency[judged, device] - 1.0))
            logs.append(np.log(errors))
        return np.mean(logs, axis=0) if logs else np.zeros(len(designs))

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
