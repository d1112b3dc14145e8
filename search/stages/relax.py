"""Stage `relax` (optional): a gradient search over the same choices, before the study, which goes on from what it finds."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

from search.job import RELAXED_FOLDER, Job
from search.objectives import Goal, Objective
from search.relaxation import ExpectedCost, search_member
from search.run import Facts, digest
from spaces.choice import Architecture
from spaces.errors import UserError
from spaces.files import write_atomically


def relax_choices(job: Job) -> Facts:
    """Search a family of architectures for each goal, and evaluate them with the supernet's weights."""
    settings = job.relaxation
    name = settings.strategy.name
    fits, members = {}, []
    for goal in job.goals:
        objective = cost_of(goal)
        value = partial(_value, job, goal, objective)
        cost = ExpectedCost.fit(job.space, value, settings.held, settings.cost_samples, job.seed)
        fits[goal.name] = {"cost": objective.name, **asdict(cost.quality)}
        job.progress.say(
            f"  {objective.name} as a sum over options: mean error {cost.quality.mape:.1%}, "
            f"Spearman {cost.quality.spearman:.3f} on {cost.quality.n} held out"
        )
        for index, weight in enumerate(settings.cost_weights, 1):
            what = f"{name} for {goal.name}, {index} of {len(settings.cost_weights)}"
            found = _member(job, cost, f"{goal.name} {objective.name}", float(weight), what)
            architecture = job.space.architecture(found.pop("architecture"))
            members.append({"architecture": dict(architecture), "goal": goal.name, "cost": value(architecture), **found})
    architectures = [job.space.architecture(m["architecture"]) for m in members]
    progress = partial(job.progress.advance, f"evaluations, {name}")
    job.evaluations.evaluate(architectures, name, job.workforce.evaluate, progress)
    accuracy = {e.architecture: e.accuracy for e in job.evaluations}
    for member, architecture in zip(members, architectures, strict=True):
        member["accuracy"] = accuracy[architecture]
    job.progress.say(f"  {len(members)} searches with {name} found {len(set(architectures))} networks")
    return {
        "strategy": name,
        "fits": fits,
        "members": members,
        "output": digest([[a.to_json(), accuracy[a]] for a in architectures], name),
    }


def cost_of(goal: Goal) -> Objective:
    """The cost whose weight is swept: the goal's first objective but accuracy."""
    return next(o for o in goal.values if o.quantity != "accuracy")


def relaxed_architectures(job: Job) -> tuple[str, list[Architecture]]:
    """The strategy and what it found for the present study; nothing where the stage was not done."""
    if job.relaxed_output is None:
        return "", []
    facts = job.run.facts("relax")
    return str(facts["strategy"]), [job.space.architecture(m["architecture"]) for m in facts["members"]]


def _value(job: Job, goal: Goal, objective: Objective, architecture: Architecture) -> float:
    return job.predicted[goal].costs(architecture)[objective.name]


def _member(job: Job, cost: ExpectedCost, key: str, weight: float, what: str) -> Facts:
    path = job.path(RELAXED_FOLDER) / f"{digest(key, weight)}.json"
    known = _known(path, weight)
    if known is not None:
        return known
    begin, state = time.perf_counter(), path.with_suffix(".ckpt")
    epochs = job.relaxation.epochs

    def on_epoch(done: int) -> None:
        job.progress.advance(what, done, epochs)

    found = search_member(job.supernet, job.relaxation, cost, job.ready_data, weight, job.seed, state, on_epoch)
    facts: Facts = {**asdict(found), "architecture": dict(found.architecture), "seconds": time.perf_counter() - begin}
    write_atomically(path, json.dumps(facts, allow_nan=False))
    state.unlink(missing_ok=True)
    return facts


def _known(path: Path, weight: float) -> Facts | None:
    """What an earlier attempt of the stage found.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        facts: Facts = json.loads(path.read_text())
        if facts["weight"] != weight or not {"architecture", "expected_cost"} <= facts.keys():
            raise ValueError("not what this search writes")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and run again") from error
    return facts
