"""Fronts: what dominates, which candidates are chosen, and near misses."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from search.candidates import Candidate
from search.fronts import choose, evenly, nearest_miss, nondominated
from search.objectives import parse_constraint, parse_objectives
from spaces.choice import Architecture

OBJECTIVES = parse_objectives(["accuracy", "size"], ["x86"])


def candidate(index: int, accuracy: float, size: float, violation: float = 0.0) -> Candidate:
    return Candidate(Architecture({"index": index}), {"accuracy": accuracy, "size": size}, violation)


POINTS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(-1, 3)), max_size=30)


def candidates_of(points: list[tuple[int, int, int]]) -> list[Candidate]:
    return [candidate(i, a / 8, float(s), float(v)) for i, (a, s, v) in enumerate(points)]


def dominates(a: Candidate, b: Candidate) -> bool:
    x, y = ((-c.values["accuracy"], c.values["size"]) for c in (a, b))
    return all(p <= q for p, q in zip(x, y, strict=True)) and x != y


@given(POINTS)
def test_nondominated_are_those_that_nothing_dominates(points: list[tuple[int, int, int]]) -> None:
    candidates = candidates_of(points)
    expected = [c for c in candidates if not any(dominates(other, c) for other in candidates)]
    assert nondominated(candidates, OBJECTIVES) == expected


@given(POINTS, st.integers(1, 12))
def test_what_is_chosen(points: list[tuple[int, int, int]], count: int) -> None:
    candidates = candidates_of(points)
    chosen = choose([*candidates, *candidates], OBJECTIVES, count)
    by_architecture = {c.architecture: c for c in candidates}
    feasible = [c for c in candidates if c.feasible]
    assert len(set(chosen)) == len(chosen)
    assert len(chosen) == min(count, len(feasible or candidates))
    picked = [by_architecture[a] for a in chosen]
    if feasible:
        assert all(c.feasible for c in picked)
        front = nondominated(feasible, OBJECTIVES)
        # A front is taken whole before anything behind it, and only from it when it does not fit.
        assert sum(c in front for c in picked) == min(count, len(front))
        for c in picked:
            assert c in front or len(front) <= count
    assert choose(candidates, OBJECTIVES, count) == chosen


def test_a_long_front_is_thinned_out_from_end_to_end() -> None:
    front = [candidate(i, i / 100, float(i)) for i in range(50)]
    chosen = choose(front, OBJECTIVES, 5)
    assert [a["index"] for a in chosen] == [0, 12, 24, 37, 49]


def test_when_nothing_is_feasible_the_nearest_are_chosen() -> None:
    candidates = [candidate(i, 0.5, float(i), violation=i + 1.0) for i in range(100)]
    assert {a["index"] for a in choose(candidates, OBJECTIVES, 3)} <= set(range(12))


def test_the_nearest_miss_names_what_binds() -> None:
    constraints = [parse_constraint("size<=10kB", ["x86"]), parse_constraint("accuracy>=90%", ["x86"])]
    candidates = [
        Candidate(
            Architecture({"i": i}),
            {"accuracy": a, "size": s},
            max(c.violation(v) for c, v in zip(constraints, (s, a), strict=True)),
        )
        for i, (a, s) in enumerate([(0.45, 5e3), (0.89, 11e3), (0.95, 40e3)])
    ]
    miss = nearest_miss(candidates, constraints)
    assert (miss["constraint"], miss["value"], miss["unit"]) == ("size<=10kB", 11e3, "B")
    assert "size<=10kB" in str(miss["text"])
    assert "1.1e+04 B" in str(miss["text"])


def test_what_stands_alone_is_taken_as_often_as_a_crowd() -> None:
    """Sizes of 1 to 2 a hundred times, and one of 4, to which a quarter of the logarithm's range is nearest."""
    front = [candidate(i, i / 200, 1.0 + i / 100) for i in range(101)] + [candidate(101, 0.9, 4.0)]
    taken = evenly(front, OBJECTIVES, 200)
    assert len(taken) == 200
    assert (taken[0], taken[-1]) == (front[0].architecture, front[-1].architecture)
    assert abs(taken.count(front[-1].architecture) - 50) <= 1
    assert {front[0].architecture, front[100].architecture, front[101].architecture} <= set(taken)


def test_each_cost_has_its_share() -> None:
    """Along one cost a candidate stands alone, along the other another one does."""
    objectives = parse_objectives(["accuracy", "size", "macs"], ["x86"])
    rows = [(0.1, 1.0, 8.0), (0.2, 1.1, 7.9), (0.3, 1.2, 1.0), (0.4, 9.0, 8.1)]
    found = [
        Candidate(Architecture({"index": i}), {"accuracy": a, "size": s, "macs": m}, 0.0) for i, (a, s, m) in enumerate(rows)
    ]
    taken = evenly(found, objectives, 100)
    assert len(taken) == 100
    counts = [taken.count(c.architecture) for c in found]
    assert counts[2] >= 20  # few multiply-accumulates, alone
    assert counts[3] >= 20  # large, alone


def test_without_a_cost_the_best_are_taken() -> None:
    front = [candidate(i, i / 10, 1.0) for i in range(5)]
    assert evenly(front, parse_objectives(["accuracy"], ["x86"]), 2) == choose(
        front, parse_objectives(["accuracy"], ["x86"]), 2
    )
