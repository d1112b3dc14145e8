"""Stage `focus`: the supernet trained further near the fronts that the predictors expect, before the study."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace
from functools import partial

from safetensors.torch import save

from search.evaluation import Evaluation
from search.evaluations import INITIAL, Evaluated
from search.fronts import choose
from search.job import FOCUS_FOLDER, FOCUSED_FILE, Job
from search.left_out import NOTHING
from search.objectives import Goal
from search.run import Facts
from search.stages.learn import evaluate_first
from search.strategies.guided import Guided
from search.strategies.strategy import Round
from search.study import no_scores
from search.training import Distillation, SupernetTraining, train
from search.training.focusing import NearFronts, focusing_epochs, renewals
from search.training.module import Point
from search.workers import WithWeights
from spaces.choice import Architecture
from spaces.errors import UserError
from spaces.files import write_atomically
from spaces.supernet import Supernet


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
    evaluate_first(job)
    settings = job.focus
    strategy = NearFronts(_fronts(job, job.evaluations.of(INITIAL)), settings.near, settings.change)
    epochs = focusing_epochs(job.space, strategy, job.train_images, settings.share * macs, job.seed)
    supernet = copy.deepcopy(job.supernet)

    def on_epoch(done: int, curve: list[Point]) -> None:
        if done in renewals(epochs, settings.rounds):
            strategy.renew(_fronts(job, _evaluated_anew(job, training.result)))
        job.progress.advance("epochs near the fronts", done, epochs)

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
    train(training, job.ready_data, job.path(FOCUS_FOLDER))
    weights = save({name: value.contiguous() for name, value in supernet.state_dict().items()})
    write_atomically(job.path(FOCUSED_FILE), weights)
    job.workforce.renew()
    devices = [goal.name for goal in job.goals]
    fronts = [len(front) for front in strategy.rounds]
    job.progress.say(
        f"  {epochs} epochs near the fronts of {' and '.join(devices)}, predicted {_times(len(fronts))} "
        f"(at last {fronts[-1]} networks); {100 * training.macs_done / macs:.0f} % of the supernet's arithmetic"
    )
    return {
        "epochs": epochs,
        "macs": training.macs_done,
        "devices": devices,
        "fronts": fronts,
        "files": [FOCUSED_FILE],
        "output": hashlib.sha256(weights).hexdigest()[:16],
    }


def _evaluated_anew(job: Job, supernet: Supernet) -> list[Evaluated]:
    """The networks that teach the accuracy predictor, evaluated with weights that are still trained; not kept."""
    chosen = [e.architecture for e in job.evaluations.of(INITIAL)]
    results: dict[int, Evaluation] = {}
    for index, result in job.workforce.pool.each(WithWeights(job.evaluator, supernet), chosen):
        results[index] = result
        job.progress.advance("evaluations", len(results), len(chosen))
    return [Evaluated(a, results[i].accuracy, results[i].loss, INITIAL) for i, a in enumerate(chosen)]


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
