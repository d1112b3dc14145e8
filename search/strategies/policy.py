"""A recurrent policy over the choices of a space: which layers of the largest network it removes, and how it shrinks others.

It knows a choice by its kind, by its place, and by the share of the network that it decides about, and an option by how large
it is among its choice's. So a policy that was trained on one space is a policy for every other one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from search.left_out import NOTHING, LeftOut
from spaces.choice import Architecture, Option
from spaces.errors import UserError
from spaces.space import Space

HIDDEN = 32
KIND_FEATURES = 8
PLACE_FEATURES = 4  # of a choice: place, number of options, shares of arithmetic and of weights
FORMAT = "netwright policy 1"


class Plan:
    """The decisions of a space, as a policy sees them.

    Args:
        space: of the choices.
        removed_by: kinds of choices whose options say how many layers stay; they are decided first, layer by layer.
        left_out: options that are not to be chosen.
    """

    def __init__(self, space: Space, removed_by: Sequence[str], left_out: LeftOut = NOTHING) -> None:
        self.space, self.choices = space, space.choices
        self.options = [left_out.options(choice) for choice in self.choices]
        self.kinds = tuple(choice.kind for choice in self.choices)
        self.positions = [
            torch.tensor([choice.options.index(o) / max(1, len(choice.options) - 1) for o in options])
            for choice, options in zip(self.choices, self.options, strict=True)
        ]
        self.parents = {choice.name: index for index, choice in enumerate(self.choices)}
        # A layer that can be removed is a step of its choice from one option to the next smaller one.
        counts = [(i, len(options) - 1) for i, options in enumerate(self.options) if self.kinds[i] in removed_by]
        self.removals = [index for index, steps in counts for _ in range(steps)]
        self.places = torch.tensor([self._place(index) for index in range(len(self.choices))])

    def _place(self, index: int) -> list[float]:
        choice, network = self.choices[index], self.space.network(self.space.largest())
        owner = choice.name.rpartition(".")[0]
        inside = [n.spec for n in network.nodes if not owner or n.name == owner or n.name.startswith(f"{owner}.")]
        shares = [
            math.log10(max(1e-4, sum(of) / max(1, whole)))
            for of, whole in (
                ([s.macs for s in inside], network.macs),
                ([s.parameters for s in inside], network.parameters),
            )
        ]
        return [index / max(1, len(self.choices) - 1), math.log2(len(self.options[index])), *shares]

    def active(self, chosen: Sequence[torch.Tensor], index: int, count: int) -> torch.Tensor:
        """Which of `count` rollouts have a choice, by the indices `(count,)` of the options chosen before."""
        when = self.choices[index].when
        if when is None:
            return torch.ones(count, dtype=torch.bool)
        parent = self.parents[when[0]]
        allowed = torch.tensor([option in when[1] for option in self.options[parent]])
        return allowed[chosen[parent]] & self.active(chosen, parent, count)

    def architectures(self, chosen: Sequence[torch.Tensor]) -> list[Architecture]:
        """The architectures of rollouts, by the indices of their options for each choice."""
        rows = torch.stack(list(chosen)).T.tolist()
        found = []
        for row in rows:
            values: Mapping[str, Option] = {c.name: o[i] for c, o, i in zip(self.choices, self.options, row, strict=True)}
            found.append(self.space.architecture(values))
        return found


@dataclass(frozen=True)
class Rollouts:
    """What a policy did.

    Args:
        architectures: one for each rollout.
        log_probability: of the actions of each rollout, `(n,)`, with a gradient.
        entropy: mean over the decisions of each rollout, `(n,)`, with a gradient.
    """

    architectures: list[Architecture]
    log_probability: torch.Tensor
    entropy: torch.Tensor


class Policy(nn.Module):
    """The two recurrent networks of N2N (arXiv:1709.06030): a bidirectional one removes, an autoregressive one shrinks.

    Args:
        kinds: of the choices that it knows.
    """

    def __init__(self, kinds: Sequence[str]) -> None:
        super().__init__()
        self.kinds = tuple(dict.fromkeys(kinds))
        self.kind = nn.Parameter(0.3 * torch.randn(len(self.kinds), KIND_FEATURES))
        seen = KIND_FEATURES + PLACE_FEATURES + 1
        self.removal = nn.LSTM(seen, HIDDEN, bidirectional=True, batch_first=True)
        self.keep = nn.Linear(2 * HIDDEN, 1)
        self.shrinkage = nn.LSTMCell(seen + 1, HIDDEN)
        self.state = nn.Linear(HIDDEN, HIDDEN)
        self.size = nn.Linear(2, HIDDEN, bias=False)
        self.rating = nn.Linear(HIDDEN, 1, bias=False)

    def rollouts(self, plan: Plan, wishes: torch.Tensor, generator: torch.Generator, shrinks: bool = True) -> Rollouts:
        """Act once for each wish.

        Args:
            plan: the decisions.
            wishes: `(n,)`, what the policy is told about each rollout's reward.
            generator: of the actions.
            shrinks: whether layers are shrunk too; otherwise those that stay are as large as can be.
        """
        count = len(wishes)
        kinds = self.kind[[self.kinds.index(kind) for kind in plan.kinds]]
        features = torch.cat([kinds, plan.places], dim=1)
        steps: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # log-probability, entropy, whether it was decided
        removed = self._remove(plan, features, wishes, generator, steps)
        chosen: list[torch.Tensor] = []
        hidden = wishes.new_zeros(count, HIDDEN), wishes.new_zeros(count, HIDDEN)
        last = wishes.new_ones(count)
        for index, options in enumerate(plan.options):
            largest = torch.full((count,), len(options) - 1)
            active = plan.active(chosen, index, count)
            if index in removed:
                action = largest - removed[index]
            elif not shrinks:
                action = largest
            else:
                seen = torch.cat([features[index].expand(count, -1), wishes[:, None], last[:, None]], dim=1)
                output, cell = self.shrinkage(seen, hidden)
                hidden = torch.where(active[:, None], output, hidden[0]), torch.where(active[:, None], cell, hidden[1])
                action = largest
                if len(options) > 1:
                    place = plan.positions[index]
                    sizes = self.size(torch.stack([place, place**2], dim=1))
                    logits = self.rating(torch.relu(self.state(hidden[0])[:, None, :] + sizes)).squeeze(2)
                    action = _draw(logits, active, generator, steps)
            chosen.append(action)
            last = torch.where(active, plan.positions[index][action], last)
        logs, entropies, decided = (
            (torch.stack(part) for part in zip(*steps, strict=True)) if steps else 3 * (wishes[None] * 0,)
        )
        mean = (entropies * decided).sum(dim=0) / decided.sum(dim=0).clamp_min(1)
        return Rollouts(plan.architectures(chosen), (logs * decided).sum(dim=0), mean)

    def _remove(
        self,
        plan: Plan,
        features: torch.Tensor,
        wishes: torch.Tensor,
        generator: torch.Generator,
        steps: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    ) -> dict[int, torch.Tensor]:
        """How many layers each of the removing choices loses, `(n,)`, by the choice's index."""
        if not plan.removals:
            return {}
        count, every = len(wishes), torch.ones(len(wishes), dtype=torch.bool)
        seen = features[plan.removals].expand(count, -1, -1)
        seen = torch.cat([seen, wishes[:, None, None].expand(-1, seen.shape[1], 1)], dim=2)
        keeps = self.keep(self.removal(seen)[0]).squeeze(2)
        removed = {index: torch.zeros(count, dtype=torch.long) for index in plan.removals}
        for place, index in enumerate(plan.removals):
            logits = torch.stack([keeps[:, place], torch.zeros(count)], dim=1)
            removed[index] = removed[index] + _draw(logits, every, generator, steps)
        return removed

    # -- storing --------------------------------------------------------------------------------------------------------------

    def stored(self) -> bytes:
        """The policy as a safetensors file, to be trained further on another space."""
        weights = {name: value.contiguous() for name, value in self.state_dict().items()}
        return save(weights, {"format": FORMAT, "kinds": json.dumps(self.kinds)})

    def start_from(self, path: Path) -> None:
        """Take over a stored policy; kinds of choices that it does not know stay as they are.

        Raises:
            UserError: the file is missing, damaged, or not a policy.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            if metadata.get("format") != FORMAT or not all(w.isfinite().all() for w in weights.values()):
                raise ValueError("not a policy")
            known = [str(kind) for kind in json.loads(metadata["kinds"])]
            rows = weights["kind"]
            if rows.shape != (len(known), KIND_FEATURES):
                raise ValueError(f"{len(known)} kinds and {tuple(rows.shape)}")
            mine = self.kind.detach().clone()
            for row, kind in enumerate(self.kinds):
                if kind in known:
                    mine[row] = rows[known.index(kind)]
            self.load_state_dict({**weights, "kind": mine})
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"study.strategy.policy={path} is no policy of a run ({reason}); give another, or null") from error


def _draw(
    logits: torch.Tensor,
    active: torch.Tensor,
    generator: torch.Generator,
    steps: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """Actions `(n,)` by their logits `(n, actions)`; kept in `steps`, as decided where the choice is active."""
    logs = logits.log_softmax(dim=1)
    probabilities = logs.exp()
    action = torch.multinomial(probabilities.detach(), 1, generator=generator)
    steps.append((logs.gather(1, action).squeeze(1), -(probabilities * logs).sum(dim=1), active))
    return action.squeeze(1)
