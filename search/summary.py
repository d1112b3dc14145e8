"""`summary.json`: every figure of a run in machine-readable form; the report draws nothing that is not in it."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from search import __version__
from search.job import Job
from search.training.focusing import MACS_PER_TRAINING
from spaces.errors import UserError

PACKAGES = ("torch", "onnxruntime", "onnx", "onnx-ir", "optuna", "pytorch-lightning", "hydra-core", "scikit-learn", "numpy")
STAGES = ("space", "tables", "supernet", "predictors", "focus", "relax", "study", "finish", "export")

OPTIONAL = ("focus", "relax", "finish")

SUMMARY_FILE = "summary.json"

Rows = Sequence[Mapping[str, Any]]


def read_summary(path: Path) -> dict[str, Any]:
    """The summary of a run.

    Raises:
        UserError: the file is damaged.
    """
    try:
        summary = json.loads(path.read_text())
        if not isinstance(summary, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and run again") from error
    return summary


def summarize(
    job: Job,
    fronts: Mapping[str, Rows],
    points: Mapping[str, Mapping[str, Any]],
    pays: Mapping[str, Rows],
    does_not_pay: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """The summary of a finished run. Parts that are per device show the first one, and all of them under `devices`.

    Args:
        job: its stages have finished, apart from the report.
        fronts: by device, points of its front with their costs.
        points: by device, `cloud`, `evaluated` and `random` for the report.
        pays: by device, rows of `latency_lut.pays.what_pays`.
        does_not_pay: by device, sentences.

    Raises:
        UserError: `points` lacks a device.
    """
    facts = {name: job.run.facts(name) for name in STAGES}
    exported = facts["export"]["devices"]
    if job.finished_output is None:
        facts["finish"] = {}
    if job.relaxed_output is None:
        facts["relax"] = {}
    if job.focused_output is None:
        facts["focus"] = {}
    seconds = {
        n: record.seconds for n in STAGES if (record := job.run.record(n)) is not None and (facts[n] or n not in OPTIONAL)
    }
    supernet = {name: facts["supernet"][name] for name in ("epochs", "steps", "curve")}
    studies = study_figures(job, facts["study"], points)
    devices = {
        name: {
            **table_figures(name, facts["tables"]["devices"][name]),
            "study": studies[name],
            "front": list(fronts[name]),
            **{part: exported[name][part] for part in ("winners", "baselines", "beats", "speed")},
            "pays": list(pays[name]),
            "does_not_pay": list(does_not_pay[name]),
        }
        for name in job.devices
    }
    first = {part: value for part, value in next(iter(devices.values())).items() if part != "speed"}
    return {
        "name": job.run.path.name,
        "netwright": __version__,
        "seed": job.seed,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "wall_s": sum(seconds.values()),
        "versions": versions(),
        "config": dict(job.settings),
        "fingerprints": fingerprints(job),
        "stages": seconds,
        "space": facts["space"],
        "data": data_figures(job),
        "accuracy_predictor": facts["predictors"]["accuracy_predictor"],
        "memory_models": facts["predictors"].get("memory_models", {}),
        "energy_models": facts["predictors"].get("energy_models", {}),
        "supernet": {**supernet, "seconds": seconds["supernet"], **cost_figures(job, facts, exported)},
        "focus": facts["focus"],
        "relaxation": facts["relax"],
        "finish": facts["finish"].get("networks", []),
        **first,
        "devices": devices if len(devices) > 1 else {},
        "tolerances": asdict(job.export.tolerances),
        "notes": notes(exported, bool(facts["finish"]), job.space.shares_weights),
    }


def table_figures(name: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """What the table of a device holds, and how well its latency model does."""
    parts = ("pairs", "pairs_per_min", "reachable_pairs", "statistic", "transferred")
    kept = {part: table[part] for part in parts if part in table}
    device = {"name": name, **table["device"]}
    return {"table": {**kept, "device": device}, "latency_model": with_lists(table["latency_model"])}


def study_figures(job: Job, facts: Mapping[str, Any], points: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By device, what was looked for and found, with the points to draw.

    Raises:
        UserError: `points` lacks a device.
    """
    shared = {name: value for name, value in facts.items() if name != "studies"}
    figures: dict[str, dict[str, Any]] = {}
    for goal in job.goals:
        objectives = [{"name": o.name, "unit": o.unit, "direction": o.direction, "source": o.source} for o in goal.objectives]
        found = {
            "objectives": objectives,
            "constraints": [c.text for c in goal.constraints],
            **shared,
            **facts["studies"][goal.name],
        }
        for device in goal.devices:
            if device not in points:
                raise UserError(f"{job.path('points.json')} has nothing of {device}; delete it and run again")
            figures[device] = {**found, **points[device]}
    return figures


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that figures depend on."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


