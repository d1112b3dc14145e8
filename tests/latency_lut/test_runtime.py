"""Timing: loading and running in onnxruntime, and taking the machine's slowness out."""

import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from latency_lut.device import Device
from latency_lut.lowering import applicable
from latency_lut.network import build_layer, random_weights
from latency_lut.runtimes import onnxruntime as runtime
from latency_lut.timing import Stopwatch, size_slope, steadied, summarize
from latency_lut.visits import interleaved
from spaces.layers import LayerSpec
from spaces.mobile import MobileSpace

DEVICE = Device("x86")
SMALL = LayerSpec("conv2d", 8, 8, 8, 8, 3)
LARGE = LayerSpec("conv2d", 64, 64, 24, 24, 3)
INTEGER = LayerSpec("conv2d", 16, 16, 8, 8, 3, activation="relu", precision="w8a8", input_bits=8, output_bits=8)


def layer(spec, lowering="fp32"):
    return build_layer(spec, lowering, random_weights(spec, np.random.default_rng(0)))


def test_run_computes_the_layer():
    spec = LayerSpec("linear", 5, 3)
    weights = random_weights(spec, np.random.default_rng(0))
    x = np.random.default_rng(1).standard_normal((1, 5, 1, 1), dtype=np.float32)
    y = runtime.load(build_layer(spec, "fp32", weights), DEVICE).run({"input": x})
    np.testing.assert_allclose(y, x.reshape(1, 5) @ weights.weight.T + weights.bias, rtol=1e-5, atol=1e-6)


def test_a_larger_layer_takes_longer():
    times_us = runtime.time_interleaved([layer(SMALL), layer(LARGE)], DEVICE, rounds=5, visit_s=0.001)
    assert times_us.shape == (2, 5)
    small_us, large_us = np.median(times_us, axis=1)
    assert 0 < small_us < large_us


def test_sessions_and_models_are_timed_alike():
    sessions = [runtime.load(layer(INTEGER, "qdq_u8"), DEVICE) for _ in range(2)]
    assert runtime.time_interleaved(sessions, DEVICE, rounds=2, visit_s=0.0002).shape == (2, 2)


def test_optimized_operators_show_the_fusion_and_leave_no_file():
    before = set(Path(tempfile.gettempdir()).glob("*.onnx"))
    assert "QLinearConv" in runtime.optimized_operators(layer(INTEGER, "qdq_u8"), DEVICE)
    assert "QLinearConv" not in runtime.optimized_operators(layer(SMALL), DEVICE)
    assert set(Path(tempfile.gettempdir()).glob("*.onnx")) <= before


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_threads_do_not_wait_actively_for_long_after_a_visit():
    """With many models loaded, those of each would else take the cores from the others for tens of milliseconds."""
    models = [runtime.load(layer(LARGE), replace(DEVICE, threads=2)) for _ in range(4)]
    for model in models:
        model.visit(0.001)
    time.sleep(0.002)
    before = time.process_time()
    time.sleep(0.1)
    assert time.process_time() - before < 0.015


class Simulated:
    """A model of known cost on a machine whose speed changes with the visits made so far."""

    def __init__(self, us, slowness, noise=0.01):
        self.us, self.slowness, self.noise = us, slowness, noise

    def run(self, feeds):
        raise NotImplementedError

    def visit(self, seconds):
        return self.us * self.slowness() * float(np.exp(self.noise * RNG.standard_normal()))


