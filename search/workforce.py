"""Who works for a job: its pool, who evaluates networks with it, and the study in a database by which several processes do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from search.candidates import Candidate
from search.evaluation import Evaluation
from search.fronts import choose
from search.one_by_one import AloneTrainer, Halving, TrainedNetworks
from search.pool import Pool
from search.shared_study import SharedStudy
from search.workers import PoolWorkers, WithWeights, Workers
from spaces.choice import Architecture

if TYPE_CHECKING:
    from search.job import Job


class Workforce:
    """Made when it is first needed, each part by itself.

    Args:
        job: for which it works.
    """

    def __init__(self, job: Job) -> None:
        self.job = job

    @cached_property
    def pool(self) -> Pool:
        """Who evaluates networks, and trains those that are trained alone.

        Raises:
            UserError: it cannot be started or reached.
        """
        return self.job.new_pool(say=self.job.progress.say)

    def evaluate(self, architectures: Sequence[Architecture]) -> Iterator[tuple[Architecture, Evaluation]]:
        """See `Workers.evaluate`."""
        return self.evaluators.evaluate(architectures)

    @cached_property
    def evaluators(self) -> Workers:
        """Who evaluates networks, with the supernet or by training them.

        Raises:
            UserError: they cannot be reached.
        """
        job = self.job
        if isinstance(job.networks, TrainedNetworks):
            trainer = AloneTrainer(job.space, job.training(), job.ready_data, job.evaluator, job.seed, job.processes.single)
            return Halving(job.networks, trainer, self._promoted, self.pool, job.progress.advance)
        if job.storage is None:
            return PoolWorkers(self.pool, WithWeights(job.evaluator, job.supernet))
        return self.shared_study

    def _promoted(self, accuracies: Mapping[Architecture, float], count: int) -> list[Architecture]:
        """The networks that are worth training further: front after front of what any study looks for."""
        values: dict[Architecture, dict[str, float]] = {a: {"accuracy": accuracy} for a, accuracy in accuracies.items()}
        violations = dict.fromkeys(accuracies, math.inf)
        for goal, predicted in self.job.predicted.items():
            for architecture, known in values.items():
                known.update(predicted.costs(architecture))
                missed = max((c.violation(known[c.objective.name]) for c in goal.constraints), default=0.0)
                violations[architecture] = min(violations[architecture], missed)
        objectives = dict.fromkeys(objective for goal in self.job.goals for objective in goal.objectives)
        return choose([Candidate(a, values[a], violations[a]) for a in accuracies], list(objectives), count)

    @cached_property
    def shared_study(self) -> SharedStudy:
        """The study in a database by which several processes evaluate.

        Raises:
            UserError: the database does not answer.
        """
        job = self.job

        def measure(architecture: Architecture) -> Evaluation:
            return job.evaluator.evaluate(job.supernet, job.space.architecture(architecture))

        return SharedStudy(str(job.storage), job.evaluations_key, measure, job.progress.say)

    def serve_some(self) -> bool:
        """Evaluate some networks for the process that holds the run; returns whether there were any to do."""
        job = self.job
        if job.storage is None:
            return False
        job.run.reload()
        supernet = job.run.record("supernet")
        if supernet is None or not supernet.done or supernet.fingerprint != job.fingerprint("supernet"):
            return False
        if "shared_study" in self.__dict__ and self.shared_study.key != job.evaluations_key:
            self.renew()
        return self.shared_study.serve_some() > 0

    def renew(self) -> None:
        """Evaluate with the present weights from now on; the pool stays."""
        self.__dict__.pop("evaluators", None)
        if "shared_study" in self.__dict__:
            self.__dict__.pop("shared_study").close()

    def release_pool(self) -> None:
        """Give the pool back; a later use makes another one."""
        self.__dict__.pop("evaluators", None)
        if "pool" in self.__dict__:
            self.__dict__.pop("pool").close()

    def close(self) -> None:
        """Give back what was made."""
        self.release_pool()
        if "shared_study" in self.__dict__:
            self.shared_study.close()
