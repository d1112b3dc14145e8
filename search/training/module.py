"""Training a supernet, as a Lightning module: optimizer, learning rate, figures; what a step trains is a `Strategy`.

What is drawn depends on the seed and the step alone, so a training that is killed and resumed from its last epoch ends with the
same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel

from search.evaluation import Evaluator
from search.training.distillation import Distillation
from search.training.fit import Training
from search.training.parallel import average_gradients, mean_over_processes
from search.training.schedule import check_schedule, rate_factor
from search.training.strategy import Losses, Step, Strategy
from spaces.errors import DivergedError, UserError
from spaces.quantizers import WeightQuantizer
from spaces.supernet import Supernet

Point = dict[str, float]


class SupernetTraining(Training):
    """One optimizer step trains what its strategy says.

    Args:
        supernet: the shared weights.
        strategy: which networks a step trains, and on what.
        epochs: passes over the training data.
        learning_rate: its peak.
        weight_decay: of AdamW, on weights of convolutions and linear layers only.
        seed: of what is drawn.
        evaluator: measures the curve's points on validation data.
        distillation: how students learn from a teacher.
        schedule: `cosine` or `constant_ending`, see `search.training.schedule`.
        label_smoothing: where the largest network learns from labels, and where nobody teaches any network.
        averaging: decay of the averaged weights, which are what is evaluated and kept; 0 keeps the last ones.
        zero_init_residual: begin with residual branches that add nothing: 0 for the scale of each one's last batch norm
            (arXiv:1706.02677, section 5.1).
        curve_points: how many epochs are measured.
        on_epoch: called after each epoch with `(epochs done, curve)`.

    Raises:
        UserError: a value that is not allowed, or a strategy that cannot train this space.
    """

    def __init__(
        self,
        supernet: Supernet,
        strategy: Strategy,
        epochs: int,
        learning_rate: float,
        weight_decay: float,
        seed: int,
        evaluator: Evaluator,
        distillation: Distillation | None = None,
        schedule: str = "cosine",
        label_smoothing: float = 0.0,
        averaging: float = 0.0,
        zero_init_residual: bool = False,
        curve_points: int = 6,
        on_epoch: Callable[[int, list[Point]], None] = lambda epoch, curve: None,
    ) -> None:
        if not learning_rate > 0 or not weight_decay >= 0:
            found = f"supernet.learning_rate is {learning_rate} and weight_decay {weight_decay}"
            raise UserError(f"{found}; allowed are a rate above 0 and a decay from 0")
        if not 0.0 <= label_smoothing < 1.0 or not 0.0 <= averaging < 1.0:
            found = f"supernet.label_smoothing is {label_smoothing} and averaging {averaging}"
            raise UserError(f"{found}; allowed are values from 0 to below 1")
        if not isinstance(strategy, Strategy):
            raise UserError(f"supernet.strategy is a {type(strategy).__name__}; allowed is a search.training.Strategy")
        check_schedule(schedule)
        super().__init__()
        self.automatic_optimization = False
        self.supernet, self.strategy, self.distillation = supernet, strategy, distillation or Distillation()
        strategy.check(supernet.space, self.distillation)
        strategy.prepare(supernet, self.distillation)
        self.evaluator, self.on_epoch = evaluator, on_epoch
        self.epochs, self.learning_rate, self.weight_decay = epochs, learning_rate, weight_decay
        self.schedule, self.label_smoothing, self.seed = schedule, label_smoothing, seed
        if zero_init_residual:
            zero_residuals(supernet)
        self.averaged = AveragedModel(supernet, multi_avg_fn=_averaging(averaging)) if averaging else None
        self.curve: list[Point] = []
        self._processes, self._curve_points = 1, curve_points
        self._planned: int | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return int(self.global_step)

    @property
    def macs_done(self) -> int:
        """Multiply-accumulates of the training so far, over all processes."""
        return self.supernet.macs_done * self._processes

    @property
    def result(self) -> Supernet:
        """The weights that are evaluated and kept."""
        averaged = self.averaged.module if self.averaged is not None else self.supernet
        if not isinstance(averaged, Supernet):
            raise TypeError("averaged weights are not those of a supernet")
        return averaged

    def plan(self, epochs: int) -> None:
        """Train for another number of epochs in all, from the next epoch on; a checkpoint keeps it."""
        self.epochs = self.trainer.fit_loop.max_epochs = self._planned = epochs

    def setup(self, stage: str) -> None:
        self._processes = self.trainer.world_size

    def configure_optimizers(self) -> Any:
        # Scales and codebooks that quantizers learn have no reason to be small.
        learned = {id(p) for m in self.supernet.modules() if isinstance(m, WeightQuantizer) for p in m.parameters()}
        decayed = [p for p in self.supernet.parameters() if p.dim() > 1 and id(p) not in learned]
        other = [p for p in self.supernet.parameters() if p.dim() <= 1 or id(p) in learned]
        groups: list[dict[str, object]] = [
            {"params": decayed, "weight_decay": self.weight_decay},
            {"params": other, "weight_decay": 0.0},
            *self.strategy.own_parameters(),
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, fused=True)
        self._peaks = [float(group["lr"]) for group in optimizer.param_groups]
        # Counted in epochs, so that a training can go on with another number of processes, hence of steps per epoch.
        self._batches = -(-int(self.trainer.estimated_stepping_batches) // self.epochs)
        return optimizer

    def on_train_epoch_start(self) -> None:
        # The data's order and augmentation restart from the epoch, so that a resumed training sees what the killed one would.
        torch.manual_seed(self.seed * 100_003 + self.current_epoch)
        self._losses: list[Losses] = []

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_index: int) -> None:
        try:
            losses = self._step(*batch, self.current_epoch * self._batches + batch_index, self.epochs * self._batches)
        except DivergedError as error:  # an activation tells before a loss does
            raise UserError(self._diverged("not finite")) from error
        self._losses.append(losses)

    def _step(self, images: torch.Tensor, labels: torch.Tensor, index: int, steps: int) -> Losses:
        rng = np.random.default_rng([self.seed, index])
        for weights in {self.supernet, self.result}:
            weights.start_step(index, steps)
        optimizer: Any = self.optimizers()
        for group, peak in zip(optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * rate_factor(self.schedule, index, steps)
        optimizer.zero_grad()
        with self.supernet.remember_masks():
            losses = self.strategy.backward(
                Step(
                    supernet=self.supernet,
                    images=images,
                    labels=labels,
                    index=index,
                    steps=steps,
                    rng=rng,
                    distillation=self.distillation,
                    smoothing=self.label_smoothing,
                    backward=self.manual_backward,
                )
            )
        if self._processes > 1:
            average_gradients(self.parameters())
        self.supernet.before_step()
        optimizer.step()
        self.supernet.after_step()
        if self.averaged is not None:
            self.averaged.update_parameters(self.supernet)
        return losses

    def _diverged(self, losses: str) -> str:
        return (
            f"the loss is {losses} in epoch {self.current_epoch + 1}; "
            f"lower the learning rate: supernet.learning_rate={self.learning_rate / 4:g}"
        )

    def on_train_epoch_end(self) -> None:
        names = dict.fromkeys(name for losses in self._losses for name in losses)
        means = {}
        for name in names:
            own = torch.stack([losses[name] for losses in self._losses if name in losses]).mean().item()
            means[name] = mean_over_processes(own) if self._processes > 1 else own
        done = self.current_epoch + 1
        if not np.isfinite(list(means.values())).all():
            raise UserError(self._diverged(", ".join(f"{value} ({name} network)" for name, value in means.items())))
        point = {"epoch": float(done), **{f"{name}_loss": value for name, value in means.items()}}
        if done in self._measured_epochs() and self.global_rank == 0:
            space, result = self.supernet.space, self.result
            point["validation_accuracy_largest"] = self.evaluator.evaluate(result, space.largest()).accuracy
            point["validation_accuracy_smallest"] = self.evaluator.evaluate(result, space.smallest()).accuracy
        self.curve.append(point)
        self.on_epoch(done, self.curve)

    def _measured_epochs(self) -> set[int]:
        """After which the curve has a point."""
        return {round(self.epochs * (point + 1) / self._curve_points) for point in range(self._curve_points)}

    def on_fit_end(self) -> None:
        if self.averaged is not None:
            self.supernet.load_state_dict(self.result.state_dict())
        for weights in {self.supernet, self.result}:
            weights.start_step(1, 1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["curve"], checkpoint["macs"], checkpoint["planned"] = self.curve, self.macs_done, self._planned

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        self.curve, self.supernet.macs_done = list(checkpoint["curve"]), int(checkpoint["macs"]) // self._processes
        if checkpoint.get("planned") is not None:
            self.plan(int(checkpoint["planned"]))


def zero_residuals(supernet: Supernet) -> None:
    """Set the scale of the last batch norm of every residual branch to 0."""
    with torch.no_grad():
        for node in supernet.space.network(supernet.space.largest()).nodes:
            weight = getattr(supernet.layer(node.name), "norm_weight", None)
            if node.spec.skip_bits and isinstance(weight, torch.Tensor):
                weight.zero_()


def _averaging(decay: float) -> Callable[[Any, Any, Any], None]:
    """An exponential average that follows quickly at first, so that a short training does not keep its beginning."""

    @torch.no_grad()
    def average(averaged: Any, current: Any, count: Any) -> None:
        n = float(count)
        torch._foreach_lerp_(averaged, current, 1.0 - min(decay, (1.0 + n) / (10.0 + n)))

    return average
