"""Profiling a device that a transport reaches: as `latency_lut.profile` does here, with bundles that are run there.

Two bundles go there, one after the other: first the layers; then whole networks, whose lowerings are by then known to be fast
there. What comes back is believed no more than a file of unknown origin: `latency_lut.importing` checks it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np

from latency_lut.bundle import NothingMissingError, plan_samples, write_bundle, write_planned
from latency_lut.device import Device
from latency_lut.importing import Imported, import_results
from latency_lut.manifest import Manifest
from latency_lut.profile import ProfileStats, pairs_of
from latency_lut.remote import WATCH, RemoteRun, Watch
from latency_lut.table import LatencyTable
from latency_lut.transfer import Samples
from latency_lut.transports import Transport
from spaces.errors import UserError
from spaces.space import Space

RUNTIME = "onnxruntime"  # what the runner measures


def profile_elsewhere(
    space: Space,
    device: Device,
    path: Path,
    *,
    seed: int = 0,
    max_pairs: int = 2800,
    networks: int = 40,
    rounds: int = 12,
    visit_s: float = 0.0006,
    turn: Callable[[], AbstractContextManager[None]] = nullcontext,
    watch: Watch = WATCH,
) -> tuple[LatencyTable, ProfileStats] | None:
    """Measure what is missing in a table, on the device. Stopped and started again, only what is missing is measured.

    Args:
        space: what can be built.
        device: with a transport.
        path: the table's file; created, or continued. Beside it lie meanwhile the bundle, and the results that came so far.
        seed: decides which pairs and networks are measured.
        max_pairs: pairs to measure.
        networks: whole random networks to time.
        rounds: visits per pair.
        visit_s: seconds of one visit.
        turn: entered for work that needs this machine's processor.
        watch: told what happens; stops it.

    Returns:
        The table and what was done; `None` when it was stopped.

    Raises:
        UserError: as for `latency_lut.profile.profile`; the device cannot be reached; what came back is refused.
    """
    mend = f"run: python -m latency_lut bundle device={device.name}, there the bundle, here: python -m latency_lut import FILE"
    transport = _transport_of(device, mend)
    begin = time.perf_counter()
    counts, pairs_s = np.zeros(3, int), 0.0
    for networks_of_bundle in dict.fromkeys((0, networks)):
        bundle_begin = time.perf_counter()
        write = partial(
            write_bundle,
            space,
            device,
            path,
            seed=seed,
            max_pairs=max_pairs,
            networks=networks_of_bundle,
            rounds=rounds,
            visit_s=visit_s,
            on_progress=partial(watch.on_progress, "models of the bundle"),
        )
        imported = _measure(space, device, transport, path, write, turn, watch)
        if watch.stopped.is_set():
            return None
        if imported is not None:
            counts += imported.pairs, imported.networks, imported.failed
            pairs_s += time.perf_counter() - bundle_begin if imported.pairs else 0.0
    if counts[2]:
        watch.say(f"{device.name}: {counts[2]} models did not load there and have no entry in the table")
    with turn():
        table = LatencyTable.load(path)
        _, reachable = pairs_of(space, np.random.default_rng(seed), max_pairs, description=table.device)
    rate = 60 * counts[0] / pairs_s if counts[0] else 0.0
    seconds = time.perf_counter() - begin
    return table, ProfileStats(len(table.entries), reachable, int(counts[0]), int(counts[1]), seconds, rate)


def take_there(
    space: Space,
    device: Device,
    path: Path,
    samples: Samples,
    table: LatencyTable,
    *,
    seed: int,
    max_pairs: int,
    visit_s: float,
    turn: Callable[[], AbstractContextManager[None]] = nullcontext,
    watch: Watch = WATCH,
) -> LatencyTable | None:
    """Measure the samples of a transfer on the device, as `latency_lut.transfer.take_here` does here, in one bundle.

    Args:
        space: what can be built.
        device: with a transport.
        path: the table's file, which is written; beside it lie meanwhile the bundle, and the results that came so far.
        samples: what to measure.
        table: what the file holds, or an empty table.
        seed: as in `latency_lut.transfer.transfer`, like `max_pairs` and `visit_s`.
        max_pairs: see `seed`.
        visit_s: see `seed`.
        turn: entered for work that needs this machine's processor.
        watch: told what happens; stops it.

    Returns:
        The table with what came back; `None` when it was stopped.

    Raises:
        UserError: the device cannot be reached; what came back is refused.
    """
    if not samples.pairs and not samples.networks:
        return table
    transport = _transport_of(
        device, f"without one its whole table is measured: python -m latency_lut bundle device={device.name}"
    )

    def write(bundle: Path) -> Manifest:
        manifest = plan_samples(space, device, table, samples, seed, max_pairs, visit_s)
        write_planned(manifest, space, device, bundle, partial(watch.on_progress, "models of the bundle"))
        return manifest

    imported = _measure(space, device, transport, path, write, turn, watch)
    if imported is None:
        return None
    if imported.failed:
        watch.say(f"{device.name}: {imported.failed} models did not load there; the same command tries others")
    return imported.table


def _transport_of(device: Device, mend: str) -> Transport:
    """The way to a device that is measured through one.

    Raises:
        UserError: it has none, or another runtime than the runner measures.
    """
    if device.transport is None:
        raise UserError(f"device {device.name} is elsewhere and has no transport; {mend}")
    if device.runtime != RUNTIME:
        raise UserError(f"device {device.name}: runtime is {device.runtime!r}; allowed by a transport is {RUNTIME}")
    return device.transport


def _measure(
    space: Space,
    device: Device,
    transport: Transport,
    path: Path,
    write: Callable[[Path], Manifest],
    turn: Callable[[], AbstractContextManager[None]],
    watch: Watch,
) -> Imported | None:
    """Bring what one bundle measures into the table; `None` when nothing is missing in it, or when stopped."""
    bundle = path.with_name(f"{device.name}-bundle.zip")
    watch.on_progress("waits for this machine", 0, 1)
    with turn():
        try:
            manifest = write(bundle)
        except NothingMissingError:
            return None
    digest = hashlib.sha256(bundle.read_bytes()).hexdigest()[:8]
    results = path.with_name(f"{device.name}-{digest}-results.jsonl")  # another bundle has others, and disturbs none
    run = RemoteRun(device.name, transport, bundle, results, len(manifest.models), watch)
    try:
        run.run()
    except UserError:
        if not results.stat().st_size:  # nothing to go on from
            _remove(results, bundle)
        raise
    if watch.stopped.is_set():
        return None
    watch.on_progress("waits for this machine", len(manifest.models), len(manifest.models))
    try:
        with turn():
            imported = import_results(space, results, path.parent, bundles=(bundle,))
            imported.save()
    except UserError as error:
        kept = results.replace(path.with_name(f"{device.name}-refused.jsonl"))
        run.clean_up()
        raise UserError(f"{error}; they are kept as {kept}, the same command measures anew") from error
    run.clean_up()
    _remove(results, bundle)
    return imported


def _remove(*files: Path) -> None:
    for file in files:
        file.unlink(missing_ok=True)
