"""Losses of training steps rank networks, whatever their trend and however alike the networks are that were trained."""

import numpy as np
import pytest
from scipy.stats import kendalltau

from predictors.losses import LossPredictor

FEATURES = 12


def steps(seed: int, count: int, spread: float = 1.0, slope: float = 0.05) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of as many steps' networks, what each is worth, and noisy losses that fall while training goes on."""
    rng = np.random.default_rng(seed)
    features = rng.uniform(size=(count, FEATURES)) * spread
    worth = features @ np.linspace(-1.0, 1.0, FEATURES)
    falling = 2.0 - np.log1p(np.arange(count) / 50.0) / 3.0
    return features, worth, falling - slope * worth + rng.normal(0.0, 0.1, count)


@pytest.mark.parametrize("seed", range(3))
def test_networks_are_ranked_in_spite_of_noise_and_trend(seed: int) -> None:
    features, _, losses = steps(seed, 1500)
    ranks = LossPredictor(features, losses.tolist(), features)
    others, worth, _ = steps(seed + 10, 200)
    likelihood, std = ranks.predict(others)
    assert kendalltau(likelihood, worth).statistic > 0.6
    assert ((likelihood > 0) & (likelihood <= 1) & (std > 0)).all()
    assert np.median(-np.log(likelihood)) == pytest.approx(losses.mean(), abs=0.1)


def test_a_feature_that_no_step_varied_says_nothing_about_others() -> None:
    """The scale is that of networks of all sizes: a feature that hardly changed in the steps is not blown up elsewhere."""
    features, _, losses = steps(0, 1500)
    features[:, 0] = 0.5 + 1e-9 * np.random.default_rng(1).normal(size=len(features))
    reference, _, _ = steps(2, 300)
    ranks = LossPredictor(features, losses.tolist(), reference)
    low, high = reference.copy(), reference.copy()
    low[:, 0], high[:, 0] = 0.0, 1.0
    assert ranks.predict(low)[0] == pytest.approx(ranks.predict(high)[0], rel=1e-3)


def test_further_features_are_left_out() -> None:
    features, _, losses = steps(0, 300)
    ranks = LossPredictor(features, losses.tolist(), features)
    wider = np.hstack([features, np.full((len(features), 2), 7.0)])
    assert np.array_equal(ranks.predict(wider)[0], ranks.predict(features)[0])


def test_losses_without_a_difference_give_all_networks_the_same() -> None:
    features, _, _ = steps(0, 50)
    likelihood, _ = LossPredictor(features, [1.0] * 50, features).predict(features)
    assert likelihood == pytest.approx(np.full(50, np.exp(-1.0)))
