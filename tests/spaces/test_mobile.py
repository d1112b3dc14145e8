"""The space `mobile`: what its options mean, and what it refuses."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from spaces.choice import Option
from spaces.errors import UserError
from spaces.layers import INPUT, LayerSpec, Network, Node
from spaces.mask_strategies import create_mask_training
from spaces.mobile import MobileSpace
from spaces.supernet import Supernet
from spaces.weights import Estimators

OPTIONS: dict[str, object] = {
    "channels": 3,
    "classes": 7,
    "resolutions": [16],
    "stem": [8, 12],
    "stages": [{"widths": [8, 12], "depths": [1, 2]}, {"widths": [12, 16], "depths": [1, 3], "stride": 2}],
    "expansions": [1, 2, 4],
    "kernels": [3, 5],
    "head": [24],
    "precisions": ["w8a8", "fp32"],
    "sparsities": ["dense", "group@1/2"],
}


def mobile(**changes: object) -> MobileSpace:
    return MobileSpace(**{**OPTIONS, **changes})  # type: ignore[arg-type]


def largest_values(space: MobileSpace) -> dict[str, Option]:
    return {choice.name: choice.options[-1] for choice in space.choices}


def network(space: MobileSpace, **values: Option) -> Network:
    """The largest network with some choices changed; `__` stands for the dot."""
    changes = {name.replace("__", "."): value for name, value in values.items()}
    return space.network(space.architecture({**largest_values(space), **changes}))


def nodes(net: Network) -> dict[str, Node]:
    return {node.name: node for node in net.nodes}


def test_the_largest_network_by_hand() -> None:
    specs = [(n.name, n.spec.in_channels, n.spec.out_channels, n.spec.height, n.inputs) for n in network(mobile()).nodes]
    expected = [("stem", 3, 12, 16, (INPUT,))]
    x, width, rows = "stem", 12, 16
    for stage, depth, out in ((1, 2, 12), (2, 3, 16)):
        for block in range(1, depth + 1):
            name, stride = f"stage{stage}.block{block}", 2 if (stage, block) == (2, 1) else 1
            residual = (x,) if stride == 1 and width == out else ()
            expected.append((f"{name}.expand", width, 4 * width, rows, (x,)))
            expected.append((f"{name}.depthwise", 4 * width, 4 * width, rows, (f"{name}.expand",)))
            rows //= stride
            expected.append((f"{name}.project", 4 * width, out, rows, (f"{name}.depthwise", *residual)))
            x, width = f"{name}.project", out
    expected += [("head", 16, 24, 8, (x,)), ("pool", 24, 24, 8, ("head",)), ("classifier", 24, 7, 1, ("pool",))]
    assert specs == expected


def test_activations_are_where_mobilenet_has_them() -> None:
    for node in network(mobile()).nodes:
        linear = node.name.endswith("project") or node.name in ("pool", "classifier")
        assert node.spec.activation == ("none" if linear else "relu"), node.name


def test_a_block_that_is_not_there_has_no_choices() -> None:
    space = mobile()
    shallow = space.architecture({**largest_values(space), "stage1.depth": 1, "stage2.depth": 1})
    assert not [name for name in shallow if "block2" in name or "block3" in name]
    assert "stage1.block1.kernel" in shallow
    assert not [node.name for node in space.network(shallow).nodes if "block2" in node.name]


def test_between_two_depths_the_blocks_come_together() -> None:
    """Depths 1 and 3: there is no network with exactly two blocks, and blocks 2 and 3 depend on the same depth."""
    space = mobile()
    when = {choice.name: choice.when for choice in space.choices}
    assert when["stage2.block2.kernel"] == when["stage2.block3.kernel"] == ("stage2.depth", (3,))
    assert when["stage2.block1.kernel"] is None


def test_at_expansion_one_there_is_no_expanding_convolution() -> None:
    space = mobile()
    net = nodes(network(space, stage1__block2__expansion=1))
    assert "stage1.block2.expand" not in net
    assert net["stage1.block2.depthwise"].inputs == ("stage1.block1.project",)
    assert net["stage1.block2.project"].inputs == ("stage1.block2.depthwise", "stage1.block1.project")
    architecture = space.architecture({**largest_values(space), "stage1.block2.expansion": 1})
    assert not [name for name in architecture if name.startswith("stage1.block2.expand.")]
    assert not [choice.name for choice in mobile(expansions=[1]).choices if ".expand." in choice.name]


def test_residuals_only_where_shapes_agree() -> None:
    for values in ({}, {"stem__width": 8}, {"stage1__width": 8}):
        net = network(mobile(), **values)
        source = {node.name: node for node in net.nodes}
        for node in net.nodes:
            if not node.name.endswith(".project"):
                assert len(node.inputs) == 1
                continue
            first = source.get(node.name.replace("project", "expand"), source[node.name.replace("project", "depthwise")])
            before = source[first.inputs[0]].spec
            here = (node.spec.out_channels, node.spec.out_height)
            assert (len(node.inputs) == 2) is ((before.out_channels, before.out_height) == here)
            assert node.inputs[1:] in ((), first.inputs)


def test_a_width_of_its_own_for_every_block() -> None:
    space = mobile(width_per_block=True)
    net = nodes(network(space, stage2__block2__width=12))
    widths = [net[f"stage2.block{block}.project"].spec.out_channels for block in (1, 2, 3)]
    assert widths == [16, 12, 16]
    assert [len(net[f"stage2.block{block}.project"].inputs) for block in (2, 3)] == [1, 1]
    assert "stage2.width" not in {choice.name for choice in space.choices}


@pytest.mark.parametrize("layer", ["stem", "stage1.block1.expand", "stage1.block2.depthwise", "stage2.block3.project", "head"])
def test_a_precision_belongs_to_one_layer(layer: str) -> None:
    specs = {node.name: node.spec for node in network(mobile(), **{f"{layer}.precision": "w8a8"}).nodes}
    assert [name for name, spec in specs.items() if spec.integer] == [layer]


@pytest.mark.parametrize("layer", ["stage1.block1.expand", "stage2.block3.project", "head"])
def test_a_sparsity_belongs_to_one_layer_that_mixes_channels(layer: str) -> None:
    specs = {node.name: node.spec for node in network(mobile(), **{f"{layer}.sparsity": "group@1/2"}).nodes}
    assert [name for name, spec in specs.items() if spec.sparsity != "dense"] == [layer]


def test_what_can_be_sparse() -> None:
    sparse = {choice.name.rsplit(".", 1)[0] for choice in mobile().choices if choice.kind == "sparsity"}
    for name in sparse:
        assert name == "head" or name.endswith((".expand", ".project"))


def test_every_convolution_has_its_own_precision() -> None:
    names = {node.name for node in network(mobile()).nodes} - {"pool"}
    assert {choice.name for choice in mobile().choices if choice.kind == "precision"} == {f"{name}.precision" for name in names}


def test_kernel_and_resolution_reach_the_layers() -> None:
    net = nodes(network(mobile(resolutions=[15, 16]), stage2__block1__kernel=3, resolution=15))
    assert net["stem"].spec.height == 15
    assert net["stage2.block1.depthwise"].spec.kernel == 3
    assert net["stage2.block2.depthwise"].spec.kernel == 5
    assert net["stage2.block1.depthwise"].spec.out_height == 8
    assert net["pool"].spec.height == 8


def test_stem_stride() -> None:
    assert network(mobile(stem_stride=2)).nodes[0].spec == LayerSpec(
        "conv2d", 3, 12, 16, 16, 3, 2, activation="relu", output_bits=32
    )


def test_options_ascend_whatever_order_they_are_given_in() -> None:
    mixed = mobile(
        stem=[12, 8],
        kernels=[5, 3],
        expansions=[4, 1, 2, 2],
        precisions=["fp32", "w8a8"],
        sparsities=["group@1/2", "dense"],
        stages=[{"widths": [12, 8], "depths": [2, 1]}, {"widths": [16, 12], "depths": [3, 1], "stride": 2}],
    )
    assert mixed.choices == mobile().choices
    assert mixed.fingerprint == mobile().fingerprint


def test_max_width_leaves_out_what_is_wider() -> None:
    space = mobile(max_width=12, head=[12, 24])
    for choice in space.choices:
        assert choice.kind != "width" or max(int(option) for option in choice.options) <= 12
    assert mobile(max_width=24).choices == mobile().choices


def test_two_spellings_of_one_sparsity_are_not_two_options() -> None:
    """Equal networks are equal: `1/2` and `2/4` keep the same weights."""
    space = mobile(sparsities=["dense", "group@1/2", "group@2/4", "group@0.5"])
    assert len(space.sparsities) == 2


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"resolutions": []}, "resolutions"),
        ({"resolutions": 16}, "resolutions"),
        ({"resolutions": [0]}, "resolutions"),
        ({"stem": []}, "stem"),
        ({"stem": [-8]}, "stem"),
        ({"head": [24.0]}, "head"),
        ({"head": [True]}, "head"),
        ({"head": "24"}, "head"),
        ({"head": None}, "head"),
        ({"kernels": []}, "kernels"),
        ({"kernels": [3, 4]}, "kernels"),
        ({"kernels": ["3"]}, "kernels"),
        ({"expansions": []}, "expansions"),
        ({"expansions": [0, 1]}, "expansions"),
        ({"precisions": [4]}, "precisions"),
        ({"precisions": [8, 16, 32]}, "precisions"),
        ({"precisions": []}, "precisions"),
        ({"sparsities": []}, "sparsities"),
        ({"sparsities": ["group"]}, "sparsity 'group'"),
        ({"sparsities": ["dense", "spread@1/2"]}, "spread@1/2"),
        ({"stem": [9]}, "stem"),
        ({"head": [24, 25]}, "head"),
        ({"max_width": 4}, "max_width=4"),
        ({"sparsities": ["2:4"], "head": [18]}, "head are [18]: 2:4 sparsity needs input channels divisible by 4, got 18"),
        ({"sparsities": ["dense", 124]}, "quote 2:4"),
        ({"stages": []}, "stages"),
        ({"stages": [{"widths": [], "depths": [1]}]}, r"stages[0].widths"),
        ({"stages": [{"widths": [8], "depths": [1]}, {"widths": [8], "depths": [0]}]}, r"stages[1].depths"),
        ({"stages": [{"widths": [7], "depths": [1]}]}, r"stages[0].widths"),
    ],
    ids=str,
)
def test_what_makes_no_space_is_refused_in_one_line(changes: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=re.escape(named)) as caught:
        mobile(**changes)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"stages": [{"depths": [1]}]},
        {"stages": [{"widths": [8]}]},
        {"stages": [{"widths": [8], "depths": [1], "strides": 2}]},
        {"stages": [{"widths": [8], "depths": [1], "stride": 0}]},
        {"stages": [{"widths": [8], "depths": [1], "stride": -2}]},
        {"stages": [{"widths": [8], "depths": [1], "stride": "two"}]},
        {"stages": [[8, 1]]},
        {"stem_stride": 0},
        {"channels": 0},
        {"classes": 0},
        {"sparsities": [0.5]},
    ],
    ids=str,
)
def test_a_malformed_stage_or_number_is_a_users_mistake(changes: dict[str, object]) -> None:
    """All of these can be written on the command line; none may end in a traceback or in a wrong network."""
    with pytest.raises(UserError):
        mobile(**changes)


def test_odd_widths_are_fine_without_sparsity() -> None:
    space = mobile(sparsities=["dense"], stem=[7], head=[9], stages=[{"widths": [5], "depths": [1]}], expansions=[1, 3])
    assert space.network(space.largest()).parameters > 0


def test_sparse_layers_always_divide_into_their_blocks() -> None:
    space, rng = mobile(), np.random.default_rng(0)
    specs = [spec for _ in range(30) for spec in space.layers(space.sample(rng))]
    assert all(spec.out_channels % 2 == 0 for spec in specs if spec.sparsity != "dense")
    assert any(spec.sparsity != "dense" for spec in specs)


def sparse_and_wide(**options: object) -> MobileSpace:
    given = {
        "sparsities": ["1:4", "group@1/2", "dense"],
        "hidden": ["plain", "iso_flop"],
        "resolutions": [9, 16],
        "kernels": [3, 5],
    }
    return mobile(**{**given, **options})


def test_iso_flop_blocks_are_wider_at_the_dense_blocks_macs() -> None:
    space, rng, wider = sparse_and_wide(), np.random.default_rng(0), 0
    for _ in range(60):
        architecture = space.sample(rng)
        found, dense = (nodes(space.network(a)) for a in (architecture, space.replaced(architecture, sparsity="dense")))
        for name in {name.rpartition(".")[0] for name in found if name.endswith(".depthwise")}:
            macs = [sum(net[n].spec.macs for n in net if n.startswith(f"{name}.")) for net in (found, dense)]
            widths = [net[f"{name}.depthwise"].spec.in_channels for net in (found, dense)]
            chosen = architecture.get(f"{name}.hidden")
            assert (chosen is None) is (architecture.get(f"{name}.expand.sparsity", "dense") == "dense")
            assert macs[0] <= macs[1]
            assert widths[0] == widths[1] if chosen != "iso_flop" else widths[0] >= widths[1]
            wider += widths[0] > widths[1]
    assert wider > 30


@pytest.mark.parametrize("options", [{}, {"width_per_block": True}, {"hidden": ["iso_flop"]}, {"sparsities": ["1:4"]}], ids=str)
def test_every_network_fits_into_what_is_stored(options: dict[str, object]) -> None:
    space, rng = sparse_and_wide(**options), np.random.default_rng(1)
    stored = nodes(space.stored_network())
    reached = set()
    ends = [space.graded(end, hidden="iso_flop", **kinds) for end in (0, 1) for kinds in ({}, {"sparsity": "1:4", "kernel": 3})]
    for architecture in [space.largest(), space.smallest(), *ends, *(space.sample(rng) for _ in range(40))]:
        for name, node in nodes(space.network(architecture)).items():
            shapes = node.spec.weight_shape, stored[name].spec.weight_shape
            assert all(used <= whole for used, whole in zip(*shapes, strict=True)), name
            reached |= {name} if shapes[0][:2] == shapes[1][:2] else set()
    assert {f"stage{s}.block1.project" for s in (1, 2)} <= reached  # no wider than some network needs
    network = Supernet(space).extract(ends[-1])
    assert network(torch.zeros(2, 3, 16, 16)).shape == (2, 7)


def test_a_space_without_wider_blocks_stores_the_largest_network() -> None:
    space = mobile()
    assert space.stored_network() == space.network(space.largest())
    assert not [choice.name for choice in space.choices if choice.kind == "hidden"]


def test_wider_blocks_need_sparsity_and_trainings_that_know_them() -> None:
    with pytest.raises(UserError, match=r"hidden width iso_flop is for pruned layers.*space.sparsities="):
        mobile(sparsities=["dense"], hidden=["plain", "iso_flop"])
    with pytest.raises(UserError, match="hidden is \\['wide'\\]; allowed is a list out of plain, iso_flop"):
        mobile(hidden=["wide"])
    with pytest.raises(UserError, match=r"trains weights as a whole.*space.hidden=\[plain\]"):
        Supernet(sparse_and_wide(sparsities=["1:4"]), Estimators(create_mask_training("iterative_shrinkage")))
