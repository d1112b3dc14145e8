"""Stages `export` and `report`: verified models, and the page that shows them."""

from __future__ import annotations

import json
import time
from dataclasses import asdict

from latency_lut.device import Device
from latency_lut.pays import never_pays, what_pays
from predictors.size import model_bytes
from search import __version__, fronts, winners
from search.candidates import Candidate
from search.elsewhere import measure_elsewhere, watch_of
from search.evaluations import INITIAL, RANDOM
from search.job import Job
from search.report import write_report
from search.run import Facts
from search.stages.find import chosen_winners, read_fronts
from search.summary import SUMMARY_FILE, summarize
from spaces.choice import Architecture
from spaces.errors import UserError
from spaces.files import write_atomically


def export_winners(job: Job) -> Facts:
    """Export, verify and time the winners of each front, and baselines, on the devices that the front is for."""
    job.workforce.release_pool()  # workers that wait still take some of the machine's time, and here it is measured
    facts: Facts = {}
    for goal, chosen in chosen_winners(job).items():
        predicted = job.predicted[goal]
        sources = (INITIAL, RANDOM)
        random_front = fronts.evaluated_front(job.evaluations.of(*sources), predicted, goal.objectives, goal.constraints)
        picked = winners.pick(random_front, [], goal.objectives, job.export.random_winners) if random_front else []
        for name in goal.devices:
            device = job.devices[name]
            facts[name] = export_device(job, device, [c.architecture for c in chosen], [c.architecture for c in picked])
    made = [entry["path"] for device in facts.values() for entry in (*device["winners"], *device["baselines"])]
    return {"devices": facts, "files": made}


def export_device(job: Job, device: Device, chosen: list[Architecture], random_front: list[Architecture]) -> Facts:
    """Export one device's winners and baselines; returns their cards."""
    provenance: dict[str, object] = {
        "run": job.run.path.name,
        "netwright": __version__,
        "seed": job.seed,
        **{stage: job.run.output(stage) for stage in ("tables", "supernet", "predictors", "study")},
        **({} if job.finished_output is None else {"finish": job.finished_output}),
    }
    exporter = winners.Exporter(
        job.space,
        job.networks,
        job.evaluator,
        job.test,
        device,
        job.latency[device.name],
        job.export.tolerances,
        provenance,
        job.memory.get(device.name),
        job.energy.get(device.name),
    )
    rows: list[tuple[str, str | None, str | None, int | None, Architecture]] = []
    rows += [(f"winners/{device.name}/{rank}", None, None, rank, a) for rank, a in enumerate(chosen, 1)]
    if chosen:
        for name, family, rank, a in winners.baselines_of(job.space, chosen, random_front):
            rows.append((f"baselines/{device.name}/{name.replace(' ', '_')}", name, family, rank, a))
    cards = []
    for index, (folder, baseline, _, _, architecture) in enumerate(rows, 1):
        own = None if baseline else job.weights(architecture)  # baselines are not finished
        cards.append(exporter.make(architecture, job.path(folder), own))
        job.progress.advance(f"exports for {device.name}", index, len(rows))
    if not rows:
        return {"winners": [], "baselines": [], "beats": {}, "speed": 1.0}
    table = job.table(device)
    folders = [job.path(row[0]) for row in rows]
    if device.elsewhere:
        weights = [None if row[1] else job.weights(row[4]) for row in rows]
        way = job.table_path(device).parent, watch_of(device, job.progress)
        cards, speed = measure_elsewhere(exporter, cards, folders, weights, table, *way)
    else:
        cards, speed = exporter.measure(cards, folders, table)
    file = exporter.model_name
    won = [
        {"rank": row[3], "path": f"{row[0]}/{file}", **card} for row, card in zip(rows, cards, strict=True) if row[1] is None
    ]
    names = ("architecture", "accuracy_runtime", "measured_us", "spread_us", "bytes", "verified")
    baselines = [
        {"name": row[1], "family": row[2], "of_winner": row[3], "path": f"{row[0]}/{file}", **{k: card[k] for k in names}}
        for row, card in zip(rows, cards, strict=True)
        if row[1] is not None
    ]
    winners.feed_back(table, won, job.space)
    table.save(job.table_path(device))
    verified = sum(card["verified"] for card in won)
    within = sum(card["within_tolerance"] for card in won)
    job.progress.say(f"  {device.name}: {len(won)} winners, {verified} verified, {within} within the latency tolerance")
    return {"winners": won, "baselines": baselines, "beats": winners.beaten(won, baselines), "speed": speed}


def report_run(job: Job) -> Facts:
    """Write `summary.json` and `report.html`."""
    begin = time.perf_counter()
    fronts = {
        name: [front_row(job, name, candidate) for candidate in front]
        for goal, front in read_fronts(job).items()
        for name in goal.devices
    }
    try:
        points = json.loads(job.path("points.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{job.path('points.json')} is damaged ({error}); delete it and run again") from error
    pays = {name: what_pays(job.table(device)) for name, device in job.devices.items()}
    rows = {name: [{**asdict(r), "pays": r.pays} for r in of_device] for name, of_device in pays.items()}
    sentences = {name: never_pays(of_device) for name, of_device in pays.items()}
    summary = summarize(job, fronts, points, rows, sentences)
    write_report(summary, job.path("report.html"))
    summary["stages"]["report"] = time.perf_counter() - begin
    summary["wall_s"] = sum(summary["stages"].values())
    write_atomically(job.path(SUMMARY_FILE), json.dumps(summary, indent=1, allow_nan=False))
    return {}


def front_row(job: Job, name: str, candidate: Candidate) -> Facts:
    """A point of a device's front with what it costs there, as the search saw it."""
    predictor, network = job.latency[name], job.space.network(candidate.architecture)
    lowerings, more = predictor.plan(network), {}
    if name in job.memory:
        more["predicted_peak_bytes"] = job.memory[name].predict(network, lowerings)[0]
    if name in job.energy:
        more["predicted_energy_uj"] = job.energy[name].predict(network, lowerings)[0]
    return {
        "architecture": dict(candidate.architecture),
        "accuracy": candidate.values["accuracy"],
        "predicted_us": candidate.values[f"latency@{name}"],
        "std_us": predictor.predict(network)[1],
        "macs": network.macs,
        "parameters": network.parameters,
        "size_bytes": model_bytes(network, lowerings),
        "peak_activation_bytes": network.peak_activation_bytes,
        **more,
    }
