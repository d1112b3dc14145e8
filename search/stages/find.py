"""Stage `study`: the search itself, its archive, and the front of each device."""

from __future__ import annotations

import csv
import io
import json
import time

from search import fronts, study, winners
from search.candidates import Candidate, FinishedStudy, archive
from search.evaluations import RANDOM
from search.job import Job
from search.left_out import NOTHING, LeftOut, left_out
from search.objectives import Goal
from search.run import Facts
from search.stages.learn import evaluate_first
from search.stages.relax import relaxed_architectures
from spaces.choice import Architecture
from spaces.errors import UserError
from spaces.files import write_atomically

CLOUD_POINTS = 2000
STRATEGY_FOLDER = "strategy"

Results = dict[Goal, study.StudyResult]


def search_study(job: Job) -> Facts:
    """Search, and write the fronts, the archive and the points for the report."""
    evaluate_first(job)  # known already, unless the supernet was focused since
    unpaid = {goal: _left_out(job, goal) for goal in job.goals} if job.study.leave_out_what_does_not_pay else {}
    results = study.run_studies(
        job.predicted,
        job.evaluations,
        job.chosen_predictor,
        job.sampler,
        job.workforce.evaluate,
        job.study,
        job.progress.advance,
        left_out=unpaid,
        relaxed=relaxed_architectures(job),
        new_strategy=job.strategy,
        scores=lambda names, architectures, on_progress: job.proxy_scores.scores(names, architectures, on_progress),
    )
    begin = time.perf_counter()
    archive(job.path("study.log"), job.space, {study_name(job, g): finished(g, result) for g, result in results.items()})
    archive_s = time.perf_counter() - begin
    write_fronts(job, results)
    write_points(job, results)
    for goal, result in results.items():
        for name, content in result.files.items():
            write_atomically(job.path(f"{STRATEGY_FOLDER}/{goal.name}/{name}"), content)
    facts = {
        "archive_s": archive_s,
        "rounds": job.study.rounds,
        "strategy": job.strategy().name,
        "sampler": type(job.sampler(job.seed)).__name__,
        "evaluations": len(job.evaluations),
    }
    return {
        **facts,
        "studies": {goal.name: figures(job, goal, result, unpaid.get(goal, NOTHING)) for goal, result in results.items()},
    }


def _left_out(job: Job, goal: Goal) -> LeftOut:
    """What does not pay on a goal's devices; it is also told."""
    tables = {name: job.table(job.devices[name]) for name in goal.devices}
    unpaid = left_out(job.space, tables, goal.objectives, goal.constraints)
    if unpaid.count:
        where = " or ".join(unpaid.devices)
        job.progress.say(f"  {unpaid.count} of {unpaid.considered} options left out, which do not pay on {where}:")
    for sentence in unpaid.sentences():
        job.progress.say(f"    {sentence}")
    return unpaid


def study_name(job: Job, goal: Goal) -> str:
    """Of the archived study: `RUN`, or `RUN-DEVICE` where each device has its own."""
    return job.run.path.name if len(job.goals) == 1 else f"{job.run.path.name}-{goal.name}"


def finished(goal: Goal, result: study.StudyResult) -> FinishedStudy:
    """A study's candidates for the archive, each once, with the round in which it was first asked for."""
    first = {c.architecture: (c, n) for c, n in reversed(result.candidates)}
    return FinishedStudy([(c, {"round": n}) for c, n in reversed(first.values())], goal.objectives)


