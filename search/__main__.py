"""`python -m search`: the command line of a search, or of a sweep of them."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import optuna
import torch
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from latency_lut.command import run_hydra
from search.building import build_job, told
from search.claims import claimed
from search.heap import keep_freed_memory
from search.job import Job
from search.overrides import (
    OVERRIDES_FILE,
    fallen_overrides,
    kept_overrides,
    merged_overrides,
    missing_keys,
    own_processes,
    plain_settings,
    saved_overrides,
)
from search.progress import StageProgress
from search.report import print_front
from search.run import digest
from search.shared_study import check_answers
from search.sharing import SharedStages
from search.stages import STAGES, Stage, of_devices, print_choices
from search.summary import SUMMARY_FILE, read_summary
from search.sweep import JOBS_FOLDER, SweepRecorder, job_of, with_folder
from search.sweep_report import tell_sweep
from search.training.fit import quiet_lightning
from search.training.parallel import Processes
from spaces.errors import UserError
from spaces.files import write_atomically


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
    quiet_lightning()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    keep_freed_memory()
    given = None if config.run is None else Path(str(config.run))
    fallen: dict[str, list[str]] = {}
    if given is not None and (given / OVERRIDES_FILE).exists():
        saved = saved_overrides(given)
        fallen = fallen_overrides(saved, overrides)
        gone = [text for texts in fallen.values() for text in texts]
        overrides = merged_overrides([text for text in saved if text not in gone], overrides)
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
        worker_command = (*kept_overrides(overrides), f"run={path}", *own_processes(overrides))
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
        if job.storage is not None and not stages <= {"space", "tables", "supernet"}:
            check_answers(job.storage, progress.say)
        does = "waiting" if job.storage is None else "evaluating for it"
        waiting = claimed(
            path,
            path.name,
            lambda holder: progress.say(f"run {path} is in use by {holder}; {does}"),
            meanwhile=job.workforce.serve_some,
        )
        claim = held.enter_context(waiting)
        job.run.reload()  # somebody else may have worked on it meanwhile
        write_atomically(path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(settings)))
        write_atomically(path / OVERRIDES_FILE, json.dumps(kept_overrides(overrides)))
        progress.say(f"run {path}")
        for switch, texts in fallen.items():
            progress.say(f"  with {switch}, settings of the run no longer apply: {' '.join(texts)}")
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

    files = stage.shared_by(job)
    if shared is not None and files:
        shared.do(job.run, stage.name, fingerprint, stage.leaves, files, of_devices(stage.unfinished, job), action)
    else:
        action()
    finished = job.run.record(stage.name)
    job.progress.say(f"  {finished.seconds if finished else 0.0:.1f} s")


def join_training(job: Job, stages: set[str]) -> None:
    """What every process but the first does: train, where there is something to train."""
    for stage in STAGES:
        if stage.joins is not None and stage.name in stages:
            stage.joins(job)
            if not job.run.finished(stage.name, job.fingerprint(stage.name), stage.made_by(job)):
                stage.action(job)


# -- configuration ------------------------------------------------------------------------------------------------------------


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
