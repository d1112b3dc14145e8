"""From a configuration to a `Job`: here, and only here, configuration objects become plain arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from optuna.samplers import BaseSampler
from pytorch_lightning import LightningDataModule

from latency_lut.energy import meter_of
from latency_lut.memory import check_measures_memory
from search.elsewhere import check_searchable
from search.job import Job
from search.objectives import devices_of, goals_of, parse_constraint, parse_objectives
from search.progress import StageProgress
from search.proxies import ProxySettings
from search.relaxation import RelaxationSettings, check_strategy
from search.run import Run
from search.settings import EvaluationSettings, ExportSettings, ProfileSettings
from search.shared_study import checked_url
from search.strategies import SearchStrategy
from search.study import StudySettings
from search.training import Distillation, Strategy
from search.training.alone import AloneSettings
from search.training.finishing import FinishSettings
from search.training.focusing import FocusSettings
from search.training.parallel import Processes
from spaces.entangled import Entangled, check_held
from spaces.errors import UserError
from spaces.space import Space
from spaces.supernet import Supernet, check_estimators
from spaces.weights import Estimators


def build_job(
    config: DictConfig,
    settings: dict[str, Any],
    path: Path,
    progress: StageProgress,
    processes: Processes,
    worker_command: Sequence[str],
) -> Job:
    """Everything that the configuration names, made.

    Raises:
        UserError: something is not as it has to be.
    """
    if not config.get("devices"):
        raise UserError("no device; give one, for example device=x86")
    space = instantiate(config.space, _convert_="all")
    devices = {str(name): instantiate(entry) for name, entry in config.devices.items()}
    for name, device in devices.items():
        if device.name != name:
            raise UserError(f"devices.{name}.name is {device.name!r}; allowed is {name}, or another entry under devices")
    data = instantiate(config.data.module, _convert_="all")
    if not isinstance(data, LightningDataModule):
        raise UserError(f"data.module is a {type(data).__name__}; allowed is a LightningDataModule")
    profile, evaluation, study = config.profile, config.evaluation, config.study
    positive = {
        "study.candidates": study.candidates,
        "study.rounds": study.rounds,
        "study.evaluations": study.evaluations,
        "evaluation.initial": evaluation.initial,
        "evaluation.held_out": evaluation.held_out,
        "evaluation.calibration_images": evaluation.calibration_images,
        "supernet.epochs": config.supernet.get("epochs", 1),
        "profile.max_pairs": profile.max_pairs,
        "profile.networks": profile.networks,
        "profile.rounds": profile.rounds,
        "export.winners": config.export.winners,
    }
    for name, value in positive.items():
        if type(value) is not int or value < 1:
            raise UserError(f"{name} is {value!r}; allowed are integers from 1")
    leave_out = study.get("leave_out_what_does_not_pay", True)
    if type(leave_out) is not bool:
        raise UserError(f"study.leave_out_what_does_not_pay is {leave_out!r}; allowed are true and false")
    if type(config.seed) is not int or not 0 <= config.seed < 2**31:
        raise UserError(f"seed is {config.seed!r}; allowed are integers from 0 to {2**31 - 1}")
    storage = study.get("storage")
    if storage is not None:
        checked_url(str(storage))
        if HydraConfig.get().runtime.choices.get("evaluator") not in (None, "local"):
            raise UserError("study.storage and evaluator are both given; allowed is one of them")
    names = list(devices)
    objectives = parse_objectives([str(text) for text in config.objectives], names)
    constraints = [parse_constraint(str(text), names) for text in config.constraints]
    goals = goals_of(objectives, constraints, names)
    for name in devices_of(goals, "peak_memory"):
        check_measures_memory(devices[name])
    for name in devices_of(goals, "energy"):
        meter_of(devices[name])
    with told("estimators"):
        estimators = instantiate(config.estimators)
        check_estimators(estimators, space)
    training, sampler = instantiate(config.supernet), sampler_factory(instantiate(study.sampler))
    predictor = instantiate(config.predictor)
    with told("supernet"):
        inspect.signature(training.func).bind_partial(**training.keywords)
    check_training(space, training, storage)
    with told("study.sampler"):
        sampler(config.seed)
    strategy = instantiate(study.strategy, _convert_="all")
    with told("study.strategy"):
        if not isinstance(strategy(), SearchStrategy):
            raise UserError(f"study.strategy is a {type(strategy()).__name__}; allowed is a search.strategies.SearchStrategy")
        strategy().check(space)
    with told("predictor"):
        predictor(seed=config.seed)
    with told("profile"):
        profile_settings = ProfileSettings(**{str(key): value for key, value in profile.items()})
    for device in devices.values():
        if device.elsewhere:
            check_searchable(device, profile_settings)
    with told("proxies"):
        proxies = ProxySettings(**settings["proxies"])
    with told("focus"):
        focus_settings = FocusSettings(**{str(key): value for key, value in config.focus.items()})
    with told("finish"):
        finish_settings = FinishSettings(**{str(key): value for key, value in config.finish.items()})
    with told("relaxation"):
        relaxation = instantiate(config.relaxation, _convert_="all")
        check_held(space, relaxation.held)
        if "relax" in config.stages and space.shares_weights:
            check_relaxation(space, estimators, relaxation)
    with told("evaluation"):
        evaluation_settings = EvaluationSettings(**{str(key): value for key, value in evaluation.items()})
    return Job(
        space=space,
        devices=devices,
        data=data,
        channels=config.data.channels,
        classes=config.data.classes,
        goals=goals,
        seed=config.seed,
        training=training,
        estimators=estimators,
        predictor=lambda: predictor(seed=config.seed),
        sampler=sampler,
        new_pool=instantiate(config.evaluator),
        storage=storage,
        profile=profile_settings,
        evaluation=evaluation_settings,
        proxies=proxies,
        strategy=strategy,
        study=StudySettings(study.candidates, study.rounds, study.evaluations, config.seed, leave_out),
        processes=processes,
        worker_command=worker_command,
        focus=focus_settings,
        finish=finish_settings,
        relaxation=relaxation,
        export=ExportSettings(config.export.winners, config.export.random_winners, instantiate(config.export.tolerances)),
        settings=settings,
        progress=progress,
        run=Run(path),  # last: a mistake leaves no folder behind
    )


def check_training(space: Space, training: Callable[..., Any], storage: object) -> None:
    """Make sure that a space is trained as it can be.

    Raises:
        UserError: a supernet of a space without shared weights, networks one by one of one that has them, or a strategy that
            cannot train it so.
    """
    if (getattr(training, "func", None) is AloneSettings) == space.shares_weights:
        has, allowed = (
            ("shares", "single_path, or others of conf/supernet") if space.shares_weights else ("does not share", "one_by_one")
        )
        raise UserError(f"space {space.name} {has} weights between networks; allowed is supernet={allowed}")
    if space.shares_weights:
        given = getattr(training, "keywords", {})
        if isinstance(given.get("strategy"), Strategy):
            given["strategy"].check(space, given.get("distillation") or Distillation())
        return
    training()
    if storage is not None:
        raise UserError(
            f"networks of {space.name} are trained by the process that asks, or on Dask: study.storage is {storage}, "
            "allowed is null, with evaluator=dask for several at once"
        )


def check_relaxation(space: Space, estimators: Estimators, relaxation: RelaxationSettings) -> None:
    """Make sure that a gradient search can work on a space, before a supernet is trained for it.

    Raises:
        UserError: a choice cannot be relaxed, or there is nothing to decide.
    """
    with torch.random.fork_rng(devices=[]):
        untrained = Supernet(space, estimators)
    check_strategy(relaxation.strategy, Entangled(untrained, relaxation.held))


@contextmanager
def told(part: str) -> Iterator[None]:
    """Tell arguments that do not fit as a user's mistake.

    Raises:
        UserError: instead of TypeError and ValueError.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        raise UserError(f"{part}: {error}; see python -m search --cfg job --package {part.partition('.')[0]}") from error


def sampler_factory(make: Callable[..., BaseSampler]) -> Callable[[int], BaseSampler]:
    """Samplers from seeds; a sampler that takes no seed is made without."""
    kind = make.func if hasattr(make, "func") else make
    takes_seed = "seed" in inspect.signature(kind).parameters
    return lambda seed: make(seed=seed) if takes_seed else make()
