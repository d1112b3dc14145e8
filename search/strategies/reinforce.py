"""Strategy `reinforce`: a recurrent policy learns to compress the largest network, by removing layers, then by shrinking them.

N2N learning (arXiv:1709.06030): with compression `C = 1 - cost / cost of the teacher`, a student's reward is `C (2 - C)`
times its accuracy relative to the teacher's, and -1 where it violates a constraint; the policy is trained by REINFORCE
(Williams 1992).

Where the paper trains every student and finds one network, here students have the supernet's weights. What is not evaluated yet
counts with its predicted accuracy, and the best are evaluated in every round. And since a front is looked for, the relative
accuracy counts to several powers, of which the policy is told: 1 is the paper's, the larger the more an accuracy is worth.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch

from predictors.accuracy import AccuracyPredictor
from search.candidates import Candidate, Values
from search.fronts import choose
from search.objectives import Goal, Objective
from search.strategies.policy import Plan, Policy
from search.strategies.strategy import Round, SearchStrategy
from spaces.choice import Architecture
from spaces.errors import UserError

VIOLATED = -1.0
LEAST_COMPRESSION = -1.0  # a student that costs twice as much as the teacher is bad enough
BASELINE_DECAY = 0.8
MOST_GRADIENT = 1.0


class Reinforce(SearchStrategy):
    """A policy that compresses the largest network.

    Args:
        powers: of the relative accuracy in the reward, from 1; as many networks of a batch are for each.
        batch: students between two steps of the policy's optimizer.
        removing: share of the study's candidates before layers are shrunk too.
        removed_by: kinds of choices that say how many layers there are.
        learning_rate: of the policy's Adam.
        entropy: weight of the policy's entropy, so that it does not settle early.
        policy: file of a policy to start from, as `python -m search` leaves it in `strategy/` of a run; `None`: a new one.

    Raises:
        UserError: a value that is not allowed, or no policy in the file.
    """

    name: ClassVar[str] = "reinforce"

    def __init__(
        self,
        powers: Sequence[float] = (1.0, 4.0, 16.0),
        batch: int = 48,
        removing: float = 0.1,
        removed_by: Sequence[str] = ("depth",),
        learning_rate: float = 0.01,
        entropy: float = 0.01,
        policy: str | None = None,
    ) -> None:
        if not powers or not all(isinstance(p, (int, float)) and math.isfinite(p) and p >= 1.0 for p in powers):
            raise UserError(f"study.strategy.powers is {list(powers)}; allowed is a list of numbers from 1")
        if type(batch) is not int or batch < len(powers):
            raise UserError(f"study.strategy.batch is {batch!r}; allowed are integers from the number of powers, {len(powers)}")
        if not 0.0 <= removing < 1.0:
            raise UserError(f"study.strategy.removing is {removing}; allowed are shares from 0 to below 1")
        if not learning_rate > 0.0 or not entropy >= 0.0:
            found = f"study.strategy.learning_rate is {learning_rate} and entropy {entropy}"
            raise UserError(f"{found}; allowed are a rate above 0 and a weight from 0")
        self.powers = torch.tensor([float(p) for p in powers])
        self.batch, self.removing, self.removed_by = batch, removing, tuple(removed_by)
        self.learning_rate, self.entropy = learning_rate, entropy
        self.start = None if policy is None else Path(policy)
        if self.start is not None:
            Policy([]).start_from(self.start)  # a mistake is told before anything runs
        self.policy: Policy | None = None
        self._done = 0  # candidates of earlier rounds
        self._baseline = torch.full((len(self.powers),), math.nan)

    @property
    def key(self) -> str:
        return "" if self.start is None else hashlib.sha256(self.start.read_bytes()).hexdigest()

    def files(self) -> dict[str, bytes]:
        return {} if self.policy is None else {"policy.safetensors": self.policy.stored()}

    def search(self, round_: Round) -> list[Candidate]:
        """Train the policy on students of predicted accuracy, and have the best of them evaluated."""
        space = round_.predicted.space
        plan = Plan(space, self.removed_by, round_.left_out)
        if self.policy is None:
            self._begin(plan, round_.seed)
        teacher = space.largest()
        round_.evaluate([teacher])  # where it was not among the first
        judge = _Judge(round_, teacher)
        generator = torch.Generator().manual_seed(round_.seed)
        candidates: list[Candidate] = []
        while len(candidates) < round_.candidates:
            done = self._done + len(candidates)
            shrinks = done >= self.removing * round_.candidates * round_.rounds
            count = min(self.batch, max(len(self.powers), round_.candidates - len(candidates)))
            candidates += self._step(plan, judge, generator, count, shrinks)
            round_.on_progress("candidates", min(len(candidates), round_.candidates), round_.candidates)
        candidates = candidates[: round_.candidates]
        self._done += len(candidates)
        known = {e.architecture for e in round_.seen}
        new = [c for c in candidates if c.architecture not in known]
        round_.evaluate(choose(new, round_.goal.objectives, round_.left))
        return candidates

    def _begin(self, plan: Plan, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.policy = Policy(plan.kinds)
        if self.start is not None:
            self.policy.start_from(self.start)
        self._optimizer = torch.optim.Adam(self.policy.parameters(), lr=self.learning_rate)

    def _step(self, plan: Plan, judge: _Judge, generator: torch.Generator, count: int, shrinks: bool) -> list[Candidate]:
        """A batch of students and what they teach the policy."""
        if self.policy is None:
            raise RuntimeError("a policy is made by the first round")
        which = torch.arange(count) % len(self.powers)
        powers = self.powers[which]
        rollouts = self.policy.rollouts(plan, torch.log2(powers) / 4.0, generator, shrinks)
        candidates = judge.candidates(rollouts.architectures)
        rewards = torch.tensor([judge.reward(c, float(p)) for c, p in zip(candidates, powers, strict=True)])
        advantages = torch.zeros(count)
        for index in range(len(self.powers)):
            mine = which == index
            mean = rewards[mine].mean()
            before = mean if self._baseline[index].isnan() else self._baseline[index]
            advantages[mine] = rewards[mine] - before
            self._baseline[index] = BASELINE_DECAY * before + (1.0 - BASELINE_DECAY) * mean
        advantages = advantages / advantages.std().clamp_min(1e-3)
        loss = -(advantages * rollouts.log_probability + self.entropy * rollouts.entropy).mean()
        if loss.requires_grad:  # else there is nothing to decide
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.policy.parameters(), MOST_GRADIENT)
            self._optimizer.step()
        return candidates


class _Judge:
    """Values and rewards of students: accuracies measured where they are known, else predicted."""

    def __init__(self, round_: Round, teacher: Architecture) -> None:
        self.goal, self.predicted = round_.goal, round_.predicted
        self._predictor: AccuracyPredictor = round_.new_predictor()
        accuracies = [e.accuracy for e in round_.seen]
        self._predictor.fit(self.predicted.features([e.architecture for e in round_.seen]), accuracies)
        self._known: dict[Architecture, Candidate] = {}
        self._measured = {e.architecture: e.accuracy for e in round_.seen}
        self._teacher = self._candidate(teacher, {"accuracy": self._measured[teacher]})
        self._cost = cost_of(self.goal)

    def candidates(self, architectures: Sequence[Architecture]) -> list[Candidate]:
        new = [a for a in dict.fromkeys(architectures) if a not in self._known]
        for architecture, values in zip(new, self.predicted.predict(new, self._predictor), strict=True):
            accuracy = self._measured.get(architecture, values["accuracy"])
            self._known[architecture] = self._candidate(architecture, {"accuracy": accuracy})
        return [self._known[a] for a in architectures]

    def _candidate(self, architecture: Architecture, values: Values) -> Candidate:
        values = {**self.predicted.costs(architecture), **values}
        violation = max((c.violation(values[c.objective.name]) for c in self.goal.constraints), default=0.0)
        return Candidate(architecture, values, violation)

    def reward(self, candidate: Candidate, power: float) -> float:
        """What a student is worth."""
        if not candidate.feasible:
            return VIOLATED
        costs = [self._of(c) for c in (candidate, self._teacher)]
        accuracies = [c.values["accuracy"] for c in (candidate, self._teacher)]
        return reward(accuracies[0], accuracies[1], costs[0], costs[1], power)

    def _of(self, candidate: Candidate) -> float:
        if self._cost is None:
            return float(self.predicted.network(candidate.architecture).parameters)
        return candidate.values[self._cost.name]


def reward(accuracy: float, teacher_accuracy: float, cost: float, teacher_cost: float, power: float = 1.0) -> float:
    """N2N's reward `C (2 - C)` times relative accuracy, here to a power (arXiv:1709.06030, section 3.4)."""
    compression = max(LEAST_COMPRESSION, 1.0 - cost / max(teacher_cost, 1e-12))
    relative = accuracy / max(teacher_accuracy, 1e-6)
    return compression * (2.0 - compression) * math.pow(relative, power)


def cost_of(goal: Goal) -> Objective | None:
    """The cost that is to be compressed, the goal's first; `None` where it has none: parameters, as in the paper."""
    return next((o for o in goal.values if o.quantity != "accuracy"), None)
