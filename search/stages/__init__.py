"""The stages of a run. Each reads what earlier ones left in the run folder, leaves its own files, and returns its figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from search.job import EVALUATIONS_FILE, FINISHED_FOLDER, FOCUS_FOLDER, FOCUSED_FILE, RELAXED_FOLDER, SUPERNET_FILE, Job
from search.run import Facts
from search.stages.deliver import export_winners, report_run
from search.stages.find import STRATEGY_FOLDER, search_study
from search.stages.finish import finish_winners
from search.stages.focus import focus_supernet, wait_for_fronts
from search.stages.learn import fit_predictors, train_supernet
from search.stages.measure import describe_space, measure_tables, print_choices
from search.stages.relax import relax_choices
from search.summary import SUMMARY_FILE
from search.training import CHECKPOINT

__all__ = ["STAGES", "Stage", "print_choices"]


@dataclass(frozen=True)
class Stage:
    """A stage of a run.

    Args:
        name: as users write it.
        action: does it.
        leaves: files and folders of the run that are removed when it begins with other settings or inputs.
        makes: those without which it is not done.
        always: it is never skipped.
        shared: files to hand to other runs that need the same stage; empty where stages are not shared.
        unfinished: files from which it goes on after it was interrupted.
        joins: of one that several processes do; waits until those that are not the first can join.
    """

    name: str
    action: Callable[[Job], Facts]
    leaves: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    always: bool = False
    shared: tuple[str, ...] = ()
    unfinished: tuple[str, ...] = ()
    joins: Callable[[Job], None] | None = None

    def made_by(self, job: Job) -> list[str]:
        """What the stage makes in a job, a file per device where it says `DEVICE`, and what it said it made."""
        return [*of_devices(self.makes, job), *job.run.facts(self.name).get("files", [])]

    def shared_by(self, job: Job) -> list[str]:
        """Files that it makes in a job for other runs too."""
        if self.name != "tables" and not job.space.shares_weights:
            return []
        return [] if self.name == "focus" and not job.focus.share else of_devices(self.shared, job)


def of_devices(names: tuple[str, ...], job: Job) -> list[str]:
    """Names with that of every device where they say `DEVICE`."""
    return list(dict.fromkeys(name.replace("DEVICE", device) for name in names for device in job.devices))


STUDY_FILES = ("study.log", "front.csv", "points.json")
TABLES = ("tables/DEVICE.parquet",)

# Tables and evaluations stay when settings change: both know what they belong to, and take what still fits.
STAGES = (
    Stage("space", describe_space, ("space.json",), ("space.json",), always=True),
    Stage("tables", measure_tables, (), TABLES, shared=TABLES, unfinished=TABLES),
    Stage(
        "supernet",
        train_supernet,
        ("supernet",),
        shared=(SUPERNET_FILE,),
        unfinished=(f"supernet/{CHECKPOINT}",),
        joins=lambda job: None,
    ),
    Stage(
        "predictors",
        fit_predictors,
        ("predictors",),
        (EVALUATIONS_FILE, "predictors/accuracy.json"),
        shared=(EVALUATIONS_FILE, "predictors/accuracy.json", "predictors/latency@DEVICE.json"),
        unfinished=(EVALUATIONS_FILE,),
    ),
    Stage(
        "focus",
        focus_supernet,
        (FOCUS_FOLDER,),
        shared=(FOCUSED_FILE,),
        unfinished=(f"{FOCUS_FOLDER}/{CHECKPOINT}",),
        joins=wait_for_fronts,
    ),
    Stage("relax", relax_choices, (RELAXED_FOLDER,), ()),
    Stage("study", search_study, (*STUDY_FILES, STRATEGY_FOLDER), STUDY_FILES),
    Stage("finish", finish_winners, (FINISHED_FOLDER,), ()),
    Stage("export", export_winners, ("winners", "baselines"), ()),
    Stage("report", report_run, ("report.html", SUMMARY_FILE), ("report.html", SUMMARY_FILE)),
)
