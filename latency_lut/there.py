"""Models on a device that a transport reaches: whole networks timed and run on samples, pairs of a table timed again.

As for a profile (`latency_lut.elsewhere`) they go there as a bundle, and what comes back is checked before it is believed.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from latency_lut.bundle import pack
from latency_lut.device import Device
from latency_lut.lowering import Description
from latency_lut.machine import fingerprint_of
from latency_lut.manifest import KINDS, Asked, Manifest, Protocol
from latency_lut.models import build_layer
from latency_lut.network import random_weights
from latency_lut.profile import BATCH_NETWORKS, BATCH_PAIRS
from latency_lut.remote import WATCH, Watch, carry_out, transport_of
from latency_lut.results import Results, read_results
from latency_lut.session import NETWORK_ROUNDS, NETWORK_VISIT_S, Drawn
from latency_lut.table import LatencyTable, Pair, changes
from latency_lut.timing import Speed, Timing, steadied, summarize
from spaces.errors import UserError


@dataclass(frozen=True)
class Sent:
    """A whole network to be measured elsewhere.

    Args:
        name: for messages.
        network: its architecture and lowerings.
        model: serialized.
        samples: what it is run on besides, `(n, ...)` of its input's shape without the batch; `None`: nothing. Networks with
            the same array share it on the way.
        values: in its output for a sample.
    """

    name: str
    network: Drawn
    model: bytes
    samples: np.ndarray | None = None
    values: int = 1


@dataclass(frozen=True)
class Retimed:
    """What came back.

    Args:
        timings: of every network, at the speed at which the table was measured.
        speed: how fast the device was against the table (1: as fast).
        outputs: of every network, `(n, values)`; `None` where there were no samples.
    """

    timings: list[Timing]
    speed: float
    outputs: list[np.ndarray | None]


def retime_elsewhere(
    sent: Sequence[Sent], table: LatencyTable, device: Device, folder: Path, *, seed: int = 0, watch: Watch = WATCH
) -> Retimed:
    """Time whole networks on a device elsewhere, as `latency_lut.session.retime` does here, and run them on samples there.

    Args:
        sent: the networks.
        table: the device's; its anchors are timed along.
        device: with a transport.
        folder: where the bundle, and the results that came so far, lie meanwhile; an interrupted call goes on from them.
        seed: of the order of visits.
        watch: told what happens.

    Raises:
        UserError: the device cannot be reached, is another than its table says, or does not take a model; what came back is
            refused.
    """
    rng = np.random.default_rng([seed, 2])
    names = {f"n{index:05}": network for index, network in enumerate(sent)}
    pairs = {f"p{index:05}": pair for index, pair in enumerate(table.anchors)}
    manifest = replace(
        _manifest(table, device, seed, pairs, Protocol(3, NETWORK_VISIT_S, BATCH_PAIRS)),
        networks={name: (network.network, "winner") for name, network in names.items()},
    )
    files: dict[str, bytes] = {}
    named: dict[int, str] = {}
    for name, network in names.items():
        if network.samples is not None:
            file = named.setdefault(id(network.samples), f"samples/{len(named)}.f32")
            if file not in files:
                files[file] = np.ascontiguousarray(network.samples, "<f4").tobytes()
            manifest.outputs[name] = Asked(file, len(network.samples), network.values)
    layers = ((name, build_layer(*pair, random_weights(pair[0], rng), device.batch)) for name, pair in pairs.items())
    models = [*layers, *((name, network.model) for name, network in names.items())]

    results = _measured(manifest, models, files, device, folder, watch)
    if fingerprint_of(results.device) != table.device_fingerprint:
        differs = changes(table.device, results.device)
        mend = f"measure it again: delete its table and run: python -m latency_lut device={device.name}"
        raise UserError(f"device {device.name} is not what its table says ({differs}); {mend}")
    for name, reason in results.failed.items():
        raise UserError(f"device {device.name} does not take {names[name].name} ({reason}); install a newer onnxruntime there")
    speed = Speed(len(pairs), [table.entries[pair].us for pair in table.anchors])
    timings: dict[str, Timing] = {}
    for batch in results.batches:
        timings.update(zip(batch.names[len(pairs) :], speed.add(batch.times_us, batch.orders), strict=True))
    outputs = [results.outputs.get(name) for name in names]
    return Retimed([timings[name] for name in names], speed.speed, outputs)


def time_pairs_elsewhere(
    pairs: Sequence[Pair],
    table: LatencyTable,
    device: Device,
    folder: Path,
    rounds: int,
    visit_s: float,
    *,
    seed: int = 0,
    watch: Watch = WATCH,
) -> tuple[list[Timing], Description]:
    """What pairs cost by the clock on a device elsewhere.

    Args:
        pairs: to time, all together.
        table: the device's.
        device: with a transport.
        folder: as in `retime_elsewhere`.
        rounds: visits of every pair.
        visit_s: seconds of one visit.
        seed: of the weights and the order of visits.
        watch: told what happens.

    Returns:
        A timing per pair, and what the device says of itself.

    Raises:
        UserError: as in `retime_elsewhere`, except for what the device is.
    """
    rng = np.random.default_rng([seed, 4])
    named = {f"p{index:05}": pair for index, pair in enumerate(pairs)}
    manifest = _manifest(table, device, seed, named, Protocol(rounds, visit_s, len(pairs)))
    models = ((name, build_layer(*pair, random_weights(pair[0], rng), device.batch)) for name, pair in named.items())
    results = _measured(manifest, models, {}, device, folder, watch)
    batch = results.batches[-1]
    return summarize(steadied(batch.times_us, batch.orders)), results.device


def _manifest(table: LatencyTable, device: Device, seed: int, pairs: Mapping[str, Pair], protocol: Protocol) -> Manifest:
    """A manifest with pairs all of which are anchors."""
    protocols = protocol, Protocol(NETWORK_ROUNDS, NETWORK_VISIT_S, BATCH_NETWORKS)
    bundled = replace(device, reach="bundle", energy_meter=None)
    by_kind = dict(zip(KINDS, protocols, strict=True))
    space = table.space_name, table.space_fingerprint
    return Manifest(*space, bundled, seed, max(1, len(pairs)), by_kind, tuple(pairs), dict(pairs))


def _measured(
    manifest: Manifest,
    models: Iterable[tuple[str, bytes]],
    samples: Mapping[str, bytes],
    device: Device,
    folder: Path,
    watch: Watch,
) -> Results:
    """Results of a bundle that is made of this and run there."""
    transport_of(device)
    bundle = folder / f"{device.name}-own-bundle.zip"
    pack(manifest, models, device, bundle, samples=samples, on_progress=partial(watch.on_progress, "models of the bundle"))
    checksum = hashlib.sha256(manifest.to_json().encode()).hexdigest()

    def believe(path: Path) -> Results:
        try:
            return read_results(io.BytesIO(path.read_bytes()), manifest, checksum)
        except UserError as error:
            raise UserError(f"results of device {device.name} are refused: {error}") from error

    results = carry_out(device, bundle, len(manifest.models), watch, believe)
    if results is None:
        raise KeyboardInterrupt
    return results
