"""Networks that are trained with each format of weights, so that a broken estimator is seen."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from spaces.precision import parse_precision
from spaces.quantizers import QuantizerSettings, quantizer_of
from spaces.quantizers.integer import IntegerWeights
from spaces.quantizers.nonuniform import CodebookWeights, PowerWeights

SHAPES = [(12, 1, 3, 3), (24, 12, 3, 3), (10, 96)]
STEPS = 150
TRAINED = 1297

CASES = [
    *((text, QuantizerSettings()) for text in ("w8", "w4", "w3", "w2", "w4@tensor", "w4@inputs", "w4@32")),
    *((text, QuantizerSettings(scale="learned")) for text in ("w8", "w3", "w2", "w2@32")),
    *((text, QuantizerSettings(scale="statistics")) for text in ("w3", "w2")),
    ("w3", QuantizerSettings(scale="percentile", percentile=0.95, annealing=True)),
    *(("binary", QuantizerSettings(binary=binary)) for binary in ("straight_through", "reste", "biper")),
    *((text, QuantizerSettings()) for text in ("ternary", "power3", "codebook2", "codebook4", "partial@1/8")),
]


@cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)


def trained_accuracy(text: str, choice: QuantizerSettings, learns: bool = True) -> float:
    """Accuracy on 500 digits of a small network, all weights in one format, after a short training on the others."""
    rng = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(s, generator=rng) * math.sqrt(2 / math.prod(s[1:]))) for s in SHAPES]
    biases = [nn.Parameter(torch.zeros(s[0])) for s in SHAPES]
    gains = [nn.Parameter(torch.ones(s[0])) for s in SHAPES]
    quantizers = nn.ModuleList(quantizer_of(parse_precision(text), s, choice) or nn.Identity() for s in SHAPES)
    optimizer = torch.optim.Adam([*weights, *biases, *gains, *quantizers.parameters()])

    def network(x: torch.Tensor) -> torch.Tensor:
        used = [q(w) if learns else q(w).detach() for q, w in zip(quantizers, weights, strict=True)]
        for i in range(2):
            y = F.conv2d(x, used[i], stride=2, padding=1)
            x = F.batch_norm(y, None, None, gains[i], biases[i], training=True).relu()
        return F.linear(x.flatten(1), used[2], biases[2])

    images, labels = digits()
    batches = torch.randint(0, TRAINED, (STEPS, 128), generator=rng)
    for step, batch in enumerate(batches):
        for quantizer in quantizers:
            quantizer.progress = step / STEPS  # type: ignore[assignment]
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / STEPS)
        optimizer.zero_grad()
        F.cross_entropy(network(images[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        return float((network(images[TRAINED:]).argmax(1) == labels[TRAINED:]).float().mean())


@cache
def float_accuracy() -> float:
    return trained_accuracy("fp32", QuantizerSettings())


@pytest.mark.parametrize(("text", "choice"), CASES, ids=[f"{text}-{c.scale}-{c.binary}" for text, c in CASES])
def test_each_format_learns_nearly_as_well_as_float(text: str, choice: QuantizerSettings) -> None:
    allowed = 0.02 if text in ("w8", "w4") else 0.06
    assert trained_accuracy(text, choice) >= float_accuracy() - allowed


def test_weights_without_a_gradient_would_be_seen() -> None:
    assert trained_accuracy("w8", QuantizerSettings(), learns=False) < float_accuracy() - 0.3


def error_after(quantizer: nn.Module, weight: torch.Tensor, steps: int = 200) -> tuple[float, float]:
    """Squared error before and after learning nothing but the quantizer."""
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.01)
    before = float((quantizer(weight) - weight).detach().square().mean())
    for _ in range(steps):
        optimizer.zero_grad()
        (quantizer(weight) - weight).square().mean().backward()
        optimizer.step()
    return before, float((quantizer(weight) - weight).detach().square().mean())


@pytest.mark.parametrize(("text", "wrong"), [("w4", 4.0), ("w4", 0.3), ("w2", 2.0), ("w3@32", 0.4)])
def test_a_wrong_step_is_learned(text: str, wrong: float) -> None:
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    quantizer = quantizer_of(parse_precision(text), (16, 256), QuantizerSettings(scale="learned"))
    assert isinstance(quantizer, IntegerWeights)
    best = float((quantizer(weight) - weight).detach().square().mean())
    with torch.no_grad():
        quantizer.steps *= wrong
    before, after = error_after(quantizer, weight)
    assert before > 1.5 * best
    assert after < 1.05 * best


def test_a_wrong_exponent_and_a_wrong_codebook_are_learned() -> None:
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    power = quantizer_of(parse_precision("power4"), (16, 256))
    codebook = quantizer_of(parse_precision("codebook3"), (16, 256))
    assert isinstance(power, PowerWeights)
    assert isinstance(codebook, CodebookWeights)
    best_power, best_codebook = (float((q(weight) - weight).detach().square().mean()) for q in (power, codebook))
    with torch.no_grad():
        power.exponent.fill_(1.2)
        codebook.values *= 0.6
    for quantizer, best in ((power, best_power), (codebook, best_codebook)):
        before, after = error_after(quantizer, weight)
        assert before > 1.5 * best
        assert after < 1.05 * best
