"""Settings of stages, as plain values that were looked at: how tables are measured, networks evaluated, winners exported."""

from __future__ import annotations

from dataclasses import dataclass

from latency_lut.measuring import MeasuringSettings
from latency_lut.refine import Refinement
from predictors.wishes import wishes_of
from search.export import Tolerances


@dataclass(frozen=True)
class ProfileSettings:
    """How tables are measured, see `latency_lut.profile.profile`.

    `tables`: folder with finished tables to start from. `recheck_days`: older tables are checked for drift; `None`: none are.
    `target_error`, `budget_s`: see `latency_lut.refine`.

    Raises:
        ValueError: `recheck_days` is no number of days, or a limit is out of range.
    """

    tables: str | None
    max_pairs: int
    networks: int
    rounds: int
    visit_s: float
    held_out: int
    recheck_days: float | None = None
    target_error: float | None = None
    budget_s: float | None = None

    @property
    def refinement(self) -> Refinement | None:
        """How measuring goes on after a spread sample; `None`: what is measured was decided beforehand."""
        if self.target_error is None and self.budget_s is None:
            return None
        return Refinement(wishes_of, self.target_error, self.budget_s)

    def measuring(self, seed: int) -> MeasuringSettings:
        """What is measured for a table."""
        return MeasuringSettings(seed, self.max_pairs, self.networks, self.rounds, self.visit_s)

    def __post_init__(self) -> None:
        self.refinement  # noqa: B018 - wrong limits are told before anything runs
        days = self.recheck_days
        if days is not None and (isinstance(days, bool) or not isinstance(days, (int, float)) or not days >= 0):
            raise ValueError(f"recheck_days is {days!r}; allowed are days from 0, or null for no check")


@dataclass(frozen=True)
class EvaluationSettings:
    """Networks evaluated before the first round, how many of them test the predictor, and images to recalibrate with."""

    initial: int
    held_out: int
    calibration_images: int


@dataclass(frozen=True)
class ExportSettings:
    """How many winners and random networks are exported, and what an export must keep."""

    winners: int
    random_winners: int
    tolerances: Tolerances
