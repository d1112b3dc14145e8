"""Shared weights: slices, masks that networks of a step share, and work that does not grow with the number of channels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from spaces import weights
from spaces.elastic import OPERATORS, LayerOptions
from spaces.layers import LayerSpec
from spaces.mask_strategies import create_mask_training
from spaces.precision import parse_precision
from spaces.weights import ElasticWeight, Estimators, sliced

SPARSITIES = ["group@1/2", "2:4", "7:16", "block4x1@1/2", "unstructured@1/4"]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a mask was really computed, by sparsity."""
    counts: Counter[str] = Counter()
    real: Callable[..., torch.Tensor | None] = weights.mask

    def counting(weight: torch.Tensor, sparsity: Any, *ranking: torch.Tensor | None) -> torch.Tensor | None:
        counts[sparsity if isinstance(sparsity, str) else sparsity.text] += 1
        return real(weight, sparsity, *ranking)

    monkeypatch.setattr(weights, "mask", counting)
    return counts


def elastic_weight(saliency: str = "magnitude", training: str = "masked", **options: float) -> ElasticWeight:
    masks = create_mask_training(training, **options)
    values = torch.randn(16, 32, 3, 3, generator=torch.Generator().manual_seed(0))
    return ElasticWeight(values, estimators=Estimators(masks=masks, saliency=saliency))


@pytest.mark.parametrize(
    ("largest", "shape"), [((6, 8, 5, 5), (4, 3, 3, 3)), ((6, 8, 7, 7), (6, 8, 1, 1)), ((9, 8), (5, 8)), ((7,), (3,))]
)
@pytest.mark.parametrize("inside", [False, True])
def test_a_slice_is_the_first_channels_and_the_centre_with_its_gradient(
    largest: tuple[int, ...], shape: tuple[int, ...], inside: bool
) -> None:
    stored = torch.randn(2, *largest).requires_grad_()
    whole = stored[1] if inside else stored.flatten(0, 1)[: largest[0]]
    places = [slice(0, size) for size in shape[:2]]
    places += [slice((a - b) // 2, (a - b) // 2 + b) for a, b in zip(largest[2:], shape[2:], strict=True)]
    gradient = torch.randn(shape)
    expected, found = whole[tuple(places)], sliced(whole, shape)
    assert torch.equal(found, expected)
    ours, theirs = (torch.autograd.grad(part, stored, gradient)[0] for part in (found, expected))
    assert torch.equal(ours, theirs)
    assert sliced(whole, largest) is whole


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_passes_of_a_step_share_a_mask_and_change_nothing(sparsity: str, computed: Counter[str]) -> None:
    shape = (16, 32, 3, 3)
    weight, factor = elastic_weight(), torch.randn(shape)

    def passes() -> torch.Tensor:
        weight.values.grad = None
        for _ in range(3):  # gradients add up, which changes no weight
            (weight(shape, sparsity, "fp32") * factor).sum().backward()  # type: ignore[no-untyped-call]
        assert weight.values.grad is not None
        return weight.values.grad

    alone = passes()
    assert computed == {sparsity: 3}
    computed.clear()
    weight.remember_masks(True)
    shared = passes()
    assert computed == {sparsity: 1}
    assert torch.equal(alone, shared)
    weight.remember_masks(False)
    passes()
    assert computed == {sparsity: 4}


def test_another_slice_sparsity_or_share_has_its_own_mask(computed: Counter[str]) -> None:
    weight = elastic_weight(training="gradual", end=1.0)
    weight.remember_masks(True)
    for progress in (1, 2, 2):
        weight.estimators.masks.start_step(progress, 3)
        for shape in ((16, 32, 3, 3), (8, 32, 3, 3), (16, 32, 1, 1)):
            for sparsity in ("unstructured@1/2", "group@1/2"):
                weight(shape, sparsity, "fp32")
                weight(shape, sparsity, "fp32")
    assert sum(computed.values()) == 2 * 3 * 2


def test_a_weight_that_changes_has_another_mask() -> None:
    weight, shape = elastic_weight(), (16, 32, 3, 3)
    weight.remember_masks(True)
    before = weight(shape, "2:4", "fp32")
    with torch.no_grad():
        weight.values.copy_(weight.values.flip(1))
    after = weight(shape, "2:4", "fp32")
    torch.testing.assert_close(after, before.flip(1), rtol=0, atol=0)


def test_a_saliency_by_gradients_is_asked_anew(computed: Counter[str]) -> None:
    weight = elastic_weight("taylor")
    weight.remember_masks(True)
    for _ in range(2):
        weight((16, 32, 3, 3), "2:4", "fp32").square().sum().backward()  # type: ignore[no-untyped-call]
    assert computed == {"2:4": 2}


def test_masks_of_both_directions_are_shared_apart(computed: Counter[str]) -> None:
    weight, shape = elastic_weight(training="bidirectional"), (16, 16, 3, 3)
    expected = weight(shape, "2:4", "fp32"), weight.backward_weight(shape, "2:4")
    computed.clear()
    weight.remember_masks(True)
    for _ in range(2):
        found = weight(shape, "2:4", "fp32"), weight.backward_weight(shape, "2:4")
    assert computed == {"2:4": 2}
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours, theirs)
    assert not torch.equal(*(tensor for tensor in found if tensor is not None))


class Operations(TorchDispatchMode):
    """Counts what torch is called for, backward passes included."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(channels: int, sparsity: str, precision: str, side: int = 4) -> int:
    """Calls of torch in a training pass of a sampled layer; numbers are drawn, so that no two are equal."""
    largest = LayerSpec("conv2d", 2 * channels, 2 * channels, side, side, 3, activation="relu")
    spec = LayerSpec("conv2d", channels, channels, side, side, 3, sparsity=sparsity, precision=precision, activation="relu")
    layer = OPERATORS["conv2d"](largest, LayerOptions((precision,)))
    x = torch.randn(2, channels, side, side, requires_grad=True)
    layer(spec, x).sum().backward()
    layer.zero_grad()
    with Operations() as counted:
        layer(spec, x).sum().backward()
    return counted.count


PRECISIONS = ["fp32", "w8a8", "w4@32", "ternary", "binary", "power4", "codebook4", "partial@1/8"]
COMBINED = [(s, p) for s in ("dense", *SPARSITIES) for p in PRECISIONS if s == "dense" or parse_precision(p).has_zero]


@pytest.mark.parametrize(("sparsity", "precision"), COMBINED)
def test_the_number_of_operations_does_not_grow_with_channels_or_groups(sparsity: str, precision: str) -> None:
    torch.manual_seed(0)
    counts = {channels: operations(channels, sparsity, precision) for channels in (32, 64, 128)}
    assert len(set(counts.values())) == 1, counts


def test_nor_with_the_units_that_a_set_has() -> None:
    torch.manual_seed(0)
    assert len({operations(64, sparsity, "fp32") for sparsity in ("2:4", "4:8", "8:16", "16:32", "1:32")}) == 1
