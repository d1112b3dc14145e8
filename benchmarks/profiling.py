"""How fast and how repeatable profiling is: `python -m benchmarks.profiling [key=value ...]`; JSON on the last line.

Two independent profiles of the same pairs of the default space. `repeat_median_diff` is the median over pairs of the relative
difference; `repeat_median_diff_same_speed` is that without the part that is common to all pairs, the machine's speed.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.defaults import device_and_space, options
from latency_lut.profile import profile


def main() -> None:
    values = options(sys.argv[1:], {"pairs": 300, "seed": 0})
    device, space = device_and_space()
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.parquet" for number in (1, 2)]
        runs = [profile(space, device, path, seed=values["seed"], max_pairs=values["pairs"], networks=0) for path in paths]
    (first, one), (second, two) = runs
    ratios = np.array([first.entries[pair].us / second.entries[pair].us for pair in first.entries])
    result = {
        "pairs_per_min": round((one.pairs_per_min + two.pairs_per_min) / 2),
        "repeat_median_diff": round(float(np.median(np.abs(ratios - 1))), 5),
        "repeat_p90_diff": round(float(np.quantile(np.abs(ratios - 1), 0.9)), 5),
        "repeat_median_diff_same_speed": round(float(np.median(np.abs(ratios / np.median(ratios) - 1))), 5),
        "pairs": one.pairs,
        "seconds": round(one.seconds + two.seconds, 1),
        "device": device.describe(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
