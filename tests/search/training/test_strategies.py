"""Strategies: what a step trains, that each learns, and that a killed training goes on to the same weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch.nn import functional as F

from latency_lut.command import CONFIG_FOLDER
from search.data import Digits
from search.evaluation import Evaluator
from search.training import Distillation, Step, Strategy, SupernetTraining, train
from search.training.progressive import Progressive
from search.training.sandwich import Sandwich
from search.training.schedule import rate_factor
from search.training.single_path import SinglePath
from search.training.sorted import Sorted
from search.training.strategy import drawn
from spaces import weights
from spaces.choice import Architecture
from spaces.errors import UserError
from spaces.mobile import MobileSpace
from spaces.sparsity import Sparsity, parse
from spaces.supernet import Outputs, Supernet
from spaces.weights import ElasticWeight

STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "sandwich": lambda: Sandwich(1),
    "sandwich after the largest": lambda: Sandwich(1, largest_first=0.5),
    "sandwich now and then": lambda: Sandwich(1, every=3),
    "sorted": lambda: Sorted(2),
    "progressive": lambda: Progressive(2, largest_share=0.4),
    "single path": SinglePath,
    "single path of all sizes": lambda: SinglePath(spread=True),
}


class StopError(Exception):
    """Stands for a kill."""


def run(
    make: Callable[[], Strategy], space: MobileSpace, evaluator: Evaluator, folder: Path, stop_in: int = 0, **arguments: object
) -> SupernetTraining:
    torch.manual_seed(0)

    class Stopping(SupernetTraining):
        def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_index: int) -> None:
            super().training_step(batch, batch_index)
            if stop_in == self.current_epoch + 1:
                raise StopError

    training = Stopping(Supernet(space), make(), 3, 0.02, 0.01, 0, evaluator, curve_points=1, **arguments)  # type: ignore[arg-type]
    train(training, Digits(batch_size=256, seed=0), folder)
    return training


def same(a: Supernet, b: Supernet) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", STRATEGIES)
def test_it_learns_and_resumes_to_the_same_weights(
    name: str, tiny_space: MobileSpace, evaluator: Evaluator, tmp_path: Path
) -> None:
    whole = run(STRATEGIES[name], tiny_space, evaluator, tmp_path / "whole")
    first = next(key for key in ("largest_loss", "drawn_loss") if key in whole.curve[0])
    last = first if first in whole.curve[-1] else "drawn_loss"
    assert whole.curve[-1][last] < whole.curve[0][first]
    for stop_in in (2, 3):
        with pytest.raises(StopError):
            run(STRATEGIES[name], tiny_space, evaluator, tmp_path / "cut", stop_in)
    resumed = run(STRATEGIES[name], tiny_space, evaluator, tmp_path / "cut")
    assert same(resumed.supernet, whole.supernet)
    assert resumed.curve == whole.curve


def step_of(supernet: Supernet, index: int, steps: int, distillation: Distillation | None = None) -> Step:
    rng = np.random.default_rng(index)
    images, labels = torch.rand(8, 1, 8, 8, generator=torch.manual_seed(index)), torch.arange(8)
    how = distillation or Distillation()
    return Step(supernet, images, labels, index, steps, rng, how, 0.0, lambda loss: loss.backward())


def trained_in(
    strategy: Strategy, supernet: Supernet, index: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> list[Architecture]:
    """The architectures that one step runs, in order."""
    seen: list[Architecture] = []
    activate = supernet.activate
    monkeypatch.setattr(supernet, "activate", lambda a: (seen.append(a), activate(a))[1])
    strategy.backward(step_of(supernet, index, steps))
    monkeypatch.undo()
    return seen


def test_sandwich_trains_both_ends_and_drawn_ones(tiny_space: MobileSpace, monkeypatch: pytest.MonkeyPatch) -> None:
    supernet = Supernet(tiny_space)
    seen = trained_in(Sandwich(2), supernet, 0, 10, monkeypatch)
    assert seen[:2] == [tiny_space.largest(), tiny_space.smallest()]
    assert len(seen) == 4
    assert trained_in(Sandwich(2), supernet, 0, 10, monkeypatch) == seen  # the step decides what is drawn


def test_between_sandwiches_drawn_networks_learn_from_the_labels(
    tiny_space: MobileSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    supernet, strategy = Supernet(tiny_space), Sandwich(2, every=3)
    between = trained_in(strategy, supernet, 4, 10, monkeypatch)
    assert between == drawn(tiny_space, np.random.default_rng(4), 2)
    assert trained_in(strategy, supernet, 6, 10, monkeypatch)[:2] == [tiny_space.largest(), tiny_space.smallest()]


@pytest.mark.parametrize("name", ["sandwich", "sorted", "single path"])
def test_labels_are_smoothed_where_asked(name: str, tiny_space: MobileSpace) -> None:
    losses = []
    for smoothing in (0.0, 0.3):
        torch.manual_seed(0)
        step = replace(step_of(Supernet(tiny_space), 0, 10), smoothing=smoothing)
        losses.append(float(next(iter(STRATEGIES[name]().backward(step).values()))))
    assert losses[0] != losses[1]


def test_networks_are_drawn_spread_over_the_sizes_where_asked(tiny_space: MobileSpace, monkeypatch: pytest.MonkeyPatch) -> None:
    supernet, strategy = Supernet(tiny_space), Sandwich(2, every=3, spread=True)
    rng = np.random.default_rng(4)
    assert trained_in(strategy, supernet, 4, 10, monkeypatch) == [tiny_space.sample_spread(rng) for _ in range(2)]
    for path, draw in ((SinglePath(spread=True), tiny_space.sample_spread), (SinglePath(), tiny_space.sample)):
        assert trained_in(path, supernet, 4, 10, monkeypatch) == [draw(np.random.default_rng(4))]


def test_the_largest_first_and_then_the_sandwich(tiny_space: MobileSpace, monkeypatch: pytest.MonkeyPatch) -> None:
    supernet, strategy = Supernet(tiny_space), Sandwich(2, largest_first=0.5)
    assert trained_in(strategy, supernet, 4, 10, monkeypatch) == [tiny_space.largest()]
    assert len(trained_in(strategy, supernet, 5, 10, monkeypatch)) == 4


def test_progressive_opens_kinds_one_after_the_other(tiny_space: MobileSpace) -> None:
    strategy = Progressive(2)
    strategy.prepare(Supernet(tiny_space), Distillation())
    before: dict[str, int] = {}
    for position in np.linspace(0, 1, 30):
        opened = strategy.opened(tiny_space, float(position))
        for choice in tiny_space.choices:
            assert opened[choice.name] == choice.options[-len(opened[choice.name]) :]  # the largest stays
            assert len(opened[choice.name]) >= before.get(choice.name, 1)
            before[choice.name] = len(opened[choice.name])
    assert all(before[c.name] == len(c.options) for c in tiny_space.choices)
    early = strategy.opened(tiny_space, 0.3)
    assert all(len(early[c.name]) == 1 for c in tiny_space.choices if c.kind in ("precision", "sparsity"))


def test_progressive_keeps_the_teacher_that_the_first_phase_left(tiny_space: MobileSpace) -> None:
    supernet, strategy = Supernet(tiny_space), Progressive(1, largest_share=0.2)
    strategy.prepare(supernet, Distillation())
    strategy.backward(step_of(supernet, 2, 10))
    kept = {name: value.clone() for name, value in strategy.teacher.named_parameters()}
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.add_(1.0)
    strategy.backward(step_of(supernet, 5, 10))
    assert all(torch.equal(value, kept[name]) for name, value in strategy.teacher.named_parameters())


def test_in_place_distillation_is_cross_entropy_to_the_largest(tiny_space: MobileSpace) -> None:
    supernet = Supernet(tiny_space)
    step = step_of(supernet, 0, 1)
    said = Outputs(torch.randn(8, 10), {})
    student = Outputs(torch.randn(8, 10), {})
    lesson = Distillation(temperature=2.0, labels=0.25).lesson(supernet, step.images, said)
    log_p = (student.logits / 2).log_softmax(1)
    soft = -((said.logits / 2).softmax(1) * log_p).sum(1).mean() * 4
    expected = 0.75 * soft + 0.25 * F.cross_entropy(student.logits, step.labels)
    torch.testing.assert_close(lesson.loss(tiny_space.smallest(), student, step.labels), expected)


def test_a_quantized_network_learns_from_itself_in_float(tiny_space: MobileSpace) -> None:
    supernet = Supernet(tiny_space)
    step = step_of(supernet, 0, 1)
    quantized, floating = tiny_space.graded(1.0, precision="w8a8"), tiny_space.graded(1.0, precision="fp32")
    lesson = Distillation("float").lesson(supernet, step.images, None)
    supernet.activate(quantized)
    student = supernet.outputs(step.images)
    loss = lesson.loss(quantized, student, step.labels)
    supernet.activate(floating)
    soft = supernet(step.images).detach().softmax(1)
    torch.testing.assert_close(loss, F.cross_entropy(student.logits, soft))


def test_a_given_teacher_is_asked_once_a_step_and_not_trained(tiny_space: MobileSpace) -> None:
    asked: list[int] = []

    class Teacher(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(64, 10)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            asked.append(len(images))
            return self.linear(images.flatten(1))

    supernet, teacher = Supernet(tiny_space), Teacher()
    Sandwich(2).backward(step_of(supernet, 0, 1, Distillation(teacher)))
    assert asked == [8]
    assert teacher.linear.weight.grad is None
    assert not teacher.training


def test_attention_is_nothing_between_equal_networks_and_pulls_others_together(tiny_space: MobileSpace) -> None:
    supernet = Supernet(tiny_space)
    step = step_of(supernet, 0, 1)
    how = Distillation(attention=1.0)
    teacher = how.run(supernet, tiny_space.largest(), step.images)
    lesson = how.lesson(supernet, step.images, teacher)
    plain = Distillation().lesson(supernet, step.images, teacher)
    assert torch.equal(
        lesson.loss(tiny_space.largest(), teacher, step.labels), plain.loss(tiny_space.largest(), teacher, step.labels)
    )
    supernet.activate(tiny_space.smallest())
    student = supernet.outputs(step.images)
    assert lesson.loss(tiny_space.smallest(), student, step.labels) > plain.loss(tiny_space.smallest(), student, step.labels)
    assert student.maps.keys() & teacher.maps.keys()


def test_averaged_weights_are_kept(tiny_space: MobileSpace, evaluator: Evaluator, tmp_path: Path) -> None:
    averaged = run(lambda: Sandwich(1), tiny_space, evaluator, tmp_path / "a", averaging=0.9)
    last = run(lambda: Sandwich(1), tiny_space, evaluator, tmp_path / "b")
    assert same(averaged.supernet, averaged.result)
    assert not same(averaged.supernet, last.supernet)
    with pytest.raises(StopError):
        run(lambda: Sandwich(1), tiny_space, evaluator, tmp_path / "c", 3, averaging=0.9)
    assert same(run(lambda: Sandwich(1), tiny_space, evaluator, tmp_path / "c", averaging=0.9).supernet, averaged.supernet)


def test_residual_branches_can_begin_with_nothing(evaluator: Evaluator) -> None:
    stages = [{"widths": [8], "depths": [1, 2], "stride": 2}]
    space = MobileSpace(1, 10, [8], [8], stages, [2], [3], [16], ["fp32"], ["dense"])  # type: ignore[arg-type]
    supernet = Supernet(space)
    SupernetTraining(supernet, SinglePath(), 1, 0.1, 0.0, 0, evaluator, zero_init_residual=True)
    skips = [n for n in space.network(space.largest()).nodes if n.spec.skip_bits]
    assert skips
    assert all(supernet.layer(n.name).get_parameter("norm_weight").abs().max() == 0 for n in skips)


SETTINGS: dict[str, dict[str, Any]] = {
    "teacher": {"teacher": "float"},
    "module": {"teacher": torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))},
    "labels": {"labels": 0.5},
    "temperature": {"temperature": 3.0},
    "attention": {"attention": 1.0},
}
CONFIGURED = sorted(path.stem for path in (CONFIG_FOLDER / "supernet").glob("*.yaml") if path.stem != "one_by_one")


def configured(name: str) -> Strategy:
    """The strategy of a file in `conf/supernet/`."""
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        strategy = instantiate(compose("search", [f"supernet={name}"]).supernet.strategy)
    assert isinstance(strategy, Strategy)
    return strategy


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", CONFIGURED)
def test_a_setting_of_the_distillation_changes_what_is_learned_or_is_refused(
    name: str, setting: str, tiny_space: MobileSpace, evaluator: Evaluator
) -> None:
    """Of every strategy that there is, in a late step that is a sandwich."""

    def gradients(distillation: Distillation) -> torch.Tensor:
        torch.manual_seed(0)
        supernet, strategy = Supernet(tiny_space), configured(name)
        SupernetTraining(supernet, strategy, 1, 0.02, 0.0, 0, evaluator, distillation=distillation)
        strategy.backward(step_of(supernet, 120, 128, distillation))
        return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in supernet.parameters()])

    usual, refused = gradients(Distillation()), ""
    try:
        with_setting = gradients(Distillation(**SETTINGS[setting]))
    except UserError as error:
        refused = str(error)
    if refused:
        named = "teacher" if setting == "module" else setting
        assert re.fullmatch(f"distillation.{named} is .*; allowed is .*", refused)
    else:
        assert (with_setting - usual).norm() > 0.01 * usual.norm()


@pytest.mark.parametrize("name", ["single_path", "sorted", "uniform"])
def test_where_nobody_teaches_no_setting_of_the_distillation_is_taken(name: str, tiny_space: MobileSpace) -> None:
    for settings in SETTINGS.values():
        with pytest.raises(UserError, match=r"trains all networks on the labels; allowed is .*sandwich"):
            configured(name).check(tiny_space, Distillation(**settings))


@pytest.mark.parametrize("name", ["cosine", "constant_ending"])
def test_rates_rise_and_fall(name: str) -> None:
    rates = [rate_factor(name, step, 400) for step in range(400)]
    assert np.argmax(rates) in (19, 20)
    assert rates[19] == pytest.approx(1.0)
    assert (np.diff(rates[20:]) <= 1e-12).all()
    if name == "constant_ending":
        assert rates[-1] == rates[-90] == 0.05


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Distillation("largest"), "in_place"),
        (lambda: Distillation(labels=1.5), "1.5"),
        (lambda: Distillation(temperature=0.0), "temperature 0.0"),
        (lambda: Distillation(torch.nn.Identity(), attention=1.0), "attention"),
        (lambda: Sandwich(-1), "-1"),
        (lambda: Sandwich(1, largest_first=1.0), "1.0"),
        (lambda: Sandwich(1, every=0), "every is 0"),
        (lambda: Sandwich(0, every=2), "every is 2"),
        (lambda: Sandwich(spread=1), "spread is 1"),  # type: ignore[arg-type]
        (lambda: SinglePath(spread=0.5), "spread is 0.5"),  # type: ignore[arg-type]
        (lambda: Sorted(0), "0"),
        (lambda: Progressive(0), "0"),
        (lambda: Progressive(1, largest_share=0.0), "0.0"),
    ],
)
def test_values_that_are_not_allowed_are_one_line(make: Callable[[], object], word: str) -> None:
    with pytest.raises(UserError, match="allowed") as caught:
        make()
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["sandwich", "sorted"])
def test_no_mask_is_computed_twice_in_a_step(
    name: str, tiny_space: MobileSpace, evaluator: Evaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, object, torch.Size]] = []
    computed: list[tuple[int, object, torch.Size]] = []
    real_use, real_mask, real_step = ElasticWeight.masked, weights.mask, SupernetTraining._step
    repeated = 0

    def using(self: ElasticWeight, shape: tuple[int, ...], sparsity: str) -> torch.Tensor:
        if sparsity != "dense":
            asked.append((self.values.data_ptr(), parse(sparsity), torch.Size(shape)))
        return real_use(self, shape, sparsity)

    def computing(weight: torch.Tensor, sparsity: str | Sparsity, *ranking: torch.Tensor | None) -> torch.Tensor | None:
        if sparsity != "dense":
            computed.append((weight.data_ptr(), sparsity, weight.shape))
        return real_mask(weight, sparsity, *ranking)

    def step(self: SupernetTraining, *arguments: Any) -> Any:
        nonlocal repeated
        asked.clear()
        computed.clear()
        result = real_step(self, *arguments)
        assert len(computed) == len(set(computed)) == len(set(asked))
        repeated += len(asked) - len(computed)
        return result

    monkeypatch.setattr(ElasticWeight, "masked", using)
    monkeypatch.setattr(weights, "mask", computing)
    monkeypatch.setattr(SupernetTraining, "_step", step)
    run(STRATEGIES[name], tiny_space, evaluator, tmp_path)
    assert repeated > 0


def test_masks_of_a_step_are_those_of_its_weights(
    tiny_space: MobileSpace, evaluator: Evaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = run(STRATEGIES["sandwich"], tiny_space, evaluator, tmp_path / "shared")
    monkeypatch.setattr(Supernet, "remember_masks", lambda self: nullcontext())
    alone = run(STRATEGIES["sandwich"], tiny_space, evaluator, tmp_path / "alone")
    assert same(shared.supernet, alone.supernet)
