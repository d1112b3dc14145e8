"""Selective activation: which weights go last against plain loops, what it does to a ReLU, and what it costs: nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from latency_lut.lowering import applicable
from latency_lut.table import pair_key
from spaces.errors import UserError
from spaces.layers import LayerSpec
from spaces.mobile import MobileSpace
from spaces.sparsity import as_shipped, kept_weights, mask, parse, selective
from spaces.supernet import Supernet
from spaces.weights import ElasticWeight


def kept(weight: torch.Tensor, text: str, start: torch.Tensor | None = None) -> torch.Tensor:
    keep = mask(weight, text, start=start)
    assert keep is not None
    return keep


def drawn(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def reference(weights: list[float], start: list[float], stay: int, by_movement: int) -> list[bool]:
    """One set of single weights: those of the smallest magnitude go, then the negative ones that moved least."""
    left = sorted(range(len(weights)), key=lambda i: -abs(weights[i]))[: stay + by_movement]
    negative = sorted((i for i in left if weights[i] < 0), key=lambda i: abs(weights[i] - start[i]))[:by_movement]
    left = [i for i in left if i not in negative]
    left = sorted(left, key=lambda i: -abs(weights[i]))[:stay]
    return [i in left for i in range(len(weights))]


@pytest.mark.parametrize("seed", range(5))
def test_a_tenth_of_the_removed_weights_are_negative_ones_that_moved_little(seed: int) -> None:
    start = drawn((12, 20, 1, 1), seed)
    weight = start + 0.3 * drawn((12, 20, 1, 1), seed + 100)
    found = kept(weight, "unstructured@1/4+selective", start)
    expected = reference(weight.flatten().tolist(), start.flatten().tolist(), stay=60, by_movement=18)
    assert found.flatten().bool().tolist() == expected
    for row in range(12):
        four = weight[row, :4].flatten().tolist()
        expected = reference(four, start[row, :4].flatten().tolist(), stay=2, by_movement=1)
        assert kept(weight, "2:4+selective", start)[row, :4].flatten().bool().tolist() == expected


@pytest.mark.parametrize("text", ["group@1/2", "2:4", "3:4", "block2x2@1/2", "unstructured@1/4", "unstructured@7/8"])
def test_it_keeps_as_many_masks_itself_and_nests(text: str) -> None:
    weight, chosen = drawn((8, 16, 3, 3)), selective(text)
    keep = kept(weight, chosen)
    assert keep.sum() == kept_weights(text, (8, 16, 3, 3)) == kept_weights(chosen, (8, 16, 3, 3))
    assert torch.equal(kept(weight * keep, chosen), keep)
    assert not torch.equal(keep, kept(weight, text))
    assert (parse(chosen).pattern, parse(chosen).kept) == (parse(text).pattern, parse(text).kept)
    smaller = parse(chosen).with_share(parse(text).kept / 2)
    assert parse(smaller.text) == smaller
    assert smaller.selective


def test_texts() -> None:
    assert selective("dense") == as_shipped("dense") == "dense"
    assert selective(selective("2:4")) == "2:4+selective"
    assert as_shipped("2:4+selective") == "2:4"
    for text in ("dense+selective", "2:4+selective+selective", "2:4+else", "+selective"):
        with pytest.raises(UserError, match="allowed are"):
            parse(text)


def test_a_relu_has_fewer_zeros_and_every_pattern_gains() -> None:
    """The dynamic dead neuron rate, with inputs that come from a ReLU."""
    inputs = drawn((500, 64), 1).relu()
    weight = drawn((48, 64), 2)

    def dead(text: str) -> float:
        return float((inputs @ (weight * kept(weight, text)).T <= 0).float().mean())

    for text in ("unstructured@1/8", "unstructured@1/2", "2:4", "1:4", "group@1/2", "block4x1@1/2"):
        assert dead(selective(text)) < dead(text) - 0.01, text


def test_a_stored_weight_remembers_how_it_began_in_every_slice() -> None:
    elastic = ElasticWeight(drawn((24, 32, 3, 3)), selective=True)
    start = elastic.values.detach().clone()
    with torch.no_grad():
        elastic.values.add_(0.5 * drawn((24, 32, 3, 3), 1))
    shape, text = (20, 24, 1, 1), "unstructured@1/4+selective"
    part, began = elastic.values[:20, :24, 1:2, 1:2].detach(), start[:20, :24, 1:2, 1:2]
    expected = part * kept(part, text, began)
    assert not torch.equal(expected, part * kept(part, text))
    assert torch.equal(elastic.masked(shape, text), expected)
    assert torch.equal(elastic.final(shape, text, "fp32")[0], expected)
    again = ElasticWeight(drawn((24, 32, 3, 3), 5), selective=True)
    again.load_state_dict(elastic.state_dict())
    assert torch.equal(again.masked(shape, text), expected)


def space(sparsities: list[str], activations: list[str]) -> MobileSpace:
    stages = [{"widths": [8], "depths": [1], "stride": 2}]
    return MobileSpace(1, 10, [8], [8], stages, [2], [3], [16], ["fp32"], sparsities, activations=activations)


def test_in_a_space_it_is_relu_with_another_mask() -> None:
    kinds = space(["2:4", "dense"], ["relu", "selective"])
    for sparsity in ("2:4", "dense"):
        networks = [
            kinds.network(kinds.replaced(kinds.smallest(), sparsity=sparsity, activation=activation))
            for activation in ("relu", "selective")
        ]
        assert [s.activation for s in networks[0].layers] == [s.activation for s in networks[1].layers]
        chosen = [s.sparsity for s in networks[1].layers if s.sparsity.endswith("+selective")]
        assert chosen == ([] if sparsity == "dense" else ["2:4+selective"])  # the layer before the stage's ReLU
    supernet = Supernet(kinds)
    supernet.activate(kinds.smallest())
    remembered = {name for name, _ in supernet.named_buffers() if name.endswith(".start")}
    assert any("expand" in name for name in remembered)
    assert not any("depthwise" in name or "classifier" in name for name in remembered)
    assert not [name for name, _ in Supernet(space(["2:4"], ["relu"])).named_buffers()]


def test_it_is_measured_and_priced_as_the_layer_that_ships() -> None:
    for text in ("2:4", "group@1/2"):
        plain = LayerSpec("conv2d", 16, 16, 8, 8, activation="relu", sparsity=text)
        chosen = LayerSpec("conv2d", 16, 16, 8, 8, activation="relu", sparsity=selective(text))
        assert applicable(chosen) == applicable(plain)
        assert [pair_key(chosen, name) for name in applicable(chosen)] == [pair_key(plain, name) for name in applicable(plain)]
        assert (chosen.macs, chosen.weight_bytes) == (plain.macs, plain.weight_bytes)


def test_without_pruned_layers_and_among_sparsities_it_is_refused() -> None:
    with pytest.raises(UserError, match=r"pruned layers.*space.sparsities="):
        space(["dense"], ["relu", "selective"])
    with pytest.raises(UserError, match=r"space.activations="):
        space(["dense", "2:4+selective"], ["relu"])


def test_gradual_pruning_and_other_saliencies_go_with_it() -> None:
    weight = drawn((8, 16, 1, 1))
    saliency = torch.from_numpy(np.random.default_rng(0).random((8, 16, 1, 1), np.float32))
    keep = mask(weight, "unstructured@1/2+selective", saliency)
    assert keep is not None
    first = saliency.flatten().argsort(descending=True)[:70]  # 64 stay, 6 of 64 go by movement
    assert set(keep.flatten().nonzero().flatten().tolist()) < set(first.tolist())
