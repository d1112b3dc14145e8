"""What to measure next on a device, so that the networks that a search would visit are predicted better.

The variance of a prediction has a part for every layer that was fitted instead of measured, and a part for the coefficients
that whole networks teach. Measuring a pair takes its part away in all networks that have it; timing a network takes most from
networks like it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from latency_lut.lowering import applicable
from latency_lut.session import Drawn
from latency_lut.table import LatencyTable, Pair, pair_key
from predictors.latency import LatencyPredictor
from spaces.space import Space

VISITED = 300
WISHED_NETWORKS = 30


@dataclass(frozen=True)
class Wishes:
    """What a latency model wants measured.

    Args:
        error: the model's mean absolute relative error, leave-one-out over its timed networks.
        pairs: unmeasured pairs, the one that weighs most first.
        networks: architectures with lowerings, likewise.
    """

    error: float
    pairs: tuple[Pair, ...]
    networks: tuple[Drawn, ...]


def wishes_of(table: LatencyTable, space: Space, seed: int = 0, candidates: Sequence[Drawn] | None = None) -> Wishes:
    """What a model fitted to a table wants measured.

    Args:
        table: pairs and networks measured so far.
        space: the table's space.
        seed: draws the networks that stand for those that a search visits.
        candidates: those networks, with lowerings; by default drawn, two thirds with the lowerings predicted to be fastest, one
            third with random ones.

    Raises:
        UserError: the table has too few networks for a model.
    """
    predictor = LatencyPredictor.fit(table, space, held_out=2, seed=seed)
    if candidates is None:
        candidates = _visited(predictor, space, np.random.default_rng([seed, len(table.entries), len(table.networks)]))
    weights: defaultdict[Pair, float] = defaultdict(float)
    rows = []
    for architecture, lowerings in candidates:
        network = space.network(architecture)
        row, us, stds_us = predictor.explain(network, lowerings)
        rows.append(row / us)
        for spec, name, (std_us, measured) in zip(network.layers, lowerings, stds_us, strict=True):
            if not measured:
                weights[pair_key(spec, name)] += (predictor.coefficients["layer_sum"] * std_us / us) ** 2
    design, covariance = np.array(rows), predictor.regression.covariance
    chosen = _most_telling(design, covariance, min(WISHED_NETWORKS, len(design)))
    ranked = tuple(sorted(weights, key=lambda pair: (-weights[pair], pair[1], pair[0].to_json())))
    return Wishes(predictor.regression.loo_error, ranked, tuple(candidates[i] for i in chosen))


def _visited(predictor: LatencyPredictor, space: Space, rng: np.random.Generator) -> list[Drawn]:
    drawn: dict[Drawn, None] = {}
    for index in range(VISITED):
        architecture = space.sample_spread(rng) if index % 2 else space.sample(rng)
        if index % 3:
            lowerings = predictor.plan(space.network(architecture))
        else:
            options = [applicable(spec, predictor.table.device) for spec in space.layers(architecture)]
            lowerings = tuple(str(rng.choice(names)) for names in options)
        drawn[architecture, lowerings] = None
    return list(drawn)


def _most_telling(design: np.ndarray, covariance: np.ndarray, count: int) -> list[int]:
    """Rows, one after the other, each the one whose measurement takes most variance from all rows, given those before."""
    covariance = covariance.copy()
    chosen: list[int] = []
    for _ in range(count):
        spread = design @ covariance
        own = np.einsum("ij,ij->i", spread, design)
        gain = ((spread @ design.T) ** 2).sum(axis=0) / (1.0 + own)
        gain[chosen] = -1.0
        best = int(np.argmax(gain))
        chosen.append(best)
        covariance -= np.outer(spread[best], spread[best]) / (1.0 + own[best])
    return chosen
