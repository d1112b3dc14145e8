"""The predicted size of a model file against the file."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latency_lut.lowering import applicable
from latency_lut.network import build_model, random_weights
from predictors.size import model_bytes
from spaces.choice import Architecture
from spaces.mobile import MobileSpace

SHARE = 0.03

DEFAULT = MobileSpace(
    channels=3,
    classes=10,
    resolutions=[24, 32],
    stem=[8, 16],
    stages=[
        {"widths": [16, 24], "depths": [1, 2], "stride": 2},
        {"widths": [32, 48], "depths": [1, 2], "stride": 2},
        {"widths": [64, 128], "depths": [1, 2]},
    ],
    expansions=[1, 2, 4],
    kernels=[3, 5, 7],
    head=[96, 128],
    precisions=["w8a8", "fp32"],
    sparsities=["dense", "group@1/2", "group@1/4"],
)


def file_bytes(space: MobileSpace, architecture: Architecture, lowerings: list[str]) -> int:
    """The file as the exporter writes it, which tells its architecture."""
    network = space.network(architecture)
    weights = {node.name: random_weights(node.spec, np.random.default_rng(1)) for node in network.nodes}
    metadata = {"netwright.architecture": architecture.to_json(), "netwright.device": "x86"}
    return len(build_model(network, lowerings, weights, metadata=metadata))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_within_three_percent_of_the_file(seed: int, spread: bool) -> None:
    rng = np.random.default_rng(seed)
    architecture = DEFAULT.sample_spread(rng) if spread else DEFAULT.sample(rng)
    network = DEFAULT.network(architecture)
    lowerings = [names[int(rng.integers(len(names)))] for names in map(applicable, network.layers)]
    assert model_bytes(network, lowerings) == pytest.approx(file_bytes(DEFAULT, architecture, lowerings), rel=SHARE)


def test_weights_in_few_bits_too() -> None:
    options = {"stages": [{"widths": [32, 64], "depths": [1]}], "expansions": [4], "kernels": [3], "head": [256]}
    precisions = ["w4a8", "w2a8", "ternary_a8", "w4", "w2", "w8a8"]
    space = MobileSpace(3, 10, [16], [16], precisions=precisions, sparsities=["dense", "group@1/2"], **options)
    rng = np.random.default_rng(0)
    for _ in range(10):
        architecture = space.sample(rng)
        network = space.network(architecture)
        lowerings = [names[int(rng.integers(len(names)))] for names in map(applicable, network.layers)]
        assert model_bytes(network, lowerings) == pytest.approx(file_bytes(space, architecture, lowerings), rel=SHARE)


@pytest.mark.parametrize("which", ["tiny_space", "small_space"])
def test_the_smallest_networks_too(which: str, request: pytest.FixtureRequest) -> None:
    space, rng = request.getfixturevalue(which), np.random.default_rng(0)
    for architecture in [space.largest(), space.smallest(), *(space.sample(rng) for _ in range(10))]:
        network = space.network(architecture)
        lowerings = [applicable(spec)[-1] for spec in network.layers]
        assert model_bytes(network, lowerings) == pytest.approx(file_bytes(space, architecture, lowerings), rel=SHARE)


def test_other_lowerings_have_other_sizes() -> None:
    architecture = DEFAULT.architecture(
        {c.name: "group@1/4" if c.kind == "sparsity" else c.options[-1] for c in DEFAULT.choices}
    )
    network = DEFAULT.network(architecture)
    dense = [applicable(spec)[0] for spec in network.layers]
    gathered = [applicable(spec)[-1] for spec in network.layers]
    assert model_bytes(network, gathered) < 0.6 * model_bytes(network, dense)


def test_another_number_of_lowerings_is_refused() -> None:
    network = DEFAULT.network(DEFAULT.smallest())
    with pytest.raises(ValueError, match=r"shorter|longer"):
        model_bytes(network, [applicable(spec)[0] for spec in network.layers][:-1])
