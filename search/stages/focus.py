"""Stage `focus`: the supernet trained further near the fronts that the predictors expect, before the study."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from safetensors.torch import save

from predictors.accuracy import RanksNetworks, accuracy_features
from predictors.losses import LossPredictor
from search.candidates import propose
from search.evaluations import INITIAL
from search.fronts import evaluated_front, evenly
from search.job import FOCUS_FOLDER, FOCUSED_FILE, FRONTS_FILE, Job
from search.objectives import Goal
from search.run import Facts
from search.stages.learn import evaluate_first
from search.strategies.guided import with_precision_runs
from search.training import Distillation, SupernetTraining, train
from search.training.focusing import Budget, NearFronts, architectures, texts
from search.training.module import Point
from search.training.parallel import JOIN_FROM_OUTSIDE, text_of_the_first
from spaces.choice import Architecture
from spaces.errors import UserError
from spaces.files import write_atomically

LOOK_EVERY_S = 0.5  # at what the first process has done
REFERENCE = 300  # networks of all sizes that tell how far features spread


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
    strategy = NearFronts(_first_fronts(job), settings.near, settings.change, settings.together)
    budget = Budget(settings.share * macs, settings.rounds, job.train_images, job.seed)
    epochs = budget.plan(job.space, strategy, 0, 0.0)
    supernet = copy.deepcopy(job.supernet)

    def on_epoch(done: int, curve: list[Point]) -> None:
        if done == strategy.until < training.epochs:
            found = text_of_the_first(lambda: json.dumps(texts(_fronts_anew(job, strategy))))
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
    sizes = [len(set(front)) for front in strategy.rounds]
    job.progress.say(
        f"  {training.epochs} epochs near the fronts of {' and '.join(devices)}, predicted {_times(len(sizes))} "
        f"(at last {sizes[-1]} networks); {100 * training.macs_done / macs:.0f} % of the supernet's arithmetic"
    )
    return {
        "epochs": training.epochs,
        "macs": training.macs_done,
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


def _first_fronts(job: Job) -> list[Architecture]:
    """Fronts predicted with the supernet as it was trained. The first process predicts them and tells the others."""
    if job.processes.rank > 0:
        return architectures(job.space, _told(job)["fronts"])
    evaluate_first(job)
    seen = job.evaluations.of(INITIAL)
    evaluated, accuracies = [e.architecture for e in seen], [e.accuracy for e in seen]

    def front(goal: Goal) -> list[Architecture]:
        predicted, accuracy = job.predicted[goal], job.chosen_predictor()
        accuracy.fit(predicted.features(evaluated), accuracies)
        begin = evaluated_front(seen, predicted, goal.objectives, ())
        return _front(job, goal, accuracy, [c.architecture for c in begin])

    fronts = [a for goal in job.goals for a in front(goal)]
    if job.processes.count > 1:
        told = {"key": job.fingerprint("focus"), "fronts": texts(fronts)}
        write_atomically(job.path(FRONTS_FILE), json.dumps(told))
    return fronts


def _told(job: Job) -> dict[str, Any]:
    """What the first process told the others; empty where it has told nothing."""
    try:
        told = json.loads(job.path(FRONTS_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _fronts_anew(job: Job, strategy: NearFronts) -> list[Architecture]:
    """Fronts predicted from the losses of the steps so far."""
    space, network = job.space, next(iter(job.predicted.values())).network
    rng = np.random.default_rng([job.seed, 8])
    trained, losses = strategy.trained
    drawn = [space.sample_spread(rng) for _ in range(REFERENCE)]
    of_steps, reference = (accuracy_features(space, some, [network(a) for a in some]) for some in (trained, drawn))
    ranks = LossPredictor(of_steps, losses, reference)
    return [a for goal in job.goals for a in _front(job, goal, ranks, strategy.rounds[-1])]


def _front(job: Job, goal: Goal, accuracy: RanksNetworks, begin: Sequence[Architecture]) -> list[Architecture]:
    """The predicted front of a goal's objectives, searched from where another one was.

    Constraints are left out, so that runs with other budgets can share what is trained; and so is what does not pay, since that
    depends on the constraints. At most half of the candidates are variants of where it begins.
    """
    begins = with_precision_runs(job.space, begin)
    kept = np.linspace(0, len(begins) - 1, min(len(begins), -(-job.focus.candidates // 2))).round().astype(int)
    candidates = propose(
        job.space,
        partial(job.predicted[goal].predict, accuracy=accuracy),
        goal.objectives,
        (),
        job.sampler(job.seed),
        job.focus.candidates,
        [begins[i] for i in kept],
        on_progress=lambda done: job.progress.advance("candidates", done, job.focus.candidates),
    )
    return evenly(candidates, goal.objectives, job.focus.networks)


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")
