"""A job: one configured search on one run folder, with everything that its stages share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
from safetensors import SafetensorError
from safetensors.torch import load_file

from latency_lut.device import Device
from latency_lut.energy import measure_energy
from latency_lut.memory import measure_memory
from latency_lut.table import LatencyTable
from predictors.accuracy import AccuracyPredictor
from predictors.automatic import KINDS, Automatic
from predictors.energy import EnergyPredictor
from predictors.latency import LatencyPredictor
from predictors.memory import MemoryPredictor
from search import __version__
from search.configured import Configured
from search.data import check_batch, fingerprint
from search.evaluation import Evaluator, Split, Weights, calibration_batches, collect, training_sample
from search.evaluations import Evaluations
from search.objectives import Goal, devices_of
from search.one_by_one import TrainedNetworks
from search.predicted import PredictedValues
from search.proxies import ProxyScores, compressed
from search.run import digest
from search.workforce import Workforce
from spaces.choice import Architecture
from spaces.errors import UserError
from spaces.supernet import Supernet

SUPERNET_FILE = "supernet/supernet.safetensors"
EVALUATIONS_FILE = "evaluations.parquet"
PROXIES_FILE = "proxies.parquet"
FINISHED_FOLDER = "finished"
RELAXED_FOLDER = "relaxed"
FOCUS_FOLDER = "focus"
FOCUSED_FILE = f"{FOCUS_FOLDER}/supernet.safetensors"
FRONTS_FILE = f"{FOCUS_FOLDER}/fronts.json"
FOCUSED_EVALUATIONS_FILE = f"{FOCUS_FOLDER}/evaluations.parquet"
ALONE_FOLDER = "supernet/alone"


class Job(Configured):
    """What the stages of a run work with. Data, weights and predictors are made when they are first needed."""

    _current: tuple[str | None, Supernet] | None = None  # weights, with what focused them
    _evaluations: Evaluations | None = None

    # -- fingerprints -----------------------------------------------------------------------------------------------------

    def fingerprint(self, stage: str) -> str:
        """Fingerprint of everything that a stage depends on; those of earlier stages must have finished."""
        s, output = self.settings, self.run.output
        ways = {name: [device.transport.name] if device.transport else [] for name, device in self.devices.items()}
        devices = [(name, device.fingerprint, *ways[name]) for name, device in self.devices.items()]
        fronts = [(g.name, [o.name for o in g.objectives]) for g in self.goals]
        goals = [(g.name, [o.name for o in g.objectives], [c.text for c in g.constraints]) for g in self.goals]
        judging = ("evaluation", "predictor", "proxies")
        parts: dict[str, Callable[[], list[object]]] = {
            "space": lambda: [self.space.fingerprint],
            "tables": lambda: [self.space.fingerprint, devices, s["profile"], self.seed],
            "supernet": lambda: [self.space.fingerprint, self.data_fingerprint, s["supernet"], s["estimators"], self.seed],
            "predictors": lambda: [output("tables"), output("supernet"), *(s[part] for part in judging), self.seed],
            "focus": lambda: [output("predictors"), s["focus"], fronts, self.seed],
            "relax": lambda: [output("predictors"), self.focused_output, s["relaxation"], goals, self.seed],
            "study": lambda: [
                *(output("predictors"), self.focused_output, self.relaxed_output),
                *(s["study"], goals, self.seed, self.strategy().key),
            ],
            "finish": lambda: [output("study"), s["finish"], s["export"]["winners"]],
            "export": lambda: [output("study"), s["export"], self.finished_output],
            "report": lambda: [output("export")],
        }
        return digest(stage, __version__, *parts[stage]())

    @property
    def focused_output(self) -> str | None:
        """What the stage `focus` made with the present predictors; `None` where it was not done."""
        known = self.run.record("predictors")
        if known is None or not known.done:
            return None
        return self.run.output("focus") if self.run.finished("focus", self.fingerprint("focus"), [FOCUSED_FILE]) else None

    @property
    def relaxed_output(self) -> str | None:
        """What the stage `relax` found with the present predictors; `None` where it was not done."""
        return self.run.output("relax") if self.run.finished("relax", self.fingerprint("relax"), ()) else None

    @property
    def finished_output(self) -> str | None:
        """What the stage `finish` made for the present study; `None` where it was not done."""
        return self.run.output("finish") if self.run.finished("finish", self.fingerprint("finish"), ()) else None

    @cached_property
    def data_fingerprint(self) -> str:
        return digest(fingerprint(self.data), self.settings["data"])

    # -- data ---------------------------------------------------------------------------------------------------------------

    @cached_property
    def ready_data(self) -> pl.LightningDataModule:
        """The data module, set up and looked at.

        Raises:
            UserError: the data is missing or not as configured.
        """
        self.data.prepare_data()
        self.data.setup("fit")
        for images, labels in self.data.train_dataloader():
            check_batch(images, labels, self.channels, self.classes)
            break
        return self.data

    @cached_property
    def train_images(self) -> int:
        """Images in the training data."""
        return sum(len(labels) for _, labels in self.ready_data.train_dataloader())

    @cached_property
    def validation(self) -> Split:
        return collect(self.ready_data, "validation")

    @cached_property
    def test(self) -> Split:
        self.ready_data.setup("test")
        return collect(self.ready_data, "test")

    @cached_property
    def evaluator(self) -> Evaluator:
        batches = calibration_batches(self.ready_data, self.evaluation.calibration_images, self.seed)
        return Evaluator(batches, self.validation)

    # -- what earlier stages left -----------------------------------------------------------------------------------------

    def path(self, name: str) -> Path:
        """A file of the run."""
        return self.run.path / name

    def table_path(self, device: Device) -> Path:
        return self.path(f"tables/{device.name}.parquet")

    def table(self, device: Device) -> LatencyTable:
        """The device's table.

        Raises:
            UserError: missing, damaged, or of another space or device.
        """
        path = self.table_path(device)
        if not path.exists():
            raise UserError(f"no table {path}; run: python -m search run={self.run.path}")
        table = LatencyTable.load(path)
        table.check(self.space, device)
        return table

    @cached_property
    def latency(self) -> dict[str, LatencyPredictor]:
        """Latency predictor of each device, fitted to its table."""
        return {
            name: LatencyPredictor.fit(self.table(device), self.space, self.profile.held_out, self.seed)
            for name, device in self.devices.items()
        }

    @cached_property
    def memory(self) -> dict[str, MemoryPredictor]:
        """Predictor of the peak memory on each device where it is asked for; what is not measured yet is, in seconds."""
        fitted = {}
        for name in devices_of(self.goals, "peak_memory"):
            path, device = self.path(f"tables/{name}.memory.json"), self.devices[name]
            table = measure_memory(self.space, device, path, seed=self.seed, on_progress=self.progress.advance)
            fitted[name] = MemoryPredictor.fit(table, self.space, self.profile.held_out, self.seed)
        return fitted

    @cached_property
    def energy(self) -> dict[str, EnergyPredictor]:
        """Predictor of the energy on each device where it is asked for; what is not measured yet is, in a minute."""
        fitted = {}
        for name in devices_of(self.goals, "energy"):
            path, device = self.path(f"tables/{name}.energy.json"), self.devices[name]
            table = measure_energy(self.space, device, path, seed=self.seed, on_progress=self.progress.advance)
            fitted[name] = EnergyPredictor.fit(table, self.space, self.latency[name], self.profile.held_out, self.seed)
        return fitted

    @cached_property
    def predicted(self) -> dict[Goal, PredictedValues]:
        """What each study judges architectures by."""
        models = self.latency, self.memory, self.energy
        further = self.proxy_features if self.proxies.features else None
        return {g: PredictedValues(self.space, g.values, *models, g.devices[0], further) for g in self.goals}

    @cached_property
    def proxy_scores(self) -> ProxyScores:
        """Scores of networks by zero-cost proxies, on a few training images."""
        sample = training_sample(self.ready_data, self.proxies.images, self.seed)
        key = digest(__version__, self.space.fingerprint, self.data_fingerprint, self.proxies.images, self.seed)
        return ProxyScores(self.path(PROXIES_FILE), self.space, sample.images, sample.labels, self.seed, key)

    def proxy_features(self, architectures: Sequence[Architecture]) -> np.ndarray:
        """The proxies that are features of the accuracy predictor, `(n, f)`."""
        return compressed(self.proxy_scores.scores(self.proxies.features, architectures))

    def chosen_predictor(self) -> AccuracyPredictor:
        """A fresh accuracy predictor, of the kind that the stage `predictors` chose where that was left to it.

        Raises:
            UserError: the record of the run names no kind that there is.
        """
        predictor = self.predictor()
        if isinstance(predictor, Automatic) and predictor.kind is None:
            kind = (self.run.facts("predictors").get("accuracy_predictor") or {}).get("kind")
            if kind not in KINDS:
                path = self.path("stages.json")
                raise UserError(f"{path} is damaged (accuracy predictor {kind!r}); delete it to run every stage again")
            predictor.kind = kind
        return predictor

    @property
    def supernet(self) -> Supernet:
        """The trained supernet, focused where the stage `focus` was done.

        Raises:
            UserError: its weights are missing or damaged.
        """
        output = self.focused_output
        if self._current is None or self._current[0] != output:
            self._current = output, self._loaded(self.path(SUPERNET_FILE if output is None else FOCUSED_FILE))
        return self._current[1]

    @property
    def supernet_macs(self) -> int | None:
        """Multiply-accumulates of training the supernet, focusing included; `None` where an earlier version trained it."""
        macs: int | None = self.run.facts("supernet").get("macs")
        focused = 0 if self.focused_output is None else self.run.facts("focus").get("macs", 0)
        return macs + focused if macs else None

    def _loaded(self, path: Path) -> Supernet:
        supernet = Supernet(self.space, self.estimators)
        try:
            supernet.load_state_dict(load_file(path))
        except (OSError, SafetensorError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"{path} is damaged ({reason}); delete {self.path('stages.json')} to train again") from error
        return supernet

    @property
    def networks(self) -> Weights:
        """Where networks come from: the supernet, or where there is none, what was trained one by one."""
        if self.space.shares_weights:
            return self.supernet
        return TrainedNetworks(self.path(f"{ALONE_FOLDER}/{self.evaluations_key}"), self.space)

    def weights(self, architecture: Architecture) -> Weights:
        """The weights with which an architecture ships: finished ones where there are some, else those of `networks`.

        Raises:
            UserError: the file with them is missing or damaged.
        """
        networks = self.run.facts("finish").get("networks", []) if self.finished_output is not None else []
        for network in networks:
            if network["kept"] == "finished" and network["architecture"] == dict(architecture):
                return self._loaded(self.path(network["file"]))
        return self.networks

    @property
    def evaluations_key(self) -> str:
        """Fingerprint of the supernet and of how networks are evaluated with it."""
        focused = self.focused_output
        return digest(self.run.output("supernet") if focused is None else focused, self.settings["evaluation"])

    @property
    def evaluations(self) -> Evaluations:
        """The networks evaluated with the present weights."""
        key = self.evaluations_key
        if self._evaluations is None or self._evaluations.key != key:
            name = EVALUATIONS_FILE if self.focused_output is None else FOCUSED_EVALUATIONS_FILE
            self._evaluations = Evaluations(self.path(name), self.space, key)
        return self._evaluations

    @cached_property
    def workforce(self) -> Workforce:
        return Workforce(self)

    def close(self) -> None:
        """Give back who works for the job, and keep the proxies' scores, where they were needed."""
        if "workforce" in self.__dict__:
            self.workforce.close()
        if "proxy_scores" in self.__dict__:
            self.proxy_scores.save()
