"""Accuracy of an architecture, predicted from a few hundred that were evaluated.

Accuracies are predicted on the logit scale, where the steps near 1 that separate good networks are as wide as those in the
middle. Every prediction carries a standard deviation.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from scipy.stats import kendalltau
from sklearn.ensemble import ExtraTreesRegressor, GradientBoostingRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, DotProduct, WhiteKernel
from sklearn.linear_model import BayesianRidge
from sklearn.neural_network import MLPRegressor
from threadpoolctl import threadpool_limits

from predictors.ensembles import Bagged, PairwiseRidge
from spaces.choice import Architecture
from spaces.layers import Network
from spaces.space import Space

INACTIVE = -0.5
MIXING_KINDS = ("pointwise", "linear")


def accuracy_features(space: Space, architectures: Sequence[Architecture], networks: Sequence[Network]) -> np.ndarray:
    """Features of architectures, `(n, f)`.

    The position of every choice among its options, mean and minimum of each kind of choice (a network is as good as its
    narrowest place), sizes of the network on a logarithmic scale, and the inputs that a mixing layer keeps, mean and minimum.
    """
    if not architectures:
        return np.zeros((0, len(space.choices) + 2 * len(space.kinds) + 7))
    positions = space.positions(list(architectures))
    kinds = np.array([choice.kind for choice in space.choices])
    active = ~np.isnan(positions)
    summaries = []
    for kind in space.kinds:
        here = active[:, kinds == kind]
        values = np.where(here, positions[:, kinds == kind], 0.0)
        summaries.append(values.sum(axis=1) / np.maximum(here.sum(axis=1), 1))
        summaries.append(np.where(here, values, 1.0).min(axis=1))
    sizes = [[n.macs, n.parameters, n.weight_bytes, n.peak_activation_bytes, len(n.nodes)] for n in networks]
    return np.hstack([np.where(active, positions, INACTIVE), np.transpose(summaries), np.log(sizes), _kept_inputs(networks)])


def _kept_inputs(networks: Sequence[Network]) -> np.ndarray:
    rows = []
    for network in networks:
        kept = [math.log(max(1, s.kept_weights // s.out_channels)) for s in network.layers if s.kind in MIXING_KINDS]
        rows.append([min(kept), sum(kept) / len(kept)] if kept else [0.0, 0.0])
    return np.array(rows)


class Regressor(Protocol):
    """What sklearn's regressors with an uncertainty offer."""

    def fit(self, features: np.ndarray, targets: np.ndarray) -> object: ...

    def predict(self, features: np.ndarray, return_std: bool) -> tuple[np.ndarray, np.ndarray]: ...


class RanksNetworks(Protocol):
    """What a search asks: something that ranks networks as accuracy does, and its standard deviation, for features `(n, f)`."""

    def predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(frozen=True)
class AccuracyQuality:
    """Rank correlation on held-out evaluations (0 where there is nothing to rank), with the pairs it was computed from."""

    kendall_tau: float
    n_held_out: int
    predicted: list[float]
    measured: list[float]


