"""Peak memory predicted from layers, against what the runtime holds."""

from dataclasses import replace

import numpy as np
import pytest

from latency_lut.lowering import applicable
from latency_lut.memory import measure_memory
from latency_lut.networks import NetworkValue
from latency_lut.runtimes import onnxruntime as runtime
from latency_lut.session import build_random
from predictors.memory import MemoryPredictor
from predictors.ratios import Ratios
from predictors.tensors import peak_tensor_bytes
from spaces.errors import UserError


@pytest.fixture(scope="module")
def table(small_space, x86, tmp_path_factory):
    return measure_memory(small_space, x86, tmp_path_factory.mktemp("memory") / "x86.json", networks=50)


@pytest.mark.parametrize("end", ["smallest", "largest"])
def test_a_network_of_floats_is_known_to_a_tenth(small_space, x86, end):
    architecture = small_space.graded(float(end == "largest"), precision="fp32", sparsity="dense")
    network = small_space.network(architecture)
    lowerings = ["fp32"] * len(network.nodes)
    model = build_random(network, lowerings, np.random.default_rng(0), x86)
    assert peak_tensor_bytes(network, lowerings, x86.describe()) == pytest.approx(runtime.peak_bytes(model, x86), rel=0.1)


def test_held_out_networks_are_predicted(small_space, table):
    quality = MemoryPredictor.fit(table, small_space, held_out=25, seed=1).quality
    assert quality.n == 25
    assert quality.mape < 0.1
    assert quality.spearman > 0.95
    assert quality.coverage >= 0.7


def test_predictions_scale_with_what_was_measured(small_space, table):
    doubled = replace(table, networks=[NetworkValue(n.architecture, n.lowerings, 2 * n.value) for n in table.networks])
    plain, twice = (MemoryPredictor.fit(t, small_space) for t in (table, doubled))
    for timing in table.networks[:5]:
        network = small_space.network(timing.architecture)
        mean, std = plain.predict(network, timing.lowerings)
        assert twice.predict(network, timing.lowerings) == pytest.approx((2 * mean, 2 * std))
        low, high = plain.interval(network, timing.lowerings)
        assert low <= mean <= high
        wide = plain.interval(network, timing.lowerings, 0.5)
        assert low <= wide[0] <= wide[1] <= high


def test_intervals_hold_the_share_that_they_promise():
    """Ratios drawn from one distribution: exchangeable, so the promise is exact but for rounding to ranks."""
    rng, inside = np.random.default_rng(0), []
    for _ in range(300):
        ratios = rng.lognormal(sigma=0.1, size=60)
        seen, modelled = Ratios(np.ones(40), ratios[:40]), np.arange(1.0, 21.0)
        inside.append(seen.quality(modelled, ratios[40:] * modelled).coverage)
    assert 0.88 < np.mean(inside) < 0.94


def test_more_samples_hold_more(small_space, x86):
    network = small_space.network(small_space.largest())
    lowerings = [applicable(spec)[0] for spec in network.layers]
    one, four = (peak_tensor_bytes(network, lowerings, x86.describe(), batch) for batch in (1, 4))
    assert four == pytest.approx(4 * one, rel=0.05)
    with pytest.raises(ValueError, match="zip"):
        peak_tensor_bytes(network, lowerings[1:], x86.describe())


def test_too_few_networks_are_told(small_space, table):
    few = replace(table, networks=table.networks[:11])
    with pytest.raises(UserError, match="11 networks with measured memory; a model needs 20"):
        MemoryPredictor.fit(few, small_space)
