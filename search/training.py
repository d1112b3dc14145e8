"""Training the supernet: the sandwich rule with in-place distillation, as a Lightning module.

Every step trains the largest network on the labels, then the smallest and `random_networks` drawn ones on the largest one's
predictions (BigNAS, arXiv:2003.11142). Precision and sparsity are drawn like every other choice. What is drawn depends on the
seed and the step alone, so a training that is killed and resumed from its last epoch ends with the same weights.
"""

from __future__ import annotations

import pickle  # for the name of an error; torch.load runs with weights_only
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.nn import functional as F

from search.evaluation import Evaluator
from spaces.errors import UserError
from spaces.quantizers import WeightQuantizer
from spaces.supernet import Supernet

CHECKPOINT = "last.ckpt"

Point = dict[str, float]


class SandwichTraining(pl.LightningModule):
    """One optimizer step trains several networks of the supernet.

    Args:
        supernet: the shared weights.
        epochs: passes over the training data.
        learning_rate: its peak; warmed up over the first twentieth of the steps, then lowered along a cosine.
        weight_decay: of AdamW, on weights of convolutions and linear layers only.
        random_networks: drawn per step beside the largest and the smallest.
        seed: of what is drawn.
        evaluator: measures the curve's points on validation data.
        curve_points: how many epochs are measured.
        on_epoch: called after each epoch with `(epochs done, curve)`.
    """

    def __init__(
        self,
        supernet: Supernet,
        epochs: int,
        learning_rate: float,
        weight_decay: float,
        random_networks: int,
        seed: int,
        evaluator: Evaluator,
        curve_points: int = 6,
        on_epoch: Callable[[int, list[Point]], None] = lambda epoch, curve: None,
    ) -> None:
        if not learning_rate > 0 or not weight_decay >= 0:
            found = f"supernet.learning_rate is {learning_rate} and weight_decay {weight_decay}"
            raise UserError(f"{found}; allowed are a rate above 0 and a decay from 0")
        super().__init__()
        self.automatic_optimization = False
        self.supernet, self.evaluator, self.on_epoch = supernet, evaluator, on_epoch
        self.epochs, self.learning_rate, self.weight_decay = epochs, learning_rate, weight_decay
        self.random_networks, self.seed = random_networks, seed
        self.curve: list[Point] = []
        self._measured_epochs = {round(epochs * (point + 1) / curve_points) for point in range(curve_points)}
        self._largest, self._smallest = supernet.space.largest(), supernet.space.smallest()

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return int(self.global_step)

    def configure_optimizers(self) -> Any:
        # Scales and codebooks that quantizers learn have no reason to be small.
        learned = {id(p) for m in self.supernet.modules() if isinstance(m, WeightQuantizer) for p in m.parameters()}
        decayed = [p for p in self.supernet.parameters() if p.dim() > 1 and id(p) not in learned]
        other = [p for p in self.supernet.parameters() if p.dim() <= 1 or id(p) in learned]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": other, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, fused=True)
        total = self._total_steps = int(self.trainer.estimated_stepping_batches)
        warmup = max(1, total // 20)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + float(np.cos(np.pi * (step - warmup) / max(1, total - warmup))))

        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, factor)]

    def on_train_epoch_start(self) -> None:
        # The data's order and augmentation restart from the epoch, so that a resumed training sees what the killed one would.
        torch.manual_seed(self.seed * 100_003 + self.current_epoch)
        self._losses: list[tuple[torch.Tensor, torch.Tensor]] = []

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_index: int) -> None:
        try:
            self._sandwich(*batch)
        except UserError as error:  # an activation that is not finite, before a loss tells
            raise UserError(self._diverged("not finite", "unknown")) from error

    def _sandwich(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        rng = np.random.default_rng([self.seed, self.global_step])
        self.supernet.start_step(self.global_step, self._total_steps)
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.supernet.activate(self._largest)
        logits = self.supernet(images)
        loss = F.cross_entropy(logits, labels)
        self.manual_backward(loss)
        targets = logits.detach().softmax(dim=1)
        others = [self._smallest, *(self.supernet.space.sample(rng) for _ in range(self.random_networks))]
        student_losses = []
        for architecture in others:
            self.supernet.activate(architecture)
            student_loss = F.cross_entropy(self.supernet(images), targets)
            self.manual_backward(student_loss)
            student_losses.append(student_loss.detach())
        self.supernet.before_step()
        optimizer.step()
        self.supernet.after_step()
        schedule: Any = self.lr_schedulers()
        schedule.step()
        self._losses.append((loss.detach(), student_losses[0]))

    def _diverged(self, largest: object, smallest: object) -> str:
        return (
            f"the loss is {largest} (largest network) and {smallest} (smallest) in epoch {self.current_epoch + 1}; "
            f"lower the learning rate: supernet.learning_rate={self.learning_rate / 4:g}"
        )

    def on_train_epoch_end(self) -> None:
        largest, smallest = torch.tensor(self._losses).mean(dim=0).tolist()
        done = self.current_epoch + 1
        if not np.isfinite(largest + smallest):
            raise UserError(self._diverged(largest, smallest))
        point = {"epoch": float(done), "largest_loss": largest, "smallest_loss": smallest}
        if done in self._measured_epochs:
            point["validation_accuracy_largest"] = self.evaluator.evaluate(self.supernet, self._largest).accuracy
            point["validation_accuracy_smallest"] = self.evaluator.evaluate(self.supernet, self._smallest).accuracy
        self.curve.append(point)
        self.on_epoch(done, self.curve)

    def on_fit_end(self) -> None:
        self.supernet.start_step(1, 1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["curve"] = self.curve

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        self.curve = list(checkpoint["curve"])


def train(training: SandwichTraining, data: pl.LightningDataModule, folder: Path, accelerator: str = "cpu") -> None:
    """Train to the end, from the last checkpoint in `folder` if there is one.

    Args:
        training: what a step does.
        data: training batches.
        folder: receives `last.ckpt` after every epoch.
        accelerator: Lightning's; evaluations run on the CPU so far, and so does training by default.

    Raises:
        UserError: the loss is not finite.
    """
    name = CHECKPOINT.removesuffix(".ckpt")
    checkpoints = pl.callbacks.ModelCheckpoint(
        folder, filename=name, save_top_k=1, every_n_epochs=1, enable_version_counter=False
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning")  # advice on loader workers, validation loops, loggers
        warnings.filterwarnings("ignore", category=FutureWarning)
        trainer = pl.Trainer(
            max_epochs=training.epochs,
            accelerator=accelerator,
            devices=1,
            callbacks=[checkpoints],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            default_root_dir=folder,
        )
        trainer.fit(training, datamodule=data, ckpt_path=readable_checkpoint(folder / CHECKPOINT), weights_only=True)


def readable_checkpoint(path: Path) -> Path | None:
    """The checkpoint to go on from, `None` when there is none.

    Raises:
        UserError: it is damaged.
    """
    if not path.exists():
        return None
    try:
        torch.load(path, weights_only=True)
    except (RuntimeError, OSError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"checkpoint {path} is damaged ({reason}); delete it to train from the beginning") from error
    return path
