"""What every space promises. To bring a new space under these tests add an instance to `SPACES` and a tiny one to `TINY`."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import math
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import spaces as spaces_room
from spaces.choice import Architecture, Choice
from spaces.layers import INPUT, LayerSpec, Network, NetworkBuilder
from spaces.mobile import MobileSpace
from spaces.nni import NniSpace
from spaces.space import Space
from spaces.transformer import TransformerSpace

CHECKOUT = Path(__file__).resolve().parents[2]
SAMPLES = 40


def mobile(**options: object) -> Space:
    defaults: dict[str, object] = {
        "channels": 3,
        "classes": 10,
        "resolutions": [15, 16, 24],
        "stem": [8, 12],
        "stages": [
            {"widths": [8, 12], "depths": [1, 2]},
            {"widths": [12, 16], "depths": [1, 2, 3], "stride": 2},
            {"widths": [16, 24], "depths": [2], "stride": 2},
        ],
        "expansions": [1, 2, 4],
        "kernels": [3, 5, 7],
        "head": [32, 48],
        "precisions": ["w8a8", "fp32"],
        "sparsities": ["dense", "group@1/2", "group@1/4"],
    }
    return MobileSpace(**{**defaults, **options})  # type: ignore[arg-type]


def transformer(**options: object) -> Space:
    defaults: dict[str, object] = {
        "channels": 3,
        "classes": 10,
        "resolutions": [9, 16],
        "patch": 4,
        "widths": [8, 12],
        "depths": [1, 3],
        "heads": [1, 2, 3],
        "head_widths": [4, 8],
        "ratios": [1, 2],
        "precisions": ["w8a8", "fp32"],
    }
    return TransformerSpace(**{**defaults, **options})  # type: ignore[arg-type]


def nni(resolutions: list[int], **model: object) -> Space:
    return NniSpace({"_target_": "tests.spaces.nni_spaces.Small", "inputs": False, **model}, 3, 10, resolutions)


ONE_STAGE = [{"widths": [4, 6], "depths": [1], "stride": 2}]


class ToySpace(Space):
    """Choices three deep, of mixed types, with an option that two parents' values share."""

    name = "toy"
    choices = (
        Choice("depth", (1, 2, 3)),
        Choice("layer1.type", ("plain", "wide"), ordered=False),
        Choice("layer1.width", (4, 8, 16), when=("layer1.type", ("wide",))),
        Choice("layer2.type", ("plain", "wide", "wider"), ordered=False, when=("depth", (2, 3))),
        Choice("layer2.width", (4, 8), when=("layer2.type", ("wide", "wider"))),
        Choice("layer2.kernel", (1, 3), when=("layer2.width", (8,))),
        Choice("layer3.width", (2, 4), when=("depth", (3,))),
    )

    def network(self, architecture: Architecture) -> Network:
        a = architecture
        net = NetworkBuilder(2, 6, 6)
        x = net.add("layer1", "conv2d", INPUT, a.integer("layer1.width") if "layer1.width" in a else 2)
        if a.integer("depth") >= 2:
            width = a.integer("layer2.width") * (2 if a["layer2.type"] == "wider" else 1) if "layer2.width" in a else 1
            kernel = a.integer("layer2.kernel") if "layer2.kernel" in a else 1
            x = net.add("layer2", "conv2d", x, width, kernel=kernel)
        if a.integer("depth") == 3:
            net.add("layer3", "conv2d", x, a.integer("layer3.width"))
        return net.build()


SPACES: dict[str, Callable[[], Space]] = {
    "mobile": mobile,
    "mobile_width_per_block": lambda: mobile(width_per_block=True),
    "mobile_strided_stem": lambda: mobile(stem_stride=2, channels=1, expansions=[2, 3]),
    "mobile_float": lambda: mobile(precisions=["fp32"], sparsities=["dense"], expansions=[1]),
    "mobile_narrow": lambda: mobile(max_width=32, precisions=["w8a8"]),
    "transformer": transformer,
    "transformer_float": lambda: transformer(precisions=["fp32"], patch=1, depths=[2]),
    "toy": ToySpace,
}
WITH_NNI = importlib.util.find_spec("nni") is not None  # it has no wheels for some processors
if WITH_NNI:
    SPACES["nni"] = lambda: nni([8, 12], channels=3)
