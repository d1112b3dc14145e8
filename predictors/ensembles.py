"""Regressors with an uncertainty of their own for accuracy predictors: ridge on pairwise features, and bagged ensembles.

They take features and targets that are centred and of unit spread, as `predictors.accuracy` gives them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.linalg import eigh

PAIR_SHARES = (0.0, 0.1, 0.3, 1.0)
PENALTIES = np.logspace(-4, 2, 19)


class PairwiseRidge:
    """Ridge regression on the features and all their pairwise products.

    It is solved in its dual form (Saunders et al. 1998), so its cost follows from the number of rows, not of pairs. Penalty and
    weight of the pairs beside the single features are those with the smallest leave-one-out error, which has a closed form.
    """

    def __init__(self, pair_shares: Sequence[float] = PAIR_SHARES, penalties: Sequence[float] | np.ndarray = PENALTIES) -> None:
        self.pair_shares, self.penalties = pair_shares, penalties

    def fit(self, features: np.ndarray, targets: np.ndarray) -> PairwiseRidge:
        """Learn from `features (n, f)` and `targets (n,)`."""
        self._features, best = features, np.inf
        for share in self.pair_shares:
            values, vectors = eigh(self._kernel(features, features, share))
            values = np.maximum(values, 0.0)
            rotated = vectors.T @ targets
            for penalty in self.penalties:
                inverse = 1.0 / (values + penalty)
                weights = vectors @ (inverse * rotated)
                left_out = weights / np.maximum((vectors**2) @ inverse, 1e-12)
                error = float(np.mean(left_out**2))
                if error < best * (1.0 - 1e-9):
                    best, self.pair_share, self.penalty = error, share, float(penalty)
                    self._weights, self._vectors, self._inverse = weights, vectors, inverse
        self.left_out_error = best
        self._signal = float(targets @ self._weights) / len(targets)  # what one unit of the kernel is worth
        return self

    def predict(self, features: np.ndarray, return_std: bool = False) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Means `(n,)`, with `return_std` also standard deviations `(n,)`, of the noise and of what is not known."""
        kernel = self._kernel(features, self._features, self.pair_share)
        mean = kernel @ self._weights
        if not return_std:
            return np.asarray(mean)
        single = (features**2).mean(axis=1)
        own = 1.0 + single + self.pair_share * single**2
        unknown = np.maximum(own - ((kernel @ self._vectors) ** 2) @ self._inverse, 0.0)
        return mean, np.sqrt(self._signal * unknown + min(self.left_out_error, self._signal * self.penalty) + 1e-12)

    @staticmethod
    def _kernel(left: np.ndarray, right: np.ndarray, pair_share: float) -> np.ndarray:
        """Products of the rows' images: a constant, the features, and with a weight all products of two features."""
        product = left @ right.T / left.shape[1]
        return np.asarray(1.0 + product + pair_share * product**2)


class Bagged:
    """Regressors fitted to bootstrap samples (Breiman 1996).

    The variance of a prediction is that of the members, and the mean squared error on the rows that members have not seen.

    Args:
        member: makes a regressor from a seed.
        members: how many.
        seed: draws the samples.
    """

    def __init__(self, member: Callable[[int], Any], members: int, seed: int) -> None:
        self.member, self.members, self.seed = member, members, seed

    def fit(self, features: np.ndarray, targets: np.ndarray) -> Bagged:
        """Learn from `features (n, f)` and `targets (n,)`."""
        rng, count = np.random.default_rng(self.seed), len(targets)
        self._fitted, sums, times = [], np.zeros(count), np.zeros(count)
        for index in range(self.members):
            rows = rng.integers(0, count, count)
            fitted = self.member(self.seed + index).fit(features[rows], targets[rows])
            unseen = np.setdiff1d(np.arange(count), rows)
            if len(unseen):
                sums[unseen] += fitted.predict(features[unseen])
                times[unseen] += 1
            self._fitted.append(fitted)
        told = times > 0
        errors = sums[told] / times[told] - targets[told]
        self.noise = float(np.mean(errors**2)) if told.any() else float(targets.var())
        return self

    def predict(self, features: np.ndarray, return_std: bool = False) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Means `(n,)`, with `return_std` also standard deviations `(n,)`."""
        each = np.array([fitted.predict(features) for fitted in self._fitted])
        mean = np.asarray(each.mean(axis=0))
        return (mean, np.sqrt(each.var(axis=0) + self.noise)) if return_std else mean
