"""Winners: networks along the front, exported and verified on the device, and the baselines they have to beat.

All models of a device are timed together, visit by visit in turn, at the speed at which its table was measured. So their
latencies can be compared with each other and with the predictions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latency_lut.device import Device
from latency_lut.energy import meter_of, run_energy_uj
from latency_lut.lowering import model_kind
from latency_lut.session import retime
from latency_lut.table import STATISTIC, LatencyTable, NetworkTiming
from latency_lut.timing import Timing
from predictors.energy import EnergyPredictor
from predictors.latency import LatencyPredictor
from predictors.memory import MemoryPredictor
from predictors.size import model_bytes
from search.candidates import Candidate
from search.evaluation import Evaluator, Split, Weights
from search.export import Tolerances, export, sha256, verify
from search.fronts import nondominated
from search.objectives import Objective
from spaces.choice import Architecture, Option
from spaces.files import write_atomically
from spaces.layers import LayerSpec, Network
from spaces.precision import FLOAT, INT8
from spaces.space import Space

CARD_SCHEMA = 1
HERE = "this machine"
Provenance = Mapping[str, object]


@dataclass(frozen=True)
class Exporter:
    """Makes verified models of architectures for one device.

    Args:
        space: of the architectures.
        supernet: trained; or what was trained one by one.
        evaluator: recalibrates.
        test: images that the search has not seen.
        device: the target.
        predictor: its latency predictor.
        tolerances: what an export must keep.
        provenance: what a card says of where it comes from.
        memory: predictor of its peak memory, where that was asked for.
        energy: predictor of its energy, where that was asked for.
    """

    space: Space
    supernet: Weights
    evaluator: Evaluator
    test: Split
    device: Device
    predictor: LatencyPredictor
    tolerances: Tolerances
    provenance: Provenance
    memory: MemoryPredictor | None = None
    energy: EnergyPredictor | None = None

    @property
    def classes(self) -> int:
        """Logits of every network."""
        return self.space.layers(self.space.smallest())[-1].out_channels

    @property
    def model_name(self) -> str:
        """What a model's file is called: `model.onnx`, or `model.pt2` for the runtime torch."""
        return f"model.{model_kind(self.device.describe())}"

    def make(self, architecture: Architecture, folder: Path, weights: Weights | None = None) -> dict[str, Any]:
        """Export and verify one architecture into `folder` (the model, `card.json`); skipped when both are there and agree.

        Args:
            architecture: what to export.
            folder: where to.
            weights: those that it was finished with; by default the supernet's.

        Returns:
            The card, still without a measured latency.
        """
        made = _finished_card(folder, self.model_name, architecture, self.provenance)
        if made is not None:
            return made
        network = self.space.network(architecture)
        lowerings = self.predictor.plan(network)
        predicted_us, std_us = self.predictor.predict(network, lowerings)
        finished = weights is not None and weights is not self.supernet
        plain = self.evaluator.plain(weights or self.supernet, architecture)
        metadata = {"netwright.architecture": architecture.to_json(), "netwright.device": self.device.name}
        model = export(plain, lowerings, self.device, metadata)
        check = verify(plain, lowerings, model, self.device.twin, self.test, self.tolerances)
        card = {
            "schema": CARD_SCHEMA,
            "architecture": dict(architecture),
            "input_shape": [self.device.batch, *network.input_shape],
            "device": {**self.device.describe(), "fingerprint": self.device.fingerprint, "statistic": STATISTIC},
            "predicted_us": predicted_us,
            "std_us": std_us,
            **check.to_dict(),
            "finished": finished,
            "accuracy_inherited": self._inherited(architecture) if finished else check.accuracy_torch,
            "accuracy_validation": self.evaluator.measure(plain).accuracy,
            "bytes": len(model),
            "predicted_bytes": model_bytes(network, lowerings),
            "macs": network.macs,
            "parameters": network.parameters,
            "peak_activation_bytes": network.peak_activation_bytes,
            **self._memory(network, lowerings, model),
            **self._energy(network, lowerings, model),
            "layers": [self._layer(n.name, n.spec, low) for n, low in zip(network.nodes, lowerings, strict=True)],
            "sha256": {self.model_name: sha256(model)},
            "provenance": dict(self.provenance),
        }
        write_atomically(folder / self.model_name, model)
        write_atomically(folder / "card.json", json.dumps(card, indent=1))
        return card

    def _memory(self, network: Network, lowerings: Sequence[str], model: bytes) -> dict[str, object]:
        """Peak memory as predicted and measured; nothing where the search did not ask for it."""
        if self.memory is None:
            return {}
        predicted, _ = self.memory.predict(network, lowerings)
        measured = self.device.load_runtime().peak_bytes(model, self.device)
        interval = self.memory.interval(network, lowerings)
        return {"peak_bytes": measured, "predicted_peak_bytes": predicted, "predicted_peak_bytes_90": interval}

    def _energy(self, network: Network, lowerings: Sequence[str], model: bytes) -> dict[str, object]:
        """Energy of a run as predicted and measured; nothing where the search did not ask for it."""
        if self.energy is None:
            return {}
        predicted, _ = self.energy.predict(network, lowerings)
        measured = run_energy_uj(self.device.load_runtime().load(model, self.device), meter_of(self.device))
        interval = self.energy.interval(network, lowerings)
        return {
            "energy_uj": measured,
            "predicted_energy_uj": predicted,
            "predicted_energy_uj_90": interval,
            "energy_meter": self.device.energy_meter,
        }

    def _inherited(self, architecture: Architecture) -> float:
        """Test accuracy in torch with the supernet's weights."""
        plain = self.evaluator.plain(self.supernet, architecture)
        return Evaluator([], self.test).measure(plain).accuracy

    def _layer(self, name: str, spec: LayerSpec, lowering: str) -> dict[str, object]:
        prices = {price.lowering: price.us for price in self.predictor.prices(spec)}
        return {
            "name": name,
            "operator": spec.operator,
            "kind": spec.kind,
            "in_channels": spec.in_channels,
            "out_channels": spec.out_channels,
            "height": spec.height,
            "kernel": spec.kernel,
            "precision": spec.precision,
            "rank": spec.rank,
            "heads": spec.heads,
            "sparsity": spec.sparsity,
            "lowering": lowering,
            "macs": spec.macs,
            "predicted_us": prices[lowering],
        }

    def measure(
        self, cards: Sequence[dict[str, Any]], folders: Sequence[Path], table: LatencyTable
    ) -> tuple[list[dict[str, Any]], float]:
        """Time the models of several folders together and write what was measured onto their cards.

        Returns:
            The complete cards, and the machine's speed meanwhile against the table's.
        """
        models = [(folder / self.model_name).read_bytes() for folder in folders]
        timings, speed = retime(models, self.space, table, self.device)
        here = {"measured_on": dict.fromkeys(("latency", "accuracy", "graph"), HERE)}
        complete = [{**self.timed(card, timing), **here} for card, timing in zip(cards, timings, strict=True)]
        for card, folder in zip(complete, folders, strict=True):
            write_atomically(folder / "card.json", json.dumps(card, indent=1))
        return complete, speed

    def timed(self, card: Mapping[str, Any], timing: Timing) -> dict[str, Any]:
        """A card with a measured latency, held against the predicted one."""
        error = card["predicted_us"] / timing.us - 1.0
        failures = [f for f in card["failures"] if not f.startswith("latency")]
        within = abs(error) <= self.tolerances.latency
        if not within:
            failures.append(
                f"latency {timing.us:.1f} us: predicted {card['predicted_us']:.1f} us ({error:+.1%}), "
                f"tolerance {self.tolerances.latency:.0%}"
            )
        return {
            **card,
            "measured_us": timing.us,
            "spread_us": timing.spread_us,
            "visits": timing.count,
            "within_tolerance": within,
            "failures": failures,
        }


