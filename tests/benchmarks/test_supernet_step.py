"""Supernets of other tools compute what the networks compute that they extract, and a tool that is missing is told."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from benchmarks.defaults import device_and_space
from benchmarks.elastic_peers import INSTALL, peer_of
from benchmarks.supernet_step import NetworkAlone, largest_difference
from benchmarks.supernet_step_peers import COMMON
from spaces.mobile import MobileSpace

MODULES = {"modelopt": "modelopt", "nni": "nni"}


@pytest.fixture(scope="module")
def space() -> MobileSpace:
    _, found = device_and_space(changes=COMMON)
    assert isinstance(found, MobileSpace)
    return found


@pytest.mark.parametrize("name", MODULES)
def test_a_peer_computes_the_same_networks_or_says_how_to_get_it(name: str, space: MobileSpace) -> None:
    if importlib.util.find_spec(MODULES[name]) is None:
        with pytest.raises(SystemExit, match=f"error: peer {name} is not installed .*run: pip install") as caught:
            peer_of(name, space)
        assert str(caught.value).endswith(INSTALL[name])
        assert "\n" not in str(caught.value)
        return
    peer = peer_of(name, space)
    rng = np.random.default_rng(0)
    architectures = [space.largest(), space.smallest(), *(space.sample(rng) for _ in range(6))]
    images = torch.randn(4, space.channels, 8, 8, generator=torch.manual_seed(0))
    assert largest_difference(peer, peer.extract, architectures, images) < 1e-5
    for architecture in architectures:
        theirs, ours = peer.extract(architecture), NetworkAlone(space.network(architecture))
        assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())


def test_an_unknown_peer_is_one_line(space: MobileSpace) -> None:
    with pytest.raises(SystemExit, match="error: peer 'darts'; allowed are modelopt, nni"):
        peer_of("darts", space)
