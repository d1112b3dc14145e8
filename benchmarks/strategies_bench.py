"""The settings of `strategies_cifar10`: runs of `python -m search` for each strategy, with equal arithmetic."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir
from rich.console import Console

from latency_lut.command import CONFIG_FOLDER
from search.building import build_job
from search.job import Job
from search.overrides import plain_settings
from search.progress import StageProgress
from search.run import Run
from search.training.focusing import MACS_PER_TRAINING
from search.training.parallel import Processes
from search.training.strategy import Step
from spaces.choice import Architecture
from spaces.files import write_atomically
from spaces.space import Space
from spaces.supernet import Supernet

DEFAULT = "focused"  # single paths, then near the fronts that predictors expect
PLAIN = "bignas"  # the sandwich rule in every step, as published; its epochs are what other strategies' are made equal to
TRAINING = (DEFAULT, "single_path", "uniform", "sandwich", "bignas", "sorted", "progressive")
GRADIENT = ("tangle", "proxyless", "dass", "quantnas", "once_for_both")
SEARCHING = ("upper_confidence", "reinforce", "training_free")  # in the default's supernet, beside its own study
INT8 = "uniform_int8"  # trained and searched as the default is, in the space's dense networks with int8 everywhere
FOCUSED = (DEFAULT, INT8)
FOCUS_SHARE = 3.0  # arithmetic near the fronts, about, as a share of that of the single paths before
ALL = (*TRAINING, INT8, *SEARCHING, *GRADIENT)
DRY_STEPS = 64
POOL = 10  # networks drawn for each that is trained alone


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
    alone_seeds: int
    learning_rate: float
    supernet_learning_rates: Mapping[str, float]
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
            f"supernet.learning_rate={self.supernet_learning_rates[supernet_of(strategy)]}",
            f"seed={self.seed}",
            f"threads={'null' if self.threads is None else self.threads}",
        ]

    def overrides(self, strategy: str) -> list[str]:
        """All settings for a strategy; `sandwich@0.5` trains for half of the epochs."""
        name, _, length = strategy.partition("@")
        supernet = supernet_of(name)
        epochs = self.epochs_of(supernet, float(length or 1.0) / (1.0 + FOCUS_SHARE if supernet in FOCUSED else 1.0))
        given = [*self.base_overrides(name), f"supernet.epochs={epochs}"]
        if supernet in FOCUSED:
            given.append(f"focus.share={self.focus_share(supernet, length, epochs):.4f}")
        if name in GRADIENT:
            given += [f"relaxation={name}", f"relaxation.epochs={self.member_epochs}"]
            given += [f"relaxation.cost_weights=[{','.join(map(str, self.members))}]"]
        first, later = self.evaluations
        given += [f"evaluation.initial={first}", f"evaluation.held_out={first // 4}", f"study.evaluations={later}"]
        candidates = 400 if name == "training_free" else 2000  # each takes it nine passes, and a predictor hardly anything
        return [*given, "study.rounds=2", f"study.candidates={candidates}", *self.search]

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

    def focus_share(self, supernet: str, length: str, epochs: int) -> float:
        """What a supernet leaves of the arithmetic, as a share of what it took, or of what it will take."""
        per_image, images = self.plan["macs_per_image"], self.plan["images"]["train"]
        total = self.epochs * float(length or 1.0) * per_image[PLAIN] * images
        facts = Run(self.run(f"{supernet}@{length}" if length else supernet)).facts("supernet")
        taken = facts.get("macs", epochs * per_image[supernet] * images)
        return float(max(0.0, total / taken - 1.0))

    @property
    def evaluations(self) -> tuple[int, int]:
        """Networks evaluated at first and in each of two rounds, for the arithmetic of a gradient strategy's whole family."""
        family = len(self.members) * self.member_epochs * self.plan["images"]["train"] * self.plan["macs"]["largest"]
        each = (self.plan["images"]["val"] + self.plan["images"]["calibration"]) * self.plan["macs"]["mean"]
        count = round(MACS_PER_TRAINING * family / each)
        return max(12, count // 2), max(2, count // 4)

    @property
    def alone(self) -> dict[str, tuple[str, int]]:
        """Trainings of each network alone: length and seed by name."""
        full = {f"1.0~{number}" if number else "1.0": ("1.0", self.seed + number) for number in range(self.alone_seeds)}
        return full | {str(length): (str(length), self.seed) for length in ("equal", *self.lengths)}

    def alone_epochs(self, length: str, share: float) -> int:
        """Passes of a network trained alone.

        Args:
            length: a share of `epochs`, or `equal`: the networks together take at least the arithmetic
                of a supernet of which as many networks are finished.
            share: of the supernet's arithmetic for each that is finished.
        """
        if length != "equal":
            return self.epochs_of(PLAIN, float(length))
        total: float = self.epochs * self.plan["macs_per_image"][PLAIN] * (1.0 + self.networks * share)
        return max(1, math.ceil(total / float(MACS_PER_TRAINING * self.plan["macs"]["networks"])))

    def reference_networks(self, space: Space) -> list[Architecture]:
        """Networks spread evenly over the sizes that random ones have, by multiply-accumulates."""
        rng, count = np.random.default_rng([self.seed, 101]), self.networks
        found = {space.sample_spread(rng) for _ in range(POOL * count)}
        drawn = sorted(found, key=lambda a: (space.network(a).macs, a.to_json()))
        return [drawn[round((i + 0.5) * len(drawn) / count - 0.5)] for i in range(count)]

    # -- where results are ----------------------------------------------------------------------------------------------------

    def cost_path(self, phase: str) -> Path:
        return Path(self.work) / "costs" / f"{phase.replace(':', '-')}.json"

    def result_path(self, name: str) -> Path:
        return Path(self.work) / "results" / f"{name}.json"


def supernet_of(strategy: str) -> str:
    """The strategy whose supernet it searches in: its own, if it trains one."""
    return strategy if strategy in (*TRAINING, INT8) else DEFAULT


def is_focused(strategy: str) -> bool:
    """Whether the weights that it searches are trained further near predicted fronts."""
    return supernet_of(strategy.partition("@")[0]) in FOCUSED


def training_stages(strategy: str) -> list[str]:
    """The stages of a run that make the weights which are searched."""
    return ["space", "tables", "supernet", *(("predictors", "focus") if is_focused(strategy) else ())]


def own_overrides(strategy: str) -> list[str]:
    """What is a strategy's own in the settings of `python -m search`: space, supernet and study."""
    if strategy == PLAIN:
        published = ("every=1", "random_networks=2", "spread=false")
        return ["supernet=sandwich", "supernet.distillation.labels=0.0", *(f"supernet.strategy.{p}" for p in published)]
    if strategy == INT8:
        return ["supernet=single_path", "space.precisions=[w7a8]", "space.sparsities=[dense]"]
    supernet = supernet_of(strategy)
    given = ["supernet=single_path" if supernet == DEFAULT else f"supernet={supernet}"]
    if strategy == "upper_confidence":
        given.append("study.strategy.choose=upper_confidence")
    elif strategy in SEARCHING:
        given.append(f"study={strategy}")
    return given


def arithmetic(bench: Bench) -> None:
    """Count what each training strategy computes for an image, in a dry run of a few steps from beginning to end."""
    path = Path(bench.work) / "plan.json"
    if path.exists():
        return
    counting = Path(bench.work) / "counting"
    jobs = {strategy: _job([*bench.base_overrides(strategy), *bench.search], counting) for strategy in (*TRAINING, INT8)}
    job = jobs[DEFAULT]
    space, rng = job.space, np.random.default_rng(bench.seed)
    chosen = bench.reference_networks(space)
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