class Slowness:
    """1.0, or 1.6 during long stretches, and a flicker of 10 % over some thirty visits."""

    def __init__(self, period=330):
        self.visits, self.period = 0, period

    def __call__(self):
        self.visits += 1
        level = 1.6 if (self.visits // self.period) % 2 else 1.0
        return level * (1 + 0.1 * np.sin(self.visits / 5))


RNG = np.random.default_rng(0)


def test_steadied_finds_relative_costs_on_an_unsteady_machine():
    slowness = Slowness()
    truth = np.geomspace(10, 1000, 60)
    raw, orders = interleaved([Simulated(us, slowness) for us in truth], rounds=12, visit_s=0.0)
    plain = np.median(raw, axis=1) / truth
    steady = np.median(steadied(raw, orders), axis=1) / truth

    def disagreement(ratios):
        return np.median(np.abs(ratios / np.median(ratios) - 1))

    assert disagreement(steady) < 0.015
    assert disagreement(plain) > 3 * disagreement(steady)


def test_steadied_keeps_a_steady_machine_as_it_is():
    raw, orders = interleaved([Simulated(us, lambda: 1.0, noise=0.0) for us in (1.0, 2.0, 5.0, 9.0)], 6, 0.0)
    np.testing.assert_allclose(steadied(raw, orders), raw)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_models_are_left_as_measured(count):
    raw, orders = interleaved([Simulated(3.0, lambda: 1.0) for _ in range(count)], 5, 0.0)
    np.testing.assert_array_equal(steadied(raw, orders), raw)


def test_anchors_tie_batches_to_one_speed():
    slowness = Slowness(period=400)
    anchors = [Simulated(us, slowness) for us in np.geomspace(20, 400, 10)]
    stopwatch = Stopwatch(anchors)
    truth = np.geomspace(10, 1000, 25)  # a batch is 420 visits: nearly all in one stretch
    batches = [stopwatch.time([Simulated(us, slowness) for us in truth], 12, 0.0) for _ in range(4)]
    found = np.array([[t.us for t in batch] for batch in batches]) * stopwatch.scale / truth
    assert np.ptp(np.median(found, axis=1)) < 0.05 * np.median(found)
    again = Stopwatch(anchors, [t.us * stopwatch.scale for t in stopwatch.anchor_timings()])
    later = np.array([t.us for t in again.time([Simulated(us, slowness) for us in truth], 12, 0.0)])
    assert np.median(later / truth) == pytest.approx(np.median(found), rel=0.05)


def test_speed_says_how_slow_the_machine_was():
    stopwatch = Stopwatch([Simulated(us, lambda: 1.0) for us in (5.0, 10.0, 20.0)], [2.5, 5.0, 10.0])
    timings = stopwatch.time([Simulated(8.0, lambda: 1.0)], 12, 0.0)
    assert stopwatch.speed == pytest.approx(0.5, rel=0.02)
    assert timings[0].us == pytest.approx(4.0, rel=0.02)
    assert stopwatch.scale == 1.0


def test_a_batch_that_slows_large_models_more_is_brought_to_the_same_speed():
    truth = np.geomspace(10, 1000, 40)
    reference = np.geomspace(20, 400, 16)

    def timed(by_size: bool) -> np.ndarray:
        anchors = [Simulated(us * 1.1 * (us / 90) ** 0.03, lambda: 1.0) for us in reference]
        models = [Simulated(us * 1.1 * (us / 90) ** 0.03, lambda: 1.0) for us in truth]
        timings = Stopwatch(anchors, list(reference), by_size).time(models, 12, 0.0)
        return np.array([t.us for t in timings]) / truth

    assert np.abs(timed(by_size=True) - 1.0).max() < 0.02
    assert np.abs(timed(by_size=False) - 1.0).max() > 0.05


@pytest.mark.parametrize("scatter", [0.0, 0.01, 0.05])
@pytest.mark.parametrize("slope", [0.0, 0.02])
def test_the_more_anchors_scatter_the_less_their_slope_is_believed(slope: float, scatter: float):
    rng = np.random.default_rng(0)
    us = np.geomspace(20, 400, 16)
    found = np.array([size_slope(us, us**slope * rng.lognormal(0.2, scatter, 16)) for _ in range(300)])
    assert found.mean() == pytest.approx(slope, abs=0.001 if not scatter or not slope else 0.012)
    assert found.std() <= 0.4 * scatter + 1e-9
    assert size_slope(us[:4], us[:4] ** 0.02) == 0.0


def test_summary_is_a_median_with_its_standard_error():
    samples = 100 + RNG.standard_normal((400, 25))
    timings = summarize(samples, scale=2.0)
    assert np.mean([t.us for t in timings]) == pytest.approx(200, rel=0.001)
    real = np.std([t.us for t in timings])
    assert np.mean([t.spread_us for t in timings]) == pytest.approx(real, rel=0.25)
    assert timings[0].count == 25


CONVERSIONS = {"ReorderInput", "ReorderOutput", "Transpose"}
STAGES = [{"widths": [16, 24], "depths": [2], "stride": 2}, {"widths": [32, 40], "depths": [2], "stride": 1}]
SPACE = MobileSpace(1, 10, [12], [8, 16], STAGES, [2, 4], [3, 5], [64], ["w8a8", "fp32"], ["dense", "group@1/2", "group@1/4"])


def networks(count):
    rng = np.random.default_rng(0)
    for _ in range(count):
        network = SPACE.network(SPACE.sample(rng))
        yield network, [str(rng.choice(applicable(spec))) for spec in network.layers]


@pytest.mark.parametrize("name", ["layer_norm", "layer_norm_first", "attention"])
@pytest.mark.parametrize(("input_bits", "output_bits"), [(8, 8), (8, 32), (32, 8), (32, 32)])
def test_borders_of_layers_of_tokens(name, input_bits, output_bits):
    shape = {"attention": LayerSpec("attention", 48, 16, 4, 4, heads=2)}.get(name, LayerSpec("layer_norm", 16, 16, 4, 4))
    spec = replace(shape, input_bits=input_bits, output_bits=output_bits)
    borders = runtime.borders(spec, name, DEVICE.describe())
    # The kernel of layer norm wants channels last: a float tensor is transposed by the layer itself, in a network as alone.
    inside = ((input_bits == 32) + (output_bits == 32)) * (name == "layer_norm")
    found = runtime.optimized_operators(layer(spec, name), DEVICE).count("Transpose") - inside
    assert found == borders.foreign_input + borders.foreign_output
    assert not borders.fuses_skip


def test_borders_are_the_conversions_of_a_layer_alone():
    pairs = {pair for network, names in networks(12) for pair in zip(network.layers, names, strict=True)}
    agree = []
    for spec, name in pairs:
        if spec.skip_bits == 32 or (spec.integer and spec.input_bits == 32):
            continue  # these convert inside, in a network as alone
        borders = runtime.borders(spec, name, DEVICE.describe())
        operators = runtime.optimized_operators(layer(spec, name), DEVICE)
        # Conversions inside the layer, which it pays in a network as well: before a skip of bytes is added, after a gather of
        # bytes, and between a float kernel's blocks and what was gathered, or the bytes that come in or go out.
        integer, quantizes = spec.integer, spec.operator == "conv2d"
        inside = not integer and spec.skip_bits == 8 and spec.output_bits == 32 and "gather" not in name
        inside += integer and "gather" in name
        inside += not integer and quantizes and spec.output_bits == 8 and "ReorderOutput" in operators
        inside += not integer and quantizes and spec.input_bits == 8 and "ReorderInput" in operators
        inside += not integer and spec.input_bits == 32 and "gather" in name and "ReorderInput" in operators
        found = sum(operator in CONVERSIONS for operator in operators) - inside
        agree.append(found == borders.foreign_input + borders.foreign_skip + borders.foreign_output)
    assert len(agree) > 60
    assert np.mean(agree) > 0.95
