"""Stages `space` and `tables`: what can be built, and what its layers cost on each device."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

from latency_lut.device import Device
from latency_lut.drift import age_days, check
from latency_lut.elsewhere import profile_elsewhere
from latency_lut.profile import ProfileStats, profile
from latency_lut.table import STATISTIC, LatencyTable
from latency_lut.transferred import Transferred
from predictors.latency import LatencyPredictor
from search.elsewhere import watch_of
from search.job import Job
from search.run import Facts, digest
from spaces.files import write_atomically


def describe_space(job: Job) -> Facts:
    """Write `space.json`, and say how large the space is."""
    space, say = job.space, job.progress.say
    facts: Facts = {"name": space.name, "choices": len(space.choices), "size_log10": math.log10(space.size())}
    facts["shares_weights"] = space.shares_weights
    for end, architecture in (("largest", space.largest()), ("smallest", space.smallest())):
        network = space.network(architecture)
        names = ("macs", "parameters", "weight_bytes", "peak_activation_bytes")
        facts[end] = {name: getattr(network, name) for name in names}
    choices = [{"name": c.name, "options": c.options, "when": c.when} for c in space.choices]
    write_atomically(job.path("space.json"), json.dumps({**facts, "choices": choices}, indent=1))
    say(f"  {facts['choices']} choices, 10^{facts['size_log10']:.1f} networks")
    for end in ("largest", "smallest"):
        f = facts[end]
        say(
            f"  {end}: {f['macs'] / 1e6:.2f} M MACs, {f['parameters']:,} parameters, "
            f"{f['weight_bytes'] / 1e3:.1f} kB of weights, {f['peak_activation_bytes'] / 1e3:.1f} kB peak activations"
        )
    return facts


def print_choices(job: Job) -> None:
    """Print every choice with its options and when it is active."""
    for choice in job.space.choices:
        condition = f"   if {choice.when[0]} in {list(choice.when[1])}" if choice.when else ""
        job.progress.say(f"  {choice.name:<32} {', '.join(map(str, choice.options))}{condition}")


def recheck(job: Job, device: Device) -> None:
    """Tell whether a table that was measured some time ago still holds. The run goes on: its winners are timed anew."""
    days, path = job.profile.recheck_days, job.table_path(device)
    if days is None or not path.exists():
        return
    table = LatencyTable.load(path)
    table.check(job.space, device)
    age = age_days(table)
    if age <= days or not table.entries:
        return
    drift = check(table, device, seed=job.seed, folder=path.parent, watch=watch_of(device, job.progress))
    verdict = f"has drifted; delete {path} to measure again" if drift.drifted else "still holds"
    job.progress.say(f"  {device.name}: the table is {age:.0f} days old and {verdict}: {'; '.join(drift.sentences())}")


def measure_tables(job: Job) -> Facts:
    """Measure the table of every device, or take one that was measured before."""
    facts: Facts = {"devices": {}}
    outputs = []
    for device in job.devices.values():
        path = job.table_path(device)
        if job.profile.tables is not None and not path.exists():
            given = Path(job.profile.tables) / path.name
            LatencyTable.load(given).check(job.space, device)
            write_atomically(path, given.read_bytes())
        recheck(job, device)
        if path.exists() and (table := LatencyTable.load(path)).transferred is not None:
            facts["devices"][device.name] = transferred_figures(job, device, table)
            outputs.append(table.fingerprint)
            continue
        table, stats = measured(job, device, path)
        quality = LatencyPredictor.fit(table, job.space, job.profile.held_out, job.seed).quality
        outputs.append(table.fingerprint)
        facts["devices"][device.name] = {
            "pairs": stats.pairs,
            "reachable_pairs": stats.reachable,
            "pairs_per_min": stats.pairs_per_min,
            "measured": stats.measured,
            "statistic": STATISTIC,
            "device": {**table.device, "fingerprint": table.device_fingerprint},
            "latency_model": asdict(quality),
            "curve": [asdict(point) for point in table.curve],
        }
        job.progress.say(
            f"  {device.name}: {stats.pairs} pairs ({stats.pairs_per_min:,.0f} a minute); latency model on {quality.n} "
            f"held-out networks: mean error {quality.mape:.1%}, Spearman {quality.spearman:.3f}"
        )
    return {**facts, "output": digest(outputs)}


def measured(job: Job, device: Device, path: Path) -> tuple[LatencyTable, ProfileStats]:
    """A device's table with all that is to be measured, here or elsewhere."""
    settings = job.profile.measuring(job.seed)
    if not device.elsewhere:
        refinement, on_progress = job.profile.refinement, job.progress.advance
        return profile(job.space, device, path, settings, refinement=refinement, on_progress=on_progress)
    done = profile_elsewhere(job.space, device, path, settings, watch=watch_of(device, job.progress))
    if done is None:
        raise KeyboardInterrupt
    return done


def transferred_figures(job: Job, device: Device, table: LatencyTable) -> Facts:
    """What is told of a table that was predicted from other devices. It is used as it is: who has it chose not to measure."""
    table.check(job.space, device)
    quality = LatencyPredictor.fit(table, job.space, job.profile.held_out, job.seed).quality
    transferred = table.transferred or Transferred({}, 0, 0, None, None)
    job.progress.say(
        f"  {device.name}: {transferred.summary()}; latency model on {quality.n} held-out networks: mean error "
        f"{quality.mape:.1%}, Spearman {quality.spearman:.3f}"
    )
    return {
        "pairs": len(table.entries),
        "reachable_pairs": len(table.entries) + len(transferred.pairs),
        "pairs_per_min": 0.0,
        "measured": 0,
        "transferred": transferred.summary(),
        "statistic": STATISTIC,
        "device": {**table.device, "fingerprint": table.device_fingerprint},
        "latency_model": asdict(quality),
        "curve": [],
    }
