"""How well whole networks are predicted: `python -m benchmarks.latency_model [key=value ...]`; JSON on the last line.

Profiles the default space from nothing and tests the latency model on networks that it was not fitted to. `mape`, `p95`, `p99`
are shares of the measured latency.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.defaults import device_and_space, options
from latency_lut.profile import profile
from predictors.latency import LatencyPredictor


def main() -> None:
    values = options(sys.argv[1:], {"pairs": 2800, "networks": 40, "held_out": 20, "seed": 0})
    device, space = device_and_space()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x86.parquet"
        counts = values["pairs"], values["networks"]
        table, stats = profile(space, device, path, seed=values["seed"], max_pairs=counts[0], networks=counts[1])
    predictor = LatencyPredictor.fit(table, space, held_out=values["held_out"], seed=values["seed"])
    quality = predictor.quality
    result = {
        "mape": round(quality.mape, 5),
        "p95": round(quality.p95, 5),
        "p99": round(quality.p99, 5),
        "spearman": round(quality.spearman, 5),
        "held_out": quality.n,
        "networks": len(table.networks),
        "pairs": stats.pairs,
        "reachable": stats.reachable,
        "pairs_per_min": round(stats.pairs_per_min),
        "seconds": round(time.perf_counter() - begin, 1),
        "coefficients": {name: round(value, 4) for name, value in predictor.coefficients.items()},
        "device": device.describe(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
