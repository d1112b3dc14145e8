"""Winners for a device that a transport reaches: timed there, and run on the test images there.

Their models were checked before in the same runtime on this machine. What the device itself answers replaces those figures
where the test images and the answers are not too large to be sent; the cards say where each figure was measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latency_lut.device import Device
from latency_lut.remote import Watch, transport_of
from latency_lut.runner import LINE_VALUES
from latency_lut.table import STATISTIC, LatencyTable
from latency_lut.there import Sent, retime_elsewhere
from search.evaluation import Weights, predict
from search.export import compare
from search.progress import StageProgress
from search.settings import ProfileSettings
from search.winners import Exporter
from spaces.choice import Architecture
from spaces.errors import UserError
from spaces.files import write_atomically
from spaces.plain import resize

MOST_BYTES = 2**27  # of the test images of all sizes, and of all answers: what is more is not sent
FROM_HERE = ("accuracy_runtime", "max_abs_diff", "agreement", "failures")

Card = dict[str, Any]


def check_searchable(device: Device, profile: ProfileSettings) -> None:
    """Make sure that a search can measure, check and time on a device elsewhere.

    Raises:
        UserError: it cannot.
    """
    if device.transport is None:
        mend = "name a way in its file (reach: latency_lut.transports.Ssh, or Adb), or measure it by a bundle without a search"
        raise UserError(f"device {device.name} is elsewhere and nothing reaches it, so winners cannot be timed there; {mend}")
    transport_of(device)
    if profile.refinement is not None:
        limits = "profile.target_error and profile.budget_s"
        raise UserError(f"device {device.name} is elsewhere; {limits} choose here, leave them away")
    try:
        device.twin  # noqa: B018 - where models are checked before they go there
    except UserError as error:
        raise UserError(f"models for device {device.name} are checked in the same runtime on this machine: {error}") from error


def twin_place(device: Device) -> str:
    """What cards call the place where models for a device elsewhere are checked before they go there."""
    return f"this machine, in {device.runtime} {device.load_runtime().version()}"


def watch_of(device: Device, progress: StageProgress) -> Watch:
    """Shows what happens on a device elsewhere."""
    return Watch(lambda what, done, total: progress.advance(f"measuring {device.name}", done, total), progress.say)


def measure_elsewhere(
    exporter: Exporter,
    cards: Sequence[Card],
    folders: Sequence[Path],
    weights: Sequence[Weights | None],
    table: LatencyTable,
    place: Path,
    watch: Watch,
) -> tuple[list[Card], float]:
    """Measure the models of several folders on the device, and write what was measured onto their cards.

    Args:
        exporter: of the device, with which they were made.
        cards: of the models.
        folders: where they are.
        weights: with which each was made; `None`: those of the supernet.
        table: the device's.
        place: folder for what goes there and comes back; an interrupted call goes on from what lies there.
        watch: told what happens.

    Returns:
        The complete cards, and the device's speed meanwhile against the table's.

    Raises:
        UserError: see `latency_lut.there.retime_elsewhere`.
    """
    device = exporter.device
    networks = [exporter.space.network(exporter.space.architecture(card["architecture"])) for card in cards]
    images: dict[tuple[int, int], np.ndarray] = {}
    for network in networks:
        size = network.input_shape[1], network.input_shape[2]
        if size not in images:
            images[size] = resize(exporter.test.images, *size).numpy()
    classes = exporter.classes
    answers = len(cards) * len(exporter.test.labels) * classes * 4 * 4 // 3  # in base64
    sends = max(answers, sum(array.nbytes for array in images.values())) <= MOST_BYTES and classes <= LINE_VALUES
    sent = [
        Sent(
            str(folder / exporter.model_name),
            (Architecture(card["architecture"]), tuple(layer["lowering"] for layer in card["layers"])),
            (folder / exporter.model_name).read_bytes(),
            images[network.input_shape[1], network.input_shape[2]] if sends else None,
            classes,
        )
        for card, folder, network in zip(cards, folders, networks, strict=True)
    ]
    measured = retime_elsewhere(sent, table, device, place, watch=watch)
    where, here = transport_of(device).name, twin_place(device)
    complete = []
    for card, timing, outputs, own in zip(cards, measured.timings, measured.outputs, weights, strict=True):
        answered = _with_outputs(exporter, card, outputs, own, where) if outputs is not None else card
        measured_on = {"latency": where, "accuracy": here if outputs is None else where, "graph": here}
        described = {**table.device, "fingerprint": table.device_fingerprint, "statistic": STATISTIC}
        complete.append({**exporter.timed(answered, timing), "device": described, "measured_on": measured_on})
    for card, folder in zip(complete, folders, strict=True):
        write_atomically(folder / "card.json", json.dumps(card, indent=1))
    return complete, measured.speed


def _with_outputs(exporter: Exporter, card: Card, outputs: np.ndarray, weights: Weights | None, where: str) -> Card:
    """A card with what the device itself answered; what the same runtime answered here stays beside it."""
    architecture = exporter.space.architecture(card["architecture"])
    plain = exporter.evaluator.plain(weights or exporter.supernet, architecture)
    expected = predict(plain, exporter.test.images).numpy()
    lowerings = [layer["lowering"] for layer in card["layers"]]
    check = compare(plain.network, lowerings, expected, outputs, exporter.test.labels.numpy(), exporter.tolerances)
    here: Mapping[str, Any] = card.get("same_runtime_here") or {name: card[name] for name in FROM_HERE}
    failures = [*here["failures"], *(f"{where}: {failure}" for failure in check.failures)]
    found = {name: getattr(check, name) for name in FROM_HERE if name != "failures"}
    return {**card, **found, "failures": failures, "verified": not failures, "same_runtime_here": dict(here)}
