"""Winners of each device on every device: `python -m benchmarks.cross_device [run=FOLDER] [key=value ...]`.

Further keys are `rounds=25` and `winners=40` (of each front, at most). JSON on the last line. It runs
`python -m search 'device=[x86,wasm]'` with the other options up to the fronts (a finished run is used as it is), and then
lowers, exports, verifies and times the winners of each device on both, each as that device's own table says: what is carried
over is the architecture, as someone does who searched for another device.

* `home_speedup`, by device: how much faster a device's own winner is there than the winner of another device, at equal
  accuracy. At each validation accuracy that a winner has, the fastest winner of at least that accuracy stands for its device
  (fastest on the device that it was searched for). The median over these levels; `home_speedup_range` are its extremes,
  `levels` has all, `same_network` is the share of levels with one network for both. `accuracy_difference` is the mean test
  accuracy, in the device's runtime, of the winners from elsewhere less that of those at home. `home_speedup_by_test` is the
  median with test accuracies in place of those that the search saw; they are as noisy as the test set is small.
* `precisions`, by device: the dense shape of every winner, all of it float, all int8, or per layer as the device's latency
  model predicts it to be fastest. `int8_speedup` and `per_layer_speedup` are medians of speeds against float, `int8_slower` is
  the share of the shapes that int8 slows down, `per_layer_over_best_uniform` the median speed against the faster of both
  uniform ones, `per_layer_slower` the share of shapes on which it is slower than that by more than the noise of 1 %.

All networks of a device are timed together, visit by visit in turn; a latency is the median of `rounds` visits, with the
device's threads and batch.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir
from rich.console import Console

from benchmarks.defaults import options, take
from latency_lut.command import CONFIG_FOLDER
from latency_lut.device import Device
from latency_lut.session import retime
from predictors.latency import LatencyPredictor
from search.building import build_job
from search.job import Job
from search.overrides import override_key, plain_settings, saved_overrides
from search.progress import StageProgress
from search.stages.find import read_fronts
from search.training.parallel import Processes
from search.winners import Exporter, offered, pick, uniform
from spaces.choice import Architecture, Option
from spaces.precision import FLOAT, INT8
from spaces.space import Space

DEFAULTS = ("device=[x86,wasm]", "stages=[space,tables,supernet,predictors,focus,study]")
LONGEST_SPAN = 3  # layers that change their precision together
NOISE = 0.01  # share by which two timings may differ


@dataclass(frozen=True)
class Winner:
    """A winner of one device, measured on all.

    Args:
        home: the device that it was searched for.
        validation: accuracy that the search saw.
        accuracy: in the runtime on the test images, by device.
        us: median microseconds of a run, by device.
    """

    home: str
    validation: float
    accuracy: Mapping[str, float]
    us: Mapping[str, float]


def searched(folder: Path, arguments: Sequence[str]) -> None:
    """Run the search, or go on with it.

    Raises:
        SystemExit: it failed, and has said why.
    """
    given = {override_key(argument) for argument in arguments}
    defaults = [text for text in DEFAULTS if override_key(text) not in given]
    ended = subprocess.run([sys.executable, "-m", "search", f"run={folder}", *defaults, *arguments], check=False)
    if ended.returncode:
        raise SystemExit(ended.returncode)


def opened(folder: Path) -> Job:
    """The job of a finished run."""
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        config = compose("search", [*saved_overrides(folder), f"run={folder}"])
    return build_job(config, plain_settings(config), folder, StageProgress(Console(quiet=True)), Processes(), ())


def exporter_of(job: Job, device: Device) -> Exporter:
    parts = (job.space, job.supernet, job.evaluator, job.test, device, job.latency[device.name], job.export.tolerances)
    return Exporter(*parts, {"run": job.run.path.name})


@dataclass(frozen=True)
class Timed:
    """What was measured of networks on one device: microseconds, test accuracy, and whether the export was verified."""

    us: Mapping[Architecture, float]
    accuracy: Mapping[Architecture, float]
    verified: Mapping[Architecture, bool]


def timed(job: Job, device: Device, architectures: Iterable[Architecture], folder: Path, rounds: int) -> Timed:
    """Export networks for a device into a folder, verify them, and time them together."""
    exporter, distinct = exporter_of(job, device), list(dict.fromkeys(architectures))
    folders = [folder / device.name / str(index) for index in range(len(distinct))]
    cards = [exporter.make(architecture, path) for architecture, path in zip(distinct, folders, strict=True)]
    models = [(path / exporter.model_name).read_bytes() for path in folders]
    timings, _ = retime(models, job.space, job.table(device), device, rounds=rounds, seed=job.seed)
    return Timed(
        {a: timing.us for a, timing in zip(distinct, timings, strict=True)},
        {a: float(card["accuracy_runtime"]) for a, card in zip(distinct, cards, strict=True)},
        {a: bool(card["verified"]) for a, card in zip(distinct, cards, strict=True)},
    )


# -- each device's winners at home and elsewhere ------------------------------------------------------------------------------


def validation_accuracy(winner: Winner) -> float:
    return winner.validation


def test_accuracy(winner: Winner) -> float:
    return winner.accuracy[winner.home]


def levels_of(
    winners: Sequence[Winner], device: str, accuracy: Callable[[Winner], float] = validation_accuracy
) -> list[dict[str, Any]]:
    """What a device's own winners and those of the others cost on it, at each accuracy that some winner of each has."""
    others = [name for name in dict.fromkeys(w.home for w in winners) if name != device]
    rows = []
    for other in others:
        both = [w for w in winners if w.home in (device, other)]
        for level in sorted({accuracy(w) for w in both}):
            found = {name: fastest([w for w in both if accuracy(w) >= level], name) for name in (device, other)}
            home, guest = found[device], found[other]
            if home is None or guest is None:
                continue
            rows.append(
                {
                    "accuracy_from": round(level, 4),
                    "winner_of": other,
                    "home_us": round(home.us[device], 1),
                    "guest_us": round(guest.us[device], 1),
                    "home_accuracy": round(home.accuracy[device], 4),
                    "guest_accuracy": round(guest.accuracy[device], 4),
                    "home_speedup": round(guest.us[device] / home.us[device], 3),
                    "same_network": guest.us == home.us,
                }
            )
    return rows