def _finished_card(folder: Path, name: str, architecture: Architecture, provenance: Provenance) -> dict[str, Any] | None:
    """The card of an export that an earlier attempt finished."""
    try:
        card: dict[str, Any] = json.loads((folder / "card.json").read_text())
        model = (folder / name).read_bytes()
        same = card["architecture"] == dict(architecture) and card["provenance"] == dict(provenance)
        return card if same and card["sha256"][name] == sha256(model) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def pick(
    front: Sequence[Candidate], others: Sequence[Candidate], objectives: Sequence[Objective], count: int
) -> list[Candidate]:
    """Winners: spread evenly along the front; when it is short, filled up from the fronts behind it.

    Args:
        front: not dominated, in order.
        others: evaluated and feasible.
        objectives: what the fronts are made of.
        count: how many, if there are so many.
    """
    if len(front) > count:
        return [front[i] for i in np.unique(np.linspace(0, len(front) - 1, count).round().astype(int))]
    taken = {c.architecture for c in front}
    chosen, pool = list(front), [c for c in others if c.architecture not in taken]
    while pool and len(chosen) < count:
        behind = nondominated(pool, objectives)
        chosen += behind[: count - len(chosen)]
        taken = {c.architecture for c in behind}
        pool = [c for c in pool if c.architecture not in taken]
    return chosen


