"""How well whole networks are predicted: `python -m benchmarks.latency_model [device=NAME] [key=value ...]`; JSON at the end.

Profiles the default space from nothing, then times `held_out` random networks and tests the latency model on as many that it
was not fitted to. `mape`, `p95`, `p99` are shares of the measured latency; `within_10` is nn-Meter's figure (Zhang et al.,
MobiSys 2021); `coverage` is the share of the networks in their 90 % interval. `seconds` is all the measuring that the
model is fitted to, loading included; `fit_seconds` comes on top. With `target_error=0.02` or `budget_s=60` the model chooses
what is measured after 600 pairs and `networks` networks, and `curve` says how its error fell. `tables=FOLDER` keeps the table
there, and goes on from it. With `splits=5` all figures are means over five draws of the networks that are tested on.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import astuple
from pathlib import Path
from statistics import fmean

from benchmarks.defaults import device_and_space, options, take
from latency_lut.measuring import MeasuringSettings
from latency_lut.profile import profile
from latency_lut.refine import Refinement
from predictors.latency import LatencyPredictor
from predictors.wishes import wishes_of

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
    values = options(arguments, {"pairs": 5000, "networks": networks, "held_out": 100, "threads": 1, "seed": 0, "splits": 1})
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
    predictor = predictors[0]
    result = {
        **{figure: round(fmean(getattr(p.quality, figure) for p in predictors), 5) for figure in ROUNDED},
        "held_out": predictor.quality.n,
        "loo_error": round(fmean(p.regression.loo_error for p in predictors), 5),
        "networks": known,
        "pairs": stats.pairs,
        "reachable": stats.reachable,
        "pairs_per_min": round(stats.pairs_per_min),
        "seconds": round(stats.seconds, 1),
        "splits": len(predictors),
        "fit_seconds": round((time.perf_counter() - begin) / len(predictors), 1),
        "curve": [list(astuple(point)) for point in table.curve],
        "coefficients": {name: round(value, 4) for name, value in predictor.coefficients.items()},
        "device": device.describe(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
