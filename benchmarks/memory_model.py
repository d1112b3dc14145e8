"""How well peak memory is predicted: `python -m benchmarks.memory_model [key=value ...]`; JSON on the last line.

Measures random networks of the default space on x86 and tests the model on those that it was not fitted to, in several splits.
`repeat`: largest difference between two measurements of a network, as a share.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from benchmarks.defaults import device_and_space, options
from latency_lut.memory import measure_memory
from predictors.memory import MemoryPredictor

REPEATED = 10


def main() -> None:
    values = options(sys.argv[1:], {"networks": 160, "held_out": 60, "splits": 10, "seed": 0})
    device, space = device_and_space()
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        table = measure_memory(space, device, Path(folder) / "memory.json", networks=values["networks"], seed=values["seed"])
        seconds = time.perf_counter() - begin
        again = measure_memory(space, device, Path(folder) / "again.json", networks=REPEATED, seed=values["seed"])
    repeat = max(abs(a.value / b.value - 1.0) for a, b in zip(again.networks, table.networks, strict=False))
    fits = [MemoryPredictor.fit(table, space, values["held_out"], values["seed"] + split) for split in range(values["splits"])]
    qualities = [asdict(fit.quality) for fit in fits]
    begin = time.perf_counter()
    for timing in table.networks:
        fits[0].predict(space.network(timing.architecture), timing.lowerings)
    result = {
        **{name: round(float(np.mean([quality[name] for quality in qualities])), 5) for name in qualities[0]},
        "splits": values["splits"],
        "networks": len(table.networks),
        "networks_per_s": round(len(table.networks) / seconds, 1),
        "repeat": round(repeat, 5),
        "predict_ms": round(1e3 * (time.perf_counter() - begin) / len(table.networks), 3),
        "device": device.describe(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
