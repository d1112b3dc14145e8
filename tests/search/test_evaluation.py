"""Measuring networks: the same numbers every time, on the images that were meant."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from search.data import Digits
from search.evaluation import Evaluator, Split, calibration_batches, collect, predict
from spaces.mobile import MobileSpace
from spaces.supernet import Supernet


def test_accuracy_and_loss_by_hand(trained: Supernet, small_space: MobileSpace, evaluator: Evaluator) -> None:
    plain = evaluator.plain(trained, small_space.largest())
    measured = evaluator.measure(plain)
    images, labels = evaluator.split.images, evaluator.split.labels
    with torch.no_grad():
        logits = plain(images)
    assert measured.accuracy == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert measured.loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
    assert measured.accuracy > 0.3  # it has learned something
    assert not plain.training
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in plain.modules())


def test_the_same_architecture_gives_the_same_numbers(
    trained: Supernet, small_space: MobileSpace, evaluator: Evaluator
) -> None:
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    rng = np.random.default_rng(0)
    architectures = [small_space.sample(rng) for _ in range(3)]
    first = [evaluator.evaluate(trained, a) for a in architectures]
    trained.activate(small_space.smallest())
    torch.manual_seed(99)
    assert [evaluator.evaluate(trained, a) for a in reversed(architectures)] == first[::-1]
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())


def test_batches_do_not_change_predictions(trained: Supernet, small_space: MobileSpace, evaluator: Evaluator) -> None:
    plain = evaluator.plain(trained, small_space.largest())
    images = evaluator.split.images
    expected = predict(plain, images, 1000)
    for size in (1, 7, 64):
        torch.testing.assert_close(predict(plain, images[:70], size), expected[:70], rtol=1e-4, atol=1e-5)


def test_calibration_matters_and_is_not_the_split(trained: Supernet, small_space: MobileSpace, evaluator: Evaluator) -> None:
    split = evaluator.split
    wrong = Evaluator([5.0 + torch.randn_like(split.images)], split)
    assert wrong.evaluate(trained, small_space.largest()).accuracy < evaluator.evaluate(trained, small_space.largest()).accuracy


def test_splits_are_whole_and_apart(digits: Digits) -> None:
    validation, test = collect(digits, "validation"), collect(digits, "test")
    assert isinstance(validation, Split)
    assert len(validation.images) == len(validation.labels) == digits.sizes["val"]
    assert len(test.images) == len(test.labels) == digits.sizes["test"]
    assert not torch.equal(validation.images[:10], test.images[:10])


def test_calibration_images_come_from_training_and_follow_the_seed(digits: Digits) -> None:
    first, again, other = (calibration_batches(digits, 150, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert 150 <= sum(map(len, first)) < 150 + 64
    whole = calibration_batches(digits, 10**6, 0)
    assert sum(map(len, whole)) == digits.sizes["train"]
