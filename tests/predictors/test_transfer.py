from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal, spearmanr

from predictors.transfer import TransferPredictor, _combination, widening_of
from predictors.transfer_design import CELLS, drawn_cells, most_telling
from predictors.transfer_process import JOINT, NOISE_VARIANCES, SHAPE, VARIANCES, Posterior, Process, evidence_of
from predictors.transfer_sources import learn_sources
from spaces.errors import UserError

NETWORKS, KINDS, PLACES = 400, 4, 5


def additive_world(
    seed: int = 0, devices: int = 8, noise: float = 0.02, networks: int = NETWORKS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features (operator by place), latencies of known devices, and of a new one; devices are of three families."""
    rng = np.random.default_rng(seed)
    operators = rng.integers(KINDS, size=(networks, PLACES))
    features = (operators[:, :, None] == np.arange(KINDS)).reshape(networks, -1).astype(float)
    families = rng.gamma(2.0, 1.0, (3, KINDS))
    costs = np.array([rng.dirichlet([1, 1, 1]) @ families * rng.lognormal(0, 0.1, KINDS) for _ in range(devices + 1)])
    exact = 0.5 + features @ np.tile(costs, PLACES).T
    measured = exact * rng.lognormal(0, noise, exact.shape) * 10.0 ** rng.integers(-3, 4, devices + 1)
    return features, measured[:, :-1], measured[:, -1]


@pytest.fixture(scope="module")
def world() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return additive_world()


@pytest.fixture(scope="module")
def predictor(world: tuple[np.ndarray, np.ndarray, np.ndarray]) -> TransferPredictor:
    features, known, _ = world
    return TransferPredictor(features, known)


def quality(p: TransferPredictor, measured: np.ndarray, ids: np.ndarray) -> tuple[float, float]:
    p.fit(ids, measured[ids])
    rest = np.setdiff1d(np.arange(len(measured)), ids)
    mean = p.predict(rest)[0]
    return float(spearmanr(mean, measured[rest]).statistic), float(np.mean(np.abs(mean / measured[rest] - 1)))


def test_ten_measurements_predict_a_new_device(predictor: TransferPredictor, world: tuple[np.ndarray, ...]) -> None:
    rank, error = quality(predictor, world[2], np.arange(10))
    assert rank > 0.97
    assert error < 0.04


def test_it_is_better_than_the_nearest_known_device_and_than_features_alone(world: tuple[np.ndarray, ...]) -> None:
    features, known, _ = world
    errors = []
    for new in range(4):
        measured, others = known[:, new], np.delete(known, new, axis=1)
        ids = np.arange(8)
        ours = quality(TransferPredictor(features, others), measured, ids)[1]
        alone = quality(TransferPredictor(features, np.zeros((NETWORKS, 0))), measured, ids)[1]
        scaled = others * np.median(measured[ids, None] / others[ids], axis=0)
        nearest = scaled[:, np.argmin(np.abs(scaled[ids] / measured[ids, None] - 1).mean(axis=0))]
        errors.append((ours, alone, float(np.mean(np.abs(nearest / measured - 1)))))
    ours, alone, nearest = np.mean(errors, axis=0)
    assert ours < 0.6 * alone
    assert ours < 0.8 * nearest


def test_measurements_that_were_proposed_predict_better_than_random_ones() -> None:
    proposed, random = [], []
    for seed in range(4):
        features, known, measured = additive_world(seed)
        p = TransferPredictor(features, known)
        ids = p.propose(5)
        assert len(set(ids.tolist())) == 5
        proposed.append(quality(p, measured, ids)[1])
        rng = np.random.default_rng(seed)
        random += [quality(p, measured, rng.choice(NETWORKS, 5, replace=False))[1] for _ in range(10)]
    assert np.mean(proposed) < np.mean(random)


def test_proposals_leave_the_least_error_that_is_to_be_expected_over_the_grid() -> None:
    features, known, _ = additive_world(networks=50)
    process = Process.of(learn_sources(features, known), np.arange(known.shape[1]))
    rng = np.random.default_rng(0)
    weights = np.zeros(SHAPE)
    cells = [(3, 9), (20, 1), (44, 5), (50, 3)]
    weights[tuple(np.transpose(cells))] = rng.dirichlet(np.ones(len(cells)))

    def expected(ids: list[int]) -> float:
        variances = [plain_posterior(process, g, s, np.array(ids), np.ones(len(ids)))[1] for g, s in cells]
        return float(sum(weights[cell] * np.sqrt(v).mean() for cell, v in zip(cells, variances, strict=True)))

    chosen = [7]
    for _ in range(3):
        chosen.append(min(set(range(50)) - set(chosen), key=lambda row: expected([*chosen, row])))
    everything = np.arange(50)
    assert most_telling(process, weights, np.array([7]), np.delete(everything, 7), everything, 3).tolist() == chosen[1:]


def test_proposals_are_for_all_cells_of_the_grid_by_their_weights() -> None:
    few = np.zeros(SHAPE)
    few[3, 9], few[20, 1] = 0.3, 0.1
    cells, shares = drawn_cells(few)
    assert cells.tolist() == [3 * SHAPE[1] + 9, 20 * SHAPE[1] + 1]
    assert shares == pytest.approx([0.75, 0.25])
    rng = np.random.default_rng(0)
    for concentration in (0.1, 1.0, 100.0):  # from few likely cells to flat weights
        weights = rng.dirichlet(np.full(SHAPE[0] * SHAPE[1], concentration))
        cells, shares = drawn_cells(weights.reshape(SHAPE))
        assert len(cells) <= CELLS
        assert shares.sum() == pytest.approx(1.0)
        drawn = np.zeros(weights.size)
        drawn[cells] = shares
        assert np.abs(np.cumsum(drawn) - np.cumsum(weights)).max() <= 0.51 / CELLS


def test_what_was_measured_is_not_proposed_again(predictor: TransferPredictor, world: tuple[np.ndarray, ...]) -> None:
    predictor.fit([3, 5], world[2][[3, 5]])
    assert sorted(predictor.propose(3, [3, 5, 7, 8, 9])) == [7, 8, 9]
    with pytest.raises(UserError, match="count is 4; there are 3 candidates"):
        predictor.propose(4, [3, 5, 7, 8, 9])


@pytest.mark.parametrize(("devices", "count", "worlds", "least", "most"), [(6, 10, 8, 0.82, 0.98), (2, 5, 24, 0.85, 0.97)])
def test_the_intervals_hold_what_they_say(devices: int, count: int, worlds: int, least: float, most: float) -> None:
    inside = []
    for seed in range(worlds):
        features, known, measured = additive_world(seed, noise=0.05, devices=devices)
        p = TransferPredictor(features, known)
        p.fit(np.arange(count), measured[:count])
        mean, std = p.predict(np.arange(count, NETWORKS))
        inside.append(np.mean(np.abs(mean - measured[count:]) < 1.645 * std))
    assert least < np.mean(inside) < most


def test_few_measurements_few_devices_and_large_deviations_widen_intervals() -> None:
    expected = np.ones(5)
    assert 1.0 < widening_of(expected, 9) < widening_of(expected, 2) < 1.3
    assert widening_of(np.ones(400), 2) == pytest.approx(1.0, abs=0.01)
    assert widening_of(expected / 9, 2) == widening_of(expected, 2) > widening_of(expected / 9, 3)
    assert widening_of(expected, 2) < widening_of(2 * expected, 2) < 2 * widening_of(expected, 2)
    assert widening_of(np.array([1.0, 1e6]), 2) < 4


def test_the_more_is_measured_the_better(world: tuple[np.ndarray, ...], predictor: TransferPredictor) -> None:
    errors = [quality(predictor, world[2], np.arange(count))[1] for count in (1, 10, 100)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(unit=st.floats(1e-6, 1e6), ids=st.lists(st.integers(0, NETWORKS - 1), min_size=1, max_size=20))
def test_the_unit_of_the_measurements_is_that_of_the_predictions(
    unit: float, ids: list[int], world: tuple[np.ndarray, ...], predictor: TransferPredictor
) -> None:
    predictor.fit(ids, world[2][ids])
    mean, std = predictor.predict()
    predictor.fit(ids, unit * world[2][ids])
    other_mean, other_std = predictor.predict()
    assert np.allclose(other_mean, unit * mean, rtol=1e-6)
    assert np.allclose(other_std, unit * std, rtol=1e-5)


def test_units_of_features_and_devices_do_not_matter(world: tuple[np.ndarray, ...]) -> None:
    features, known, measured = world
    rng = np.random.default_rng(0)
    p = TransferPredictor(features, known)
    q = TransferPredictor(features * 10.0 ** rng.integers(-6, 9, features.shape[1]), known * [10.0**k for k in range(-4, 4)])
    for each in (p, q):
        each.fit(np.arange(10), measured[:10])
    assert np.allclose(p.predict()[0], q.predict()[0], rtol=1e-4)


def test_same_seed_same_result(world: tuple[np.ndarray, ...]) -> None:
    features, known, measured = world
    results = []
    for _ in range(2):
        p = TransferPredictor(features, known, seed=3)
        ids = p.propose(6)
        p.fit(ids, measured[ids])
        results.append((ids.tolist(), *(values.tolist() for values in p.predict())))
    assert results[0] == results[1]


def test_an_outlier_among_the_measurements_does_little(world: tuple[np.ndarray, ...], predictor: TransferPredictor) -> None:
    ids = np.arange(20)
    latency = world[2][ids].copy()
    latency[4] *= 8
    predictor.fit(ids, latency)
    assert np.mean(np.abs(predictor.predict()[0] / world[2] - 1)) < 0.06


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_the_arrays_predictions_are_finite_and_positive(data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 1000))
    rng = np.random.default_rng(seed)
    networks = data.draw(st.integers(1, 40))
    width, devices = data.draw(st.integers(0, 50)), data.draw(st.integers(0, 5))
    kind = data.draw(st.sampled_from(["binary", "normal", "constant", "duplicate", "huge"]))
    features = {
        "binary": rng.integers(2, size=(networks, width)).astype(float),
        "normal": rng.normal(size=(networks, width)),
        "constant": np.full((networks, width), 7.0),
        "duplicate": np.repeat(rng.normal(size=(networks, 1)), width, axis=1),
        "huge": rng.lognormal(20, 3, size=(networks, width)),
    }[kind]
    known = rng.lognormal(0, data.draw(st.sampled_from([0.0, 0.1, 1.5])), (networks, devices))
    known[rng.random(known.shape) < data.draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))] = np.nan
    p = TransferPredictor(features, known)
    count = data.draw(st.integers(1, networks))
    ids = p.propose(count)
    assert sorted(set(ids.tolist())) == sorted(ids.tolist())
    latency = rng.lognormal(3, 0.5, count)
    p.fit(ids, latency)
    mean, std = p.predict()
    assert mean.shape == std.shape == (networks,)
    assert np.isfinite(mean).all()
    assert (mean > 0).all()
    assert np.isfinite(std).all()
    assert (std > 0).all()


@pytest.mark.parametrize(
    ("ids", "latency", "message"),
    [
        ([0, NETWORKS], [1.0, 1.0], f"id {NETWORKS}; allowed are 0 to {NETWORKS - 1}"),
        ([-1], [1.0], "id -1; allowed are 0"),
        ([0.5], [1.0], "allowed is a sequence of integers"),
        ([[0]], [1.0], "allowed is a sequence of integers"),
        ([0, 1], [1.0], "latency has shape"),
        ([0, 1], [1.0, 0.0], "latency of network 1 is 0.0"),
        ([0, 1], [-1.0, 2.0], "latency of network 0 is -1.0"),
        ([0, 1], [1.0, float("nan")], "latency of network 1 is nan"),
        ([0, 1], [1.0, float("inf")], "latency of network 1 is inf"),
        ([0, 1], ["a", "b"], "latency is not an array of numbers"),
        ([], [], "no measurement"),
    ],
)
def test_bad_measurements_are_refused(ids: object, latency: object, message: str, predictor: TransferPredictor) -> None:
    with pytest.raises(UserError, match=message):
        predictor.fit(ids, latency)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("features", "latency", "message"),
    [
        (np.zeros(3), np.ones((3, 1)), "features have shape"),
        (np.zeros((0, 2)), np.ones((0, 1)), "at least one network"),
        (np.zeros((3, 2)), np.ones((2, 1)), "source_latency has shape"),
        (np.zeros((3, 2)), np.ones(3), "source_latency has shape"),
        (np.full((3, 2), np.nan), np.ones((3, 1)), "feature 0 of network 0 is nan"),
        (np.zeros((3, 2)), np.array([[1.0], [0.0], [1.0]]), "latency of network 1 on device 0 is 0.0"),
        (np.zeros((3, 2)), np.array([[1.0], [np.inf], [1.0]]), "latency of network 1 on device 0 is inf"),
    ],
)
def test_bad_sources_are_refused(features: np.ndarray, latency: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TransferPredictor(features, latency)


def test_predicting_before_measuring_is_refused(world: tuple[np.ndarray, ...]) -> None:
    p = TransferPredictor(world[0], world[1])
    with pytest.raises(RuntimeError, match="not fitted"):
        p.predict()


# -- against plain references -----------------------------------------------------------------------------------------------


def plain_posterior(process: Process, g: int, s: int, ids: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bayesian linear regression in its textbook form, on weights of the factors' columns."""
    design = np.hstack([np.sqrt(v) * f for v, f in zip(VARIANCES[g], process.factors, strict=True)])
    mean, noise = process.means[JOINT[g]], NOISE_VARIANCES[s]
    x = design[ids]
    covariance = np.linalg.inv(x.T @ x / noise + np.eye(design.shape[1]))
    weights = covariance @ x.T @ (target - mean[ids]) / noise
    return mean + design @ weights, np.einsum("ij,jk,ik->i", design, covariance, design) + noise


@pytest.mark.parametrize(("g", "s"), [(0, 6), (12, 5), (30, 7), (SHAPE[0] - 1, SHAPE[1] - 1)])
def test_a_cell_is_bayesian_linear_regression(g: int, s: int, world: tuple[np.ndarray, ...]) -> None:
    features, known, _ = world
    process = Process.of(learn_sources(features, known), np.arange(known.shape[1]))
    ids = np.array([3, 50, 7, 200, 50])
    target = process.means[0][ids] * np.array([1.1, 0.9, 1.0, 1.05, 0.95])
    only = np.full(SHAPE, -np.inf)
    only[g, s] = 0.0
    posterior = Posterior.of(process, only, ids, target)
    mean, variance = posterior.predict(np.arange(NETWORKS))
    assert (posterior.inflation == 1).all()
    expected_mean, expected_variance = plain_posterior(process, g, s, ids, target)
    assert np.allclose(mean, expected_mean, rtol=1e-6)
    assert np.allclose(variance, expected_variance, rtol=1e-5)
    for out in range(len(ids)):
        rest = np.delete(np.arange(len(ids)), out)
        alone = plain_posterior(process, g, s, ids[rest], target[rest])[0]
        assert posterior.left_out[out] == pytest.approx(alone[ids[out]], rel=1e-6)


def test_the_evidence_is_the_density_of_the_measurements(world: tuple[np.ndarray, ...]) -> None:
    features, known, _ = world
    ids = np.arange(6)
    process = Process.of(learn_sources(features, known), np.arange(known.shape[1])).rows(ids)
    target = process.means[0] * 1.02
    log = evidence_of(process, target, np.ones(6)).log + -0.5 * 6 * np.log(2 * np.pi)
    for g, s in ((0, 4), (20, 5), (44, 9)):
        parts = sum(v * f @ f.T for v, f in zip(VARIANCES[g], process.factors, strict=True))
        covariance = parts + NOISE_VARIANCES[s] * np.eye(6)
        assert log[g, s] == pytest.approx(multivariate_normal(process.means[JOINT[g]], covariance).logpdf(target), rel=1e-6)


def test_a_combination_of_known_devices_is_found_and_never_negative() -> None:
    rng = np.random.default_rng(0)
    curves = rng.uniform(0.5, 2.0, (30, 4))
    truth = np.array([0.7, 0.0, 0.3, 0.0])
    assert np.allclose(_combination(curves, curves @ truth, 1e-9), truth, atol=1e-4)
    assert (_combination(curves, curves @ np.array([1.0, -0.3, 0.3, 0.0]), 1e-6) >= 0).all()


def test_what_is_not_additive_is_learned_from_a_known_device_and_transferred() -> None:
    rng = np.random.default_rng(1)
    features = rng.integers(2, size=(900, 10)).astype(float)
    additive = 1.0 + features @ rng.uniform(0.2, 1.0, (10, 6))
    dead = features[:, 0] * features[:, 1] > 0  # two operators that cancel the rest of the network on one kind of device
    known = additive.copy()
    known[dead, 0] *= 0.4
    new = additive[:, 0] * np.where(dead, 0.4, 1.0) * 5.0
    known[500:] = np.nan
    assert quality(TransferPredictor(features, known), new, np.arange(500, 512))[1] < 0.06
    assert quality(TransferPredictor(features, known[:, 1:]), new, np.arange(500, 512))[1] > 0.1


def test_trees_know_of_networks_that_a_device_was_measured_on_no_more_than_of_others() -> None:
    rng = np.random.default_rng(2)
    features = rng.integers(2, size=(1200, 8)).astype(float)
    beyond = rng.normal(0, 0.3, (2,) * 5)[tuple(features[:, :5].astype(int).T)] + rng.normal(0, 0.1, 1200)
    device = 5.0 + features @ rng.uniform(0.2, 1.0, 8)
    known = np.where(np.arange(1200) < 400, device * np.exp(beyond), np.nan)
    sources = learn_sources(features, known[:, None])
    errors = np.abs(sources.curves[:, 0] * sources.base / (device * np.exp(beyond)) * np.median(device) - np.median(device))
    scaled = errors / np.median(errors)
    assert 0.85 < scaled[:400].mean() / scaled[400:].mean() < 1.1
