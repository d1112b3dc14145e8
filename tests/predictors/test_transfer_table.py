"""A table predicted from others: on simulated devices whose truth is known."""

from dataclasses import replace

import numpy as np
import pytest

from latency_lut.table import LatencyTable
from latency_lut.timing import Timing
from predictors.latency import LatencyPredictor
from predictors.transfer_table import TableTransfer
from tests.predictors.simulated_device import DEVICE, SPACE, alone_us, simulated, truth_us

FACTORS = {"mild": (1.0, 1.2, 0.9), "odd": (2.0, 0.7, 1.5), "strong": (0.5, 1.5, 1.1), "new": (1.5, 0.8, 1.3)}


def factor(device, spec):
    """What integer, depthwise and other layers cost on a device, as a multiple of the simulated one."""
    integer, depthwise, other = FACTORS[device]
    return depthwise if spec.depthwise else integer if spec.integer else other


def pair_us(device, pair):
    return alone_us(*pair) * factor(device, pair[0])


def network_us(device, architecture, lowerings):
    network = SPACE.network(architecture)
    plain = truth_us(network, lowerings)
    total = sum(alone_us(s, n) for s, n in zip(network.layers, lowerings, strict=True))
    scaled = sum(alone_us(s, n) * factor(device, s) for s, n in zip(network.layers, lowerings, strict=True))
    return plain * scaled / total


@pytest.fixture(scope="module")
def measured():
    """By device, a table of all its pairs and some networks."""
    tables = {}
    for seed, device in enumerate(FACTORS):
        table = simulated(networks=40, seed=seed, samples=150)
        table.entries = {pair: Timing(pair_us(device, pair), 0.01, 12) for pair in table.entries}
        table.networks = [replace(n, us=network_us(device, n.architecture, n.lowerings)) for n in table.networks]
        tables[device] = table
    return tables


@pytest.fixture(scope="module")
def told(measured):
    """The table of the new device after ten measurements, and after none."""
    table = LatencyTable.empty(SPACE, DEVICE)
    sources = {name: measured[name] for name in FACTORS if name != "new"}
    transfer = TableTransfer(SPACE, table, sources, 600)
    for pair in transfer.propose_pairs(5):
        table.entries[pair] = Timing(pair_us("new", pair), 0.01, 12)
    for architecture, lowerings in transfer.propose_networks(5):
        timing = replace(measured["new"].networks[0], architecture=architecture, lowerings=lowerings, source="sample")
        table.networks.append(replace(timing, us=network_us("new", architecture, lowerings)))
    table.networks += measured["new"].networks
    transfer.fit(table)
    table.transferred = transfer.transferred()
    return table


def errors(table, name):
    return np.array([abs(table.estimates()[pair].us / pair_us(name, pair) - 1) for pair in table.estimates()])


def test_pairs_are_predicted_better_than_the_nearest_source_tells(told, measured):
    pairs = list(told.estimates())
    nearest = []
    for source in ("mild", "odd", "strong"):
        ratios = np.array([pair_us(source, pair) / pair_us("new", pair) for pair in pairs])
        nearest.append(np.abs(ratios / np.median(ratios) - 1).mean())
    assert errors(told, "new").mean() < 0.6 * min(nearest)


def test_the_latency_model_uses_the_predictions_and_knows_how_sure_they_are(told):
    quality = LatencyPredictor.fit(told, SPACE, held_out=40).quality
    assert quality.n == 40
    assert quality.mape < 0.06
    assert quality.spearman > 0.97
    assert quality.coverage > 0.8


def test_what_is_proposed_was_not_measured(told, measured):
    transfer = TableTransfer(SPACE, told, {"mild": measured["mild"], "odd": measured["odd"]}, 600)
    assert not set(transfer.propose_pairs(20)) & told.entries.keys()
    timed = {(n.architecture, n.lowerings) for n in told.networks if n.source == "sample"}
    assert len(timed) == 5
    assert not set(transfer.propose_networks(20)) & timed