def uniform(space: Space, architecture: Architecture, precision: str) -> Architecture:
    """The same network with every layer dense and of one precision."""
    values: dict[str, Option] = dict(space.replaced(architecture, precision=precision))
    for choice in space.choices:
        if choice.kind in ("sparsity", "rank") and choice.name in values:
            values[choice.name] = choice.options[-1]
    return space.completed(values)  # a layer that becomes dense has a rank to choose


def offered(space: Space, precisions: Sequence[str]) -> list[str]:
    """Which of these precisions layers of a space can choose, in their order."""
    options = {option for choice in space.choices if choice.kind == "precision" for option in choice.options}
    return [precision for precision in precisions if precision in options]


def baselines_of(
    space: Space, winners: Sequence[Architecture], random_front: Sequence[Architecture]
) -> list[tuple[str, str, int | None, Architecture]]:
    """What winners are compared with: name, family, rank of the winner that it is made from, architecture."""
    rows: list[tuple[str, str, int | None, Architecture]] = [
        ("largest_float", "largest_float", None, uniform(space, space.largest(), FLOAT))
    ]
    for family, allowed in (("uniform_int8", INT8), ("uniform_float", (FLOAT,))):
        found = offered(space, allowed)  # with another it would be the winner itself
        for precision in found:
            of = family if len(found) == 1 else f"{family} ({precision})"
            rows += [(f"{of} of winner {r}", family, r, uniform(space, a, precision)) for r, a in enumerate(winners, 1)]
    rows += [(f"random {index}", "random", None, a) for index, a in enumerate(random_front, 1)]
    distinct = {
        (family, architecture): (name, family, rank, architecture) for name, family, rank, architecture in reversed(rows)
    }
    return list(reversed(distinct.values()))


def beaten(cards: Sequence[Mapping[str, Any]], baselines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """How many baselines of a family some winner beats (as accurate or more on the test set, and measured faster).

    Baselines are not finished, so a finished winner counts with the accuracy that it had before.
    """
    families: dict[str, dict[str, Any]] = {}
    for family in dict.fromkeys(b["family"] for b in baselines):
        speedups = []
        members = [b for b in baselines if b["family"] == family]
        for baseline in members:
            others = [c for c in cards if c["architecture"] != baseline["architecture"]]  # no network is faster than itself
            rivals = [c["measured_us"] for c in others if _comparable(c) >= baseline["accuracy_runtime"]]
            speedups.append(baseline["measured_us"] / min(rivals) if rivals else 0.0)
        won = [s for s in speedups if s > 1.0]
        families[family] = {
            "networks": len(members),
            "beaten": len(won),
            "median_speedup": float(np.median(won)) if won else None,
            "best_speedup": max(won) if won else None,
        }
    return families


def _comparable(card: Mapping[str, Any]) -> float:
    return float(card["accuracy_inherited"] if card.get("finished") else card["accuracy_runtime"])


def feed_back(table: LatencyTable, cards: Sequence[Mapping[str, Any]], space: Space) -> None:
    """Add the measured winners to a table's networks; the next fit of its latency model learns from them."""
    known = {(n.architecture, n.lowerings) for n in table.networks}
    for card in cards:
        architecture = space.architecture(card["architecture"])
        lowerings = tuple(layer["lowering"] for layer in card["layers"])
        if (architecture, lowerings) not in known:
            timing = (card["measured_us"], card["spread_us"], card["visits"])
            table.networks.append(NetworkTiming(architecture, lowerings, *timing, source="winner"))
