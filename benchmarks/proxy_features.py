"""Whether zero-cost proxies help the accuracy predictor: `python -m benchmarks.proxy_features run=FOLDER [key=value ...]`.

`FOLDER` is a run whose supernet is trained (`python -m search run=FOLDER 'stages=[space,tables,supernet]'`). For each seed as
many networks as a run begins with are drawn as a run draws them and evaluated with the supernet. They are cut into sets as
large as those that a run holds out; each is ranked by predictors that were fitted to the others, once with the predictor's own
features and once with proxies beside them. So taus with and without proxies are of the same networks, and their differences are
averaged. The kind of predictor is chosen as a run with `predictor=auto` does it, once for each seed and set of features.

What was evaluated and scored is kept in `FOLDER/proxy_features`. The last line is JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.cross_device import opened
from benchmarks.defaults import options, take
from predictors.accuracy import accuracy_features, rank_correlation
from predictors.automatic import Automatic
from search.evaluation import training_sample
from search.evaluations import INITIAL, Evaluations
from search.job import Job
from search.overrides import OVERRIDES_FILE
from search.proxies import ProxyScores, check_names, compressed
from search.run import digest
from search.stages.learn import first_networks
from spaces.choice import Architecture
from spaces.errors import UserError

SETS = "naswot+synflow,grad_norm+snip+grasp+synflow+jacobian_covariance+naswot+zen"


def measured(job: Job, architectures: Sequence[Architecture], folder: Path, seed: int) -> list[float]:
    """Accuracies with the supernet's weights, in order."""
    known = Evaluations(folder / f"evaluations-{seed}.parquet", job.space, job.evaluations_key)
    known.evaluate(architectures, INITIAL, job.workforce.evaluate)
    accuracy = {e.architecture: e.accuracy for e in known}
    return [accuracy[a] for a in architectures]


def scored(job: Job, architectures: Sequence[Architecture], names: Sequence[str], folder: Path, seed: int) -> np.ndarray:
    """Features by proxies `(n, len(names))`, of networks initialised by the seed."""
    sample = training_sample(job.ready_data, job.proxies.images, seed)
    key = digest(job.space.fingerprint, job.data_fingerprint, job.proxies.images, seed)
    scores = ProxyScores(folder / f"proxies-{seed}.parquet", job.space, sample.images, sample.labels, seed, key)
    found = scores.scores(names, architectures)
    scores.save()
    return compressed(found)


def held_out_taus(features: np.ndarray, accuracies: np.ndarray, held_out: int, seed: int) -> list[float]:
    """Kendall's tau on every held-out set."""
    order = np.random.default_rng(seed).permutation(len(accuracies))
    taus: list[float] = []
    kind = None
    for start in range(0, len(order) - held_out + 1, held_out):
        test = order[start : start + held_out]
        train = np.setdiff1d(order, test)
        predictor = Automatic(seed, kind)
        predictor.fit(features[train], accuracies[train].tolist())
        kind = predictor.kind
        taus.append(rank_correlation(predictor.predict(features[test])[0], accuracies[test]))
    return taus


def compared(without: Sequence[float], beside: Sequence[float]) -> dict[str, float | int]:
    """How taus differ, set by set."""
    differences = np.array(beside) - np.array(without)
    return {
        "tau": round(float(np.mean(beside)), 4),
        "gain": round(float(differences.mean()), 4),
        "gain_standard_error": round(float(differences.std(ddof=1) / np.sqrt(len(differences))), 4),
        "better": int((differences > 0).sum()),
    }


def main() -> None:
    run, rest = take("run", sys.argv[1:], "")
    sets, rest = take("sets", rest, SETS)
    values = options(rest, {"seeds": 3, "threads": 1})
    if not (Path(run) / OVERRIDES_FILE).exists():
        raise SystemExit(f"error: no run {run!r}; make one: python -m search run=FOLDER 'stages=[space,tables,supernet]'")
    torch.set_num_threads(values["threads"])
    try:
        names = {text: check_names("sets", text.split("+")) for text in sets.split(",")}
        job = opened(Path(run))
        result = taus_of(job, names, values["seeds"])
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    print(json.dumps(result))


def taus_of(job: Job, sets: dict[str, tuple[str, ...]], seeds: int) -> dict[str, object]:
    """Taus without proxies, and how they change with each set of them."""
    folder, held_out = job.path("proxy_features"), job.evaluation.held_out
    without: list[float] = []
    beside: dict[str, list[float]] = {text: [] for text in sets}
    score_s, count = 0.0, 0
    for seed in range(seeds):
        architectures = first_networks(job.space, job.evaluation.initial, seed)
        accuracies = np.array(measured(job, architectures, folder, seed))
        own = accuracy_features(job.space, architectures, [job.space.network(a) for a in architectures])
        taus = partial(held_out_taus, accuracies=accuracies, held_out=held_out, seed=seed)
        without += taus(own)
        begin = time.perf_counter()
        for names in sets.values():
            scored(job, architectures, names, folder, seed)
        score_s, count = score_s + time.perf_counter() - begin, count + len(architectures)
        for text, names in sets.items():
            beside[text] += taus(np.hstack([own, scored(job, architectures, names, folder, seed)]))
        told = ", ".join(f"{text} {np.mean(found):.3f}" for text, found in beside.items())
        print(f"after seed {seed}: tau {np.mean(without):.3f} without proxies, {told}", file=sys.stderr)
    return {
        "tau_without": round(float(np.mean(without)), 4),
        "sets": {text: compared(without, found) for text, found in beside.items()},
        "held_out_sets": len(without),
        "held_out": held_out,
        "networks_per_seed": job.evaluation.initial,
        "seeds": seeds,
        "score_ms_per_network": round(score_s / count * 1e3, 1),
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    main()
