"""A device whose truth is known: what layers cost alone on it, and what networks cost."""

from dataclasses import replace

import numpy as np

from latency_lut.device import Device
from latency_lut.lowering import applicable
from latency_lut.table import LatencyTable, NetworkTiming, pair_key
from latency_lut.timing import Timing
from spaces.layers import INPUT
from spaces.mobile import MobileSpace

STAGES = [{"widths": [16, 24], "depths": [1, 2], "stride": 1}, {"widths": [32, 48], "depths": [1, 2], "stride": 2}]
SPARSITIES = ["dense", "group@1/2", "group@1/4"]
SPACE = MobileSpace(1, 10, [12, 16], [8, 16], STAGES, [2, 3], [3, 5], [64], ["w8a8", "fp32"], SPARSITIES)
DEVICE = Device("x86")
START_US, CONVERSION_US, SHARE_IN_NETWORK = 5.0, 1.5, 0.95


def core_us(spec, lowering):
    """A plausible kernel: arithmetic (integers faster, depthwise slower) and memory traffic."""
    dense = spec.macs if "gather" in lowering else replace(spec, sparsity="dense").macs
    rate = (12e3 if spec.integer else 4e3) * (0.2 if spec.depthwise else 1.0)
    gather = spec.input_elements / 8e3 if "gather" in lowering else 0.0
    return 2.0 + dense / rate + (spec.input_elements + spec.output_elements) / 10e3 + gather


def borders_of(spec, lowering):
    return DEVICE.load_runtime().borders(spec, lowering, DEVICE.describe())


def alone_us(spec, lowering):
    """A layer alone: it starts a run, and converts whatever its kernel wants otherwise."""
    borders = borders_of(spec, lowering)
    conversions = borders.foreign_input + borders.foreign_skip + (borders.foreign_output or borders.fuses_skip)
    addition = CONVERSION_US if borders.fuses_skip else 0.0
    return START_US + core_us(spec, lowering) + CONVERSION_US * conversions + addition


def truth_us(network, lowerings):
    """A network: one start, and conversions only where a tensor's producer and a reader disagree."""
    total, layout, readers = 0.0, {INPUT: False}, {}
    for node, name in zip(network.nodes, lowerings, strict=True):
        borders = borders_of(node.spec, name)
        total += SHARE_IN_NETWORK * core_us(node.spec, name)
        fused = borders.fuses_skip and layout[node.inputs[1]]
        layout[node.name] = borders.foreign_output or fused
        readers.setdefault(node.inputs[0], set()).add(borders.foreign_input)
        if len(node.inputs) > 1:
            readers.setdefault(node.inputs[1], set()).add(borders.foreign_skip or fused)
        if borders.fuses_skip and not fused:
            total += 2 * CONVERSION_US if not borders.foreign_output else CONVERSION_US
    for name, wanted in readers.items():
        total += CONVERSION_US * len(wanted - {layout[name]})
    return START_US + total


def random_lowerings(network, rng):
    return tuple(str(rng.choice(applicable(spec))) for spec in network.layers)


def simulated(networks=40, measured_share=1.0, noise=0.0, seed=0, samples=400):
    """A table of the simulated device; a share of the pairs is measured."""
    rng = np.random.default_rng(seed)
    table = LatencyTable.empty(SPACE, DEVICE)
    specs = {s for _ in range(samples) for s in SPACE.layers(SPACE.sample_spread(rng))}
    pairs = sorted({pair_key(s, n) for s in specs for n in applicable(s)}, key=str)
    for pair in pairs:
        if rng.uniform() < measured_share:
            table.entries[pair] = Timing(alone_us(*pair) * float(np.exp(noise * rng.standard_normal())), 0.1, 12)
    for _ in range(networks):
        table.networks.append(timing(SPACE.sample_spread(rng), rng, noise))
    return table


def timing(architecture, rng, noise=0.0, source="random"):
    network = SPACE.network(architecture)
    lowerings = random_lowerings(network, rng)
    us = truth_us(network, lowerings) * float(np.exp(noise * rng.standard_normal()))
    return NetworkTiming(architecture, lowerings, us, 1.0, 25, source)
