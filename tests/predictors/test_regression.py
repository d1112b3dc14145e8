"""The regression behind the latency model, against plain references."""

import numpy as np
import pytest

from predictors.regression import ALIKE_FACTORS, STRICTNESS, fit_regression


def problem(n=60, columns=8, noise=0.02, seed=0):
    """Latencies of rows whose last columns matter a little; the first is a price sum that is nearly right."""
    rng = np.random.default_rng(seed)
    rows = rng.uniform(0.0, 1.0, (n, columns))
    rows[:, 0] += 20.0
    truth = np.array([1.05, *rng.normal(0.0, 1.0, columns - 1)])
    expected, scales = np.zeros(columns), np.ones(columns)
    expected[0] = 1.0
    measured_us = rows @ truth * np.exp(noise * rng.standard_normal(n))
    return rows, measured_us, np.zeros(n), expected, scales


def fit(problem_, always=1, alike=0):
    return fit_regression(*problem_, always, alike=alike)


def really_left_out(x, expected, prior):
    """Mean absolute error of predicting 1 for each row from all others."""
    errors = []
    for left in range(len(x)):
        kept = np.delete(np.arange(len(x)), left)
        precision = x[kept].T @ x[kept] + np.diag(prior**-2)
        coefficients = np.linalg.solve(precision, x[kept].sum(axis=0) + expected / prior**2)
        errors.append(abs(1.0 - x[left] @ coefficients))
    return float(np.mean(errors))


def test_the_chosen_strictness_has_the_smallest_error_of_really_leaving_out():
    rows, measured_us, variances, expected, scales = problem(n=25)
    fitted = fit((rows, measured_us, variances, expected, scales))
    x = rows / measured_us[:, None]
    priors = [scales * np.where(np.arange(len(scales)) < 1, 1e-2**-0.5, each**-0.5) for each in STRICTNESS]
    losses = [really_left_out(x, expected, prior) for prior in priors]
    assert fitted.strictness == STRICTNESS[int(np.argmin(losses))]
    assert fitted.loo_error == pytest.approx(min(losses))


def test_columns_of_likeness_have_a_prior_of_their_own():
    rows, measured_us, variances, expected, scales = problem(n=25)
    alike = 5.0 * np.random.default_rng(1).normal(size=(25, 6))
    measured_us += alike @ np.array([0.5, -0.4, 0.3, 0.0, 0.2, -0.3])
    wide, told = np.hstack([rows, alike]), (np.append(expected, np.zeros(6)), np.append(scales, np.ones(6)))
    fitted = fit((wide, measured_us, variances, *told), alike=6)
    prior = np.append(scales * np.where(np.arange(len(scales)) < 1, 1e-2**-0.5, fitted.strictness**-0.5), np.ones(6))
    losses = []
    for factor in ALIKE_FACTORS:
        prior[-6:] = factor
        losses.append(really_left_out(wide / measured_us[:, None], told[0], prior))
    assert fitted.alike_factor == ALIKE_FACTORS[int(np.argmin(losses))]
    assert fitted.loo_error == pytest.approx(min(losses))
    without = fit((rows, measured_us, variances, expected, scales))
    assert without.alike_factor == 0.0
    assert fitted.loo_error < without.loo_error
    assert fitted.clearly_better(without)
    assert not without.clearly_better(fitted)
    assert not fitted.clearly_better(fitted)


def test_an_uncertain_latency_counts_less():
    rows, measured_us, variances, expected, scales = problem(n=30, noise=0.0)
    measured_us[0] *= 1.5
    told, stds = (rows, measured_us, variances, expected, scales, 1), np.zeros(30)
    believed = fit_regression(*told, stds).coefficients
    stds[0] = 0.5
    doubted = fit_regression(*told, stds).coefficients
    truth_us = rows[1:] @ believed, rows[1:] @ doubted
    errors = [float(np.abs(us / measured_us[1:] - 1.0).mean()) for us in truth_us]
    assert errors[1] < 0.5 * errors[0]


def test_a_column_that_says_nothing_stays_at_what_is_expected():
    rows, measured_us, variances, expected, scales = problem()
    rows[:, 5], expected[5] = 0.0, 0.3
    fitted = fit((rows, measured_us, variances, expected, scales))
    assert fitted.coefficients[5] == pytest.approx(0.3)
    unseen = np.zeros(8)
    unseen[0] = 20.0
    known_us2 = fitted.variance_us2(unseen, 20.0, 0.0)
    unseen[5] = 1.0  # and is uncertain where it appears
    assert fitted.variance_us2(unseen, 20.0, 0.0) > known_us2


@pytest.mark.parametrize("noise", [0.01, 0.05])
@pytest.mark.parametrize("columns", [4, 40])
def test_intervals_hold_nine_in_ten(noise, columns):
    shares = []
    for seed in range(5):
        rows, measured_us, variances, expected, scales = problem(600, columns, noise, seed)
        fitted = fit((rows[:100], measured_us[:100], variances[:100], expected, scales))
        means = rows[100:] @ fitted.coefficients
        stds = np.sqrt([fitted.variance_us2(row, us, 0.0) for row, us in zip(rows[100:], means, strict=True)])
        shares.append(np.mean(np.abs(means - measured_us[100:]) <= 1.645 * stds))
    assert 0.85 <= np.mean(shares) <= 0.95


def test_uncertain_layers_widen_a_prediction():
    fitted = fit(problem())
    row = problem()[0][0]
    assert fitted.variance_us2(row, 20.0, 4.0) - fitted.variance_us2(row, 20.0, 0.0) == pytest.approx(
        fitted.widening**2 * fitted.coefficients[0] ** 2 * 4.0
    )