def fingerprints(job: Job) -> dict[str, str]:
    """Fingerprints of the space, the data, the devices and what each stage made."""
    outputs = {name: job.run.output(name) for name in STAGES if name not in ("space", *OPTIONAL)}
    if job.finished_output is not None:
        outputs["finish"] = job.finished_output
    if job.relaxed_output is not None:
        outputs["relax"] = job.relaxed_output
    if job.focused_output is not None:
        outputs["focus"] = job.focused_output
    tables = job.run.facts("tables")["devices"]
    devices = {f"device {name}": tables[name]["device"]["fingerprint"] for name in job.devices}
    return {"space": job.space.fingerprint, "data": job.data_fingerprint, **devices, **outputs}


def data_figures(job: Job) -> dict[str, Any]:
    """Name and sizes of the data."""
    return {
        "name": type(job.data).__name__,
        "train": job.train_images,
        "validation": len(job.validation.labels),
        "test": len(job.test.labels),
        "channels": job.channels,
        "classes": job.classes,
    }


def with_lists(quality: Mapping[str, Any]) -> dict[str, Any]:
    """Figures with tuples as lists."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in quality.items()}


def cost_figures(job: Job, facts: Mapping[str, Mapping[str, Any]], exported: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the supernet cost, and from how many winners on it pays.

    The alternative is to train each network alone for as many epochs as the supernet was. Compared is arithmetic; that one
    would not know which networks to train is left out.
    """
    macs = job.supernet_macs
    winners = [w["macs"] for device in exported.values() for w in device["winners"]]
    if not macs or not winners:
        return {}
    alone = MACS_PER_TRAINING * facts["supernet"]["epochs"] * job.train_images * sum(winners) / len(winners)
    finishing = facts["finish"].get("networks", [])
    each = (sum(n["macs"] for n in finishing) + facts["finish"]["teacher_macs"]) / len(finishing) if finishing else 0.0
    return {
        "macs": macs,
        "winner_alone_macs": alone,
        "winner_finishing_macs": each,
        "pays_from_winners": math.ceil(macs / (alone - each)) if alone > each else None,
    }


_NOTES_ONE_BY_ONE = (
    "Networks were trained one by one. Accuracies on the front are measured on validation data; those of winners and "
    "baselines on test data in the runtime. A network that successive halving stopped early has the accuracy that it had then, "
    "and ships with those weights.",
    "Baselines were trained in the same way, and stopped in the same way, as the winners.",
)


def _notes_of_supernet(finished: bool) -> list[str]:
    return [
        "Accuracies on the front are measured on validation data with the supernet's weights; those of winners and "
        "baselines on test data in the runtime."
        + ("" if finished else " Winners are not fine-tuned; the stage `finish` does that."),
        "Baselines use the same supernet, the same calibration and the same export as the winners."
        + (
            " They are not finished, so finished winners are compared with the accuracy that they had before."
            if finished
            else ""
        ),
    ]


def notes(exported: Mapping[str, Mapping[str, Any]], finished: bool, shared: bool) -> list[str]:
    """What a reader should know about the figures of this run; `exported` is by device, `shared` whether weights are."""
    lines = _notes_of_supernet(finished) if shared else list(_NOTES_ONE_BY_ONE)
    for device, made in exported.items():
        where = f" on {device}" if len(exported) > 1 else ""
        if made["winners"] and abs(made["speed"] - 1.0) > 0.05:
            lines.append(
                f"While the winners were timed{where}, the machine ran at {made['speed']:.0%} of the speed at which the table "
                "was measured; their latencies are brought to the table's speed by anchor layers timed along with them."
            )
        off = [w["rank"] for w in made["winners"] if not w["within_tolerance"]]
        if off:
            ranks = ", ".join(map(str, off))
            lines.append(f"Winners {ranks}{where} missed the latency tolerance; the table's next fit learns from them.")
    return lines
