"""What a job is made of: the parts that its configuration names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
from optuna.samplers import BaseSampler

from latency_lut.device import Device
from predictors.accuracy import AccuracyPredictor
from search.objectives import Goal
from search.pool import Pool
from search.progress import StageProgress
from search.proxies import ProxySettings
from search.relaxation import RelaxationSettings
from search.run import Run
from search.settings import EvaluationSettings, ExportSettings, ProfileSettings
from search.strategies import SearchStrategy
from search.study import StudySettings
from search.training.finishing import FinishSettings
from search.training.focusing import FocusSettings
from search.training.parallel import Processes
from spaces.space import Space
from spaces.weights import Estimators


@dataclass
class Configured:
    """Everything that the configuration of a job names, made; nothing is computed, read or measured yet.

    Args:
        run: the folder.
        space: what can be built.
        devices: targets by name.
        data: images.
        channels: of the images.
        classes: number of labels.
        goals: what each study looks for.
        seed: of everything that is drawn.
        estimators: how sparse and quantized weights are trained.
        training: makes the supernet's training from `(supernet, seed, evaluator, on_epoch)`; for a space without shared weights
            the `AloneSettings` of its networks, from nothing.
        predictor: makes an accuracy predictor.
        sampler: makes an Optuna sampler from a seed.
        new_pool: makes those who evaluate networks and train single ones, from what tells a line.
        storage: database of a study that several processes share; `None` for none.
        profile: how tables are measured.
        evaluation: how networks are evaluated.
        proxies: zero-cost proxies beside the accuracy predictor's own features.
        strategy: makes what searches.
        study: how the search goes.
        processes: on what the supernet is trained.
        worker_command: arguments of `python -m search`, but for the stage, with which further processes join a training.
        focus: how the supernet is focused, where it is.
        finish: how winners are finished, where they are.
        relaxation: how a gradient search goes, where there is one.
        export: what is exported.
        settings: the configuration of each part as plain values, for fingerprints.
        progress: where progress is shown.
    """

    run: Run
    space: Space
    devices: Mapping[str, Device]
    data: pl.LightningDataModule
    channels: int
    classes: int
    goals: Sequence[Goal]
    seed: int
    estimators: Estimators
    training: Callable[..., Any]
    predictor: Callable[[], AccuracyPredictor]
    sampler: Callable[[int], BaseSampler]
    new_pool: Callable[..., Pool]
    storage: str | None
    profile: ProfileSettings
    evaluation: EvaluationSettings
    proxies: ProxySettings
    strategy: Callable[[], SearchStrategy]
    study: StudySettings
    processes: Processes
    worker_command: Sequence[str]
    focus: FocusSettings
    finish: FinishSettings
    relaxation: RelaxationSettings
    export: ExportSettings
    settings: Mapping[str, Any]
    progress: StageProgress
