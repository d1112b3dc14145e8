"""Stages `supernet` and `predictors`: shared weights, and predictors that learn from networks evaluated with them."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict
from functools import partial

import numpy as np
import torch
from safetensors.torch import save

from predictors.accuracy import AccuracyPredictor, AccuracyQuality
from predictors.automatic import Automatic, compared_taus
from search.evaluations import INITIAL
from search.job import SUPERNET_FILE, Job
from search.run import Facts
from search.training import SupernetTraining, train
from spaces.choice import Architecture
from spaces.files import write_atomically
from spaces.space import Space
from spaces.supernet import Supernet


def train_supernet(job: Job) -> Facts:
    """Train, from the last checkpoint if there is one; on every process of the training, the first one stores the weights.

    A space without shared weights has no supernet: its networks are trained when they are evaluated.
    """
    if not job.space.shares_weights:
        settings = job.training()
        rungs = ", ".join(map(str, settings.rungs))
        job.progress.say(f"  none: networks of {job.space.name} are trained one by one, and compared after {rungs} epochs")
        return {"epochs": settings.epochs, "steps": 0, "curve": [], "processes": 1}
    torch.manual_seed(job.seed)
    supernet = Supernet(job.space, job.estimators)
    evaluator = job.evaluator

    def on_epoch(done: int, curve: list[dict[str, float]]) -> None:
        job.progress.advance("epochs", done, training.epochs)

    training: SupernetTraining = job.training(supernet=supernet, seed=job.seed, evaluator=evaluator, on_epoch=on_epoch)
    with job.processes.started((*job.worker_command, "stages=[supernet]")):
        train(training, job.ready_data, job.path("supernet"), job.processes)
    if job.processes.rank > 0:
        return {}
    weights = save({name: value.contiguous() for name, value in supernet.state_dict().items()})
    write_atomically(job.path(SUPERNET_FILE), weights)
    output = hashlib.sha256(weights).hexdigest()[:16]
    last = training.curve[-1]
    job.progress.say(
        f"  {training.epochs} epochs; validation accuracy {last.get('validation_accuracy_largest', math.nan):.1%} (largest), "
        f"{last.get('validation_accuracy_smallest', math.nan):.1%} (smallest)"
    )
    facts = {"epochs": training.epochs, "steps": training.steps, "curve": training.curve, "macs": training.macs_done}
    facts |= {"processes": job.processes.count, "files": [SUPERNET_FILE]}
    return {**facts, "output": output}


def fit_predictors(job: Job) -> Facts:
    """Evaluate the first networks; fit and test the predictors."""
    evaluate_first(job)
    seen = job.evaluations.of(INITIAL)
    features = next(iter(job.predicted.values())).features([e.architecture for e in seen])
    predictor, quality = _tested(job, features)
    chosen_of = predictor.compared if isinstance(predictor, Automatic) else {}
    kind = str(predictor.kind) if isinstance(predictor, Automatic) else type(predictor).__name__
    accuracy = {"kind": kind, "compared": chosen_of, "n": len(seen), **asdict(quality)}
    if job.proxies.features:
        job.proxy_scores.save()
        names = list(job.proxies.features)
        without = _tested(job, features[:, : -len(names)])[1].kendall_tau
        accuracy["proxies"] = {"names": names, "kendall_tau_without": without}
    write_atomically(job.path("predictors/accuracy.json"), json.dumps(accuracy, indent=1))
    for name, latency in job.latency.items():
        write_atomically(job.path(f"predictors/latency@{name}.json"), latency.to_json())
    models = {}
    for quantity, fitted in (("peak memory", job.memory), ("energy", job.energy)):
        models[quantity] = {name: asdict(model.quality) for name, model in fitted.items()}
        for name, errors in models[quantity].items():
            job.progress.say(
                f"  {name}: {quantity} on {errors['n']} held-out networks: mean error {errors['mape']:.1%}, "
                f"{errors['coverage']:.0%} in their 90 % interval"
            )
    done = "evaluated" if job.space.shares_weights else "trained"
    job.progress.say(
        f"  {len(seen)} networks {done}; accuracy predictor {kind.replace('_', ' ')}: Kendall tau {quality.kendall_tau:.2f} "
        f"on {quality.n_held_out} held out"
    )
    if job.proxies.features:
        told = f"without the proxies {', '.join(job.proxies.features)} it is {without:.2f}"
        job.progress.say(f"    {told}{'' if quality.kendall_tau > without else ': they do not help'}")
    if chosen_of:
        job.progress.say(f"    chosen by Kendall tau in cross-validation on the others: {compared_taus(chosen_of)}")
    return {"accuracy_predictor": accuracy, "memory_models": models["peak memory"], "energy_models": models["energy"]}


def evaluate_first(job: Job) -> None:
    """Evaluate the networks that teach the accuracy predictor, with the present weights, as far as they are not known."""
    chosen = first_networks(job.space, job.evaluation.initial, job.seed)
    job.evaluations.evaluate(chosen, INITIAL, job.workforce.evaluate, partial(job.progress.advance, "evaluations"))


def first_networks(space: Space, count: int, seed: int) -> list[Architecture]:
    """Networks that teach the accuracy predictor: both ends of a space and random ones of all sizes, or all that there are."""
    rng = np.random.default_rng([seed, 5])
    architectures = dict.fromkeys([space.largest(), space.smallest()])
    while len(architectures) < count:
        before = len(architectures)
        for _ in range(100):
            architectures[space.sample_spread(rng)] = None
        if len(architectures) == before:
            break
    return list(architectures)[:count]


def _tested(job: Job, features: np.ndarray) -> tuple[AccuracyPredictor, AccuracyQuality]:
    """A predictor fitted to the first evaluations but some, and how it ranks those."""
    accuracies = [e.accuracy for e in job.evaluations.of(INITIAL)]
    predictor = job.predictor()
    return predictor, predictor.quality(features, accuracies, min(job.evaluation.held_out, len(accuracies) // 3))