TINY: dict[str, Callable[[], Space]] = {
    "mobile": lambda: mobile(
        resolutions=[8], stem=[4], stages=ONE_STAGE, expansions=[1, 2], kernels=[3], head=[8], sparsities=["dense", "group@1/2"]
    ),
    "mobile_depths": lambda: mobile(
        resolutions=[8, 9],
        stem=[4],
        stages=[{"widths": [4], "depths": [1, 3]}],
        expansions=[2],
        kernels=[3],
        head=[8],
        precisions=["fp32"],
        sparsities=["dense", "group@1/2"],
    ),
    "mobile_width_per_block": lambda: mobile(
        resolutions=[8],
        stem=[4],
        stages=[{"widths": [4, 6], "depths": [1, 2]}, {"widths": [4], "depths": [1, 2]}],
        expansions=[1, 2],
        kernels=[3],
        head=[8],
        precisions=["fp32"],
        sparsities=["dense"],
        width_per_block=True,
    ),
    "transformer": lambda: transformer(
        resolutions=[8], widths=[4], depths=[1, 2], heads=[1, 2], ratios=[2], precisions=["fp32"]
    ),
    "toy": ToySpace,
}

if WITH_NNI:
    TINY["nni"] = lambda: nni([8], channels=3, widths=[4])


@cache
def space_of(name: str) -> Space:
    return SPACES[name]()


@cache
def samples_of(name: str) -> tuple[Architecture, ...]:
    """Uniform and spread samples, and both ends."""
    space, rng = space_of(name), np.random.default_rng(0)
    drawn = [draw(rng) for draw in (space.sample, space.sample_spread) for _ in range(SAMPLES)]
    return (space.smallest(), space.largest(), *drawn)


@cache
def enumeration_of(name: str) -> frozenset[Architecture]:
    space = TINY[name]()
    products = itertools.product(*(choice.options for choice in space.choices))
    names = [choice.name for choice in space.choices]
    return frozenset(space.architecture(dict(zip(names, values, strict=True))) for values in products)


every_space = pytest.mark.parametrize("name", SPACES)
every_shared_space = pytest.mark.parametrize("name", [name for name in SPACES if name != "nni"])
every_tiny_space = pytest.mark.parametrize("name", TINY)


def test_every_space_of_the_room_is_under_test() -> None:
    modules = [importlib.import_module(f"spaces.{module.name}") for module in pkgutil.iter_modules(spaces_room.__path__)]
    classes = {
        entry
        for module in modules
        for _, entry in inspect.getmembers(module, inspect.isclass)
        if issubclass(entry, Space) and not inspect.isabstract(entry)
    }
    assert classes
    if not WITH_NNI:
        classes.remove(NniSpace)
    assert classes <= {type(space_of(name)) for name in SPACES}
    assert classes <= {type(factory()) for factory in TINY.values()}


# -- networks -----------------------------------------------------------------------------------------------------------------


@every_space
def test_every_sample_builds(name: str) -> None:
    space = space_of(name)
    for architecture in samples_of(name):
        network = space.network(architecture)
        assert network.layers == space.layers(architecture)
        assert len({node.name for node in network.nodes}) == len(network.nodes) > 0
        assert min(network.macs, network.parameters, network.weight_bytes, network.peak_activation_bytes) > 0


@every_shared_space
def test_every_layer_fits_into_the_largest_networks_layer_of_the_same_name(name: str) -> None:
    """A supernet slices the largest network's weights."""
    space = space_of(name)
    largest = {node.name: node.spec for node in space.network(space.largest()).nodes}
    for architecture in samples_of(name):
        for node in space.network(architecture).nodes:
            outer = largest[node.name]
            assert node.spec.operator == outer.operator
            for what in ("in_channels", "out_channels", "kernel", "height", "width"):
                assert getattr(node.spec, what) <= getattr(outer, what), (node.name, what)
            assert node.spec.stride == outer.stride
            assert node.spec.activation == outer.activation
            assert (node.spec.groups == 1) == (outer.groups == 1)


@every_shared_space
def test_layers_keep_their_order(name: str) -> None:
    space = space_of(name)
    order = [node.name for node in space.network(space.largest()).nodes]
    for architecture in samples_of(name):
        names = [node.name for node in space.network(architecture).nodes]
        assert names == [layer for layer in order if layer in set(names)]


@every_space
@pytest.mark.parametrize("what", ["macs", "parameters"])
def test_the_ends_are_the_ends(name: str, what: str) -> None:
    space = space_of(name)
    values = [getattr(space.network(architecture), what) for architecture in samples_of(name)]
    assert getattr(space.network(space.smallest()), what) == min(values)
    assert getattr(space.network(space.largest()), what) == max(values)
    assert min(values) < max(values)


@every_space
def test_walking_is_deterministic(name: str) -> None:
    space, again = space_of(name), SPACES[name]()
    for architecture in samples_of(name)[:10]:
        network = space.network(architecture)
        assert space.network(architecture) == network
        assert again.network(Architecture.from_json(architecture.to_json())) == network
        assert again.network(architecture).fingerprint == network.fingerprint


@pytest.mark.parametrize("name", [name for name in TINY if name != "toy"])  # toy has equal networks on purpose
def test_distinct_architectures_are_distinct_networks(name: str) -> None:
    space = TINY[name]()
    assert len({space.network(architecture).fingerprint for architecture in enumeration_of(name)}) == space.size()


