"""Stage `focus`: the supernet trained further near the fronts that the predictors expect, before the study."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from safetensors.torch import save

from search.evaluation import Evaluation, Evaluator, Split
from search.evaluations import INITIAL, Evaluated
from search.fronts import choose
from search.job import FOCUS_FOLDER, FOCUSED_FILE, FRONTS_FILE, Job
from search.left_out import NOTHING
from search.objectives import Goal
from search.run import Facts
from search.stages.learn import evaluate_first
from search.strategies.guided import Guided
from search.strategies.strategy import Round
from search.study import no_scores
from search.training import Distillation, SupernetTraining, train
from search.training.focusing import Budget, NearFronts, architectures, texts
from search.training.module import Point
from search.training.parallel import JOIN_FROM_OUTSIDE, text_of_the_first
from search.workers import WithWeights
from spaces.choice import Architecture
from spaces.errors import UserError
from spaces.files import write_atomically
from spaces.supernet import Supernet

LOOK_EVERY_S = 0.5  # at what the first process has done


def focus_supernet(job: Job) -> Facts:
    """Predict a front for each goal, and train a copy of the supernet on networks like those on them, in rounds."""
    if not job.space.shares_weights:
        job.progress.say(f"  none: networks of {job.space.name} are trained one by one")
        return {}
    if not job.focus.share:
        job.progress.say("  none: focus.share is 0")
        return {}
    macs = job.run.facts("supernet").get("macs")
    if not macs:
        raise UserError(
            "the supernet was trained by an earlier version, its cost is unknown; train it again: stages=[supernet]"
        )
    settings = job.focus
    fronts, evaluation_macs = _first_fronts(job)
    strategy = NearFronts(fronts, settings.near, settings.change)
    budget = Budget(settings.share * macs, evaluation_macs, settings.rounds, job.train_images, job.seed)
    epochs = budget.plan(job.space, strategy, 0, 0.0)
    supernet = copy.deepcopy(job.supernet)

    def on_epoch(done: int, curve: list[Point]) -> None:
        if done == strategy.until < training.epochs:
            found = text_of_the_first(lambda: json.dumps(texts(_fronts(job, _evaluated_anew(job, training.result)))))
            strategy.renew(architectures(job.space, json.loads(found)))
            training.plan(budget.plan(job.space, strategy, done, training.macs_done))
        job.progress.advance("epochs near the fronts", done, training.epochs)

    training: SupernetTraining = job.training(
        supernet=supernet,
        strategy=strategy,
        seed=job.seed,
        evaluator=job.evaluator,
        epochs=epochs,
        learning_rate=settings.learning_rate,
        distillation=Distillation(),
        zero_init_residual=False,
        curve_points=1,
        on_epoch=on_epoch,
    )
    with job.processes.started((*job.worker_command, "stages=[focus]")):
        train(training, job.ready_data, job.path(FOCUS_FOLDER), job.processes)
    if job.processes.rank > 0:
        return {}
    weights = save({name: value.contiguous() for name, value in supernet.state_dict().items()})
    write_atomically(job.path(FOCUSED_FILE), weights)
    job.workforce.renew()
    devices = [goal.name for goal in job.goals]
    sizes = [len(front) for front in strategy.rounds]
    spent = int(budget.spent(strategy, training.macs_done))
    job.progress.say(
        f"  {training.epochs} epochs near the fronts of {' and '.join(devices)}, predicted {_times(len(sizes))} "
        f"(at last {sizes[-1]} networks); {100 * spent / macs:.0f} % of the supernet's arithmetic"
    )
    return {
        "epochs": training.epochs,
        "macs": spent,
        "processes": job.processes.count,
        "devices": devices,
        "fronts": sizes,
        "files": [FOCUSED_FILE],
        "output": hashlib.sha256(weights).hexdigest()[:16],
    }


def wait_for_fronts(job: Job) -> None:
    """Wait until the first process has predicted fronts to train near, or the stage is done.

    Raises:
        UserError: it does not get there.
    """
    end = time.monotonic() + JOIN_FROM_OUTSIDE.total_seconds()
    while time.monotonic() < end:
        job.run.reload()
        if _ready(job):
            fingerprint = job.fingerprint("focus")
            done = job.run.finished("focus", fingerprint, job.run.facts("focus").get("files", []))
            if done or _told(job).get("key") == fingerprint:
                return
        time.sleep(LOOK_EVERY_S)
    raise UserError(f"the first process did not predict fronts in {JOIN_FROM_OUTSIDE.total_seconds() / 3600:g} hours")


def _ready(job: Job) -> bool:
    """Whether the stages before are done with the present settings."""
    try:
        return all(job.run.finished(name, job.fingerprint(name), ()) for name in ("tables", "supernet", "predictors"))
    except UserError:  # a fingerprint depends on what is not there yet
        return False


def _first_fronts(job: Job) -> tuple[list[Architecture], int]:
    """Fronts predicted with the supernet as it was trained, and the multiply-accumulates that predicting them anew will take.

    The first process predicts them and tells the others.
    """
    if job.processes.rank > 0:
        told = _told(job)
        return architectures(job.space, told["fronts"]), int(told["evaluation_macs"])
    evaluate_first(job)
    seen, evaluator = job.evaluations.of(INITIAL), _evaluator(job)
    images = len(evaluator.split.labels) + sum(map(len, evaluator.calibration))
    evaluation_macs = images * sum(job.space.network(e.architecture).macs for e in seen)
    fronts = _fronts(job, seen)
    if job.processes.count > 1:
        told = {"key": job.fingerprint("focus"), "fronts": texts(fronts), "evaluation_macs": evaluation_macs}
        write_atomically(job.path(FRONTS_FILE), json.dumps(told))
    return fronts, evaluation_macs


def _told(job: Job) -> dict[str, Any]:
    """What the first process told the others; empty where it has told nothing."""
    try:
        told = json.loads(job.path(FRONTS_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _evaluated_anew(job: Job, supernet: Supernet) -> list[Evaluated]:
    """The networks that teach the accuracy predictor, evaluated with weights that are still trained; not kept."""
    chosen = [e.architecture for e in job.evaluations.of(INITIAL)]
    results: dict[int, Evaluation] = {}
    for index, result in job.workforce.pool.each(WithWeights(_evaluator(job), supernet), chosen):
        results[index] = result
        job.progress.advance("evaluations", len(results), len(chosen))
    return [Evaluated(a, results[i].accuracy, results[i].loss, INITIAL) for i, a in enumerate(chosen)]


def _evaluator(job: Job) -> Evaluator:
    """Evaluates on as many of the validation images as are enough to predict fronts anew."""
    evaluator, split = job.evaluator, job.evaluator.split
    chosen = np.random.default_rng([job.seed, 9]).permutation(len(split.labels))[: job.focus.images]
    return Evaluator(evaluator.calibration, Split(split.images[chosen], split.labels[chosen]), evaluator.batch_size)


def _fronts(job: Job, seen: list[Evaluated]) -> list[Architecture]:
    """The networks of all goals' predicted fronts, from those that were evaluated."""
    return list(dict.fromkeys(a for goal in job.goals for a in _front(job, goal, seen)))


def _front(job: Job, goal: Goal, seen: list[Evaluated]) -> list[Architecture]:
    """The predicted front of a goal's objectives.

    Constraints are left out, so that runs with other budgets can share what is trained.
    """
    round_ = Round(
        goal=replace(goal, constraints=()),
        predicted=job.predicted[goal],
        number=1,
        rounds=1,
        seed=job.seed,
        candidates=job.focus.candidates,
        left=0,  # a front as predicted is enough to train near it
        seen=seen,
        left_out=NOTHING,  # it depends on the constraints, and what does not pay is on no front
        new_predictor=job.chosen_predictor,
        new_sampler=partial(job.sampler, job.seed),
        scores=no_scores,
        measured=lambda architectures: [],
        on_progress=job.progress.advance,
    )
    return choose(Guided().search(round_), goal.objectives, job.focus.networks)


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")
