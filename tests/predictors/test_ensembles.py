"""Regressors of accuracy predictors: ridge on pairs against the explicit solution, ensembles and what they have not seen."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression, Ridge

from predictors.ensembles import PENALTIES, Bagged, PairwiseRidge


def explicit(features: np.ndarray, share: float) -> np.ndarray:
    """A constant, the features, and all ordered pairs, scaled as the kernel has them."""
    count, width = features.shape
    pairs = (features[:, :, None] * features[:, None, :]).reshape(count, -1)
    return np.hstack([np.ones((count, 1)), features / np.sqrt(width), np.sqrt(share) * pairs / width])


@pytest.fixture
def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(40, 5))
    return features, features[:, 0] * features[:, 1] + 0.5 * features[:, 2] + rng.normal(0, 0.1, 40)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("penalty", [0.001, 0.1, 10.0])
def test_ridge_on_pairs_is_ridge_on_the_explicit_pairs(
    data: tuple[np.ndarray, np.ndarray], share: float, penalty: float
) -> None:
    features, targets = data
    found = PairwiseRidge([share], [penalty]).fit(features[:30], targets[:30])
    primal = Ridge(penalty, fit_intercept=False, solver="cholesky").fit(explicit(features[:30], share), targets[:30])
    assert np.allclose(found.predict(features[30:]), primal.predict(explicit(features[30:], share)), atol=1e-6)
    errors = []
    for i in range(30):
        rest = np.delete(np.arange(30), i)
        without = Ridge(penalty, fit_intercept=False, solver="cholesky").fit(explicit(features[rest], share), targets[rest])
        errors.append(float(without.predict(explicit(features[[i]], share))[0] - targets[i]) ** 2)
    assert found.left_out_error == pytest.approx(np.mean(errors), rel=1e-4)


def test_ridge_on_pairs_takes_pairs_where_they_matter_and_knows_less_far_away(data: tuple[np.ndarray, np.ndarray]) -> None:
    features, targets = data
    assert PairwiseRidge().fit(features, targets).pair_share > 0
    linear = PairwiseRidge().fit(features, features @ np.arange(5.0))
    assert linear.pair_share == 0
    assert linear.penalty == min(PENALTIES)
    _, near = PairwiseRidge().fit(features, targets).predict(features, return_std=True)
    _, far = PairwiseRidge().fit(features, targets).predict(20 * features, return_std=True)
    assert far.mean() > 2 * near.mean()


def test_an_ensemble_is_the_mean_of_its_members_and_its_noise_is_what_they_have_not_seen() -> None:
    rng = np.random.default_rng(1)
    features = rng.normal(size=(300, 3))
    targets = features @ [1.0, -2.0, 0.5] + rng.normal(0, 0.3, 300)
    seeds: list[int] = []

    def member(seed: int) -> LinearRegression:
        seeds.append(seed)
        return LinearRegression()

    bagged = Bagged(member, 5, seed=7).fit(features, targets)
    assert seeds == [7, 8, 9, 10, 11]
    assert np.sqrt(bagged.noise) == pytest.approx(0.3, rel=0.15)
    drawn = np.random.default_rng(7)
    each = []
    for _ in range(5):
        rows = drawn.integers(0, 300, 300)
        each.append(LinearRegression().fit(features[rows], targets[rows]).predict(features))
    mean, std = bagged.predict(features, return_std=True)
    assert np.allclose(mean, np.mean(each, axis=0))
    assert np.allclose(std**2, np.var(each, axis=0) + bagged.noise)


def test_an_ensemble_of_one_row_has_no_noise_to_tell() -> None:
    bagged = Bagged(lambda seed: LinearRegression(), 2, seed=0).fit(np.ones((1, 2)), np.ones(1))
    mean, std = bagged.predict(np.ones((1, 2)), return_std=True)
    assert (float(mean[0]), float(std[0])) == (1.0, 0.0)