# -- sampling and counting ----------------------------------------------------------------------------------------------------


@every_tiny_space
def test_size_is_the_number_of_distinct_architectures(name: str) -> None:
    assert TINY[name]().size() == len(enumeration_of(name))


@every_space
def test_size_is_exact_however_large(name: str) -> None:
    size = space_of(name).size()
    assert type(size) is int
    assert size <= math.prod(len(choice.options) for choice in space_of(name).choices)


@every_tiny_space
def test_samples_are_members(name: str) -> None:
    space, rng = TINY[name](), np.random.default_rng(0)
    drawn = {draw(rng) for draw in (space.sample, space.sample_spread) for _ in range(100)}
    assert drawn <= enumeration_of(name)
    assert {space.smallest(), space.largest()} <= enumeration_of(name)


@every_space
@pytest.mark.parametrize("method", ["sample", "sample_spread"])
def test_sampling_reaches_every_option(name: str, method: str) -> None:
    space, rng = space_of(name), np.random.default_rng(0)
    seen = {item for _ in range(250) for item in getattr(space, method)(rng).items()}
    assert seen == {(choice.name, option) for choice in space.choices for option in choice.options}


@every_space
def test_samples_near_an_architecture_differ_from_it_in_as_many_choices_as_asked(name: str) -> None:
    space, rng = space_of(name), np.random.default_rng(0)
    for architecture in samples_of(name)[:20]:
        assert space.sample_near(rng, architecture, 0.0) == architecture
        near, far = ([space.sample_near(rng, architecture, change) for _ in range(20)] for change in (0.1, 1.0))
        kept = [np.mean([sum(other.get(k) == v for k, v in architecture.items()) for other in each]) for each in (near, far)]
        assert kept[0] > kept[1]


@every_space
def test_one_kind_of_choices_is_drawn_together(name: str) -> None:
    """The choices of other kinds stay as they are where there are such; what a deeper network adds is drawn."""
    space, rng = space_of(name), np.random.default_rng(0)
    found = set()
    for architecture in samples_of(name)[:20]:
        for _ in range(2 * len(space.kinds)):
            other = space.sample_kind(rng, architecture)
            assert space.architecture(other) == other
            both = [c for c in space.choices if c.name in architecture and c.name in other]
            differs = {c.kind for c in both if other[c.name] != architecture[c.name]}
            assert len(differs) <= 1
            found |= differs
    assert found == {c.kind for c in space.choices if len(c.options) > 1}


def test_spread_samples_reach_the_ends_and_uniform_ones_do_not() -> None:
    """The reason for `sample_spread`."""
    space, rng = space_of("mobile"), np.random.default_rng(0)
    low, high = (math.log(space.network(end).macs) for end in (space.smallest(), space.largest()))

    def spread(method: Callable[[np.random.Generator], Architecture]) -> float:
        sizes = [(math.log(space.network(method(rng)).macs) - low) / (high - low) for _ in range(200)]
        return float(np.quantile(sizes, 0.95) - np.quantile(sizes, 0.05))

    assert spread(space.sample_spread) > 1.1 * spread(space.sample)


@every_space
@pytest.mark.parametrize("method", ["sample", "sample_spread"])
def test_sampling_follows_the_seed(name: str, method: str) -> None:
    draw = getattr(space_of(name), method)
    first, same, other = ([draw(rng) for _ in range(5)] for rng in map(np.random.default_rng, (1, 1, 2)))
    assert first == same
    assert first != other


def test_an_unconditional_choice_is_drawn_uniformly() -> None:
    space, rng = space_of("mobile"), np.random.default_rng(0)
    drawn = [space.sample(rng)["resolution"] for _ in range(900)]
    assert all(abs(drawn.count(option) - 300) < 75 for option in (15, 16, 24))  # 5 standard deviations


# -- architectures ------------------------------------------------------------------------------------------------------------


@every_space
def test_exactly_the_active_choices_are_there(name: str) -> None:
    space = space_of(name)
    for architecture in samples_of(name):
        for choice in space.choices:
            active = choice.when is None or architecture.get(choice.when[0]) in choice.when[1]
            assert (choice.name in architecture) is active
            assert not active or architecture[choice.name] in choice.options


@every_space
def test_values_of_inactive_choices_do_not_matter(name: str) -> None:
    space, rng = space_of(name), np.random.default_rng(0)
    for architecture in samples_of(name)[:20]:
        noise = {choice.name: choice.options[rng.integers(len(choice.options))] for choice in space.choices}
        assert space.architecture({**noise, **architecture}) == architecture
        assert space.architecture(architecture) == architecture


@every_space
def test_architectures_round_trip_through_json(name: str) -> None:
    space = space_of(name)
    for architecture in samples_of(name):
        assert space.architecture(Architecture.from_json(architecture.to_json())) == architecture


