"""What `strategies_cifar10` measures: networks trained alone, inherited and finished accuracy, latency of the fronts.

All accuracies are of test images that no search has seen. The networks that are trained alone are the same for all strategies
and were drawn before any of them: spread over the sizes of the space. They are trained as supernets are (optimizer, schedule,
augmentation), on the labels, with the best of several learning rates, and for as many epochs as the plain sandwich rule.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from rich.console import Console

from latency_lut.command import CONFIG_FOLDER
from latency_lut.session import build_random, retime
from search.building import build_job
from search.evaluation import Evaluator, Split
from search.evaluations import INITIAL, RANDOM, Evaluated
from search.fronts import evaluated_front
from search.heap import keep_freed_memory
from search.job import Job
from search.overrides import plain_settings
from search.progress import StageProgress
from search.stages.relax import relaxed_architectures
from search.training import train
from search.training.finishing import RememberingTeacher, architecture_key, finish_network, finishing_epochs
from search.training.parallel import Processes
from search.training.strategy import Losses, Step, Strategy
from search.winners import pick, uniform
from spaces.choice import Architecture
from spaces.files import write_atomically
from spaces.precision import FLOAT
from spaces.space import Space
from spaces.supernet import Supernet

DEFAULT = "sandwich"
PLAIN = "bignas"  # the sandwich rule in every step, as published; its epochs are what other strategies' are made equal to
TRAINING = ("sandwich", "bignas", "sorted", "progressive", "uniform")
GRADIENT = ("tangle", "proxyless", "dass", "quantnas", "once_for_both")
SEARCHING = ("upper_confidence", "reinforce", "training_free")  # in the default's supernet, beside its own study
INT8 = "uniform_int8"  # trained and searched as the default is, in the space's dense networks with int8 everywhere
ALL = (*TRAINING, INT8, *SEARCHING, *GRADIENT)
DRY_STEPS = 64
ALONE_PARTS = 2  # processes that share the networks trained alone
POOL = 10  # networks drawn for each that is trained alone
MACS_PER_TRAINING = 3  # forward, and backward to activations and weights


class Alone(Strategy):
    """Every step trains the same network on the labels."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture

    def backward(self, step: Step) -> Losses:
        step.supernet.start_step(1, 1)  # masks and grids are those that ship
        return {"network": step.on_labels(self.architecture, smoothing=step.smoothing)[0]}


