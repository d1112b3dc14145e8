"""How well whole networks are predicted: `python -m benchmarks.latency_model [device=NAME] [key=value ...]`; JSON at the end.

Profiles the default space from nothing, then times `held_out` random networks and tests the latency model on as many that it
was not fitted to. `mape`, `p95`, `p99` are shares of the measured latency; `within_10` is nn-Meter's figure (Zhang et al.,
MobiSys 2021); `coverage` is the share of the networks in their 90 % interval. `seconds` is all the measuring that the
model is fitted to, loading included; `fit_seconds` comes on top. With `target_error=0.02` or `budget_s=60` the model chooses
what is measured after 600 pairs and `networks` networks, and `curve` says how its error fell. `tables=FOLDER` keeps the table
there, and goes on from it. With `splits=5` all figures are means over five draws of the networks that are tested on.

A model that is loaded again, to other places in memory and beside others, has another latency, so a prediction cannot be
closer to one measurement than such measurements are to each other. With `loads=4` the networks that are tested on are measured
four times more, each time loaded anew in another order: `of_loads` has the errors against each network's median over these,
and `repeat` how far one measurement is from that median (mean of the absolute relative differences).
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import astuple, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.defaults import device_and_space, options, take
from latency_lut.device import Device
from latency_lut.measuring import MeasuringSettings
from latency_lut.profile import BATCH_NETWORKS, profile
from latency_lut.refine import Refinement
from latency_lut.session import Drawn, Session
from latency_lut.table import LatencyTable
from predictors.latency import LatencyPredictor
from predictors.quality import LatencyQuality
from predictors.wishes import wishes_of
from spaces.space import Space

ROUNDED = ("mape", "p95", "p99", "within_5", "within_10", "spearman", "coverage")


def main() -> None:
    name, arguments = take("device", sys.argv[1:], "x86")
    folder, arguments = take("tables", arguments, "")
    target_error, arguments = take("target_error", arguments, "")
    budget_s, arguments = take("budget_s", arguments, "")
    refinement = None
    if target_error or budget_s:
        refinement = Refinement(wishes_of, *[float(text) if text else None for text in (target_error, budget_s)])
    networks = 800 if refinement is None else 40
    defaults = {"pairs": 5000, "networks": networks, "held_out": 100, "threads": 1, "seed": 0, "splits": 1, "loads": 0}
    values = options(arguments, defaults)
    device, space = device_and_space(name, values["threads"])
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(folder or scratch) / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        networks, pairs, seed = values["networks"], values["pairs"], values["seed"]
        table, stats = profile(space, device, path, MeasuringSettings(seed, pairs, networks), refinement=refinement)
        known = len(table.networks)
        # Networks to test on; of pairs at most one.
        table, _ = profile(space, device, path, MeasuringSettings(seed, 1, networks + values["held_out"]))
    begin = time.perf_counter()
    draws = range(values["seed"], values["seed"] + max(1, values["splits"]))
    predictors = [LatencyPredictor.fit(table, space, held_out=values["held_out"], seed=draw) for draw in draws]
    fit_s = (time.perf_counter() - begin) / len(predictors)
    predictor = predictors[0]
    result = {
        **means([p.quality for p in predictors]),
        "held_out": predictor.quality.n,
        "loo_error": round(fmean(p.regression.loo_error for p in predictors), 5),
        "networks": known,
        "pairs": stats.pairs,
        "reachable": stats.reachable,
        "pairs_per_min": round(stats.pairs_per_min),
        "seconds": round(stats.seconds, 1),
        "splits": len(predictors),
        "fit_seconds": round(fit_s, 1),
        "curve": [list(astuple(point)) for point in table.curve],
        "coefficients": {name: round(value, 4) for name, value in predictor.coefficients.items()},
        "device": device.describe(),
    }
    if values["loads"]:
        result |= against_loads(predictors, table, space, device, values["loads"], values["seed"])
    print(json.dumps(result))


def means(qualities: Sequence[LatencyQuality]) -> dict[str, float]:
    return {figure: round(fmean(getattr(quality, figure) for quality in qualities), 5) for figure in ROUNDED}


def against_loads(
    predictors: Sequence[LatencyPredictor], table: LatencyTable, space: Space, device: Device, loads: int, seed: int
) -> dict[str, Any]:
    """Errors against the median of so many measurements of each network, loaded anew for each."""
    networks = list(dict.fromkeys((n.architecture, n.lowerings) for p in predictors for n in p.held_out))
    us = np.array([loaded_again(table, space, device, networks, seed + 1 + load) for load in range(loads)])
    median = np.median(us, axis=0)
    medians = dict(zip(networks, median.tolist(), strict=True))
    qualities = []
    for predictor in predictors:
        held = [(n.architecture, n.lowerings) for n in predictor.held_out]
        predicted = [predictor.predict(space.network(architecture), lowerings) for architecture, lowerings in held]
        means_us, stds_us = zip(*predicted, strict=True)
        qualities.append(LatencyQuality.of(means_us, stds_us, [medians[network] for network in held]))
    return {"of_loads": means(qualities), "repeat": round(float(np.abs(us / median - 1.0).mean()), 5), "loads": loads}


def loaded_again(table: LatencyTable, space: Space, device: Device, networks: Sequence[Drawn], seed: int) -> list[float]:
    """Microseconds of networks, loaded in random order and timed as a profile does, at the table's speed."""
    session = Session(replace(table, networks=list(table.networks)), device, (), seed)
    order = np.random.default_rng(seed).permutation(len(networks)).tolist()
    us: dict[int, float] = {}
    for first in range(0, len(order), BATCH_NETWORKS):
        batch = order[first : first + BATCH_NETWORKS]
        session.time_networks(space, [networks[i] for i in batch], "again")
        us.update(zip(batch, (n.us for n in session.table.networks[-len(batch) :]), strict=True))
    return [us[i] for i in range(len(networks))]


if __name__ == "__main__":
    main()
