"""`python -m search`: the command line of a search. Here, and only here, configuration objects become plain arguments."""

from __future__ import annotations

import inspect
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from optuna.samplers import BaseSampler
from pytorch_lightning import LightningDataModule
from rich.console import Console

from latency_lut.command import run_hydra
from latency_lut.energy import meter_of
from latency_lut.memory import check_measures_memory
from search.claims import claimed
from search.job import EvaluationSettings, ExportSettings, Job, ProfileSettings
from search.objectives import devices_of, goals_of, parse_constraint, parse_objectives
from search.overrides import (
    OVERRIDES_FILE,
    kept_overrides,
    merged_overrides,
    missing_keys,
    own_processes,
    plain_settings,
    saved_overrides,
)
from search.progress import StageProgress
from search.proxies import ProxySettings
from search.report import print_front
from search.run import Run, digest
from search.shared_study import checked_url
from search.sharing import SharedStages
from search.stages import STAGES, Stage, of_devices, print_choices
from search.strategies import SearchStrategy
from search.study import StudySettings
from search.summary import SUMMARY_FILE, read_summary
from search.sweep import JOBS_FOLDER, SweepRecorder, job_of, with_folder
from search.sweep_report import tell_sweep
from search.training.alone import AloneSettings
from search.training.finishing import FinishSettings
from search.training.parallel import Processes
from spaces.entangled import check_held
from spaces.errors import UserError
from spaces.files import write_atomically
from spaces.space import Space
from spaces.supernet import check_estimators


def command() -> None:
    """The command line: one search, or a sweep of them with what became of its jobs at the end."""
    sys.argv[1:], sweep = with_folder(sys.argv[1:])
    try:
        run_hydra(main, "search")
    finally:
        if sweep is not None and (sweep / JOBS_FOLDER).is_dir():
            tell_sweep(sweep)


def main(config: DictConfig) -> None:
    """Run the configured stages, as a job of a sweep where there is one."""
    overrides = list(HydraConfig.get().overrides.task)
    if config.sweep is None or HydraConfig.get().mode != RunMode.MULTIRUN:
        search(config, overrides)
        return
    with job_of(Path(str(config.sweep)), kept_overrides(overrides)) as recorder:
        search(config, overrides, recorder)