@every_space
def test_a_foreign_architecture_is_refused_in_one_line(name: str) -> None:
    space = space_of(name)
    whole = dict(space.largest())
    first = next(iter(whole))
    wrong: list[tuple[str, dict[str, int | float | str]]] = [
        ("stranger", {**whole, "stranger": 1}),
        (first, {key: value for key, value in whole.items() if key != first}),
        (first, {**whole, first: 12345}),
        (first, {**whole, first: "nothing"}),
    ]
    for named, values in wrong:
        with pytest.raises(ValueError, match=named) as caught:
            space.architecture(values)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["mobile", "toy"])
@pytest.mark.parametrize("kind", [float, bool])
def test_a_value_of_another_type_is_refused_or_becomes_the_option(name: str, kind: type) -> None:
    """`3.0` and `True` compare equal to `3` and `1`; kept as they are they break the JSON form and the walk."""
    space = space_of(name)
    for end in (space.smallest(), space.largest()):
        for key, value in end.items():
            if not isinstance(value, int) or kind(value) != value:
                continue
            try:
                made = space.architecture({**end, key: kind(value)})
            except ValueError:
                continue
            assert made.to_json() == end.to_json()
            assert space.network(made) == space.network(end)


# -- features and fingerprint -------------------------------------------------------------------------------------------------


@every_space
def test_features_are_one_hot(name: str) -> None:
    space, architectures = space_of(name), list(samples_of(name))
    features = space.encode(architectures)
    assert features.shape == (len(architectures), len(space.feature_names))
    assert features.dtype == np.float32
    assert set(np.unique(features)) <= {0.0, 1.0}
    assert len(set(space.feature_names)) == len(space.feature_names)
    for row, architecture in zip(features, architectures, strict=True):
        on = {feature for feature, value in zip(space.feature_names, row, strict=True) if value}
        assert on == {f"{choice}={option}" for choice, option in architecture.items()}
    assert space.encode([]).shape == (0, len(space.feature_names))


@every_tiny_space
def test_features_tell_architectures_apart(name: str) -> None:
    rows = TINY[name]().encode(list(enumeration_of(name)))
    assert len(np.unique(rows, axis=0)) == len(enumeration_of(name))


@every_space
def test_the_fingerprint_repeats(name: str) -> None:
    assert SPACES[name]().fingerprint == space_of(name).fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"channels": 1},
        {"classes": 11},
        {"resolutions": [15, 16, 20, 24]},
        {"stem": [8, 10, 12]},
        {"stem_stride": 2},
        {"stages": [{"widths": [8, 12], "depths": [1, 2]}]},
        {"expansions": [1, 3, 4]},
        {"kernels": [3, 7]},
        {"head": [32, 40, 48]},
        {"precisions": ["fp32"]},
        {"sparsities": ["dense", "group@1/4"]},
        {"max_width": 12},
        {"width_per_block": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_fingerprint_changes_with_every_option(change: dict[str, object]) -> None:
    if "max_width" in change:
        change = {**change, "stem": [8], "head": [12], "stages": [{"widths": [8, 12, 16], "depths": [1]}]}
        assert mobile(**change).fingerprint != mobile(**{**change, "max_width": 16}).fingerprint
        return
    assert mobile(**change).fingerprint != space_of("mobile").fingerprint


def test_fingerprints_are_distinct() -> None:
    assert len({space_of(name).fingerprint for name in SPACES}) == len(SPACES)


def test_the_fingerprint_is_the_same_in_another_process() -> None:
    """A run is resumed by fingerprint; strings hash differently in every process."""
    code = (
        "from spaces.mobile import MobileSpace\n"
        "print(MobileSpace(1, 3, [8], [4], [{'widths': [4, 6], 'depths': [1]}], [1, 2], [3, 5], [8], ['w8a8', 'fp32'],"
        " ['dense', 'group@1/2', 'group@1/4', 'group@3/4']).fingerprint)"
    )
    here = MobileSpace(
        1,
        3,
        [8],
        [4],
        [{"widths": [4, 6], "depths": [1]}],
        [1, 2],
        [3, 5],
        [8],
        ["w8a8", "fp32"],
        ["dense", "group@1/2", "group@1/4", "group@3/4"],
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == here.fingerprint


def test_kinds_group_choices_by_meaning() -> None:
    assert space_of("toy").kinds == ("depth", "type", "width", "kernel")


def test_specs_repeat_across_networks() -> None:
    """A table is keyed by specs: a layer in the same circumstances must give the same key."""
    space = space_of("mobile")
    counted: dict[LayerSpec, int] = {}
    for architecture in samples_of("mobile"):
        for spec in space.layers(architecture):
            counted[spec] = counted.get(spec, 0) + 1
    assert max(counted.values()) > 10
