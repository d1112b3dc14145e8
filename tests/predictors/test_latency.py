"""The latency predictor on a simulated device whose truth is known: fit, plan, unmeasured layers, storing."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

from latency_lut.lowering import applicable
from latency_lut.table import LatencyTable
from predictors.effects import COEFFICIENTS
from predictors.latency import LatencyPredictor
from predictors.pairs import PairRegressor
from predictors.prices import LayerPrices
from predictors.quality import LatencyQuality
from predictors.regression import Regression
from spaces.errors import UserError
from tests.predictors.simulated_device import (
    CONVERSION_US,
    DEVICE,
    SHARE_IN_NETWORK,
    SPACE,
    START_US,
    alone_us,
    core_us,
    random_lowerings,
    simulated,
    timing,
    truth_us,
)


@pytest.fixture(scope="module")
def exact():
    return LatencyPredictor.fit(simulated(), SPACE)


@pytest.fixture(scope="module")
def realistic():
    return LatencyPredictor.fit(simulated(measured_share=0.4, noise=0.02), SPACE)


def test_fit_finds_what_the_device_does(exact):
    assert tuple(exact.coefficients)[: len(COEFFICIENTS)] == COEFFICIENTS
    assert exact.quality.n == 20
    assert exact.quality.mape < 0.02
    assert exact.quality.spearman > 0.99
    assert exact.coefficients["layer_sum"] == pytest.approx(SHARE_IN_NETWORK, abs=0.05)
    assert exact.coefficients["layers_us"] == pytest.approx(-START_US * SHARE_IN_NETWORK, abs=1.0)
    assert exact.coefficients["saved_conversions_us"] == pytest.approx(-CONVERSION_US, abs=0.4)


def test_copies_that_only_single_layers_pay_are_taken_off():
    """A browser copies the inputs and the output of every run; a network does that at its ends only."""
    copy_us_per_kilobyte = 0.3
    table, exact_table = simulated(), simulated()
    for (spec, name), entry in exact_table.entries.items():
        skip_bytes = spec.output_elements * spec.skip_bits // 8
        tensor_bytes = spec.input_elements * spec.input_bits // 8 + skip_bytes + spec.output_bytes
        table.entries[spec, name] = replace(entry, us=entry.us + copy_us_per_kilobyte * tensor_bytes / 1024)
    for index, network in enumerate(exact_table.networks):
        layers = SPACE.layers(network.architecture)
        end_bytes = 4 * layers[0].input_elements + layers[-1].output_bytes
        table.networks[index] = replace(network, us=network.us + copy_us_per_kilobyte * end_bytes / 1024)
    predictor = LatencyPredictor.fit(table, SPACE)
    assert predictor.coefficients["tensors_us_per_kilobyte"] == pytest.approx(-copy_us_per_kilobyte, rel=0.3)
    assert predictor.quality.mape < 0.02


def test_partly_measured_tables_predict_well_and_say_how_well(realistic):
    assert realistic.quality.mape < 0.05
    assert realistic.quality.spearman > 0.97
    rng = np.random.default_rng(7)
    errors, sigmas = [], []
    for _ in range(200):
        network = SPACE.network(SPACE.sample_spread(rng))
        lowerings = random_lowerings(network, rng)
        mean_us, std_us = realistic.predict(network, lowerings)
        assert std_us > 0
        errors.append(mean_us - truth_us(network, lowerings))
        sigmas.append(std_us)
    within = np.mean(np.abs(errors) < 2 * np.array(sigmas))
    assert within > 0.9


@pytest.mark.parametrize("networks", [60, 240])
def test_nine_in_ten_networks_lie_in_their_interval(networks):
    predictor = LatencyPredictor.fit(simulated(networks, measured_share=0.5, noise=0.02), SPACE, held_out=2)
    rng = np.random.default_rng(21)
    inside = []
    for _ in range(400):
        network = SPACE.network(SPACE.sample_spread(rng))
        lowerings = random_lowerings(network, rng)
        low_us, us, high_us = predictor.interval(network, lowerings)
        assert low_us < us < high_us
        assert us == predictor.predict(network, lowerings)[0]
        inside.append(low_us <= truth_us(network, lowerings) * float(np.exp(0.02 * rng.standard_normal())) <= high_us)
    assert 0.85 <= np.mean(inside) <= 0.95
    wide, narrow = (predictor.interval(network, lowerings, coverage)[2] for coverage in (0.99, 0.5))
    assert narrow < high_us < wide
    with pytest.raises(ValueError, match="coverage is"):
        predictor.interval(network, lowerings, 1.0)


def test_more_networks_teach_more(realistic):
    """What the nine coefficients cannot say is learned from networks, not from pairs."""
    table = simulated(networks=300, measured_share=0.4, noise=0.002)
    for index, timing_ in enumerate(table.networks):
        layers = SPACE.layers(timing_.architecture)
        slow_us = sum(1.5 for spec in layers if spec.depthwise and spec.input_bits < 32)  # a cost at one kind of border
        table.networks[index] = replace(timing_, us=timing_.us + slow_us)
    many = LatencyPredictor.fit(table, SPACE, held_out=100)
    few_table = replace(table, networks=table.networks[:112])
    few = LatencyPredictor.fit(few_table, SPACE, held_out=100)
    assert few.quality.n == 56  # never more than half
    assert many.quality.mape < 0.8 * few.quality.mape
    assert many.regression.loo_error == pytest.approx(many.quality.mape, rel=0.3)


def slower(table, extra_us):
    """A table whose networks cost more by what a function says of a network and its lowerings, with the error of its model."""
    networks = []
    for timing_ in table.networks:
        extra = extra_us(SPACE.network(timing_.architecture), timing_.lowerings)
        networks.append(replace(timing_, us=timing_.us + extra))
    return LatencyPredictor.fit(replace(table, networks=networks), SPACE, held_out=80)


def test_what_networks_teach_of_a_layer_holds_for_layers_like_it(monkeypatch):
    """Layers of some shapes cost more in a network than alone, as no border and no kind of layer explains."""
    table = simulated(networks=240, noise=0.002)

    def wide_kernels_us(network, lowerings):
        of_each = [core_us(*told) for told in zip(network.layers, lowerings, strict=True)]
        return sum(us for us, spec in zip(of_each, network.layers, strict=True) if spec.kernel == 5 and spec.height > 4)

    alike = slower(table, wide_kernels_us)
    assert alike.regression.alike_factor > 0
    monkeypatch.setattr(Regression, "clearly_better", lambda fine, plain: False)
    unlike = slower(table, wide_kernels_us)
    assert unlike.regression.alike_factor == 0
    assert alike.quality.mape < 0.6 * unlike.quality.mape
    assert alike.quality.coverage >= 0.8


def test_large_networks_may_cost_more_than_their_layers():
    table = simulated(networks=240, noise=0.002)

    def cold_us(network, lowerings):
        own_us = sum(core_us(*told) for told in zip(network.layers, lowerings, strict=True))
        return 0.15 * own_us * np.log(own_us / 60.0)

    predictor = slower(table, cold_us)
    assert predictor.coefficients["whole size share"] > 0.03
    assert predictor.quality.mape < 0.015


def test_a_plan_is_among_the_best_of_all_choices(exact):
    rng = np.random.default_rng(3)
    compared = 0
    while compared < 5:
        network = SPACE.network(SPACE.sample_spread(rng))
        options = [applicable(spec) for spec in network.layers]
        if not 8 <= np.prod([len(names) for names in options]) <= 600:
            continue
        every = sorted(exact.predict(network, names)[0] for names in itertools.product(*options))
        planned = exact.predict(network)[0]
        assert every[0] <= planned + 1e-9
        # Tensors with two readers and fused additions are approximated while planning.
        assert planned <= every[0] + 0.05 * (every[-1] - every[0])
        assert exact.predict(network, exact.plan(network)) == exact.predict(network)
        assert exact.predict_us(network) == planned
        compared += 1


def test_context_can_change_a_plan():
    """Where saving conversions pays a lot, a gather that is a little faster alone is not worth it between blocked layers."""
    table = simulated(samples=60)
    prices = LayerPrices(table)

    def predictor(saved_conversions_us):
        coefficients = np.zeros(len(prices.effects.names))
        coefficients[COEFFICIENTS.index("layer_sum")] = 1.0
        coefficients[COEFFICIENTS.index("saved_conversions_us")] = saved_conversions_us
        regression = Regression(coefficients, np.zeros((len(coefficients), len(coefficients))), 0.01, 1.0, 1.0, 0.0)
        return LatencyPredictor(prices, regression, LatencyQuality.of([1.0, 2.0], [1.0, 1.0], [1.0, 2.0]))

    costly, free = predictor(-200.0), predictor(0.0)
    rng = np.random.default_rng(0)
    networks = [SPACE.network(SPACE.sample(rng)) for _ in range(30)]

    def gathers(predictor):
        return sum(name == "gather_groups" for network in networks for name in predictor.plan(network))

    assert gathers(costly) < gathers(free)


def test_measured_layers_are_priced_by_the_table(exact, realistic):
    table = realistic.table
    spec = next(spec for spec, name in table.entries if len(applicable(spec)) == 1)
    name, us, std_us, measured = realistic.price(spec)
    entry = table.entry(spec, name)
    assert (us, std_us, measured) == (entry.us, entry.spread_us, True)
    sparse = next(spec for spec, name in exact.table.entries if name == "gather_groups_qdq")
    prices = {price.lowering: price.us for price in exact.prices(sparse)}
    assert set(prices) == set(applicable(sparse))
    assert exact.price(sparse)[1] == min(prices.values())


def test_unmeasured_layers_are_fitted_with_an_uncertainty(realistic):
    rng = np.random.default_rng(11)
    specs = {s for _ in range(300) for s in SPACE.layers(SPACE.sample(rng))}
    errors, stds = [], []
    for spec in specs:
        for price in realistic.prices(spec):
            if not price.measured:
                errors.append(np.log(price.us / alone_us(spec, price.lowering)))
                stds.append(price.std_us / price.us)
    assert len(errors) > 100
    assert np.sqrt(np.mean(np.square(errors))) < 0.1
    assert 0.5 < np.sqrt(np.mean(np.square(stds))) / np.sqrt(np.mean(np.square(errors))) < 3.0


def test_winners_take_part_in_the_fit_and_are_never_held_out():
    table = simulated(networks=12, noise=0.05, samples=60)
    before = LatencyPredictor.fit(table, SPACE, held_out=6)
    rng = np.random.default_rng(5)
    table.networks += [timing(SPACE.sample_spread(rng), rng, source="winner") for _ in range(30)]
    after = LatencyPredictor.fit(table, SPACE, held_out=6)
    assert after.quality.n == before.quality.n == 6
    assert after.quality.measured_us == before.quality.measured_us
    assert after.coefficients != before.coefficients
    networks = [SPACE.network(SPACE.sample_spread(rng)) for _ in range(100)]
    lowerings = [random_lowerings(network, rng) for network in networks]

    def error(predictor):
        return np.mean(
            [abs(predictor.predict(n, names)[0] / truth_us(n, names) - 1) for n, names in zip(networks, lowerings, strict=True)]
        )

    assert error(after) < error(before)


def test_what_is_stored_says_how_good_the_model_is(realistic):
    stored = json.loads(realistic.to_json())
    assert stored["device_fingerprint"] == realistic.table.device_fingerprint
    assert stored["coefficients"] == realistic.coefficients
    assert stored["quality"]["mape"] == realistic.quality.mape


def test_too_few_networks_name_the_command():
    with pytest.raises(UserError, match="python -m latency_lut device=x86"):
        LatencyPredictor.fit(simulated(networks=3, samples=5), SPACE)


def test_an_empty_table_names_the_command():
    with pytest.raises(UserError, match="python -m latency_lut device=x86"):
        PairRegressor(LatencyTable.empty(SPACE, DEVICE))


def test_wrong_lowerings_are_refused(exact):
    network = SPACE.network(SPACE.smallest())
    with pytest.raises(ValueError, match="1 lowerings for"):
        exact.predict(network, ["fp32"])
    with pytest.raises(ValueError, match="does not apply"):
        exact.predict(network, ["gather_groups"] * len(network.nodes))


def test_quality_counts_errors():
    quality = LatencyQuality.of([109.0, 191.0, 300.0], [10.0, 5.0, 1.0], [100.0, 200.0, 300.0])
    assert quality.coverage == pytest.approx(2 / 3)  # 9 is within 1.645 times 10, but not within 1.645 times 5
    assert (quality.within_5, quality.within_10) == (pytest.approx(2 / 3), pytest.approx(1.0))
    assert quality.mape == pytest.approx(0.045)
    assert quality.spearman == pytest.approx(1.0)
    assert quality.p99 <= 0.1
