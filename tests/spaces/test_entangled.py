"""The forward pass with gates: for gates that pick one network it is that network; what cannot be mixed is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from spaces.choice import Architecture, Choice
from spaces.entangled import Entangled
from spaces.errors import UserError
from spaces.mobile import MobileSpace
from spaces.supernet import Supernet
from spaces.transformer import TransformerSpace

IMAGES = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def space_of(**changes: Any) -> MobileSpace:
    settings: dict[str, Any] = {
        "channels": 1,
        "classes": 10,
        "resolutions": [8],
        "stem": [8, 16],
        "stages": [
            {"widths": [8, 16], "depths": [1, 2], "stride": 2},
            {"widths": [24, 32], "depths": [1, 2, 3]},
        ],
        "expansions": [2, 3],
        "kernels": [3, 5, 7],
        "head": [16, 24],
        "precisions": ["w8a8", "w4", "fp32"],
        "sparsities": ["dense", "group@1/2", "group@1/4"],
    }
    return MobileSpace(**{**settings, **changes})


def picked(choices: Sequence[Choice], architecture: Architecture) -> dict[str, int]:
    return {c.name: c.options.index(architecture.get(c.name, c.options[0])) for c in choices}


def gates_of(choices: Sequence[Choice], architecture: Architecture) -> dict[str, torch.Tensor]:
    at = picked(choices, architecture)
    return {c.name: torch.eye(len(c.options))[at[c.name]] for c in choices}


def plain(supernet: Supernet, architecture: Architecture) -> torch.Tensor:
    supernet.activate(architecture)
    return supernet(IMAGES)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("activations", [["relu"], ["hard_swish"]])
def test_gates_that_pick_one_network_compute_it(seed: int, activations: list[str]) -> None:
    torch.manual_seed(seed)
    space = space_of(activations=activations)
    supernet = Supernet(space)
    entangled = Entangled(supernet)
    architecture = space.sample(np.random.default_rng(seed))
    opened = {name: [at] for name, at in picked(entangled.choices, architecture).items()}
    found = entangled.outputs(IMAGES, gates_of(entangled.choices, architecture), opened)
    torch.testing.assert_close(found, plain(supernet, architecture), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_closed_options_do_not_show(seed: int) -> None:
    """All options take part with a gate of 0. Masks and ranges are those of the widest network, so floats are compared."""
    torch.manual_seed(seed)
    space = space_of()
    supernet = Supernet(space)
    entangled = Entangled(supernet, {"precision": "fp32", "sparsity": "dense"})
    architecture = space.replaced(space.sample(np.random.default_rng(seed)), precision="fp32", sparsity="dense")
    found = entangled.outputs(IMAGES, gates_of(entangled.choices, architecture))
    torch.testing.assert_close(found, plain(supernet, architecture), rtol=1e-4, atol=1e-4)


def test_gradients_of_gates_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    space = space_of(precisions=["fp32"], sparsities=["dense", "group@1/2"])
    supernet = Supernet(space).double()
    entangled = Entangled(supernet)
    gates = {c.name: torch.rand(len(c.options)).double().softmax(dim=0) for c in entangled.choices}

    def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
        return entangled.outputs(IMAGES.double(), values).square().mean()

    leaves = {name: gate.clone().requires_grad_() for name, gate in gates.items()}
    loss(leaves).backward()
    for name in ("stem.width", "stage1.depth", "stage2.block1.kernel", "stage1.block1.expansion", "head.sparsity"):
        step = torch.zeros_like(gates[name])
        step[0] = 1e-6
        with torch.no_grad():
            up, down = (loss({**gates, name: gates[name] + sign * step}) for sign in (1.0, -1.0))
        gradient = leaves[name].grad
        assert gradient is not None
        assert float(gradient[0]) == pytest.approx(float(up - down) / 2e-6, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"resolutions": [8, 16]},
            "resolution=8 cannot be relaxed: it changes the height of stem; hold it.*held.resolution=16",
        ),
        ({"expansions": [1, 2]}, "stage1.block1.expansion=1 cannot be relaxed: stage1.block1.depthwise reads another tensor"),
        ({"ranks": ["1/4", "full"]}, "rank=1/4 cannot be relaxed: it changes the rank of"),
        ({"precisions": ["w8d8", "fp32"]}, "stem.precision=w8d8 cannot be relaxed: the layer rounds its input"),
        ({"activations": ["relu", "hard_swish"]}, "stage1.activation=relu cannot be relaxed: it changes the activation"),
        ({"sparsities": ["dense", "group@1/4"], "hidden": ["iso_flop"]}, "is wider then than in the largest network; hold it"),
        ({"width_per_block": True}, "reads another tensor then; hold it.*held.width="),
    ],
)
def test_what_cannot_be_mixed_is_told_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Entangled(Supernet(space_of(**changes)))
    assert "\n" not in str(caught.value)


def test_what_cannot_be_mixed_can_be_held() -> None:
    space = space_of(resolutions=[8, 16])
    entangled = Entangled(Supernet(space), {"resolution": 8})
    assert all(choice.kind != "resolution" for choice in entangled.choices)
    architecture = space.replaced(space.smallest(), resolution=8)
    found = entangled.outputs(IMAGES, gates_of(entangled.choices, architecture))
    assert found.shape == (16, 10)
    with pytest.raises(UserError, match=r"resolution is held at 12; resolution has 8, 16"):
        Entangled(Supernet(space), {"resolution": 12})
    with pytest.raises(UserError, match="held kind heads is none of the space"):
        Entangled(Supernet(space), {"heads": 2})


def test_of_a_transformer_depth_ratio_and_precision_are_mixed() -> None:
    torch.manual_seed(0)
    space = TransformerSpace(1, 10, [8], 2, [16], [1, 2], [1, 2], [8], [1, 2], ["w8a8", "fp32"])
    supernet = Supernet(space)
    with pytest.raises(UserError, match="heads=1 cannot be relaxed"):
        Entangled(supernet)
    entangled = Entangled(supernet, {"heads": 2})
    architecture = space.replaced(space.sample(np.random.default_rng(1)), heads=2)
    opened = {name: [at] for name, at in picked(entangled.choices, architecture).items()}
    found = entangled.outputs(IMAGES, gates_of(entangled.choices, architecture), opened)
    torch.testing.assert_close(found, plain(supernet, architecture), rtol=1e-4, atol=1e-4)
