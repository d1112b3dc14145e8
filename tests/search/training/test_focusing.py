"""Focusing: a supernet trained further near predicted fronts, in the code and as a stage of a run that may be killed."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from search.training import Distillation
from search.training.focusing import Budget, FocusSettings, NearFronts
from spaces.errors import UserError
from spaces.mobile import MobileSpace
from spaces.supernet import Supernet

Call = Callable[..., Any]
Job = tuple[str, ...]
NO_LOSSES: dict[str, Any] = {"trained": [], "losses": []}


def test_networks_are_drawn_near_the_fronts_and_of_all_sizes(small_space: MobileSpace) -> None:
    rng = np.random.default_rng(0)
    fronts = [small_space.smallest(), small_space.graded(0.5)]
    exact = NearFronts(fronts, 1.0, 0.0, 0.0)
    assert {exact.draw(small_space, rng) for _ in range(50)} == set(fronts)
    often = [NearFronts(fronts, 0.5, 0.0, 0.0).draw(small_space, rng) in fronts for _ in range(400)]
    assert 0.4 < np.mean(often) < 0.65
    largest = small_space.network(small_space.largest()).macs
    away = [small_space.network(NearFronts(fronts, 0.0, 0.0, 0.0).draw(small_space, rng)).macs for _ in range(200)]
    assert max(away) > 0.5 * largest


def test_choices_of_a_kind_are_drawn_together(small_space: MobileSpace) -> None:
    """At most one kind differs from the front's network, and every kind does in some draws."""
    rng, front = np.random.default_rng(0), small_space.largest()
    strategy, changed = NearFronts([front], 1.0, 0.0, 0.5), []
    for _ in range(400):
        drawn = strategy.draw(small_space, rng)
        changed.append({c.kind for c in small_space.choices if c.name in drawn and drawn[c.name] != front[c.name]})
    assert max(map(len, changed)) == 1
    assert set.union(*changed) == set(small_space.kinds)
    assert 0.25 < np.mean([bool(kinds) for kinds in changed]) <= 0.55


def test_what_may_be_spent_is_spent(small_space: MobileSpace) -> None:
    """Fronts that are predicted anew have networks of another size: the epochs that are left are as many as these can take."""
    small, large = small_space.smallest(), small_space.largest()
    epoch_macs = {a: 3 * small_space.network(a).macs * 100 for a in (small, large)}
    strategy = NearFronts([small], 1.0, 0.0, 0.0)
    macs = 20 * epoch_macs[small] + 9 * epoch_macs[large]
    budget = Budget(macs, rounds=2, images=100, seed=0)
    total = budget.macs / epoch_macs[small]
    assert budget.plan(small_space, strategy, 0, 0.0) == round(total)
    assert strategy.until == round(total / 2)
    spent = strategy.until * epoch_macs[small]
    strategy.renew([large])
    epochs = budget.plan(small_space, strategy, strategy.until, spent)
    assert strategy.until == epochs  # the last round
    left = epochs - round(total / 2)
    assert spent + left * epoch_macs[large] == pytest.approx(budget.macs, abs=0.5 * epoch_macs[large])


@pytest.mark.parametrize("rounds", [1, 2, 3, 5])
def test_rounds_take_the_same_arithmetic_and_all_of_it(small_space: MobileSpace, rounds: int) -> None:
    rng = np.random.default_rng(rounds)
    budget = Budget(1e10, rounds=rounds, images=100, seed=0)
    strategy, spent, taken, done = NearFronts([small_space.sample_spread(rng)], 1.0, 0.0, 0.0), 0.0, [], 0
    while True:
        epochs = budget.plan(small_space, strategy, done, spent)
        each = 300.0 * small_space.network(strategy.rounds[-1][0]).macs
        taken.append((strategy.until - done) * each)
        spent, done = spent + taken[-1], strategy.until
        if done == epochs:
            break
        strategy.renew([small_space.sample_spread(rng)])
    assert len(strategy.rounds) == rounds
    assert spent == pytest.approx(1e10, rel=0.02)
    assert taken == pytest.approx([np.mean(taken)] * rounds, rel=0.1)


def test_a_budget_that_is_too_small_is_one_epoch(small_space: MobileSpace) -> None:
    strategy = NearFronts([small_space.smallest()], 1.0, 0.0, 0.0)
    assert Budget(1.0, rounds=3, images=100, seed=0).plan(small_space, strategy, 4, 1e9) == 5
    assert strategy.until == 5


def test_the_fronts_of_a_checkpoint_are_trained_further(small_space: MobileSpace) -> None:
    first, second = [small_space.smallest()], [small_space.graded(0.5), small_space.largest()]
    before, after = NearFronts(first, 1.0, 0.0, 0.0), NearFronts(first, 1.0, 0.0, 0.0)
    for strategy in (before, after):
        strategy.prepare(Supernet(small_space), Distillation())
    before.renew(second)
    before.until = 7
    before._steps.extend([(first[0], torch.tensor(1.5)), (second[1], torch.tensor(0.5))])
    assert {before.draw(small_space, np.random.default_rng(i)) for i in range(20)} == set(second)
    after.load_state_dict(before.state_dict())
    assert (after.rounds, after.until) == ([first, second], 7)
    assert after.trained == ([first[0], second[1]], [1.5, 0.5])


