"""The accuracy predictor that ranks best what it has not seen, chosen among all kinds by cross-validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from predictors.accuracy import (
    AccuracyPredictor,
    ExtraTrees,
    GaussianProcess,
    GradientBoosting,
    MLPEnsemble,
    Pairwise,
    Regressor,
    Ridge,
    rank_correlation,
)

# In the order of preference among equals: the simpler first.
KINDS: Mapping[str, type[AccuracyPredictor]] = MappingProxyType(
    {
        "ridge": Ridge,
        "pairwise_ridge": Pairwise,
        "gaussian_process": GaussianProcess,
        "extra_trees": ExtraTrees,
        "gradient_boosting": GradientBoosting,
        "mlp_ensemble": MLPEnsemble,
    }
)
FOLDS = 4
LEAST_EVALUATIONS = 24


class Automatic(AccuracyPredictor):
    """Chooses a kind of predictor when it is first fitted, unless one is given, and learns and predicts as that kind does.

    Args:
        seed: of the folds and of the predictors.
        kind: one of `KINDS`; `None` to choose.

    Attributes:
        kind: what was given or chosen.
        compared: mean Kendall tau over the folds by kind; empty where nothing was compared: the kind was given, or there were
            fewer than 24 evaluations, with which `ridge` is taken.

    Raises:
        ValueError: `kind` is not one of `KINDS`.
    """

    def __init__(self, seed: int = 0, kind: str | None = None) -> None:
        super().__init__(seed)
        if kind is not None and kind not in KINDS:
            raise ValueError(f"kind is {kind!r}; allowed are {', '.join(KINDS)}, or null to choose")
        self.kind, self.compared = kind, dict[str, float]()

    def fit(self, features: np.ndarray, accuracies: Sequence[float]) -> None:
        """Choose where nothing is chosen yet, and learn; as `AccuracyPredictor.fit`."""
        if self.kind is None:
            self.compared = compare(features, accuracies, self.seed) if len(accuracies) >= LEAST_EVALUATIONS else {}
            self.kind = max(self.compared, key=self.compared.__getitem__, default=next(iter(KINDS)))
        super().fit(features, accuracies)

    def _regressor(self) -> Regressor:
        return KINDS[str(self.kind)](seed=self.seed)._regressor()


def compare(
    features: np.ndarray,
    accuracies: Sequence[float],
    seed: int,
    kinds: Mapping[str, type[AccuracyPredictor]] = KINDS,
) -> dict[str, float]:
    """Mean Kendall tau over `FOLDS` folds, by kind: each fold is ranked by a predictor that was fitted to the others.

    Args:
        features: `(n, f)`, at least two rows a fold.
        accuracies: `(n,)`.
        seed: of the folds and of the predictors.
        kinds: what is compared.
    """
    measured = np.asarray(accuracies)
    order = np.random.default_rng([seed, 11]).permutation(len(measured))
    folds = [order[start::FOLDS] for start in range(FOLDS)]
    taus: dict[str, list[float]] = {name: [] for name in kinds}
    for test in folds:
        train = np.setdiff1d(order, test)
        for name, kind in kinds.items():
            predictor = kind(seed=seed)
            predictor.fit(features[train], measured[train].tolist())
            taus[name].append(rank_correlation(predictor.predict(features[test])[0], measured[test]))
    return {name: float(np.mean(values)) for name, values in taus.items()}


def compared_taus(taus: Mapping[str, float]) -> str:
    """What `compare` found in words, the best first: `gaussian process 0.71, ridge 0.65`."""
    ordered = sorted(taus.items(), key=lambda item: -item[1])
    return ", ".join(f"{name.replace('_', ' ')} {tau:.2f}" for name, tau in ordered)
