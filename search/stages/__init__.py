"""The stages of a run. Each reads what earlier ones left in the run folder, leaves its own files, and returns its figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from search.job import EVALUATIONS_FILE, FINISHED_FOLDER, SUPERNET_FILE, Job
from search.run import Facts
from search.stages.deliver import export_winners, report_run
from search.stages.find import search_study
from search.stages.finish import finish_winners
from search.stages.learn import fit_predictors, train_supernet
from search.stages.measure import describe_space, measure_tables, print_choices

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
    """

    name: str
    action: Callable[[Job], Facts]
    leaves: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    always: bool = False

    def made_by(self, job: Job) -> list[str]:
        """What the stage makes in a job, a file per device where it says `DEVICE`, and what it said it made."""
        fixed = [name.replace("DEVICE", device) for name in self.makes for device in job.devices]
        return [*fixed, *job.run.facts(self.name).get("files", [])]


# Tables and evaluations stay when settings change: both know what they belong to, and take what still fits.
STAGES = (
    Stage("space", describe_space, ("space.json",), ("space.json",), always=True),
    Stage("tables", measure_tables, (), ("tables/DEVICE.parquet",)),
    Stage("supernet", train_supernet, ("supernet",), (SUPERNET_FILE,)),
    Stage("predictors", fit_predictors, ("predictors",), (EVALUATIONS_FILE, "predictors/accuracy.json")),
    Stage("study", search_study, ("study.log", "front.csv", "points.json"), ("study.log", "front.csv", "points.json")),
    Stage("finish", finish_winners, (FINISHED_FOLDER,), ()),
    Stage("export", export_winners, ("winners", "baselines"), ()),
    Stage("report", report_run, ("report.html", "summary.json"), ("report.html", "summary.json")),
)
