"""Relaxed choices and their expected cost, held against enumeration and finite differences."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from search.relaxation import ExpectedCost, Relaxed
from spaces.choice import Architecture, Option
from spaces.errors import UserError
from spaces.mobile import MobileSpace


@pytest.fixture(scope="module")
def space() -> MobileSpace:
    return MobileSpace(
        channels=1,
        classes=10,
        resolutions=[8],
        stem=[8, 16],
        stages=[{"widths": [8, 16], "depths": [1, 2], "stride": 2}],
        expansions=[2],
        kernels=[3, 5, 7],
        head=[16],
        precisions=["fp32"],
        sparsities=["dense", "group@1/2"],
    )


def anywhere(space: MobileSpace, seed: int) -> Relaxed:
    """Relaxed choices with random probabilities."""
    relaxed = Relaxed(space).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for alpha in relaxed.parameters():
            alpha.copy_(torch.randn(alpha.shape, generator=generator, dtype=torch.float64))
    return relaxed


def enumerated(relaxed: Relaxed) -> dict[Architecture, float]:
    """Every architecture with its probability."""
    found: dict[Architecture, float] = {}
    probabilities = {name: p.tolist() for name, p in relaxed.probabilities().items()}
    for combination in product(*(range(len(c.options)) for c in relaxed.choices)):
        pairs = list(zip(relaxed.choices, combination, strict=True))
        values: dict[str, Option] = {c.name: c.options[i] for c, i in pairs}
        architecture = relaxed.completed(values)
        share = float(np.prod([probabilities[c.name][i] for c, i in pairs]))
        found[architecture] = found.get(architecture, 0.0) + share
    return found


def test_marginals_are_those_of_all_architectures(space: MobileSpace) -> None:
    relaxed = anywhere(space, 0)
    everything = enumerated(relaxed)
    assert sum(everything.values()) == pytest.approx(1.0)
    expected = np.array(list(everything.values())) @ space.encode(list(everything))
    assert relaxed.marginals().detach().numpy() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_marginals_sum_to_the_probability_of_being_active(space: MobileSpace, seed: int) -> None:
    relaxed = anywhere(space, seed)
    marginals = dict(zip(space.feature_names, relaxed.marginals().tolist(), strict=True))
    for choice in space.choices:
        total = sum(marginals[f"{choice.name}={option}"] for option in choice.options)
        active = 1.0 if choice.when is None else sum(marginals[f"{choice.when[0]}={v}"] for v in choice.when[1])
        assert total == pytest.approx(active)


def test_what_is_held_has_no_probability_of_its_own(space: MobileSpace) -> None:
    relaxed = Relaxed(space, {"kernel": 5})
    assert all(choice.kind != "kernel" for choice in relaxed.choices)
    assert relaxed.architecture()["stage1.block1.kernel"] == 5
    assert relaxed.sample(np.random.default_rng(0))["stage1.block1.kernel"] == 5
    marginals = dict(zip(space.feature_names, relaxed.marginals().tolist(), strict=True))
    assert marginals["stage1.block1.kernel=5"] == pytest.approx(1.0)


def test_samples_have_the_probabilities(space: MobileSpace) -> None:
    relaxed, rng = anywhere(space, 3), np.random.default_rng(0)
    found = space.encode([relaxed.sample(rng) for _ in range(4000)]).mean(axis=0)
    assert found == pytest.approx(relaxed.marginals().detach().numpy(), abs=0.04)


def test_what_is_decided_is_the_middle_of_ordered_options(space: MobileSpace) -> None:
    relaxed = Relaxed(space)
    kernel = next(c for c in relaxed.choices if c.name == "stage1.block1.kernel")
    for probabilities, option in (([0.4, 0.2, 0.4], 5), ([0.1, 0.3, 0.6], 7), ([0.6, 0.2, 0.2], 3)):
        with torch.no_grad():
            relaxed.alpha(kernel).copy_(torch.tensor(probabilities).log())
        assert relaxed.architecture()["stage1.block1.kernel"] == option


def test_entropy_falls_from_one_to_nothing(space: MobileSpace) -> None:
    relaxed = Relaxed(space)
    assert relaxed.entropy().item() == pytest.approx(1.0)
    with torch.no_grad():
        for alpha in relaxed.parameters():
            alpha[0] = 40.0
    assert relaxed.entropy().item() == pytest.approx(0.0, abs=1e-6)
    assert relaxed.architecture() == space.smallest()


def macs(space: MobileSpace, architecture: Architecture) -> float:
    return float(space.network(architecture).macs)


@pytest.mark.parametrize("seed", range(3))
def test_gradient_of_the_expected_cost_is_that_of_finite_differences(space: MobileSpace, seed: int) -> None:
    cost = ExpectedCost.fit(space, lambda a: macs(space, a), {}, 200, 0)
    relaxed = anywhere(space, seed)
    value = cost.log_expected(relaxed.marginals())
    value.backward()
    for alpha in relaxed.parameters():
        for at in range(len(alpha)):
            ends = []
            for sign in (1.0, -1.0):
                with torch.no_grad():
                    alpha[at] += sign * 1e-5
                    ends.append(cost.log_expected(relaxed.marginals()).item())
                    alpha[at] -= sign * 1e-5
            assert alpha.grad is not None
            assert float(alpha.grad[at]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-9)


def test_a_cost_that_adds_up_is_expected_exactly(space: MobileSpace) -> None:
    weights = np.random.default_rng(1).uniform(0.5, 2.0, len(space.feature_names))

    def price(architecture: Architecture) -> float:
        return 5.0 + float(space.encode([architecture])[0] @ weights)

    cost = ExpectedCost.fit(space, price, {}, 400, 0)
    assert not cost.quality.logarithm
    assert cost.quality.mape < 0.01
    relaxed = anywhere(space, 2)
    expected = sum(share * price(architecture) for architecture, share in enumerated(relaxed).items())
    assert cost.expected(relaxed.marginals()).item() == pytest.approx(expected, rel=0.01)


def test_a_cost_that_multiplies_is_fitted_by_its_logarithm(space: MobileSpace) -> None:
    weights = np.random.default_rng(1).uniform(0.0, 1.5, len(space.feature_names))
    cost = ExpectedCost.fit(space, lambda a: float(np.exp(space.encode([a])[0] @ weights)), {}, 400, 0)
    assert cost.quality.logarithm
    assert cost.quality.mape < 0.02
    assert cost.quality.spearman > 0.99


def test_bad_costs_are_told(space: MobileSpace) -> None:
    with pytest.raises(UserError, match="cost_samples is 8; allowed are integers from 32"):
        ExpectedCost.fit(space, lambda a: 1.0, {}, 8, 0)
    with pytest.raises(UserError, match="allowed are values above 0"):
        ExpectedCost.fit(space, lambda a: -1.0, {}, 64, 0)
