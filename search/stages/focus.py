"""Stage `focus`: the supernet trained further near the fronts that the predictors expect, before the study."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace
from functools import partial

from safetensors.torch import save

from search.evaluations import INITIAL
from search.fronts import choose
from search.job import FOCUS_FOLDER, FOCUSED_FILE, Job
from search.left_out import NOTHING
from search.objectives import Goal
from search.run import Facts
from search.stages.learn import evaluate_first
from search.strategies.guided import Guided
from search.strategies.strategy import Round
from search.study import no_scores
from search.training import Distillation, train
from search.training.focusing import NearFronts, focusing_epochs
from spaces.choice import Architecture
from spaces.errors import UserError
from spaces.files import write_atomically


def focus_supernet(job: Job) -> Facts:
    """Predict a front for each goal, and train a copy of the supernet on networks like those on them."""
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
    fronts = {goal.name: _front(job, goal) for goal in job.goals}
    settings = job.focus
    strategy = NearFronts(list(dict.fromkeys(a for front in fronts.values() for a in front)), settings.near, settings.change)
    epochs = focusing_epochs(job.space, strategy, job.train_images, settings.share * macs, job.seed)
    supernet = copy.deepcopy(job.supernet)
    training = job.training(
        supernet=supernet,
        strategy=strategy,
        seed=job.seed,
        evaluator=job.evaluator,
        epochs=epochs,
        learning_rate=settings.learning_rate,
        distillation=Distillation(),
        zero_init_residual=False,
        curve_points=1,
        on_epoch=lambda done, curve: job.progress.advance("epochs near the fronts", done, epochs),
    )
    train(training, job.ready_data, job.path(FOCUS_FOLDER))
    weights = save({name: value.contiguous() for name, value in supernet.state_dict().items()})
    write_atomically(job.path(FOCUSED_FILE), weights)
    job.workforce.renew()
    found = ", ".join(f"{len(front)} networks of {name}" for name, front in fronts.items())
    job.progress.say(f"  {epochs} epochs near {found}; {100 * training.macs_done / macs:.0f} % of the supernet's arithmetic")
    return {
        "epochs": epochs,
        "macs": training.macs_done,
        "fronts": {name: len(front) for name, front in fronts.items()},
        "files": [FOCUSED_FILE],
        "output": hashlib.sha256(weights).hexdigest()[:16],
    }


def _front(job: Job, goal: Goal) -> list[Architecture]:
    """The predicted front of a goal's objectives, from networks evaluated with the supernet as it was trained.

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
        seen=job.evaluations.of(INITIAL),
        left_out=NOTHING,  # it depends on the constraints, and what does not pay is on no front
        new_predictor=job.chosen_predictor,
        new_sampler=partial(job.sampler, job.seed),
        scores=no_scores,
        measured=lambda architectures: [],
        on_progress=job.progress.advance,
    )
    return choose(Guided().search(round_), goal.objectives, job.focus.networks)