@dataclass(frozen=True)
class Bench:
    """The settings of `strategies_cifar10.yaml`, and the folder `work` that keeps results."""

    work: str
    setting: str
    data: str
    rows: int | None
    test_images: int
    epochs: int
    lengths: Sequence[float]
    networks: int
    learning_rate: float
    supernet_learning_rate: float
    members: Sequence[float]
    member_epochs: int
    timed: int
    seed: int
    jobs: int
    threads: int | None
    search: Sequence[str]

    # -- runs of `python -m search` -------------------------------------------------------------------------------------------

    def base_overrides(self, strategy: str) -> list[str]:
        """Settings of `python -m search` for a strategy's space, data and kind of training."""
        return [
            "data=parquet",
            f"data.path={self.data}/train.parquet",
            f"data.test_path={self.data}/test.parquet",
            f"data.limit={'null' if self.rows is None else self.rows}",
            "data.resolutions=[32]",
            "device=[x86]",
            *own_overrides(strategy),
            f"supernet.learning_rate={self.supernet_learning_rate}",
            f"seed={self.seed}",
            f"threads={'null' if self.threads is None else self.threads}",
        ]

    def overrides(self, strategy: str) -> list[str]:
        """All settings for a strategy; `sandwich@0.5` trains for half of the epochs."""
        name, _, length = strategy.partition("@")
        epochs = self.epochs_of(supernet_of(name), float(length or 1.0))
        given = [*self.base_overrides(name), f"supernet.epochs={epochs}"]
        if name in GRADIENT:
            given += [f"relaxation={name}", f"relaxation.epochs={self.member_epochs}"]
            given += [f"relaxation.cost_weights=[{','.join(map(str, self.members))}]"]
        first, later = self.evaluations
        given += [f"evaluation.initial={first}", f"evaluation.held_out={first // 4}", f"study.evaluations={later}"]
        return [*given, "study.rounds=2", "study.candidates=2000", *self.search]

    def search_command(self, strategy: str, stages: Sequence[str]) -> list[str]:
        """Do stages of a strategy's run; what runs have in common is done once."""
        given = [f"run={self.run(strategy)}", f"share={self.work}/shared", f"stages=[{','.join(stages)}]"]
        return [sys.executable, "-m", "search", *given, *self.overrides(strategy)]

    def run(self, strategy: str) -> Path:
        return Path(self.work) / "runs" / strategy

    def job(self, strategy: str) -> Job:
        """A strategy's run with everything in it."""
        return _job(self.overrides(strategy), self.run(strategy))

    # -- equal arithmetic -----------------------------------------------------------------------------------------------------

    @cached_property
    def plan(self) -> Mapping[str, Any]:
        """What `arithmetic` counted."""
        plan: dict[str, Any] = json.loads((Path(self.work) / "plan.json").read_text())
        return plan

    def epochs_of(self, strategy: str, length: float = 1.0) -> int:
        """Epochs of a training strategy that take the arithmetic of `epochs` of the plain sandwich rule."""
        per_image = self.plan["macs_per_image"]
        return max(1, round(self.epochs * length * float(per_image[PLAIN] / per_image[strategy])))

    @property
    def evaluations(self) -> tuple[int, int]:
        """Networks evaluated at first and in each of two rounds, for the arithmetic of a gradient strategy's whole family."""
        family = len(self.members) * self.member_epochs * self.plan["images"]["train"] * self.plan["macs"]["largest"]
        each = (self.plan["images"]["val"] + self.plan["images"]["calibration"]) * self.plan["macs"]["mean"]
        count = round(MACS_PER_TRAINING * family / each)
        return max(12, count // 2), max(2, count // 4)

    def alone_epochs(self, length: str, share: float) -> int:
        """Passes of a network trained alone.

        Args:
            length: a share of `epochs`, or `equal`: the networks together take the arithmetic of a
                supernet of which as many networks are finished.
            share: of the supernet's arithmetic for each that is finished.
        """
        if length != "equal":
            return self.epochs_of(PLAIN, float(length))
        total: float = self.epochs * self.plan["macs_per_image"][PLAIN] * (1.0 + self.networks * share)
        return max(1, round(total / float(MACS_PER_TRAINING * self.plan["macs"]["networks"])))

    # -- phases ---------------------------------------------------------------------------------------------------------------

    def cost_path(self, phase: str) -> Path:
        return Path(self.work) / "costs" / f"{phase.replace(':', '-')}.json"

    def result_path(self, name: str) -> Path:
        return Path(self.work) / "results" / f"{name}.json"

    def run_phase(self, phase: str) -> None:
        """Do a phase in this process; what it did before it was killed is not done again."""
        kind, _, rest = phase.partition(":")
        keep_freed_memory()
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        if kind == "alone":
            length, part = rest.split(":")
            self._alone(length, int(part))
        elif kind == "judge":
            self._judge(rest)
        else:
            self._time(rest.split("+"))

    def _alone(self, length: str, part: int) -> None:
        job, parts = self.job(DEFAULT), ALONE_PARTS
        evaluator, epochs = self.evaluator(job), self.alone_epochs(length, job.finish.share)
        for index, a in list(enumerate(reference_networks(job.space, self.networks, self.seed)))[part::parts]:
            self._known(f"alone-{length}-{index}", partial(self._train_alone, job, evaluator, a, epochs, length))

    def _train_alone(self, job: Job, evaluator: Evaluator, architecture: Architecture, epochs: int, length: str) -> Any:
        torch.manual_seed(self.seed)
        supernet = Supernet(job.space, job.estimators)
        given = {"learning_rate": self.learning_rate, "epochs": epochs, "curve_points": 0}
        training = job.training(supernet=supernet, strategy=Alone(architecture), seed=self.seed, evaluator=evaluator, **given)
        train(training, job.ready_data, Path(self.work) / "alone" / length / architecture_key(architecture))
        return {"accuracy": evaluator.evaluate(supernet, architecture).accuracy, "macs": training.macs_done, "epochs": epochs}

    def _judge(self, strategy: str) -> None:
        """Accuracy of the networks with the supernet's weights, and after finishing where the supernet had its full length."""
        job = self.job(strategy)
        evaluator, supernet = self.evaluator(job), job.supernet
        share = job.finish.share * self.epochs * self.plan["macs_per_image"][PLAIN] * job.train_images
        teacher = RememberingTeacher(evaluator.plain(supernet, job.space.largest()))

        def inherited(a: Architecture) -> Any:
            return {"accuracy": evaluator.evaluate(supernet, a).accuracy}

        def finished(a: Architecture) -> Any:
            epochs = finishing_epochs(job.space, a, job.train_images, share, self.networks)
            folder = Path(self.work) / "finished" / strategy / architecture_key(a)
            own = finish_network(supernet, a, teacher, evaluator, job.ready_data, epochs, job.finish, self.seed, folder)
            return {"accuracy": evaluator.evaluate(own, a).accuracy, "macs": own.macs_done, "epochs": epochs}

        for index, a in enumerate(reference_networks(job.space, self.networks, self.seed)):
            self._known(f"inherited-{strategy}-{index}", partial(inherited, a))
            if "@" not in strategy:
                self._known(f"finished-{strategy}-{index}", partial(finished, a))

    def _time(self, strategies: Sequence[str]) -> None:
        """Latency and test accuracy of the networks on each front, timed together."""
        rows: list[dict[str, Any]] = []
        networks = []
        for strategy in strategies:
            job = self.job(strategy)
            evaluator = self.evaluator(job)
            for source, front in self.fronts(job, strategy).items():
                for a in front:
                    rows.append({"strategy": source, "accuracy": evaluator.evaluate(job.supernet, a).accuracy})
                    networks.append((job, a))
        job = self.job(DEFAULT)
        networks.append((job, uniform(job.space, job.space.largest(), FLOAT)))
        device, rng, models = job.devices["x86"], np.random.default_rng(self.seed), []
        for own, a in networks:
            network = own.space.network(a)
            models.append(build_random(network, own.latency["x86"].plan(network), rng, device))
        timings, speed = retime(models, job.space, job.table(device), device)
        for row, timing in zip(rows, timings[:-1], strict=True):
            row["us"] = timing.us
        result = {"rows": rows, "largest_us": timings[-1].us, "speed": speed, "device": device.describe()}
        write_atomically(self.result_path("timing"), json.dumps(result))

    def fronts(self, job: Job, strategy: str) -> dict[str, list[Architecture]]:
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
        return [c.architecture for c in pick(front, [], goal.objectives, self.timed)]

    def evaluator(self, job: Job) -> Evaluator:
        """Recalibrates as the run does, and measures on test images."""
        split = Split(job.test.images[: self.test_images], job.test.labels[: self.test_images])
        return Evaluator(job.evaluator.calibration, split)

    def _known(self, name: str, make: Callable[[], Any]) -> None:
        path = self.result_path(name)
        if not path.exists():
            write_atomically(path, json.dumps(make()))


def supernet_of(strategy: str) -> str:
    """The strategy whose supernet it searches in: its own, if it trains one."""
    return strategy if strategy in (*TRAINING, INT8) else DEFAULT


def own_overrides(strategy: str) -> list[str]:
    """What is a strategy's own in the settings of `python -m search`: space, supernet and study."""
    if strategy == PLAIN:
        published = ("strategy.every=1", "strategy.random_networks=2", "distillation.labels=0.0")
        return ["supernet=sandwich", *(f"supernet.{setting}" for setting in published)]
    if strategy == INT8:
        return ["supernet=sandwich", "space.precisions=[w8a8]", "space.sparsities=[dense]"]
    given = [f"supernet={supernet_of(strategy)}"]
    if strategy == "upper_confidence":
        given.append("study.strategy.choose=upper_confidence")
    elif strategy in SEARCHING:
        given.append(f"study={strategy}")
    return given


def reference_networks(space: Space, count: int, seed: int) -> list[Architecture]:
    """Networks spread evenly over the sizes that random ones have, by multiply-accumulates."""
    rng = np.random.default_rng([seed, 101])
    drawn = sorted({space.sample_spread(rng) for _ in range(POOL * count)}, key=lambda a: (space.network(a).macs, a.to_json()))
    return [drawn[round((i + 0.5) * len(drawn) / count - 0.5)] for i in range(count)]


def arithmetic(bench: Bench) -> None:
    """Count what each training strategy computes for an image, in a dry run of a few steps from beginning to end."""
    path = Path(bench.work) / "plan.json"
    if path.exists():
        return
    counting = Path(bench.work) / "counting"
    jobs = {strategy: _job([*bench.base_overrides(strategy), *bench.search], counting) for strategy in (*TRAINING, INT8)}
    job = jobs[DEFAULT]
    space, rng = job.space, np.random.default_rng(bench.seed)
    chosen = reference_networks(space, bench.networks, bench.seed)
    plan = {
        "macs_per_image": {strategy: _macs_per_image(own, bench.seed) for strategy, own in jobs.items()},
        "images": {
            "train": job.train_images,
            "val": len(job.validation.labels),
            "calibration": job.evaluation.calibration_images,
        },
        "macs": {
            "largest": space.network(space.largest()).macs,
            "mean": float(np.mean([space.network(space.sample(rng)).macs for _ in range(200)])),
            "networks": sum(space.network(a).macs for a in chosen),
        },
    }
    write_atomically(path, json.dumps(plan, indent=1))


def _macs_per_image(job: Job, seed: int) -> float:
    supernet = Supernet(job.space, job.estimators)
    training = job.training(supernet=supernet, seed=seed, evaluator=job.evaluator)
    images, labels = (values[:2] for values in next(iter(job.ready_data.train_dataloader())))
    for index in range(DRY_STEPS):
        training.strategy.backward(
            Step(
                supernet=supernet,
                images=images,
                labels=labels,
                index=index,
                steps=DRY_STEPS,
                rng=np.random.default_rng([seed, index]),
                distillation=training.distillation,
                smoothing=0.0,
                backward=lambda loss: None,
            )
        )
    return supernet.macs_done / (DRY_STEPS * len(labels))


def _job(overrides: Sequence[str], run: Path) -> Job:
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        config = compose("search", list(overrides))
    progress = StageProgress(Console(quiet=True))
    return build_job(config, plain_settings(config), run, progress, Processes(), ())
