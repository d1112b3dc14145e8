"""What `strategies_cifar10` measures: networks trained alone, inherited and finished accuracy, latency of the fronts.

All accuracies are of test images that no search has seen. The networks that are trained alone are the same for all strategies
and were drawn before any of them: spread over the sizes of the space. They are trained as supernets are (optimizer, schedule,
augmentation), on the labels, with the best of several learning rates, and for as many epochs as the plain sandwich rule.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.strategies_bench import DEFAULT, GRADIENT, PLAIN, Bench
from latency_lut.session import build_random, retime
from search.evaluation import Evaluator, Split
from search.evaluations import INITIAL, RANDOM, Evaluated
from search.fronts import evaluated_front
from search.heap import keep_freed_memory
from search.job import Job
from search.stages.relax import relaxed_architectures
from search.training import train
from search.training.finishing import RememberingTeacher, architecture_key, finish_network, finishing_epochs
from search.training.strategy import Losses, Step, Strategy
from search.winners import pick, uniform
from spaces.choice import Architecture
from spaces.files import write_atomically
from spaces.precision import FLOAT
from spaces.supernet import Supernet

ALONE_PARTS = 2  # processes that share the networks trained alone


class Alone(Strategy):
    """Every step trains the same network on the labels."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture

    def backward(self, step: Step) -> Losses:
        step.supernet.start_step(1, 1)  # masks and grids are those that ship
        return {"network": step.on_labels(self.architecture, smoothing=step.smoothing)[0]}


