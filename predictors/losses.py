"""How networks rank, from the losses of the training steps that trained them.

A supernet's training step trains one network on a batch, and its loss says a little about that network. A thousand such steps
rank networks as well as two hundred evaluations do and cost nothing; and while evaluations tell what the weights were, losses
tell what they have just become.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.linear_model import BayesianRidge
from threadpoolctl import threadpool_limits

TREND = 3  # degree of the polynomial by which losses fall with the steps


class LossPredictor:
    """Bayesian ridge regression on what losses are beside their trend over the steps.

    Args:
        features: `(n, f)`, of the networks in the order in which they were trained.
        losses: `(n,)`, cross-entropy.
        reference: `(m, f)`, of networks of all sizes: how far a feature spreads there is its scale, as steps may have trained
            networks that are much alike.
    """

    def __init__(self, features: np.ndarray, losses: Sequence[float], reference: np.ndarray) -> None:
        self._centre, self._scale = reference.mean(axis=0), np.maximum(reference.std(axis=0), 1e-6)
        target = np.asarray(losses, dtype=float)
        trend = np.vander(np.linspace(-1.0, 1.0, len(target)), TREND + 1)
        beside = target - trend @ np.linalg.lstsq(trend, target, rcond=None)[0]
        self._mean = float(target.mean())
        with threadpool_limits(1):  # threads that wait for each other cost more than they bring
            self._model = BayesianRidge().fit(self._scaled(features), beside)

    def predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What ranks networks as accuracy does: the geometric mean of the probabilities that they give to the right labels.

        Args:
            features: `(n, f)`; more than were fitted are left out.

        Returns:
            It and its standard deviation, `(n,)` each.
        """
        loss, std = self._model.predict(self._scaled(features), return_std=True)
        likelihood = np.exp(-np.maximum(loss + self._mean, 0.0))
        return likelihood, likelihood * std

    def _scaled(self, features: np.ndarray) -> np.ndarray:
        return np.asarray((features[:, : len(self._centre)] - self._centre) / self._scale)
