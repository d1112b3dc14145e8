"""The choice of an accuracy predictor: it is the best of a comparison that anyone can repeat."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import kendalltau

from predictors.automatic import FOLDS, KINDS, LEAST_EVALUATIONS, Automatic, compare, compared_taus


def interacting(count: int, seed: int = 0) -> tuple[np.ndarray, list[float]]:
    """Accuracies that no single feature explains: products of features."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(count, 6))
    score = features[:, 0] * features[:, 1] - features[:, 2] * features[:, 3] + rng.normal(0, 0.05, count)
    return features, (1 / (1 + np.exp(-score))).tolist()


def test_what_is_chosen_ranks_best_and_is_what_predicts() -> None:
    features, accuracies = interacting(80)
    automatic = Automatic(seed=3)
    automatic.fit(features, accuracies)
    assert automatic.compared == compare(features, accuracies, 3)
    assert automatic.kind == "pairwise_ridge"
    assert automatic.compared["pairwise_ridge"] == max(automatic.compared.values()) > automatic.compared["ridge"] + 0.2
    alone = KINDS["pairwise_ridge"](seed=3)
    alone.fit(features, accuracies)
    for found, expected in zip(automatic.predict(features), alone.predict(features), strict=True):
        assert np.array_equal(found, expected)


def test_every_evaluation_is_ranked_once_by_a_predictor_that_has_not_seen_it() -> None:
    features, accuracies = interacting(30)
    order = np.random.default_rng([5, 11]).permutation(30)
    taus = []
    for start in range(FOLDS):
        test = order[start::FOLDS]
        train = [i for i in range(30) if i not in test]
        predictor = KINDS["ridge"](seed=5)
        predictor.fit(features[train], [accuracies[i] for i in train])
        taus.append(kendalltau(predictor.predict(features[test])[0], [accuracies[i] for i in test]).statistic)
    assert compare(features, accuracies, 5, {"ridge": KINDS["ridge"]})["ridge"] == pytest.approx(np.mean(taus))


def test_the_quality_is_of_rows_that_had_no_part_in_the_choice() -> None:
    features, accuracies = interacting(34)
    automatic = Automatic(seed=1)
    quality = automatic.quality(features, accuracies, 10)
    train = np.random.default_rng(1).permutation(34)[10:]
    assert automatic.compared == compare(features[train], [accuracies[i] for i in train], 1)
    assert quality.n_held_out == 10


def test_too_few_evaluations_choose_the_simplest() -> None:
    features, accuracies = interacting(LEAST_EVALUATIONS - 1)
    automatic = Automatic()
    automatic.fit(features, accuracies)
    assert (automatic.kind, automatic.compared) == ("ridge", {})


def test_a_given_kind_is_not_compared() -> None:
    features, accuracies = interacting(30)
    automatic = Automatic(kind="extra_trees")
    automatic.fit(features, accuracies)
    assert (automatic.kind, automatic.compared) == ("extra_trees", {})
    with pytest.raises(ValueError, match=r"kind is 'forest'; allowed are ridge, .*mlp_ensemble"):
        Automatic(kind="forest")


def test_the_comparison_in_words() -> None:
    assert compared_taus({"ridge": 0.651, "extra_trees": 0.7149}) == "extra trees 0.71, ridge 0.65"