class AccuracyPredictor(ABC):
    """Regression from features to accuracy; a subclass gives the regressor."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._centre: np.ndarray | None = None

    @abstractmethod
    def _regressor(self) -> Regressor:
        """A fresh regressor whose `predict` takes `return_std`."""

    def fit(self, features: np.ndarray, accuracies: Sequence[float]) -> None:
        """Learn from evaluations.

        Args:
            features: `(n, f)`.
            accuracies: `(n,)`, in [0, 1].
        """
        self._centre, self._scale = features.mean(axis=0), np.maximum(features.std(axis=0), 1e-6)
        target = _logit(np.asarray(accuracies))
        self._offset, self._spread = float(target.mean()), max(float(target.std()), 1e-6)
        self._model = self._regressor()
        with warnings.catch_warnings(), threadpool_limits(1):  # threads that wait for each other cost more than they bring
            warnings.simplefilter("ignore", ConvergenceWarning)  # a hyperparameter at its bound is a fit all the same
            self._model.fit((features - self._centre) / self._scale, (target - self._offset) / self._spread)

    def predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Accuracies and their standard deviations, `(n,)` each.

        Raises:
            RuntimeError: before `fit`.
        """
        if self._centre is None:
            raise RuntimeError("the accuracy predictor is not fitted")
        mean, std = self._model.predict((features - self._centre) / self._scale, return_std=True)
        accuracy = 1.0 / (1.0 + np.exp(-(mean * self._spread + self._offset)))
        return accuracy, std * self._spread * accuracy * (1.0 - accuracy)

    def quality(self, features: np.ndarray, accuracies: Sequence[float], held_out: int) -> AccuracyQuality:
        """Fit on all but `held_out` random rows and compare predictions with those rows."""
        order = np.random.default_rng(self.seed).permutation(len(accuracies))
        test, train = order[:held_out], order[held_out:]
        measured = np.asarray(accuracies)
        self.fit(features[train], measured[train].tolist())
        predicted = self.predict(features[test])[0] if len(test) else np.zeros(0)
        return AccuracyQuality(
            rank_correlation(predicted, measured[test]), len(test), predicted.tolist(), measured[test].tolist()
        )


class GaussianProcess(AccuracyPredictor):
    """Gaussian process, linear plus squared-exponential kernel; hyperparameters by marginal likelihood."""

    def _regressor(self) -> Any:
        linear = ConstantKernel(0.01, (1e-5, 10.0)) * DotProduct(1.0, (1e-2, 1e2))
        smooth = ConstantKernel(0.5, (1e-3, 10.0)) * RBF(20.0, (2.0, 500.0))
        noise = WhiteKernel(0.1, (1e-3, 1.0))
        return GaussianProcessRegressor(linear + smooth + noise, random_state=self.seed)


class ExtraTrees(AccuracyPredictor):
    """Extremely randomized trees (Geurts 2006); the standard deviation is that of the trees."""

    def _regressor(self) -> Any:
        return _Forest(n_estimators=200, min_samples_leaf=2, random_state=self.seed)


class _Forest(ExtraTreesRegressor):  # type: ignore[misc]
    def predict(self, features: np.ndarray, return_std: bool = False) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        single = np.asarray(features, dtype=np.float32)
        trees = np.array([tree.tree_.predict(single)[:, 0] for tree in self.estimators_])
        return (trees.mean(axis=0), trees.std(axis=0)) if return_std else np.asarray(trees.mean(axis=0))


class Ridge(AccuracyPredictor):
    """Bayesian ridge regression."""

    def _regressor(self) -> Any:
        return BayesianRidge()


class Pairwise(AccuracyPredictor):
    """Ridge regression on the features and all their pairwise products."""

    def _regressor(self) -> Any:
        return PairwiseRidge()


class MLPEnsemble(AccuracyPredictor):
    """Four small networks with one hidden layer, each fitted to a bootstrap sample."""

    def _regressor(self) -> Any:
        return Bagged(self._member, 4, self.seed)

    @staticmethod
    def _member(seed: int) -> Any:
        return MLPRegressor(hidden_layer_sizes=(16,), alpha=10.0, solver="lbfgs", max_iter=60, random_state=seed)


class GradientBoosting(AccuracyPredictor):
    """Stochastic gradient boosting of trees (Friedman 2002), four times, each fitted to a bootstrap sample."""

    def _regressor(self) -> Any:
        return Bagged(self._member, 4, self.seed)

    @staticmethod
    def _member(seed: int) -> Any:
        return GradientBoostingRegressor(n_estimators=60, max_depth=2, subsample=0.7, max_features=0.3, random_state=seed)


def rank_correlation(predicted: np.ndarray, measured: np.ndarray) -> float:
    """Kendall's tau, 0 where there is nothing to rank."""
    ranked = len(set(predicted)) > 1 and len(set(measured)) > 1
    return float(kendalltau(predicted, measured).statistic) if ranked else 0.0


def _logit(accuracy: np.ndarray) -> np.ndarray:
    clipped = np.clip(accuracy, 0.005, 0.995)
    return np.asarray(np.log(clipped / (1.0 - clipped)))
