"""Training: it learns, it follows from its seed, and killed and resumed it ends with the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from search.data import Digits
from search.evaluation import Evaluator
from search.training import CHECKPOINT, SupernetTraining, train
from search.training.sandwich import Sandwich
from spaces.errors import UserError
from spaces.mobile import MobileSpace
from spaces.supernet import Supernet

Point = dict[str, float]


class StopError(Exception):
    """Stands for a kill in the middle of an epoch."""


def run(
    space: MobileSpace,
    evaluator: Evaluator,
    folder: Path,
    epochs: int = 3,
    seed: int = 0,
    rate: float = 0.02,
    stop_in: int | None = None,
    points: int = 2,
    noise: int = 0,
) -> SupernetTraining:
    """One attempt; `stop_in` stops it in the middle of that epoch, `noise` disturbs the global generator before it."""
    torch.manual_seed(seed)
    supernet = Supernet(space)
    torch.manual_seed(noise)
    data = Digits(batch_size=256, seed=seed)

    class Stopping(SupernetTraining):
        def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_index: int) -> None:
            super().training_step(batch, batch_index)
            if stop_in == self.current_epoch + 1 and batch_index == 2:
                raise StopError

    training = Stopping(supernet, Sandwich(1), epochs, rate, 0.01, seed, evaluator, curve_points=points)
    train(training, data, folder)
    return training


def weights(training: SupernetTraining) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in training.supernet.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def undisturbed(tiny_space: MobileSpace, evaluator: Evaluator, tmp_path_factory: pytest.TempPathFactory) -> SupernetTraining:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    training = run(tiny_space, evaluator, tmp_path_factory.mktemp("supernet"))
    torch.set_num_threads(threads)
    return training


def test_it_learns_and_tells(undisturbed: SupernetTraining) -> None:
    curve = undisturbed.curve
    assert [point["epoch"] for point in curve] == [1, 2, 3]
    assert curve[-1]["largest_loss"] < curve[0]["largest_loss"]
    measured = [point["epoch"] for point in curve if "validation_accuracy_largest" in point]
    assert measured == [2, 3]
    assert curve[-1]["validation_accuracy_largest"] > 0.15
    assert undisturbed.steps == 3 * len(Digits(batch_size=256, seed=0).train_dataloader())


def test_the_seed_decides(undisturbed: SupernetTraining, tiny_space: MobileSpace, evaluator: Evaluator, tmp_path: Path) -> None:
    again = run(tiny_space, evaluator, tmp_path / "again", noise=5)
    assert same(weights(again), weights(undisturbed))
    assert again.curve == undisturbed.curve
    assert not same(weights(run(tiny_space, evaluator, tmp_path / "other", seed=1)), weights(undisturbed))


@pytest.mark.parametrize("stops", [(1, 2), (2, 3)])
def test_stopped_and_resumed_it_ends_with_the_same_weights(
    undisturbed: SupernetTraining, tiny_space: MobileSpace, evaluator: Evaluator, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    for stop in stops:
        with pytest.raises(StopError):
            run(tiny_space, evaluator, tmp_path, stop_in=stop, noise=stop)
    resumed = run(tiny_space, evaluator, tmp_path, noise=9)
    assert same(weights(resumed), weights(undisturbed))
    assert resumed.curve == undisturbed.curve
    assert resumed.steps == undisturbed.steps


def test_a_training_that_is_done_is_not_done_again(
    undisturbed: SupernetTraining, tiny_space: MobileSpace, evaluator: Evaluator, tmp_path: Path
) -> None:
    run(tiny_space, evaluator, tmp_path)
    resumed = run(tiny_space, evaluator, tmp_path, stop_in=1)
    assert same(weights(resumed), weights(undisturbed))
    assert (resumed.curve, resumed.steps) == (undisturbed.curve, undisturbed.steps)


def test_a_checkpoint_is_read_without_pickle(tiny_space: MobileSpace, evaluator: Evaluator, tmp_path: Path) -> None:
    run(tiny_space, evaluator, tmp_path, epochs=1)
    assert [p.name for p in tmp_path.iterdir()] == [CHECKPOINT]
    assert torch.load(tmp_path / CHECKPOINT, weights_only=True)["epoch"] == 0


def test_a_damaged_checkpoint_is_one_line(tiny_space: MobileSpace, evaluator: Evaluator, tmp_path: Path) -> None:
    run(tiny_space, evaluator, tmp_path, epochs=1)
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=CHECKPOINT) as caught:
        run(tiny_space, evaluator, tmp_path, epochs=1)
    assert "\n" not in str(caught.value)


def test_a_loss_that_is_not_finite_ends_it_with_one_line(tiny_space: MobileSpace, evaluator: Evaluator, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the loss is .* lower the learning rate: supernet.learning_rate=") as caught:
        run(tiny_space, evaluator, tmp_path, rate=1e18)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / CHECKPOINT).exists()


@pytest.mark.parametrize("points", [1, 10])
def test_the_last_epoch_is_always_measured(tiny_space: MobileSpace, evaluator: Evaluator, tmp_path: Path, points: int) -> None:
    training = run(tiny_space, evaluator, tmp_path, points=points)
    measured = [point["epoch"] for point in training.curve if "validation_accuracy_smallest" in point]
    assert measured[-1] == 3
    assert len(measured) == min(points, 3)