def fastest(winners: Sequence[Winner], home: str) -> Winner | None:
    """Of a device's winners, the fastest there."""
    return min((w for w in winners if w.home == home), key=lambda w: w.us[home], default=None)


# -- one shape, three assignments of precisions -------------------------------------------------------------------------------


def per_layer(space: Space, predictor: LatencyPredictor, shape: Architecture) -> Architecture:
    """A shape with the precisions with which it is predicted to be fastest.

    From the faster uniform one on, up to `LONGEST_SPAN` neighbouring layers change together, as long as that helps: what lies
    between layers of two precisions costs, so one layer alone may have to be slower before two are faster.
    """

    def us(architecture: Architecture) -> float:
        return predictor.predict(space.network(architecture))[0]

    names = [choice.name for choice in space.choices if choice.kind == "precision" and choice.name in shape]
    precisions = (FLOAT, int8_of(space))
    best = min((uniform(space, shape, precision) for precision in precisions), key=us)
    best_us, improved = us(best), True
    while improved:
        improved = False
        for first in range(len(names)):
            for span in range(1, LONGEST_SPAN + 1):
                for precision in precisions:
                    values: dict[str, Option] = {**best, **dict.fromkeys(names[first : first + span], precision)}
                    changed = space.completed(values)
                    if changed != best and (found := us(changed)) < best_us:
                        best, best_us, improved = changed, found, True
    return best


def int8_of(space: Space) -> str:
    """The precision of a space's int8 layers.

    Raises:
        SystemExit: it has none.
    """
    found = offered(space, INT8)
    if not found:
        raise SystemExit(
            f"error: space {space.name} has no int8 layers; allowed are spaces with {' or '.join(INT8)} and {FLOAT}"
        )
    return found[0]


