"""Accuracy predictors: what they learn, how sure they are, and data that teaches nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest

from predictors.accuracy import AccuracyPredictor, ExtraTrees, GradientBoosting, accuracy_features
from predictors.automatic import KINDS as BY_NAME
from spaces.choice import Architecture
from spaces.mobile import MobileSpace

KINDS = list(BY_NAME.values())
TREES = (ExtraTrees, GradientBoosting)


def examples(space: MobileSpace, count: int, seed: int = 0) -> tuple[list[Architecture], np.ndarray, np.ndarray]:
    """Architectures, their features, and a smooth made-up accuracy with a little noise."""
    rng = np.random.default_rng(seed)
    architectures = [space.sample_spread(rng) for _ in range(count)]
    features = accuracy_features(space, architectures, [space.network(a) for a in architectures])
    quality = 0.8 * (features[:, -5] - 9.0) + 0.5 * features[:, 3] - 0.7 * features[:, 0]
    return architectures, features, 1 / (1 + np.exp(-quality + rng.normal(0, 0.05, count)))


def test_features_tell_architectures_apart(small_space: MobileSpace) -> None:
    rng = np.random.default_rng(0)
    architectures = list(dict.fromkeys(small_space.sample(rng) for _ in range(60)))
    features = accuracy_features(small_space, architectures, [small_space.network(a) for a in architectures])
    assert features.shape == (len(architectures), len(small_space.choices) + 2 * len(small_space.kinds) + 7)
    assert np.isfinite(features).all()
    assert len(np.unique(features, axis=0)) == len(architectures)
    assert accuracy_features(small_space, [], []).shape == (0, features.shape[1])


@pytest.mark.parametrize("kind", KINDS)
def test_it_ranks_what_it_has_not_seen(kind: type[AccuracyPredictor], small_space: MobileSpace) -> None:
    _, features, accuracies = examples(small_space, 90)
    predictor = kind(seed=1)
    quality = predictor.quality(features, accuracies.tolist(), 30)
    assert quality.n_held_out == len(quality.predicted) == len(quality.measured) == 30
    assert quality.kendall_tau > (0.5 if kind in TREES else 0.75)  # what is smooth is hard for trees with few rows
    assert set(quality.measured) <= set(accuracies.tolist())
    scrambled = np.random.default_rng(0).permutation(accuracies)
    assert abs(kind(seed=1).quality(features, scrambled.tolist(), 30).kendall_tau) < 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_are_accuracies_and_the_spread_covers_the_error(
    kind: type[AccuracyPredictor], small_space: MobileSpace
) -> None:
    _, features, accuracies = examples(small_space, 120)
    predictor = kind()
    predictor.fit(features[:80], accuracies[:80].tolist())
    mean, std = predictor.predict(features[80:])
    assert mean.shape == std.shape == (40,)
    assert (mean > 0).all()
    assert (mean < 1).all()
    assert (std > 0).all()
    inside = np.abs(mean - accuracies[80:]) < 3 * std
    assert inside.mean() > 0.8
    assert std.mean() < 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_and_data_give_the_same_numbers(kind: type[AccuracyPredictor], small_space: MobileSpace) -> None:
    _, features, accuracies = examples(small_space, 40)
    runs = []
    for _ in range(2):
        predictor = kind(seed=3)
        predictor.fit(features[:30], accuracies[:30].tolist())
        runs.append(predictor.predict(features[30:])[0])
    assert np.array_equal(runs[0], runs[1])


@pytest.mark.parametrize("kind", KINDS)
def test_before_fitting_it_says_so(kind: type[AccuracyPredictor]) -> None:
    with pytest.raises(RuntimeError, match="not fitted"):
        kind().predict(np.zeros((1, 3)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 0.1, 1.0])
def test_accuracies_that_are_all_equal_teach_only_themselves(
    kind: type[AccuracyPredictor], value: float, small_space: MobileSpace
) -> None:
    _, features, _ = examples(small_space, 20)
    predictor = kind()
    predictor.fit(features, [value] * 20)
    mean, std = predictor.predict(features)
    assert np.abs(mean - value).max() < 0.01
    assert np.isfinite(std).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("held_out", [0, 1, 5])
def test_a_quality_that_cannot_be_told_is_still_json(
    kind: type[AccuracyPredictor], held_out: int, small_space: MobileSpace
) -> None:
    """Few evaluations, or all of one accuracy: the summary of a run must not die of a rank correlation of nothing."""
    _, features, _ = examples(small_space, 12)
    quality = kind().quality(features, [0.3] * 12, held_out)
    json.dumps(quality.kendall_tau, allow_nan=False)
    assert quality.n_held_out == held_out