@dataclass(frozen=True)
class Phases:
    """Does the phases of a benchmark's settings."""

    bench: Bench

    def run(self, phase: str) -> None:
        """Do a phase in this process; what it did before it was killed is not done again."""
        kind, _, rest = phase.partition(":")
        keep_freed_memory()
        if self.bench.threads is not None:
            torch.set_num_threads(self.bench.threads)
        if kind == "alone":
            name, part = rest.split(":")
            self._alone(name, int(part))
        elif kind == "judge":
            self._judge(rest)
        elif kind == "front":
            self._finish_front(rest)
        else:
            self._time(rest.split("+"))

    def _alone(self, name: str, part: int) -> None:
        job = self.bench.job(DEFAULT)
        evaluator, networks = self._evaluator(job), list(enumerate(self.bench.reference_networks(job.space)))
        for index, a in networks[part::ALONE_PARTS]:
            self._known(f"alone-{name}-{index}", partial(self._train_alone, job, evaluator, a, name))

    def _train_alone(self, job: Job, evaluator: Evaluator, architecture: Architecture, name: str) -> Any:
        bench = self.bench
        length, seed = bench.alone[name]
        epochs = bench.alone_epochs(length, job.finish.share)
        torch.manual_seed(seed)
        supernet = Supernet(job.space, job.estimators)
        given = {"learning_rate": bench.learning_rate, "epochs": epochs, "curve_points": 0}
        training = job.training(supernet=supernet, strategy=Alone(architecture), seed=seed, evaluator=evaluator, **given)
        train(
            training, job.ready_data, Path(bench.work) / "alone" / name / architecture_key(architecture), job.processes.single
        )
        return {"accuracy": evaluator.evaluate(supernet, architecture).accuracy, "macs": training.macs_done, "epochs": epochs}

    def _judge(self, strategy: str) -> None:
        """Accuracy of the networks with the supernet's weights, and after finishing where the supernet had its full length."""
        job = self.bench.job(strategy)
        evaluator, supernet = self._evaluator(job), job.supernet
        teacher = RememberingTeacher(evaluator.plain(supernet, job.space.largest()))

        def inherited(a: Architecture) -> Any:
            return {"accuracy": evaluator.evaluate(supernet, a).accuracy}

        for index, a in enumerate(self.bench.reference_networks(job.space)):
            self._known(f"inherited-{strategy}-{index}", partial(inherited, a))
            if "@" not in strategy:
                finished = partial(self._finished, strategy, job, evaluator, teacher, a, self.bench.networks)
                self._known(f"finished-{strategy}-{index}", finished)

    def _finished(
        self, strategy: str, job: Job, evaluator: Evaluator, teacher: RememberingTeacher, a: Architecture, networks: int
    ) -> Any:
        """One network of so many, trained further for its share of the arithmetic that all supernets had."""
        bench = self.bench
        share = job.finish.share * bench.epochs * bench.plan["macs_per_image"][PLAIN] * job.train_images
        epochs = finishing_epochs(job.space, a, job.train_images, share, networks)
        folder = Path(bench.work) / "finished" / strategy / architecture_key(a)
        parts = (job.supernet, a, teacher, evaluator, job.ready_data, epochs, job.finish, bench.seed, folder)
        own = finish_network(*parts, processes=job.processes.single)
        return {"accuracy": evaluator.evaluate(own, a).accuracy, "macs": own.macs_done, "epochs": epochs}

    def _finish_front(self, strategy: str) -> None:
        """The networks on a strategy's own front after finishing."""
        job = self.bench.job(strategy)
        evaluator = self._evaluator(job)
        teacher = RememberingTeacher(evaluator.plain(job.supernet, job.space.largest()))
        front = self._fronts(job, strategy)[strategy]
        for a in front:
            finished = partial(self._finished, strategy, job, evaluator, teacher, a, len(front))
            self._known(front_name(strategy, a), finished)

    def _time(self, strategies: Sequence[str]) -> None:
        """Latency and test accuracy of the networks on each front, timed together."""
        bench = self.bench
        rows: list[dict[str, Any]] = []
        networks = []
        for strategy in strategies:
            job = bench.job(strategy)
            evaluator = self._evaluator(job)
            for source, front in self._fronts(job, strategy).items():
                for a in front:
                    finished = bench.result_path(front_name(source, a))
                    row = {"strategy": source, "accuracy": evaluator.evaluate(job.supernet, a).accuracy}
                    row["finished"] = json.loads(finished.read_text())["accuracy"] if finished.exists() else None
                    rows.append(row)
                    networks.append((job, a))
        job = bench.job(DEFAULT)
        networks.append((job, uniform(job.space, job.space.largest(), FLOAT)))
        device, rng, models = job.devices["x86"], np.random.default_rng(bench.seed), []
        for own, a in networks:
            network = own.space.network(a)
            models.append(build_random(network, own.latency["x86"].plan(network), rng, device))
        timings, speed = retime(models, job.space, job.table(device), device)
        for row, timing in zip(rows, timings[:-1], strict=True):
            row["us"] = timing.us
        result = {"rows": rows, "largest_us": timings[-1].us, "speed": speed, "device": device.describe()}
        write_atomically(bench.result_path("timing"), json.dumps(result))

    def _fronts(self, job: Job, strategy: str) -> dict[str, list[Architecture]]:
        """The front that a strategy found by validation accuracy and predicted latency; random search with the default."""
        everything = list(job.evaluations)
        if strategy in GRADIENT:
            found = set(relaxed_architectures(job)[1])
            sources = {strategy: [e for e in everything if e.architecture in found]}
        else:
            sources = {strategy: [e for e in everything if e.source != RANDOM]}
        if strategy == DEFAULT:
            sources["random"] = [e for e in everything if e.source in (INITIAL, RANDOM)]
        return {name: self._front(job, evaluated) for name, evaluated in sources.items()}

    def _front(self, job: Job, evaluated: Sequence[Evaluated]) -> list[Architecture]:
        goal = job.goals[0]
        front = evaluated_front(evaluated, job.predicted[goal], goal.objectives, goal.constraints)
        return [c.architecture for c in pick(front, [], goal.objectives, self.bench.timed)]

    def _evaluator(self, job: Job) -> Evaluator:
        """Recalibrates as the run does, and measures on test images."""
        count = self.bench.test_images
        return Evaluator(job.evaluator.calibration, Split(job.test.images[:count], job.test.labels[:count]))

    def _known(self, name: str, make: Callable[[], Any]) -> None:
        path = self.bench.result_path(name)
        if not path.exists():
            write_atomically(path, json.dumps(make()))


def front_name(strategy: str, architecture: Architecture) -> str:
    """Of the result of a network on a strategy's front."""
    return f"front-{strategy}-{architecture_key(architecture)}"