def precision_figures(us: Mapping[Architecture, float], shapes: Sequence[Mapping[str, Architecture]]) -> dict[str, float]:
    """Speeds of int8 and per-layer precisions of the same shapes on one device; see the top for their names."""
    floats, int8, mixed = (np.array([us[shape[name]] for shape in shapes]) for name in ("float", "int8", "per_layer"))
    against_best = np.minimum(floats, int8) / mixed
    figures = {
        "int8_speedup": np.median(floats / int8),
        "int8_slower": np.mean(int8 > floats),
        "per_layer_speedup": np.median(floats / mixed),
        "per_layer_over_best_uniform": np.median(against_best),
        "per_layer_slower": np.mean(against_best < 1.0 - NOISE),
    }
    return {name: round(float(value), 3) for name, value in figures.items()}


def cross(job: Job, folder: Path, rounds: int, most: int) -> dict[str, Any]:
    """All figures of a finished run, of so many networks of each front at most; exports are written to a folder."""
    chosen = {goal.devices[0]: pick(front, [], goal.objectives, most) for goal, front in read_fronts(job).items()}
    pairs = [(name, candidate) for name, found in chosen.items() for candidate in found]
    dense = list(dict.fromkeys(uniform(job.space, candidate.architecture, FLOAT) for _, candidate in pairs))
    measured, precisions = {}, {}
    for name, device in job.devices.items():
        shapes = [
            {
                "float": shape,
                "int8": uniform(job.space, shape, int8_of(job.space)),
                "per_layer": per_layer(job.space, job.latency[name], shape),
            }
            for shape in dense
        ]
        wanted = [*(candidate.architecture for _, candidate in pairs), *(a for shape in shapes for a in shape.values())]
        measured[name] = timed(job, device, wanted, folder, rounds)
        precisions[name] = precision_figures(measured[name].us, shapes)
    winners = [
        Winner(
            home,
            candidate.values["accuracy"],
            {name: found.accuracy[candidate.architecture] for name, found in measured.items()},
            {name: found.us[candidate.architecture] for name, found in measured.items()},
        )
        for home, candidate in pairs
    ]
    levels = {name: levels_of(winners, name) for name in job.devices}
    speedups = {name: [row["home_speedup"] for row in rows] for name, rows in levels.items()}
    by_test = {name: [row["home_speedup"] for row in levels_of(winners, name, test_accuracy)] for name in job.devices}
    differences = {n: [row["guest_accuracy"] - row["home_accuracy"] for row in rows] for n, rows in levels.items()}
    return {
        "home_speedup": {name: round(float(np.median(values)), 3) for name, values in speedups.items()},
        "home_speedup_by_test": {name: round(float(np.median(values)), 3) for name, values in by_test.items()},
        "home_speedup_range": {name: [min(values), max(values)] for name, values in speedups.items()},
        "same_network": {n: round(float(np.mean([row["same_network"] for row in rows])), 3) for n, rows in levels.items()},
        "accuracy_difference": {name: round(float(np.mean(values)), 4) for name, values in differences.items()},
        "precisions": precisions,
        "winners": {name: len(found) for name, found in chosen.items()},
        "shapes": len(dense),
        "not_verified": {name: sum(not ok for ok in m.verified.values()) for name, m in measured.items()},
        "levels": levels,
        "rounds": rounds,
        "devices": {name: device.describe() for name, device in job.devices.items()},
    }


def main() -> None:
    folder, arguments = take("run", sys.argv[1:], "")
    rounds, arguments = take("rounds", arguments, "25")
    winners, arguments = take("winners", arguments, "40")
    values = options([f"rounds={rounds}", f"winners={winners}"], {"rounds": 25, "winners": 40})
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(folder or f"{scratch}/run")
        searched(run, arguments)
        result = cross(opened(run), Path(scratch), values["rounds"], values["winners"])
    for name, rows in result["levels"].items():
        for row in rows:
            print(name, *(f"{key}={value}" for key, value in row.items()))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