def search(config: DictConfig, overrides: list[str], recorder: SweepRecorder | None = None) -> None:
    """Run the configured stages; the recorder is told where."""
    warnings.filterwarnings("ignore", category=UserWarning, module="pytorch_lightning|lightning_fabric")
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    given = None if config.run is None else Path(str(config.run))
    if given is not None and (given / OVERRIDES_FILE).exists():
        overrides = merged_overrides(saved_overrides(given), overrides)
        config = compose(config_name="search", overrides=overrides)
    missing = missing_keys(OmegaConf.to_container(config, resolve=False))
    if missing:
        raise UserError(f"{missing[0]} is not given; pass {missing[0]}=...")
    stages = chosen_stages(list(config.stages))
    if config.threads is not None and (type(config.threads) is not int or config.threads < 1):
        raise UserError(f"threads is {config.threads!r}; allowed are integers from 1, or null for all cores")
    with told("trainer"):
        processes = Processes(**{str(key): value for key, value in config.trainer.items()})
    torch.set_num_threads(config.threads or max(1, (os.cpu_count() or 1) // processes.devices))
    console = Console(quiet=processes.rank > 0)
    settings = plain_settings(config)
    home = Path("runs") if recorder is None else Path(str(config.sweep))
    path = given if given is not None else home / default_name(config, settings)
    with StageProgress(console) as progress, ExitStack() as held:
        worker_command = (*kept_overrides(overrides), f"run={path}", "stages=[supernet]", *own_processes(overrides))
        job = build_job(config, settings, path, progress, processes, worker_command)
        for name in ("relax", "finish"):
            if name in stages and not job.space.shares_weights:
                raise UserError(
                    f"stage {name} needs a supernet, and {job.space.name} does not share weights; leave it out of stages"
                )
        if processes.rank > 0:
            join_training(job, stages)
            return
        if recorder is not None:
            recorder.runs_in(path)
        held.callback(job.close)
        does = "waiting" if job.storage is None else "evaluating for it"
        waiting = claimed(
            path,
            path.name,
            lambda holder: progress.say(f"run {path} is in use by {holder}; {does}"),
            meanwhile=job.serve_some,
        )
        claim = held.enter_context(waiting)
        job.run.reload()  # somebody else may have worked on it meanwhile
        write_atomically(path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(settings)))
        write_atomically(path / OVERRIDES_FILE, json.dumps(kept_overrides(overrides)))
        progress.say(f"run {path}")
        if stages == {"space"}:
            print_choices(job)
        shared = shared_stages(config, processes, progress)
        for stage in STAGES:
            if claim is not None and claim[0].lost:
                raise UserError(f"run {path} was taken over by another process, as this one stood still; wait for that one")
            if stage.name in stages:
                do_stage(job, stage, shared)
    if "report" in stages:
        print_front(read_summary(path / SUMMARY_FILE), console)
        console.print(f"report: {path / 'report.html'}", soft_wrap=True)


def shared_stages(config: DictConfig, processes: Processes, progress: StageProgress) -> SharedStages | None:
    """Where stages are shared with other runs; `None` where they are not."""
    if config.share is None or (config.share == "auto" and HydraConfig.get().mode != RunMode.MULTIRUN):
        return None
    if processes.count > 1 and processes.from_outside:
        return None  # the other processes are there and will train, whatever this one finds
    return SharedStages(Path("runs/shared" if config.share == "auto" else str(config.share)), progress.say)


def do_stage(job: Job, stage: Stage, shared: SharedStages | None) -> None:
    """Do one stage, take it over from another run, or say that there is nothing to do."""
    fingerprint, makes = job.fingerprint(stage.name), stage.made_by(job)
    if job.run.finished(stage.name, fingerprint, makes) and not stage.always:
        job.progress.say(f"{stage.name}: done before")
        return
    job.progress.say(stage.name)

    def action() -> None:
        job.run.do(stage.name, fingerprint, stage.leaves, lambda: stage.action(job), makes, stage.always)

    if shared is not None and stage.shared and (job.space.shares_weights or stage.name == "tables"):
        files, unfinished = of_devices(stage.shared, job), of_devices(stage.unfinished, job)
        shared.do(job.run, stage.name, fingerprint, stage.leaves, files, unfinished, action)
    else:
        action()
    finished = job.run.record(stage.name)
    job.progress.say(f"  {finished.seconds if finished else 0.0:.1f} s")


def join_training(job: Job, stages: set[str]) -> None:
    """What every process but the first does: train, where there is something to train."""
    stage = next(stage for stage in STAGES if stage.name == "supernet")
    if stage.name in stages and not job.run.finished(stage.name, job.fingerprint(stage.name), stage.made_by(job)):
        stage.action(job)


# -- configuration ------------------------------------------------------------------------------------------------------------


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
    for device in devices.values():
        device.check_here("a search, which verifies and times its winners,")
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
    with told("predictor"):
        predictor(seed=config.seed)
    with told("profile"):
        profile_settings = ProfileSettings(**{str(key): value for key, value in profile.items()})
    with told("proxies"):
        proxies = ProxySettings(**settings["proxies"])
    with told("finish"):
        finish_settings = FinishSettings(**{str(key): value for key, value in config.finish.items()})
    with told("relaxation"):
        relaxation = instantiate(config.relaxation, _convert_="all")
        check_held(space, relaxation.held)
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
        new_workers=instantiate(config.evaluator),
        storage=storage,
        profile=profile_settings,
        evaluation=evaluation_settings,
        proxies=proxies,
        strategy=strategy,
        study=StudySettings(study.candidates, study.rounds, study.evaluations, config.seed, leave_out),
        processes=processes,
        worker_command=worker_command,
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
        UserError: a supernet of a space without shared weights, or networks one by one of one that has them.
    """
    if (getattr(training, "func", None) is AloneSettings) == space.shares_weights:
        has, allowed = (
            ("shares", "sandwich, or others of conf/supernet") if space.shares_weights else ("does not share", "one_by_one")
        )
        raise UserError(f"space {space.name} {has} weights between networks; allowed is supernet={allowed}")
    if space.shares_weights:
        return
    training()
    if storage is not None or HydraConfig.get().runtime.choices.get("evaluator") not in (None, "local"):
        raise UserError(
            f"networks of {space.name} are trained in this process; allowed are evaluator=local and study.storage=null"
        )


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


def default_name(config: DictConfig, settings: dict[str, Any]) -> str:
    """`SPACE-DATA-DEVICES-FINGERPRINT`: the same settings find the same folder again."""
    data = str(config.data.module.get("_target_")).rsplit(".", 1)[-1].lower()
    space = str(config.space.get("_target_")).rsplit(".", 1)[-1].removesuffix("Space").lower()
    return f"{space}-{data}-{'+'.join(config.devices)}-{digest(settings)[:8]}"


def chosen_stages(names: Sequence[str]) -> set[str]:
    """The stages to do; they run in their own order.

    Raises:
        UserError: unknown, or none.
    """
    known = [stage.name for stage in STAGES]
    for name in names:
        if name not in known:
            raise UserError(f"stage {name!r}; allowed are {', '.join(known)}")
    if not names:
        raise UserError(f"stages is empty; allowed are {', '.join(known)}")
    return set(names)


if __name__ == "__main__":
    command()
