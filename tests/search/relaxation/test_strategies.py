"""Gradient strategies on a space that can be enumerated: what they find, what they hold in memory, that they resume."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from search.data import Digits
from search.evaluation import Evaluator
from search.relaxation import (
    ExpectedCost,
    GradientStrategy,
    RelaxationSettings,
    Relaxed,
    SearchStep,
    check_strategy,
    search_member,
)
from search.relaxation.dass import Dass
from search.relaxation.once_for_both import OnceForBoth, bi_mask, importance_share
from search.relaxation.proxyless import Proxyless, drawn_pair
from search.relaxation.quantnas import QuantNas
from search.relaxation.tangle import Tangle
from search.training import SupernetTraining, train
from search.training.sandwich import Sandwich
from spaces.choice import Architecture
from spaces.entangled import Entangled
from spaces.errors import UserError
from spaces.mixing import Gates
from spaces.mobile import MobileSpace
from spaces.supernet import Supernet

STRATEGIES: dict[str, Callable[[], GradientStrategy]] = {
    "proxyless": Proxyless,
    "binary": lambda: Proxyless("binary"),
    "darts": lambda: Tangle("darts"),
    "gdas": lambda: Tangle("gdas"),
    "drnas": lambda: Tangle("drnas"),
    "quantnas": QuantNas,
    "dass": Dass,
    "once_for_both": OnceForBoth,
}
FREE: dict[str, str] = {"quantnas": "precision", "dass": "sparsity"}  # kinds that a strategy cannot do without


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def supernet(digits: Digits, evaluator: Evaluator, tmp_path_factory: pytest.TempPathFactory) -> Supernet:
    """A trained supernet of a space with 24 networks in float and dense."""
    torch.manual_seed(0)
    space = MobileSpace(
        channels=1,
        classes=10,
        resolutions=[8],
        stem=[8],
        stages=[{"widths": [8, 16, 24], "depths": [1], "stride": 2}],
        expansions=[2, 4],
        kernels=[3, 5],
        head=[16, 32],
        precisions=["w2", "fp32"],
        sparsities=["dense", "group@1/4"],
    )
    supernet = Supernet(space)
    training = SupernetTraining(supernet, Sandwich(2), 4, 0.02, 0.0, 0, evaluator, curve_points=1)
    train(training, digits, tmp_path_factory.mktemp("supernet"))
    return supernet


HELD = {"sparsity": "dense", "precision": "fp32"}


def held_for(name: str) -> dict[str, str]:
    """What is held for a strategy: as much as it can do without."""
    return {kind: option for kind, option in HELD.items() if kind != FREE.get(name)}


def bits_of(supernet: Supernet, held: dict[str, str]) -> ExpectedCost:
    """Multiply-accumulates times the bits of the weights."""
    space = supernet.space

    def bits(architecture: Architecture) -> float:
        return float(sum(spec.macs * spec.arithmetic.bits for spec in space.network(architecture).layers))

    return ExpectedCost.fit(space, bits, held, 200, 0)


def macs_of(supernet: Supernet) -> ExpectedCost:
    space = supernet.space
    return ExpectedCost.fit(space, lambda a: float(space.network(a).macs), HELD, 200, 0)


def objective(supernet: Supernet, images: torch.Tensor, labels: torch.Tensor, weight: float) -> dict[Architecture, float]:
    """What a search minimizes, of every network of the space."""
    relaxed, found = Relaxed(supernet.space, HELD), {}
    largest = supernet.space.network(supernet.space.largest()).macs
    for values in product(*(c.options for c in relaxed.choices)):
        architecture = relaxed.completed({c.name: v for c, v in zip(relaxed.choices, values, strict=True)})
        network = supernet.activate(architecture)
        with torch.no_grad():
            found[architecture] = float(F.cross_entropy(supernet(images), labels)) + weight * math.log(network.macs / largest)
    return found


@pytest.mark.parametrize("name", ["proxyless", "darts", "drnas", "once_for_both"])
def test_it_finds_nearly_the_best_of_all_networks(name: str, supernet: Supernet, digits: Digits, tmp_path: Path) -> None:
    """At every weight of the cost, among the best tenth of the range of what all networks reach."""
    batches = list(digits.train_dataloader())
    images, labels = (torch.cat([batch[i] for batch in batches])[:512] for i in (0, 1))
    settings = RelaxationSettings(STRATEGIES[name](), [0.0], epochs=3, learning_rate=0.15, held=HELD)
    cost, costs = macs_of(supernet), []
    for weight in (0.02, 3.0):
        member = search_member(supernet, settings, cost, digits, weight, 0, tmp_path / f"{weight}.ckpt")
        every = objective(supernet, images, labels, weight)
        best, worst = min(every.values()), max(every.values())
        assert every[member.architecture] - best <= 0.1 * (worst - best), (weight, member)
        costs.append(supernet.space.network(member.architecture).macs)
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < costs[0]


@pytest.mark.parametrize("name", STRATEGIES)
def test_where_only_cost_counts_the_smallest_network_is_found(
    name: str, supernet: Supernet, digits: Digits, tmp_path: Path
) -> None:
    held = held_for(name)
    space = supernet.space
    settings = RelaxationSettings(STRATEGIES[name](), [0.0], epochs=1, learning_rate=0.3, held=held)
    size = ExpectedCost.fit(space, lambda a: 1.0 + float(np.nansum(space.positions([a]))), held, 200, 0)
    member = search_member(supernet, settings, size, digits, 30.0, 0, tmp_path / "state.ckpt")
    assert member.architecture == supernet.space.replaced(supernet.space.smallest(), **held)


@pytest.mark.parametrize(("name", "weights_rate"), [("proxyless", 0.0), *((name, 0.01) for name in STRATEGIES)])
def test_stopped_after_an_epoch_it_ends_the_same(
    name: str, weights_rate: float, supernet: Supernet, digits: Digits, tmp_path: Path
) -> None:
    held = held_for(name)
    settings = RelaxationSettings(STRATEGIES[name](), [0.0], epochs=2, weights_rate=weights_rate, held=held)
    before = {key: value.clone() for key, value in supernet.state_dict().items()}
    cost = bits_of(supernet, held)
    whole = search_member(supernet, settings, cost, digits, 0.1, 0, tmp_path / "whole.ckpt")

    class StoppedError(Exception):
        pass

    def stop(done: int) -> None:
        raise StoppedError

    with pytest.raises(StoppedError):
        search_member(supernet, settings, cost, digits, 0.1, 0, tmp_path / "again.ckpt", stop)
    assert search_member(supernet, settings, cost, digits, 0.1, 0, tmp_path / "again.ckpt") == whole
    assert all(torch.equal(value, before[key]) for key, value in supernet.state_dict().items())
    if not weights_rate:
        other = search_member(supernet, settings, cost, digits, 0.1, 1, tmp_path / "other.ckpt")
        assert other.loss != whole.loss


def saved_bytes(space: MobileSpace, strategy: GradientStrategy) -> int:
    """Bytes of activations that a step keeps for its backward pass: everything with an image's first dimension."""
    torch.manual_seed(0)
    supernet = Supernet(space)
    images, labels = torch.randn(64, 1, 8, 8), torch.zeros(64, dtype=torch.long)
    entangled, relaxed, kept = Entangled(supernet), Relaxed(space), dict[int, int]()
    strategy.prepare(relaxed)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() > 1 and tensor.shape[0] == 64:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    step = SearchStep(entangled, relaxed, images, labels, 0.0, np.random.default_rng(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = strategy.loss(step)
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("name", STRATEGIES)
def test_memory_for_activations_does_not_grow_with_options(name: str) -> None:
    def space(kernels: list[int], sparsities: list[str], precisions: list[str]) -> MobileSpace:
        stages = [{"widths": [16], "depths": [2], "stride": 1}]
        return MobileSpace(1, 10, [8], [16], stages, [2], kernels, [16], precisions, sparsities)

    few = saved_bytes(space([3, 5], ["dense", "group@1/2"], ["w4", "fp32"]), STRATEGIES[name]())
    many = saved_bytes(
        space([3, 5, 7, 9, 11], ["dense", "group@1/2", "group@1/4", "2:4"], ["w2", "w3", "w4", "w8", "fp32"]),
        STRATEGIES[name](),
    )
    assert many <= 1.02 * few


def test_noise_has_the_power_of_the_rounding_error(supernet: Supernet) -> None:
    """Seen through the loss's own pass: what is added differs from draw to draw and has the error's size per channel."""
    elastic, shape = supernet.layer("head").weights_of(supernet.space.network(supernet.space.largest()).nodes[-3].spec)[0]
    weight = elastic.masked(shape, "dense").detach()
    error = (elastic.on_grid(weight, "w2") - weight).square().flatten(1).mean(dim=1)
    seen: list[torch.Tensor] = []

    class Spy(Entangled):
        def outputs(self, images: torch.Tensor, gates: Gates, opened: Any = None, quantize: Any = None) -> torch.Tensor:
            seen.append((quantize(elastic, weight, "w2") - weight).detach())
            assert torch.equal(quantize(elastic, weight, "fp32"), weight)
            return torch.zeros(2, 10, requires_grad=True)

    spy, relaxed = Spy(supernet, held_for("quantnas")), Relaxed(supernet.space, held_for("quantnas"))
    for seed in range(60):
        step = SearchStep(spy, relaxed, torch.zeros(2, 1, 8, 8), torch.zeros(2).long(), 0.5, np.random.default_rng(seed))
        QuantNas().loss(step)
    noise = torch.stack(seen)
    assert not torch.equal(noise[0], noise[1])
    assert noise.square().flatten(2).mean(dim=(0, 2)) == pytest.approx(error, rel=0.15)
    assert noise.mean(dim=0).abs().mean() < 0.3 * error.mean().sqrt()


def test_what_dass_finds_is_sparse_wherever_it_can_be(supernet: Supernet, digits: Digits, tmp_path: Path) -> None:
    held = held_for("dass")
    settings = RelaxationSettings(Dass(), [0.0], epochs=2, weights_rate=0.01, held=held)
    member = search_member(supernet, settings, bits_of(supernet, held), digits, 0.0, 0, tmp_path / "state.ckpt")
    found = {c.name: member.architecture[c.name] for c in supernet.space.choices if c.kind == "sparsity"}
    assert set(found.values()) == {"group@1/4"}
    assert member.architecture["head.width"] == 32  # without a cost


@pytest.mark.parametrize(
    ("name", "message"),
    [("quantnas", "quantnas needs a choice of precision"), ("dass", "dass needs a choice between dense and sparse")],
)
def test_a_space_without_what_a_strategy_decides_is_told(name: str, message: str, supernet: Supernet) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_strategy(STRATEGIES[name](), Entangled(supernet, HELD))
    assert "\n" not in str(caught.value)


def test_nothing_to_decide_is_told() -> None:
    space = MobileSpace(1, 10, [8], [8], [{"widths": [8], "depths": [1]}], [2], [3], [8], ["fp32"], ["dense"])
    with pytest.raises(UserError, match="space mobile has no choice left to relax"):
        check_strategy(Proxyless(), Entangled(Supernet(space)))


@pytest.mark.parametrize("share", [0.99, 0.5, 0.1])
@pytest.mark.parametrize("opened", [[0, 1, 2, 3], [1, 2, 3], [0, 1], [2]])
def test_masks_of_units_fall_along_their_order(share: float, opened: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        probabilities = torch.randn(4, generator=generator).softmax(dim=0)
        gates = bi_mask(probabilities, torch.rand(3, generator=generator), share, opened)
        assert float(gates.sum()) == pytest.approx(1.0, abs=1e-6)
        assert bool((gates >= -1e-6).all())
        assert all(float(gates[at]) == pytest.approx(0.0, abs=1e-6) for at in range(4) if at < opened[0] or at > opened[-1])


def test_in_the_end_masks_are_mostly_probabilities() -> None:
    probabilities, importance = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.5, 0.5])
    assert importance_share(0.0) == pytest.approx(0.99)
    assert importance_share(1.0) == pytest.approx(0.1)
    assert bi_mask(probabilities, importance, 0.0, [0, 1, 2]) == pytest.approx(probabilities, abs=1e-6)


def test_closed_options_stay_closed(supernet: Supernet) -> None:
    relaxed = Relaxed(supernet.space, HELD)
    width = next(c for c in relaxed.choices if c.name == "stage1.width")
    relaxed.close(width, 1)
    assert relaxed.opened()["stage1.width"] == [0, 2]
    assert relaxed.alpha(width).softmax(dim=0)[1].item() < 1e-12
    before = relaxed.alpha(width).detach().clone()
    relaxed.close(width, 1)
    assert torch.equal(relaxed.alpha(width), before)
    relaxed.entropy_of(width).backward()
    gradient = relaxed.alpha(width).grad
    assert gradient is not None
    assert bool(gradient.isfinite().all())


def test_a_pair_is_drawn_by_the_probabilities() -> None:
    rng = np.random.default_rng(0)
    pairs = [drawn_pair(np.array([0.7, 0.2, 0.1]), rng) for _ in range(3000)]
    assert all(first < second for first, second in pairs)
    # drawn first, or second after another: 0.2 + 0.7 * 0.2 / 0.3 + 0.1 * 0.2 / 0.9
    assert np.mean([1 in pair for pair in pairs]) == pytest.approx(0.689, abs=0.03)


def test_options_that_took_no_part_stay_as_probable(supernet: Supernet) -> None:
    """Of three widths one took no part in the step; the shift leaves its probability alone."""
    strategy, relaxed = Proxyless(), Relaxed(supernet.space, HELD)
    entangled = Entangled(supernet, HELD)
    images, labels = torch.randn(32, 1, 8, 8), torch.randint(10, (32,))
    step = SearchStep(entangled, relaxed, images, labels, 0.0, np.random.default_rng(0))
    loss = strategy.loss(step)
    loss.backward()
    width = next(c for c in relaxed.choices if c.name == "stage1.width")
    gradient = relaxed.alpha(width).grad
    assert gradient is not None
    assert int((gradient == 0.0).sum()) == 1
    before = relaxed.alpha(width).detach().softmax(dim=0)
    with torch.no_grad():
        for alpha in relaxed.parameters():
            alpha -= 0.3 * alpha.grad.sign()  # type: ignore[union-attr]
    strategy.after_step(relaxed)
    after = relaxed.alpha(width).detach().softmax(dim=0)
    out = gradient == 0.0
    assert after[out] == pytest.approx(before[out], abs=1e-6)
    assert not torch.allclose(after[~out], before[~out])


def test_bad_settings_are_told(supernet: Supernet, digits: Digits, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="allowed are between, binary"):
        Proxyless("open")
    with pytest.raises(UserError, match="allowed are darts, gdas, drnas"):
        Tangle("snas")
    with pytest.raises(UserError, match=r"cost_weights is \[\]"):
        RelaxationSettings(Proxyless(), [])
    with pytest.raises(UserError, match="allowed is a search"):
        RelaxationSettings(Sandwich(), [0.1])  # type: ignore[arg-type]
    path = tmp_path / "state.ckpt"
    path.write_bytes(b"nothing of ours")
    settings = RelaxationSettings(Proxyless(), [0.1], held=HELD)
    with pytest.raises(UserError, match=r"state\.ckpt is damaged .* delete it to search again"):
        search_member(supernet, settings, macs_of(supernet), digits, 0.1, 0, path)