@pytest.mark.parametrize(
    "state",
    [
        *(None, 3, {}, {"rounds": [["{}"]]}),
        *({"rounds": r, "until": 1, **NO_LOSSES} for r in ([], [[]], [["no JSON"]], [['{"depth": 99}']], [[1]])),
    ],
)
def test_fronts_of_a_checkpoint_that_are_none(small_space: MobileSpace, state: object) -> None:
    strategy = NearFronts([small_space.smallest()], 1.0, 0.0, 0.0)
    strategy.prepare(Supernet(small_space), Distillation())
    with pytest.raises(UserError):
        strategy.load_state_dict({"_extra_state": state})


@pytest.mark.parametrize("losses", [[], ["low"], [1.0, 2.0], None])
def test_losses_of_a_checkpoint_that_are_none(small_space: MobileSpace, losses: object) -> None:
    strategy, one = NearFronts([small_space.smallest()], 1.0, 0.0, 0.0), small_space.smallest().to_json()
    strategy.prepare(Supernet(small_space), Distillation())
    with pytest.raises(UserError, match="checkpoint of the stage focus is damaged"):
        strategy.load_state_dict({"_extra_state": {"rounds": [[one]], "until": 1, "trained": [one], "losses": losses}})


@pytest.mark.parametrize(
    "values",
    [
        {"share": -0.5},
        {"share": True},
        {"learning_rate": -1},
        {"near": 1.5},
        {"change": "some"},
        {"rounds": 0},
        {"together": 1.1},
        {"candidates": 0},
        {"networks": 1.5},
    ],
)
def test_settings_that_are_not_allowed(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"focus.{next(iter(values))} is .*; allowed are"):
        FocusSettings(**values)


def test_the_stage_focuses_and_the_study_searches_what_it_made(call: Call, finished: Path, tmp_path: Path) -> None:
    """Killed while it trains, it goes on to the same weights; what was searched before is there again without it."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    for folder in (run, whole):
        shutil.copytree(finished, folder)
    settings = ("stages=[focus,study,export,report]", "focus.share=3", "focus.candidates=40", "focus.learning_rate=0.02")
    assert call(tmp_path, "run=run", *settings, kill_before=["focus/last.ckpt", 2]).status == -signal.SIGKILL
    ended = call(tmp_path, "run=run", *settings)
    assert ended.status == 0, ended.err
    assert "epochs near the fronts of x86, predicted 6 times" in ended.out
    assert call(tmp_path, "run=whole", *settings).status == 0
    ours, theirs = (load_file(folder / "focus" / "supernet.safetensors") for folder in (run, whole))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert (run / "front.csv").read_text() == (whole / "front.csv").read_text() != (finished / "front.csv").read_text()

    general, focused = (pq.read_table(run / name).to_pylist() for name in ("evaluations.parquet", "focus/evaluations.parquet"))
    initial = [{r["architecture"]: r["accuracy"] for r in rows if r["source"] == "initial"} for rows in (general, focused)]
    assert initial[0].keys() == initial[1].keys()
    assert np.mean(list(initial[1].values())) > np.mean(list(initial[0].values()))  # three epochs teach a supernet little
    facts = json.loads((run / "stages.json").read_text())["focus"]["facts"]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["focus"] == facts
    assert summary["fingerprints"]["focus"]
    before = json.loads((finished / "summary.json").read_text())
    assert summary["supernet"]["macs"] == before["supernet"]["macs"] + facts["macs"]
    assert len(facts["fronts"]) == 6
    assert facts["macs"] == pytest.approx(3 * before["supernet"]["macs"], rel=0.2)  # of a few epochs only whole ones
    assert "predicted for x86, 6 times" in (run / "report.html").read_text()
    assert all(winner["verified"] for winner in summary["winners"])

    again = call(tmp_path, "run=run", *settings)
    assert "focus: done before" in again.out
    assert "study: done before" in again.out

    # A share of the supernet's cost is one of all that it cost.
    assert call(tmp_path, "run=whole", "stages=[finish]", "finish.share=0.5").status == 0
    finish = json.loads((whole / "stages.json").read_text())["finish"]["facts"]
    spent = sum(network["macs"] for network in finish["networks"]) + finish["teacher_macs"]
    assert spent == pytest.approx(0.5 * summary["supernet"]["macs"] * len(finish["networks"]), rel=0.2)


def test_a_supernet_that_is_trained_again_is_no_longer_focused(call: Call, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    assert call(tmp_path, "run=run", "stages=[focus]", "focus.share=1", "focus.candidates=40").status == 0
    ended = call(tmp_path, "run=run", "supernet.epochs=2", "stages=[supernet,predictors,study]")
    assert ended.status == 0, ended.err
    weights = json.loads((tmp_path / "run" / "stages.json").read_text())
    assert weights["study"]["output"] != json.loads((finished / "stages.json").read_text())["study"]["output"]
    table = pq.read_table(tmp_path / "run" / "evaluations.parquet").to_pylist()
    assert {"initial", "random"} < {row["source"] for row in table}  # the study evaluated with these weights


def test_a_sweep_over_budgets_shares_one_focused_supernet(call: Call, tiny_job: Job, tmp_path: Path) -> None:
    own = tuple(text for text in tiny_job if not text.startswith("focus."))
    budgets = 'constraints=["latency<=1ms"],["latency<=2ms"]'
    stages = "stages=[tables,supernet,predictors,focus,study]"
    ended = call(tmp_path, "-m", *own, "focus.candidates=40", stages, budgets)
    assert ended.status == 0, ended.err
    assert ended.out.count("taken from") == 4
    assert ended.out.count("epochs near") == 1
    files = list((tmp_path / "runs").glob("sweep-*/*/focus/supernet.safetensors"))
    assert len(files) == 2
    assert files[0].read_bytes() == files[1].read_bytes()
