"""Networks trained one by one, for spaces without shared weights: what stands where a supernet stands elsewhere.

A batch of networks goes through successive halving: all are trained for a short while, the best go on, and so to the end. Best
is what a search looks for, accuracy against costs: front after front of what was measured goes on, so a fast network is not
dropped for being less accurate than a slow one. The accuracy of every network is that with which it stopped, and it ships as it
was measured then.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytorch_lightning as pl
import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from torch import nn

from search.evaluation import Evaluation, Evaluator
from search.pool import Pool
from search.training.alone import AloneSettings, train_alone
from search.training.finishing import architecture_key
from search.training.parallel import Processes
from search.training.parts import Trainings
from search.workers import Workers
from spaces.choice import Architecture
from spaces.errors import UserError
from spaces.files import write_atomically
from spaces.plain import PlainNetwork
from spaces.space import Space

RESULTS_FILE = "results.json"

State = Mapping[str, torch.Tensor]
Promote = Callable[[Mapping[Architecture, float], int], Sequence[Architecture]]


class SpaceOfModules(Protocol):
    """What a space without shared weights offers beside its choices and layers; see `spaces.nni.NniSpace`."""

    def module(self, architecture: Architecture) -> nn.Module:
        """A fresh network."""

    def plain(self, architecture: Architecture, state: State) -> PlainNetwork:
        """What ships of a network."""


class TrainedNetworks:
    """The weights of networks that were trained one by one, a file for each.

    Args:
        folder: with the files.
        space: of the networks.
    """

    def __init__(self, folder: Path, space: Space) -> None:
        if space.shares_weights:
            raise ValueError(f"networks of {space.name} share their weights")
        self.folder, self.space = folder, space

    def path(self, architecture: Architecture) -> Path:
        """Of a network's weights."""
        return self.folder / f"{architecture_key(architecture)}.safetensors"

    def extract(self, architecture: Architecture) -> PlainNetwork:
        """A trained network, calibrated, in evaluation mode.

        Raises:
            UserError: it was not trained, or its file is damaged.
        """
        path = self.path(architecture)
        try:
            return TrainedNetwork(self.space, load_file(path)).extract(architecture)
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(
                f"weights {path} are missing or damaged ({reason}); delete the run's evaluations and run again"
            ) from error


@dataclass
class TrainedNetwork:
    """The weights of one network.

    Args:
        space: of the network.
        state: its parameters and buffers.
    """

    space: Space
    state: State

    def extract(self, architecture: Architecture) -> PlainNetwork:
        """The network, calibrated, in evaluation mode."""
        return modules_of(self.space).plain(architecture, self.state)


class FreshNetworks:
    """Networks as they are before training.

    Args:
        space: of the networks.
        seed: of their weights.
    """

    def __init__(self, space: Space, seed: int) -> None:
        self.space, self.seed = space, seed

    def extract(self, architecture: Architecture) -> PlainNetwork:
        """A network in training mode."""
        modules = modules_of(self.space)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            network = modules.module(architecture)
        return modules.plain(architecture, state_of(network)).train()


def modules_of(space: Space) -> SpaceOfModules:
    """A space without shared weights, as what makes its networks."""
    if space.shares_weights:
        raise ValueError(f"networks of {space.name} share their weights")
    return space  # type: ignore[return-value]


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, those included that a state dict leaves out."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@dataclass(frozen=True)
class Trained:
    """The weights of a network that was trained, as safetensors, and what they measure on validation data."""

    weights: bytes
    measured: Evaluation


class AloneTrainer:
    """Trains a network for so many epochs, here or on a worker.

    Args:
        space: of the networks.
        settings: how they are trained.
        data: training batches.
        evaluator: measures them on validation data.
        seed: of initial weights and of the data's order, the same for all networks.
        processes: on what, one process.
    """

    def __init__(
        self,
        space: Space,
        settings: AloneSettings,
        data: pl.LightningDataModule,
        evaluator: Evaluator,
        seed: int,
        processes: Processes | None = None,
    ) -> None:
        self.space, self.settings, self.data, self.evaluator, self.seed = space, settings, data, evaluator, seed
        self.processes = processes

    def __call__(
        self, item: tuple[Architecture, int], folder: Path, on_epoch: Callable[[int], None], limit_s: float
    ) -> Trained:
        architecture, epochs = item
        torch.manual_seed(self.seed)
        network = modules_of(self.space).module(architecture)
        how = (self.settings, epochs, self.seed, self.data, self.evaluator.calibration)
        try:
            train_alone(network, *how, folder, on_epoch, limit_s, self.processes)
        except UserError as error:
            raise UserError(f"network {architecture.to_json()}: {error}") from error
        weights = save({name: tensor.detach().clone().contiguous() for name, tensor in state_of(network).items()})
        # As it is read from its file: its layout in memory decides about the last bits of what it computes.
        return Trained(weights, self.evaluator.evaluate(TrainedNetwork(self.space, load(weights)), architecture))


