"""A new device from ten measurements: `python -m benchmarks.transfer_nb201 data=PATH [seeds=20]`; JSON on the last line.

The protocol of HELP (Lee et al. 2021) on measured latencies of NAS-Bench-201 cells (15,625 cells on 27 devices, from HELP's
repository): nine known devices, latencies of cells 0 to 899; of six unseen devices 10 (or 5) measurements out of those
cells, and the rank correlation on cells 900 to 1899. Of both, the 10 % slowest and the 10 % fastest on the unseen device
are left out, as HELP does. Measurements are drawn at random, or proposed by the predictor out of the same cells; what all
of them together give (`*_all`, with the first seed) says how much of an error is noise. The features are the operator on
every edge, nothing else. `error` is the mean of the absolute relative errors, `within_90` the share within the 90 % interval.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from predictors.transfer import TransferPredictor

SOURCES = [
    *("1080ti_1", "1080ti_32", "1080ti_256", "silver_4114", "silver_4210r"),
    *("samsung_a50", "pixel3", "essential_ph_1", "samsung_s7"),
]
TARGETS = {
    "validation": ["titanx_1", "titanx_32", "titanx_256", "gold_6240"],
    "test": ["titan_rtx_256", "gold_6226", "fpga", "pixel2", "raspi4", "eyeriss"],
}
KNOWN, USED = 900, 1900
COUNTS = (5, 10)
PUBLISHED = {"flops": 0.787, "brp_nas_900_samples": 0.789, "help_10_samples": 0.932}
WITHIN_90 = 1.645


def main() -> None:
    path, seeds = _arguments(sys.argv[1:])
    try:
        with np.load(path, allow_pickle=False) as data:
            latency, operators = data["latency_ms"].astype(float)[:USED], data["op_idx"][:USED]
            names = [str(name) for name in data["device"]]
    except (OSError, KeyError, ValueError) as error:
        raise SystemExit(f"error: {path} is not the file of latencies, nb201_latency.npz ({error}); give data=PATH") from error
    features = one_hot(operators)
    known = np.full((USED, len(SOURCES)), np.nan)
    known[:KNOWN] = latency[:KNOWN, [names.index(name) for name in SOURCES]]
    begin = time.perf_counter()
    scores: dict[str, list[tuple[float, float, float]]] = {}
    fit_s = []
    for seed in range(seeds):
        predictor = TransferPredictor(features, known, seed)
        for group, targets in TARGETS.items():
            for target in targets:
                y = latency[:, names.index(target)]
                pool, test = trimmed(np.arange(KNOWN), y), trimmed(np.arange(KNOWN, USED), y)
                if seed == 0:
                    predictor.fit(pool, y[pool])
                    scores[f"{group} all {len(pool)} {target}"] = [scores_of(*predictor.predict(test), y[test])]
                for count in COUNTS:
                    predictor.forget()
                    fresh = predictor.propose(count, pool)
                    drawn = np.random.default_rng(seed).choice(pool, count, replace=False)
                    for how, ids in (("random", drawn), ("proposed", fresh)):
                        start = time.perf_counter()
                        predictor.fit(ids, y[ids])
                        fit_s.append(time.perf_counter() - start)
                        score = scores_of(*predictor.predict(test), y[test])
                        scores.setdefault(f"{group} {how} {count} {target}", []).append(score)
        print(f"seed {seed + 1} of {seeds}", file=sys.stderr)
    result: dict[str, object] = {}
    for group, targets in TARGETS.items():
        for how, counts in (("random", COUNTS), ("proposed", COUNTS), ("all", (len(pool),))):
            for count in counts:
                means = {t: np.mean(scores[f"{group} {how} {count} {t}"], axis=0) for t in targets}
                overall = np.mean(list(means.values()), axis=0)
                print(
                    f"{group}, {count} {how}: Spearman {overall[0]:.4f}, error {overall[1]:.2%}, within 90 % {overall[2]:.1%}"
                )
                for target, values in means.items():
                    print(f"  {target:14} {values[0]:.4f} {values[1]:7.2%} {values[2]:7.1%}")
                result[f"{group}_{how}" if how == "all" else f"{group}_{how}_{count}"] = dict(
                    zip(("spearman", "error", "within_90"), overall.round(4).tolist(), strict=True)
                )
    print("published, 10 samples:", ", ".join(f"{name} {value}" for name, value in PUBLISHED.items()))
    result |= {"published": PUBLISHED, "fit_s": round(float(np.median(fit_s)), 4), "seeds": seeds}
    print(json.dumps(result | {"seconds": round(time.perf_counter() - begin, 1)}))


def one_hot(operators: np.ndarray) -> np.ndarray:
    """Which operator is on which edge, `(n, edges * operators)`."""
    return np.asarray((operators[:, :, None] == np.arange(operators.max() + 1)).reshape(len(operators), -1), dtype=float)


def trimmed(ids: np.ndarray, latency: np.ndarray) -> np.ndarray:
    """Networks without the 10 % fastest and slowest."""
    order, cut = ids[np.argsort(latency[ids], kind="stable")], len(ids) // 10
    return np.sort(order[cut : len(ids) - cut])


def scores_of(mean: np.ndarray, std: np.ndarray, measured: np.ndarray) -> tuple[float, float, float]:
    """Rank correlation, mean absolute relative error, share within the 90 % interval."""
    error = float(np.mean(np.abs(mean / measured - 1.0)))
    return float(spearmanr(mean, measured).statistic), error, float(np.mean(np.abs(mean - measured) <= WITHIN_90 * std))


def _arguments(arguments: Sequence[str]) -> tuple[Path, int]:
    values = {"seeds": "20"} | dict(argument.partition("=")[::2] for argument in arguments)
    if set(values) != {"data", "seeds"} or not values["seeds"].isdigit() or int(values["seeds"]) < 1:
        raise SystemExit(f"error: {' '.join(arguments)!r}; allowed are data=PATH (needed) and seeds=20")
    return Path(values["data"]), int(values["seeds"])


if __name__ == "__main__":
    main()
