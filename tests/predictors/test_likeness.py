"""Columns that say how alike layers are, against the kernel that they stand for."""

from dataclasses import replace

import numpy as np
import pytest

from latency_lut.table import pair_key
from predictors.likeness import Likeness
from predictors.pairs import matern, pair_features
from tests.predictors.simulated_device import SPACE, core_us, random_lowerings

LENGTH = 3.0


@pytest.fixture(scope="module")
def networks():
    """Layers of 30 networks: pairs, and their own times."""
    rng = np.random.default_rng(0)
    drawn = [SPACE.network(SPACE.sample_spread(rng)) for _ in range(30)]
    told = [[(s, n) for s, n in zip(network.layers, random_lowerings(network, rng), strict=True)] for network in drawn]
    return [[(pair_key(spec, name), core_us(spec, name)) for spec, name in layers] for layers in told]


@pytest.fixture(scope="module")
def latencies_us(networks):
    return np.array([5.0 + sum(us for _, us in network) for network in networks])


@pytest.fixture(scope="module")
def likeness(networks, latencies_us):
    return Likeness(networks, latencies_us, LENGTH)


def test_columns_of_a_network_are_the_sum_of_those_of_its_layers(likeness, networks):
    for network, row in zip(networks, likeness.rows, strict=True):
        pairs, own_us = zip(*network, strict=True)
        assert likeness.of(pairs, own_us)[0].sum(axis=0) == pytest.approx(row, abs=1e-5)


def test_products_of_columns_are_the_kernel_between_all_layers_of_two_networks(likeness, networks, latencies_us):
    known = list(dict.fromkeys(pair for network in networks for pair, _ in network))
    raw = pair_features(known)
    x = (raw - raw.mean(axis=0)) / (raw.std(axis=0) + 1e-9)
    kinds = [(spec.kind, name) for spec, name in known]
    kernel = matern(x, x, LENGTH) * np.array([[a == b for a in kinds] for b in kinds])
    position = {pair: index for index, pair in enumerate(known)}
    for first, second in ((0, 1), (3, 3), (7, 20)):
        ids = [[position[pair] for pair, _ in networks[index]] for index in (first, second)]
        times = [np.array([us for _, us in networks[index]]) for index in (first, second)]
        wanted = times[0] @ kernel[np.ix_(*ids)] @ times[1]
        found = likeness.rows[first] @ likeness.rows[second]
        scale = latencies_us[first] * latencies_us[second]
        assert found / scale == pytest.approx(wanted / scale, abs=1e-4)


def test_similar_layers_have_similar_columns_and_other_kinds_none(likeness, networks):
    (spec, name), _ = next(layer for layer in networks[0] if layer[0][0].kind == "depthwise")
    wider = replace(spec, in_channels=spec.in_channels + 4, out_channels=spec.out_channels + 4, groups=spec.groups + 4)
    (own, near), _ = likeness.of([(spec, name), (wider, name)], [1.0, 1.0])
    assert np.linalg.norm(own) > 0
    assert own @ near > 0.5 * np.linalg.norm(own) * np.linalg.norm(near)
    assert likeness.of([(spec, name)], [3.0])[0][0] == pytest.approx(3.0 * own)
    assert not likeness.of([(spec, "never_timed")], [1.0])[0].any()


def test_only_what_no_network_had_is_left_out(likeness, networks):
    def unlike_us2(layers):
        pairs, own_us = zip(*layers, strict=True)
        columns, points = likeness.of(pairs, own_us)
        return likeness.unlike_us2(points, np.array(own_us), columns.sum(axis=0))

    own_us2 = sum(us for _, us in networks[0]) ** 2
    assert unlike_us2(networks[0]) < 1e-4 * own_us2
    fresh = [((spec, "never_timed"), us) for (spec, _), us in networks[0]]
    assert unlike_us2(fresh) > 0.1 * own_us2
    assert unlike_us2(fresh[:1]) == pytest.approx(fresh[0][1] ** 2)
