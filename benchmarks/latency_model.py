"""How well whole networks are predicted: `python -m benchmarks.latency_model [device=NAME] [key=value ...]`; JSON at the end.

Profiles the default space from nothing and tests the latency model on random networks that it was not fitted to. `mape`, `p95`,
`p99` are shares of the measured latency; `within_10` is the figure that nn-Meter states (Zhang et al., MobiSys 2021);
`coverage` is the share of the networks in their 90 % interval. `seconds` is all the measuring: pairs, networks, and loading
them; `fit_seconds` comes on top. `tables=FOLDER` keeps the table there, and goes on from it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.defaults import device_and_space, options, take
from latency_lut.profile import profile
from predictors.latency import LatencyPredictor

ROUNDED = ("mape", "p95", "p99", "within_5", "within_10", "spearman", "coverage")


def main() -> None:
    name, arguments = take("device", sys.argv[1:], "x86")
    folder, arguments = take("tables", arguments, "")
    values = options(arguments, {"pairs": 5000, "networks": 500, "held_out": 100, "threads": 1, "seed": 0})
    device, space = device_and_space(name, values["threads"])
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(folder or scratch) / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        counts = values["pairs"], values["networks"]
        table, stats = profile(space, device, path, seed=values["seed"], max_pairs=counts[0], networks=counts[1])
    begin = time.perf_counter()
    predictor = LatencyPredictor.fit(table, space, held_out=values["held_out"], seed=values["seed"])
    quality = predictor.quality
    result = {
        **{figure: round(getattr(quality, figure), 5) for figure in ROUNDED},
        "held_out": quality.n,
        "loo_error": round(predictor.regression.loo_error, 5),
        "networks": len(table.networks),
        "pairs": stats.pairs,
        "reachable": stats.reachable,
        "pairs_per_min": round(stats.pairs_per_min),
        "seconds": round(stats.seconds, 1),
        "fit_seconds": round(time.perf_counter() - begin, 1),
        "coefficients": {name: round(value, 4) for name, value in predictor.coefficients.items()},
        "device": device.describe(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
