"""What a latency model wants measured: against a plain reference, and whether it helps, on the simulated device."""

from dataclasses import replace

import numpy as np

from predictors.latency import LatencyPredictor
from predictors.wishes import _most_telling, wishes_of
from tests.predictors.simulated_device import SPACE, random_lowerings, simulated, truth_us


def test_the_most_telling_rows_are_those_that_a_plain_search_finds():
    rng = np.random.default_rng(0)
    design = rng.standard_normal((12, 4))
    precision = np.eye(4)
    found = []
    for _ in range(5):
        left = []
        for candidate in range(len(design)):
            added = np.linalg.inv(precision + np.outer(design[candidate], design[candidate]))
            left.append(np.inf if candidate in found else np.einsum("ij,jk,ik->", design, added, design))
        found.append(int(np.argmin(left)))
        precision += np.outer(design[found[-1]], design[found[-1]])
    assert _most_telling(design, np.eye(4), 5) == found


def test_wishes_are_unmeasured_distinct_and_repeatable():
    table = simulated(networks=30, measured_share=0.3, samples=100)
    wished = wishes_of(table, SPACE, seed=3)
    assert wished == wishes_of(table, SPACE, seed=3)
    assert len(set(wished.pairs)) == len(wished.pairs) > 50
    assert not set(wished.pairs) & set(table.entries)
    assert len(set(wished.networks)) == len(wished.networks) == 30
    everything = simulated(networks=30, samples=2000)
    assert len(wishes_of(everything, SPACE).pairs) < 0.2 * len(wished.pairs)


def test_wished_pairs_help_more_than_random_ones():
    everything = simulated(networks=60, samples=400)
    rng = np.random.default_rng(4)
    pairs = list(everything.entries)
    rng.shuffle(pairs)
    start = replace(everything, entries={pair: everything.entries[pair] for pair in pairs[:150]})
    wished = [pair for pair in wishes_of(start, SPACE).pairs if pair in everything.entries][:150]
    networks = [SPACE.network(SPACE.sample(rng)) for _ in range(150)]
    lowerings = [random_lowerings(network, rng) for network in networks]

    def error(more):
        entries = start.entries | {pair: everything.entries[pair] for pair in more}
        predictor = LatencyPredictor.fit(replace(start, entries=entries), SPACE, held_out=2)
        pairs_ = zip(networks, lowerings, strict=True)
        return np.mean([abs(predictor.predict(n, names)[0] / truth_us(n, names) - 1) for n, names in pairs_])

    assert error(wished) < error(pairs[150:300]) < error([])
