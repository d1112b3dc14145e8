"""Profiling a device that a transport reaches: as `latency_lut.profile` does here, with bundles that are run there.

Two bundles go there, one after the other: first the layers; then whole networks, whose lowerings are by then known to be fast
there. What comes back is believed no more than a file of unknown origin: `latency_lut.importing` checks it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from latency_lut.bundle import NothingMissingError, write_bundle, write_samples
from latency_lut.device import Device
from latency_lut.importing import Imported, import_results
from latency_lut.manifest import Manifest
from latency_lut.measuring import DEFAULTS, MeasuringSettings
from latency_lut.profile import ProfileStats, pairs_of
from latency_lut.remote import WATCH, Watch, carry_out, transport_of
from latency_lut.table import LatencyTable
from latency_lut.transfer import Samples
from spaces.space import Space


def profile_elsewhere(
    space: Space,
    device: Device,
    path: Path,
    settings: MeasuringSettings = DEFAULTS,
    *,
    turn: Callable[[], AbstractContextManager[None]] = nullcontext,
    watch: Watch = WATCH,
) -> tuple[LatencyTable, ProfileStats] | None:
    """Measure what is missing in a table, on the device. Stopped and started again, only what is missing is measured.

    Args:
        space: what can be built.
        device: with a transport.
        path: the table's file; created, or continued. Beside it lie meanwhile the bundle, and the results that came so far.
        settings: what is measured, and how.
        turn: entered for work that needs this machine's processor.
        watch: told what happens; stops it.

    Returns:
        The table and what was done; `None` when it was stopped.

    Raises:
        UserError: as for `latency_lut.profile.profile`; the device cannot be reached; what came back is refused.
    """
    transport_of(device)
    begin = time.perf_counter()
    counts, pairs_s = np.zeros(3, int), 0.0
    for networks in dict.fromkeys((0, settings.networks)):
        bundle_begin = time.perf_counter()
        write = partial(
            write_bundle,
            space,
            device,
            path,
            settings=replace(settings, networks=networks),
            on_progress=partial(watch.on_progress, "models of the bundle"),
        )
        imported = _measure(space, device, path, write, turn, watch)
        if watch.stopped.is_set():
            return None
        if imported is not None:
            counts += imported.pairs, imported.networks, imported.failed
            pairs_s += time.perf_counter() - bundle_begin if imported.pairs else 0.0
    if counts[2]:
        watch.say(f"{device.name}: {counts[2]} models did not load there and have no entry in the table")
    with turn():
        table = LatencyTable.load(path)
        _, reachable = pairs_of(space, np.random.default_rng(settings.seed), settings.max_pairs, description=table.device)
    rate = 60 * counts[0] / pairs_s if counts[0] else 0.0
    seconds = time.perf_counter() - begin
    return table, ProfileStats(len(table.entries), reachable, int(counts[0]), int(counts[1]), seconds, rate)


def take_there(
    space: Space,
    device: Device,
    path: Path,
    samples: Samples,
    table: LatencyTable,
    settings: MeasuringSettings = DEFAULTS,
    *,
    turn: Callable[[], AbstractContextManager[None]] = nullcontext,
    watch: Watch = WATCH,
) -> LatencyTable | None:
    """Measure the samples of a transfer on the device, as `latency_lut.transfer.take_here` does here, in one bundle.

    Args:
        space: what can be built.
        device: with a transport, unless there is nothing to measure.
        path: the table's file, which is written; beside it lie meanwhile the bundle, and the results that came so far.
        samples: what to measure.
        table: what the file holds, or an empty table.
        settings: how it is measured, and which pairs the samples can be of.
        turn: entered for work that needs this machine's processor.
        watch: told what happens; stops it.

    Returns:
        The table with what came back; `None` when it was stopped.

    Raises:
        UserError: the device cannot be reached; what came back is refused.
    """
    if not samples.pairs and not samples.networks:
        return table
    transport_of(device)

    def write(bundle: Path) -> Manifest:
        report = partial(watch.on_progress, "models of the bundle")
        return write_samples(space, device, table, samples, bundle, settings, on_progress=report)

    imported = _measure(space, device, path, write, turn, watch)
    if imported is None:
        return None
    if imported.failed:
        watch.say(f"{device.name}: {imported.failed} models did not load there; the same command tries others")
    return imported.table


def _measure(
    space: Space,
    device: Device,
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

    def believe(results: Path) -> Imported:
        watch.on_progress("waits for this machine", len(manifest.models), len(manifest.models))
        with turn():
            imported = import_results(space, results, path.parent, bundles=(bundle,))
            imported.save()
        return imported

    return carry_out(device, bundle, len(manifest.models), watch, believe)
