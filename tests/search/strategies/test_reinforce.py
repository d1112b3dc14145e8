"""The policy: what it decides, that it learns the reward, and that what it learned holds in a larger space."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from search.left_out import LeftOut
from search.strategies import Reinforce
from search.strategies.policy import Plan, Policy
from search.strategies.reinforce import reward
from search.study import StudySettings
from spaces.errors import UserError
from spaces.mobile import MobileSpace


def space_of(widths: list[int], depths: list[int], stages: int) -> MobileSpace:
    return MobileSpace(
        channels=1,
        classes=10,
        resolutions=[8],
        stem=[8],
        stages=[{"widths": widths, "depths": depths, "stride": 2} for _ in range(stages)],
        expansions=[1, 2],
        kernels=[3, 5],
        head=[16, 32],
        precisions=["w8a8", "fp32"],
        sparsities=["dense"],
    )


SMALL, LARGE = space_of([8, 16], [1, 2], 1), space_of([8, 16, 24, 32], [1, 2, 3], 3)


def drawn(policy: Policy, space: MobileSpace, count: int = 64, **how: Any) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return policy.rollouts(Plan(space, ["depth"]), torch.zeros(count), generator, **how).architectures


def test_the_reward_is_the_papers() -> None:
    assert reward(0.9, 0.9, 0.25, 1.0) == pytest.approx(0.75 * 1.25)
    assert reward(0.45, 0.9, 0.25, 1.0, 2.0) == pytest.approx(0.75 * 1.25 / 4)
    assert reward(0.9, 0.9, 1.0, 1.0) == 0.0
    assert reward(0.9, 0.9, 1.5, 1.0) < 0.0
    assert reward(0.9, 0.9, 50.0, 1.0) == -3.0


def test_first_it_only_removes() -> None:
    torch.manual_seed(0)
    policy = Policy(Plan(LARGE, ["depth"]).kinds)
    removed = drawn(policy, LARGE, shrinks=False)
    deep = {tuple(a[f"stage{s}.depth"] for s in (1, 2, 3)) for a in removed}
    assert len(deep) > 8
    assert all(LARGE.completed({f"stage{s}.depth": a[f"stage{s}.depth"] for s in (1, 2, 3)}) == a for a in removed)
    shrunk = drawn(policy, LARGE)
    assert len(set(shrunk)) == 64
    assert {a["stage1.width"] for a in shrunk} == {8, 16, 24, 32}


def test_probabilities_are_those_of_the_actions() -> None:
    """Over all that can happen in a space of one binary choice and one removable layer they sum up to 1."""
    space = MobileSpace(1, 10, [8], [8], [{"widths": [8], "depths": [1, 2]}], [2], [3], [8, 16], ["fp32"], ["dense"])
    torch.manual_seed(0)
    policy, found = Policy(Plan(space, ["depth"]).kinds), {}
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        rollouts = policy.rollouts(Plan(space, ["depth"]), torch.zeros(1), generator)
        found[rollouts.architectures[0]] = float(rollouts.log_probability.detach().exp())
    assert len(found) == 4
    assert sum(found.values()) == pytest.approx(1.0, abs=1e-5)


def test_it_does_not_choose_what_is_left_out() -> None:
    unpaid = LeftOut({c.name: {"w8a8": "fp32"} for c in LARGE.choices if c.kind == "precision"})
    policy, generator = Policy(Plan(LARGE, ["depth"]).kinds), torch.Generator().manual_seed(0)
    found = policy.rollouts(Plan(LARGE, ["depth"], unpaid), torch.zeros(32), generator).architectures
    assert not any("w8a8" in a.values() for a in found)


def trained(search: Callable[..., Any], goal_with: Callable[..., Any], **how: Any) -> Reinforce:
    made: list[Reinforce] = []

    def new() -> Reinforce:
        made.append(Reinforce(powers=[1.0], batch=24, **how))
        return made[-1]

    search(new, goal_with(("accuracy", "parameters")), settings=StudySettings(960, 2, 4, 0))
    return made[0]


def shares(policy: Policy, space: MobileSpace) -> float:
    """Mean share of the largest network's weights that is left."""
    largest = space.network(space.largest()).parameters
    return float(np.mean([space.network(a).parameters / largest for a in drawn(policy, space)]))


def test_it_learns_and_what_it_learned_holds_in_a_larger_space(
    search: Callable[..., Any], goal_with: Callable[..., Any], tmp_path: Path
) -> None:
    """With the paper's reward small networks pay in the made-up accuracies: the policy learns to compress."""
    strategy, path = trained(search, goal_with), tmp_path / "policy.safetensors"
    path.write_bytes(strategy.files()["policy.safetensors"])
    for space in (SMALL, LARGE):
        torch.manual_seed(0)
        kinds = Plan(space, ["depth"]).kinds
        fresh, taught = Policy(kinds), Policy(kinds)
        taught.start_from(path)
        assert shares(taught, space) < 0.8 * shares(fresh, space)
    # What a run starts from is part of what its study follows from.
    keys = {Reinforce().key, Reinforce(policy=str(path)).key}
    assert len(keys) == 2
    path.write_bytes(Policy(kinds).stored())
    assert Reinforce(policy=str(path)).key not in keys


def test_what_is_no_policy_is_told(tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    torch.manual_seed(0)
    content = Policy(["width", "depth"]).stored()
    for damaged in (b"", content[:200], content.replace(b"netwright policy 1", b"netwright policy 9")):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"is no policy of a run .*; give another, or null") as caught:
            Reinforce(policy=str(path))
        assert "\n" not in str(caught.value)