def figures(job: Job, goal: Goal, result: study.StudyResult, unpaid: LeftOut) -> Facts:
    """The figures of one study; they are also told."""
    rate = len(result.candidates) / result.candidate_s
    volumes = list(result.hypervolumes.values())
    whose = f"{goal.name}: " if len(job.goals) > 1 else ""
    if result.nearest_miss is not None:
        job.progress.say(f"  {whose}{result.nearest_miss['text']}")
    name = job.strategy().name
    verdict = "" if volumes[-1] > result.hypervolume_random else f": {name} does not beat random search"
    job.progress.say(
        f"  {whose}{len(result.candidates)} candidates ({rate:.0f} a second), {len(job.evaluations)} networks evaluated, "
        f"{len(result.front)} on the front; hypervolume {volumes[-1]:.3f}, "
        f"random search {result.hypervolume_random:.3f}{verdict}"
    )
    if result.hypervolume_relaxed is not None:
        alone, by_random = result.hypervolume_relaxed
        verdict = "" if alone > by_random else ": it does not beat random search"
        told = f"hypervolume of the gradient search alone {alone:.3f}, of as many random networks {by_random:.3f}"
        job.progress.say(f"  {whose}{told}{verdict}")
    return {
        "candidates": len(result.candidates),
        "distinct_candidates": len({c.architecture for c, _ in result.candidates}),
        "candidates_per_s": rate,
        "hypervolume": volumes[-1],
        "hypervolume_by_round": volumes,
        "hypervolume_after": list(result.hypervolumes),
        "hypervolume_random": result.hypervolume_random,
        **({} if result.hypervolume_relaxed is None else {"hypervolume_relaxed": list(result.hypervolume_relaxed)}),
        "reference_point": result.reference,
        "nearest_miss": result.nearest_miss,
        "left_out": {"options": unpaid.count, "of": unpaid.considered, "devices": unpaid.devices, "what": unpaid.sentences()},
    }


def write_fronts(job: Job, results: Results) -> None:
    """`front.csv`: device, validation accuracy as evaluated, costs as predicted or counted on every device, the architecture.

    A front that serves several devices stands there once, with their names joined by `+`.
    """
    text = io.StringIO()
    names = list(dict.fromkeys(["accuracy", *(o.name for goal in results for o in goal.values)]))
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["device", *names, "architecture"])
    for goal, result in results.items():
        for c in result.front:
            costs = {name: value for p in job.predicted.values() for name, value in p.costs(c.architecture).items()}
            values = {**costs, **c.values}
            writer.writerow([goal.name, *(repr(values[name]) for name in names), c.architecture.to_json()])
    write_atomically(job.path("front.csv"), text.getvalue())


def read_fronts(job: Job) -> dict[Goal, list[Candidate]]:
    """The fronts that `write_fronts` wrote.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = job.path("front.csv")
    fronts: dict[Goal, list[Candidate]] = {goal: [] for goal in job.goals}
    by_name = {goal.name: goal for goal in job.goals}
    try:
        for row in csv.DictReader(io.StringIO(path.read_text())):
            goal, architecture = (
                by_name[row.pop("device")],
                job.space.architecture(Architecture.from_json(row.pop("architecture"))),
            )
            fronts[goal].append(Candidate(architecture, {k: float(v) for k, v in row.items()}, 0.0))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete {job.path('stages.json')} to search again") from error
    return fronts


def chosen_winners(job: Job) -> dict[Goal, list[Candidate]]:
    """The networks to ship of each front, the fastest on its first device first; short fronts are filled up from behind."""
    chosen: dict[Goal, list[Candidate]] = {}
    for goal, front in read_fronts(job).items():
        evaluated = fronts.as_candidates(list(job.evaluations), job.predicted[goal], goal.constraints)
        feasible = [c for c in evaluated if c.feasible]
        picked = winners.pick(front, feasible, goal.objectives, job.export.winners) if front else []
        first = f"latency@{goal.devices[0]}"
        chosen[goal] = sorted(picked, key=lambda c: c.values[first])
    return chosen


def write_points(job: Job, results: Results) -> None:
    """`points.json`: what the report draws of the search, by device: its predicted latency against accuracy."""
    points = {}
    relaxed = set(relaxed_architectures(job)[1])
    for goal, result in results.items():
        every = max(1, len(result.candidates) // CLOUD_POINTS)
        costs = job.predicted[goal].costs
        for latency in (f"latency@{device}" for device in goal.devices):
            evaluated: dict[str, list[list[float]]] = {source: [] for source in ("searched", "random", "relaxed")}
            for e in job.evaluations:
                point = [costs(e.architecture)[latency], e.accuracy]
                evaluated["random" if e.source == RANDOM else "searched"].append(point)
                if e.architecture in relaxed:
                    evaluated["relaxed"].append(point)
            cloud = [[c.values[latency], c.values["accuracy"]] for c, _ in result.candidates[::every]][:CLOUD_POINTS]
            points[latency.partition("@")[2]] = {
                "cloud": cloud,
                "evaluated": evaluated["searched"],
                "random": evaluated["random"],
                **({"relaxed": evaluated["relaxed"]} if relaxed else {}),
            }
    write_atomically(job.path("points.json"), json.dumps(points))
