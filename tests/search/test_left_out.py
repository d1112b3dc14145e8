"""What a study leaves out: only what does not pay on its devices and is not wanted for another reason."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler

from latency_lut.device import Device
from latency_lut.lowering import applicable
from latency_lut.pays import is_integer
from latency_lut.table import LatencyTable, pair_key
from latency_lut.timing import Timing
from search.candidates import Values, distributions_of, propose
from search.left_out import NOTHING, LeftOut, left_out
from search.objectives import parse_constraint, parse_objectives
from spaces.choice import Architecture
from spaces.mobile import MobileSpace

DEVICES = ["x86", "wasm"]


def table_of(space: MobileSpace, device: Device, integer: float, gathered: float) -> LatencyTable:
    """A table of nearly all layers of a space, with integer arithmetic and gathering so many times as fast as dense float."""
    rng = np.random.default_rng(1)
    networks = [space.network(space.sample(rng)) for _ in range(3000)]
    table = LatencyTable.empty(space, device)
    for spec in dict.fromkeys(spec for network in networks for spec in network.layers):
        for name in applicable(spec):
            us = 10.0 / (integer if is_integer(spec) else 1.0) / (gathered if name.startswith("gather") else 1.0)
            table.entries[pair_key(spec, name)] = Timing(us, 0.1, 9)
    return table


@pytest.fixture(scope="module")
def useless(small_space: MobileSpace, x86: Device) -> LatencyTable:
    """Nothing but dense float pays."""
    return table_of(small_space, x86, 0.4, 0.5)


@pytest.fixture(scope="module")
def sparse_pays(small_space: MobileSpace, x86: Device) -> LatencyTable:
    return table_of(small_space, x86, 0.4, 2.0)


def found(
    space: MobileSpace,
    tables: dict[str, LatencyTable],
    objectives: Sequence[str] = ("accuracy", "latency@x86"),
    constraints: Sequence[str] = (),
) -> LeftOut:
    parsed = [parse_constraint(text, DEVICES) for text in constraints]
    return left_out(space, tables, parse_objectives(objectives, DEVICES), parsed)


def kinds(what: LeftOut) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name in what.instead}


def test_what_does_not_pay_is_left_out(small_space: MobileSpace, useless: LatencyTable, sparse_pays: LatencyTable) -> None:
    what = found(small_space, {"x86": useless})
    judged = [choice for choice in small_space.choices if choice.kind in ("precision", "sparsity")]
    assert {choice.name: what.options(choice) for choice in judged} == {
        choice.name: ("fp32",) if choice.kind == "precision" else ("dense",) for choice in judged
    }
    assert all(what.options(choice) == choice.options for choice in small_space.choices if choice not in judged)
    assert what.count == sum(len(choice.options) - 1 for choice in judged)
    assert what.considered == sum(len(choice.options) for choice in small_space.choices)
    assert what.devices == ("x86",)
    assert kinds(found(small_space, {"x86": sparse_pays})) == {"precision"}


@pytest.mark.parametrize(
    ("objectives", "constraints", "expected"),
    [
        (["accuracy", "latency@x86"], ["latency@x86<=1ms", "accuracy>=50%"], {"precision", "sparsity"}),
        (["accuracy"], ["latency@x86<=1ms"], {"precision", "sparsity"}),
        (["accuracy", "latency@x86", "size"], [], set()),
        (["accuracy", "latency@x86"], ["size<=50kB"], set()),
        (["accuracy", "latency@x86", "macs"], [], {"precision"}),
        (["accuracy", "latency@x86"], ["parameters<=10k"], {"precision"}),
        (["accuracy", "latency@x86"], ["memory<=10kB"], {"sparsity"}),
        (["accuracy", "size"], [], set()),
        (["accuracy"], [], set()),
    ],
)
def test_what_makes_something_smaller_that_is_wanted_stays(
    small_space: MobileSpace, useless: LatencyTable, objectives: list[str], constraints: list[str], expected: set[str]
) -> None:
    assert kinds(found(small_space, {"x86": useless}, objectives, constraints)) == expected


def test_of_several_devices_all_have_to_agree(
    small_space: MobileSpace, useless: LatencyTable, sparse_pays: LatencyTable
) -> None:
    tables = {"x86": useless, "wasm": sparse_pays}
    both = found(small_space, tables, ["accuracy", "latency@x86", "latency@wasm"])
    assert (kinds(both), both.devices) == ({"precision"}, ("x86", "wasm"))
    assert both.instead == found(small_space, tables, ["accuracy", "latency@wasm", "latency@x86"]).instead
    assert kinds(found(small_space, tables)) == {"precision", "sparsity"}  # a device whose latency does not count has no say


def test_sentences_name_kind_option_and_layers() -> None:
    what = LeftOut(
        {"stem.precision": {"w8a8": "fp32"}, "head.precision": {"w8a8": "fp32"}, "head.sparsity": {"group@1/2": "dense"}}
    )
    assert what.sentences() == ["precision w8a8 of stem, head", "sparsity group@1/2 of head"]
    assert what.count == 3
    assert NOTHING.sentences() == []


SAMPLERS = {
    "nsga2": NSGAIISampler(seed=0, population_size=20),
    "tpe": TPESampler(seed=0, multivariate=False),
    "random": RandomSampler(seed=0),
}


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_no_candidate_has_what_is_left_out_whatever_the_seeds_have(
    small_space: MobileSpace, useless: LatencyTable, name: str
) -> None:
    what = found(small_space, {"x86": useless})
    sampler: BaseSampler = SAMPLERS[name]

    def predict(architectures: Sequence[Architecture]) -> list[Values]:
        networks = [small_space.network(a) for a in architectures]
        # Left to itself, a sampler would want int8 and sparsity: they are better in both respects.
        return [{"accuracy": -n.weight_bytes / 1e6, "latency@x86": float(n.macs)} for n in networks]

    objectives = parse_objectives(["accuracy", "latency@x86"], DEVICES)
    seeds = [small_space.smallest(), small_space.largest()]
    candidates = propose(small_space, predict, objectives, [], sampler, 75, seeds, batch=20, left_out=what)
    assert len(candidates) == 75
    for candidate in candidates:
        assert small_space.architecture(candidate.architecture) == candidate.architecture
        assert all(spec.sparsity == "dense" and not is_integer(spec) for spec in small_space.layers(candidate.architecture))
    assert [c.architecture for c in candidates[:2]] == [
        small_space.architecture(what.replaced(seeds[0])),
        small_space.largest(),
    ]
    assert len({c.architecture for c in candidates}) > 20


def test_the_distributions_hold_what_remains(small_space: MobileSpace, sparse_pays: LatencyTable) -> None:
    what = found(small_space, {"x86": sparse_pays})
    full, restricted = distributions_of(small_space), distributions_of(small_space, what)
    assert set(full) == set(restricted)
    assert {name for name in full if full[name] != restricted[name]} == set(what.instead)
