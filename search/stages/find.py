"""Stage `study`: the search itself, its archive, and the front."""

from __future__ import annotations

import csv
import io
import json
import time

import optuna

from search import study
from search.candidates import Candidate, archive
from search.evaluations import RANDOM
from search.job import Job
from search.left_out import NOTHING, left_out
from search.run import Facts
from spaces.choice import Architecture
from spaces.errors import UserError
from spaces.files import write_atomically

CLOUD_POINTS = 2000


def search_study(job: Job) -> Facts:
    """Search, and write the front, the archive and the points for the report."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    unpaid = NOTHING
    if job.study.leave_out_what_does_not_pay:
        tables = {name: job.table(device) for name, device in job.devices.items()}
        unpaid = left_out(job.space, tables, job.objectives, job.constraints)
        where = " or ".join(unpaid.devices)
        if unpaid.count:
            job.progress.say(f"  {unpaid.count} of {unpaid.considered} options left out, which do not pay on {where}:")
        for sentence in unpaid.sentences():
            job.progress.say(f"    {sentence}")
    result = study.run_study(
        job.predicted,
        job.evaluations,
        job.predictor,
        job.sampler,
        lambda a: job.evaluator.evaluate(job.supernet, a),
        job.objectives,
        job.constraints,
        job.study,
        job.progress.advance,
        unpaid,
    )
    begin = time.perf_counter()
    first = {c.architecture: (c, n) for c, n in reversed(result.candidates)}
    archive(
        job.path("study.log"),
        job.run.path.name,
        job.space,
        [(c, {"round": n}) for c, n in reversed(first.values())],
        job.objectives,
    )
    archive_s = time.perf_counter() - begin
    write_front(job, result.front)
    write_points(job, result)
    rate = len(result.candidates) / result.candidate_s
    if result.nearest_miss is not None:
        job.progress.say(f"  {result.nearest_miss['text']}")
    job.progress.say(
        f"  {len(result.candidates)} candidates ({rate:.0f} a second), {len(job.evaluations)} networks evaluated, "
        f"{len(result.front)} on the front; hypervolume {result.hypervolumes[-1]:.3f}, "
        f"random search {result.hypervolume_random:.3f}"
    )
    return {
        "candidates": len(result.candidates),
        "distinct_candidates": len(first),
        "candidates_per_s": rate,
        "archive_s": archive_s,
        "rounds": job.study.rounds,
        "sampler": type(job.sampler(job.seed)).__name__,
        "hypervolume": result.hypervolumes[-1],
        "hypervolume_by_round": result.hypervolumes,
        "hypervolume_random": result.hypervolume_random,
        "reference_point": result.reference,
        "evaluations": len(job.evaluations),
        "nearest_miss": result.nearest_miss,
        "left_out": {"options": unpaid.count, "of": unpaid.considered, "devices": unpaid.devices, "what": unpaid.sentences()},
    }


def write_front(job: Job, front: list[Candidate]) -> None:
    """`front.csv`: validation accuracy as evaluated, costs as predicted or counted, the architecture."""
    text = io.StringIO()
    names = list(dict.fromkeys(["accuracy", *(o.name for o in job.predicted.objectives)]))
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, "architecture"])
    writer.writerows([*(repr(c.values[name]) for name in names), c.architecture.to_json()] for c in front)
    write_atomically(job.path("front.csv"), text.getvalue())


def read_front(job: Job) -> list[Candidate]:
    """The front that `write_front` wrote.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = job.path("front.csv")
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text())))
        return [
            Candidate(
                job.space.architecture(Architecture.from_json(row.pop("architecture"))),
                {k: float(v) for k, v in row.items()},
                0.0,
            )
            for row in rows
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete {job.path('stages.json')} to search again") from error


def write_points(job: Job, result: study.StudyResult) -> None:
    """`points.json`: what the report draws of the search, latency of the first device against accuracy."""
    latency = f"latency@{next(iter(job.devices))}"
    every = max(1, len(result.candidates) // CLOUD_POINTS)
    evaluated: dict[str, list[list[float]]] = {source: [] for source in ("searched", "random")}
    for e in job.evaluations:
        point = [job.predicted.costs(e.architecture)[latency], e.accuracy]
        evaluated["random" if e.source == RANDOM else "searched"].append(point)
    cloud = [[c.values[latency], c.values["accuracy"]] for c, _ in result.candidates[::every]][:CLOUD_POINTS]
    points = {"cloud": cloud, "evaluated": evaluated["searched"], "random": evaluated["random"]}
    write_atomically(job.path("points.json"), json.dumps(points))