@dataclass(frozen=True)
class Result:
    """How far a network was trained, and what was measured then."""

    epochs: int
    accuracy: float
    loss: float


class Halving(Workers):
    """Trains and evaluates architectures one by one, with successive halving over those that are asked for together.

    Args:
        networks: receives their weights.
        trainer: trains them.
        promote: of networks with their accuracies, as many as asked for that go on.
        pool: where they are trained.
        on_progress: called with what is trained, how many are done, and of how many.
    """

    def __init__(
        self,
        networks: TrainedNetworks,
        trainer: AloneTrainer,
        promote: Promote,
        pool: Pool,
        on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    ) -> None:
        self.networks, self.settings, self.promote, self.on_progress = networks, trainer.settings, promote, on_progress
        self.trainings = Trainings(pool, trainer)
        self.results = _results(networks.folder / RESULTS_FILE, networks.space)

    def evaluate(self, architectures: Sequence[Architecture]) -> Iterator[tuple[Architecture, Evaluation]]:
        new = [a for a in dict.fromkeys(architectures) if a not in self.results]
        if new:
            # All at once: of a batch that was interrupted nothing is known, so it is halved again in the same way.
            self.results |= self._halved(new)
            rows = [[a.to_json(), r.epochs, r.accuracy, r.loss] for a, r in self.results.items()]
            write_atomically(self.networks.folder / RESULTS_FILE, json.dumps(rows))
            for architecture in new:
                shutil.rmtree(self._folder(architecture), ignore_errors=True)
        for architecture in architectures:
            result = self.results[architecture]
            yield architecture, Evaluation(result.accuracy, result.loss)

    def _halved(self, architectures: Sequence[Architecture]) -> dict[Architecture, Result]:
        results: dict[Architecture, Result] = {}
        going = list(architectures)
        for rung, epochs in enumerate(self.settings.rungs):
            results |= self._trained(going, epochs)
            if rung + 1 < len(self.settings.rungs):
                count = math.ceil(len(going) / self.settings.reduction)
                chosen = set(self.promote({a: results[a].accuracy for a in going}, count))
                going = [a for a in going if a in chosen]
        return {a: results[a] for a in architectures}

    def _trained(self, architectures: Sequence[Architecture], epochs: int) -> dict[Architecture, Result]:
        """Networks trained until `epochs` are done; at once where an interrupted run did it."""
        files = {a: self._folder(a) / f"{epochs}.json" for a in architectures}
        found = {a: known for a, file in files.items() if (known := _measured(file, epochs)) is not None}
        missing = [a for a in architectures if a not in found]
        what = f"training, {epochs} epochs"
        self.on_progress(what, len(found), len(architectures))
        wanted = [((a, epochs), self._folder(a)) for a in missing]
        for index, trained in self.trainings.run(wanted):
            architecture, measured = missing[index], trained.measured
            write_atomically(self.networks.path(architecture), trained.weights)
            write_atomically(files[architecture], json.dumps([measured.accuracy, measured.loss]))
            found[architecture] = Result(epochs, measured.accuracy, measured.loss)
            self.on_progress(what, len(found), len(architectures))
        return found

    def _folder(self, architecture: Architecture) -> Path:
        return self.networks.folder / architecture_key(architecture)

    def epochs_of(self, architecture: Architecture) -> int:
        """For how many epochs a network was trained; 0 where it was not."""
        return self.results[architecture].epochs if architecture in self.results else 0


def _measured(path: Path, epochs: int) -> Result | None:
    try:
        accuracy, loss = json.loads(path.read_text())
        return _result(epochs, accuracy, loss)
    except (OSError, ValueError, TypeError):
        return None


def _result(epochs: object, accuracy: object, loss: object) -> Result:
    if type(epochs) is not int or not isinstance(accuracy, float) or not isinstance(loss, float):
        raise ValueError(f"{epochs!r} epochs, accuracy {accuracy!r} and loss {loss!r}")
    if not 0.0 <= accuracy <= 1.0 or not math.isfinite(loss):
        raise ValueError(f"accuracy {accuracy} and loss {loss}")
    return Result(epochs, accuracy, loss)


def _results(path: Path, space: Space) -> dict[Architecture, Result]:
    """What earlier batches ended with.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        return {}
    try:
        rows = json.loads(path.read_text())
        return {space.architecture(Architecture.from_json(text)): _result(*values) for text, *values in rows}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it to train its networks again") from error
