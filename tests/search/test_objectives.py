"""Objectives and constraints as users write them, and the volume that measures a front."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.objectives import UNITS, devices_of, goals_of, hypervolume, parse_constraint, parse_objective, parse_objectives
from spaces.errors import UserError

DEVICES = ["x86", "pi-5"]


def one_line(call: object, *arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)  # type: ignore[operator]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_objectives_know_their_unit_direction_and_source() -> None:
    accuracy, latency, size = parse_objectives(["accuracy", "latency@pi-5", "size"], DEVICES)
    assert (accuracy.direction, accuracy.unit, accuracy.device, accuracy.loss(0.9)) == ("maximize", "", None, -0.9)
    assert (latency.direction, latency.unit, latency.device, latency.loss(3.0)) == ("minimize", "us", "pi-5", 3.0)
    assert (latency.name, latency.quantity, size.unit) == ("latency@pi-5", "latency", "B")
    for name in UNITS:
        assert parse_objective(name if name != "latency" else "latency@x86", DEVICES).source


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["speed"], ["'speed'", "accuracy", "latency@x86|pi-5", "memory"]),
        (["latency", "latency@pi-5"], ["each once"]),  # on the pi-5 they are one
        (["latency@"], ["latency, latency@x86|pi-5"]),
        (["latency@phone"], ["'phone'", "x86|pi-5", "device=[...]"]),
        (["accuracy@x86"], ["'accuracy@x86'"]),
        (["memory@x86"], ["'memory@x86'", "peak_memory, peak_memory@x86|pi-5"]),
        (["peak_memory", "peak_memory@x86"], ["each once"]),
        (["Accuracy"], ["'Accuracy'"]),
        (["accuracy "], ["'accuracy '"]),
        ([""], ["''"]),
        ([], ["[]", "one or more"]),
        (["size", "size"], ["each once"]),
        ([5], ["5"]),
        ([None], ["None"]),
    ],
)
def test_wrong_objectives_take_one_line(texts: list[str], words: list[str]) -> None:
    message = one_line(parse_objectives, texts, DEVICES)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("text", "name", "upper", "bound"),
    [
        ("latency@x86<=2ms", "latency@x86", True, 2000.0),
        ("latency@x86 <= 2 ms", "latency@x86", True, 2000.0),
        ("latency@pi-5<=0.5s", "latency@pi-5", True, 5e5),
        ("latency@x86<=250us", "latency@x86", True, 250.0),
        ("latency@x86<=1e3us", "latency@x86", True, 1000.0),
        ("size<=200kB", "size", True, 200e3),
        ("size<=200KiB", "size", True, 204800.0),
        ("memory<=1.5MB", "memory", True, 1.5e6),
        ("peak_memory@pi-5<=1.5MB", "peak_memory@pi-5", True, 1.5e6),
        ("accuracy>=95%", "accuracy", False, 0.95),
        ("accuracy>=0.95", "accuracy", False, 0.95),
        ("macs<=3M", "macs", True, 3e6),
        ("macs<=3000", "macs", True, 3e3),
        ("parameters>=.5k", "parameters", False, 500.0),
    ],
)
def test_constraints(text: str, name: str, upper: bool, bound: float) -> None:
    constraint = parse_constraint(text, DEVICES)
    assert (constraint.objective.name, constraint.upper, constraint.text) == (name, upper, text)
    assert constraint.bound == pytest.approx(bound)
    worse, better = (1.1, 0.9) if upper else (0.9, 1.1)
    assert constraint.violation(bound * worse) == pytest.approx(0.1)
    assert constraint.violation(bound * better) == pytest.approx(-0.1)
    assert constraint.violation(constraint.bound) <= 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("latency@x86<2ms", ["latency@x86<=2ms"]),
        ("latency@x86=2ms", ["OBJECTIVE<=NUMBER UNIT"]),
        ("latency@x86<=", ["OBJECTIVE<=NUMBER UNIT"]),
        ("<=2ms", ["OBJECTIVE<=NUMBER UNIT"]),
        ("3", ["OBJECTIVE<=NUMBER UNIT"]),
        ("latency@x86<=two ms", ["OBJECTIVE<=NUMBER UNIT"]),
        ("latency@x86<=2 fortnights", ["'fortnights'", "us, ms, s"]),
        ("latency@x86<=2", ["unit ''", "us, ms, s"]),
        ("latency@x86<=2kB", ["'kB'", "us, ms, s"]),
        ("size<=2ms", ["'ms'", "B, kB, MB, KiB, MiB"]),
        ("size<=2", ["unit ''"]),
        ("macs<=2ms", ["none, k, M, G"]),
        ("latency@phone<=2ms", ["'phone'"]),
        ("speed<=2ms", ["'speed'"]),
        ("latency@x86<=1.2.3ms", ["'1.2.3'", "not a number"]),
        ("latency@x86<=--ms", ["not a number"]),
        ("latency@x86<=1e999us", ["1e999"]),
        ("accuracy>=95", ["95"]),  # meant in per cent; as a share it can never hold
    ],
)
def test_wrong_constraints_take_one_line(text: str, words: list[str]) -> None:
    message = one_line(parse_constraint, text, DEVICES)
    assert all(word in message for word in words), message


def test_without_a_device_a_latency_is_that_of_each_device() -> None:
    objectives = parse_objectives(["accuracy", "latency"], DEVICES)
    constraints = [parse_constraint(text, DEVICES) for text in ("latency <= 2ms", "latency@x86<=9ms", "size<=20kB")]
    assert [o.is_open for o in objectives] == [False, True]
    x86, pi = goals_of(objectives, constraints, DEVICES)
    assert (x86.name, x86.devices) == ("x86", ("x86",))
    assert (pi.name, pi.devices) == ("pi-5", ("pi-5",))
    assert [o.name for o in pi.objectives] == ["accuracy", "latency@pi-5"]
    assert [c.text for c in pi.constraints] == ["latency@pi-5 <= 2ms", "latency@x86<=9ms", "size<=20kB"]
    assert [c.bound for c in pi.constraints] == [2e3, 9e3, 20e3]
    assert [c.objective.device for c in pi.constraints] == ["pi-5", "x86", None]
    assert {o.name for o in pi.values} == {"accuracy", "latency@pi-5", "latency@x86", "size"}
    assert [c.text for c in x86.constraints] == ["latency@x86 <= 2ms", "latency@x86<=9ms", "size<=20kB"]


def test_a_peak_memory_is_that_of_each_device_too() -> None:
    goals = goals_of(parse_objectives(["accuracy", "peak_memory"], DEVICES), [], DEVICES)
    assert [[o.name for o in goal.objectives] for goal in goals] == [["accuracy", f"peak_memory@{name}"] for name in DEVICES]
    assert devices_of(goals, "peak_memory") == DEVICES
    (one,) = goals_of(parse_objectives(["accuracy"], DEVICES), [parse_constraint("peak_memory@x86<=9kB", DEVICES)], DEVICES)
    assert devices_of([one], "peak_memory") == ["x86"]


def test_an_open_constraint_alone_makes_a_study_per_device() -> None:
    goals = goals_of(parse_objectives(["accuracy", "size"], DEVICES), [parse_constraint("latency<=2ms", DEVICES)], DEVICES)
    assert [[c.text for c in goal.constraints] for goal in goals] == [["latency@x86<=2ms"], ["latency@pi-5<=2ms"]]


@pytest.mark.parametrize(
    "names", [["accuracy", "latency@x86"], ["accuracy", "latency@x86", "latency@pi-5"], ["accuracy", "size"]]
)
def test_when_nothing_is_open_one_front_serves_all_devices(names: list[str]) -> None:
    (goal,) = goals_of(parse_objectives(names, DEVICES), [], DEVICES)
    assert (goal.name, goal.devices) == ("x86+pi-5", ("x86", "pi-5"))
    assert [o.name for o in goal.objectives] == names
    assert {"latency@x86", "latency@pi-5"} <= {o.name for o in goal.values}  # each device's winners are timed


def test_with_one_device_an_open_latency_is_its_own() -> None:
    opened, closed = (
        goals_of(parse_objectives(["accuracy", name], ["x86"]), [], ["x86"]) for name in ("latency", "latency@x86")
    )
    assert opened == closed


@settings(max_examples=200)
@given(st.text(alphabet="latencysize@x86<>=0123456789.eE+-%kBMms \n", max_size=30))
def test_any_text_is_a_constraint_or_one_line(text: str) -> None:
    try:
        parsed, message = parse_constraint(text, DEVICES), ""
    except UserError as error:
        parsed, message = None, str(error)
    assert "\n" not in message
    assert parsed is None or math.isfinite(parsed.bound)


# -- hypervolume --------------------------------------------------------------------------------------------------------------

COORDINATE = st.integers(0, 6)


def counted(points: list[list[int]], reference: list[int]) -> int:
    """Unit cubes below the reference that some point dominates."""
    cubes = itertools.product(*(range(r) for r in reference))
    return sum(any(all(p <= c for p, c in zip(point, cube, strict=True)) for point in points) for cube in cubes)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 4).flatmap(lambda d: st.lists(st.lists(COORDINATE, min_size=d, max_size=d), max_size=7)))
def test_hypervolume_is_the_number_of_dominated_cubes(points: list[list[int]]) -> None:
    dimensions = len(points[0]) if points else 2
    reference = [5] * dimensions
    assert hypervolume(points, reference) == pytest.approx(counted(points, reference))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 3), st.integers(1, 12))
def test_hypervolume_against_random_points(seed: int, dimensions: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    points = rng.uniform(0, 1.1, (count, dimensions))
    darts = rng.uniform(0, 1, (20_000, dimensions))
    hit = (points[:, None, :] <= darts).all(axis=2).any(axis=0).mean()
    volume = hypervolume(points.tolist(), [1.0] * dimensions)
    assert abs(volume - hit) < 0.02
    assert hypervolume([*points.tolist(), points[0].tolist()], [1.0] * dimensions) == pytest.approx(volume)
    better = points.copy()
    better[0] -= 0.05
    assert hypervolume(better.tolist(), [1.0] * dimensions) >= volume - 1e-12


def test_points_beyond_the_reference_count_nothing() -> None:
    assert hypervolume([], [1.0, 1.0]) == 0.0
    assert hypervolume([[1.0, 0.0], [2.0, -5.0]], [1.0, 1.0]) == 0.0
    assert hypervolume([[0.25]], [1.0]) == 0.75
