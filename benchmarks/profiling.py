"""How fast and how repeatable profiling is: `python -m benchmarks.profiling [key=value ...]`; JSON on the last line.

Two independent profiles of the same pairs of the default space. `repeat_median_diff` is the median over pairs of the relative
difference; `repeat_median_diff_same_speed` is that without the part that is common to all pairs, the machine's speed.

`memory_pairs=10000` measures so many pairs of a larger space instead, with few and short visits, and says what memory the
process holds (its resident set) after a tenth of them and after all.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import psutil

from benchmarks.defaults import device_and_space, options
from latency_lut.measuring import MeasuringSettings
from latency_lut.profile import profile

LARGER = (
    "space.expansions=[2,3,4,5,6,7,8]",
    "space.kernels=[3,5,7,9,11,13]",
    "space.stem=[8,12,16]",
    "space.width_per_block=true",
)


def main() -> None:
    values = options(sys.argv[1:], {"pairs": 300, "memory_pairs": 0, "seed": 0})
    if values["memory_pairs"]:
        print(json.dumps(memory(values["memory_pairs"], values["seed"])))
        return
    device, space = device_and_space()
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.parquet" for number in (1, 2)]
        settings = MeasuringSettings(values["seed"], values["pairs"], networks=0)
        runs = [profile(space, device, path, settings) for path in paths]
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


def memory(pairs: int, seed: int) -> dict[str, object]:
    """Resident memory of a profile, in MiB, over its pairs."""
    device, space = device_and_space(changes=LARGER)
    process, resident = psutil.Process(), {}

    def on_progress(what: str, done: int, total: int) -> None:
        if what == "pairs":
            resident[done] = process.memory_info().rss / 2**20

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x86.parquet"
        settings = MeasuringSettings(seed, pairs, networks=0, rounds=3, visit_s=1e-5)
        _, stats = profile(space, device, path, settings, on_progress=on_progress)
    counts, mebibytes = np.array(list(resident)), np.array(list(resident.values()))
    late = counts >= counts[-1] / 10
    slope = float(np.polyfit(counts[late], mebibytes[late], 1)[0])
    return {
        "pairs": stats.pairs,
        "resident_mib_at_a_tenth": round(float(mebibytes[late][0]), 1),
        "resident_mib_at_the_end": round(float(mebibytes[-1]), 1),
        "resident_mib_at_most": round(float(mebibytes.max()), 1),
        "growth_kib_per_pair": round(1024 * slope, 2),
        "seconds": round(stats.seconds, 1),
        "device": device.describe(),
    }


if __name__ == "__main__":
    main()
