"""Importing: what a runner measured elsewhere becomes the device's table, or part of it.

All is checked before it is believed, and nothing is written before all is checked.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from latency_lut.archive import Archive
from latency_lut.device import Device
from latency_lut.lowering import applicable
from latency_lut.machine import fingerprint_of
from latency_lut.manifest import Manifest
from latency_lut.profile import pairs_of
from latency_lut.results import Results, bundle_of, read_results
from latency_lut.runner import LARGEST_MANIFEST, MANIFEST, RESULTS
from latency_lut.table import LatencyTable, NetworkTiming, changes
from latency_lut.timing import Speed, Timing
from spaces.errors import UserError
from spaces.space import Space

LARGEST_RESULTS = 2**28
BUNDLE_PATTERN = "*-bundle.zip"
MOST_BUNDLES = 1000  # that are looked through


@dataclass(frozen=True)
class Imported:
    """A device's table with what came back.

    Args:
        table: not yet written.
        path: its file.
        pairs: that are new in it.
        networks: likewise.
        failed: models that did not load on the device.
    """

    table: LatencyTable
    path: Path
    pairs: int
    networks: int
    failed: int

    def save(self) -> None:
        """Write the table, when anything in it is new.

        Raises:
            UserError: the folder cannot be written.
        """
        if self.pairs or self.networks:
            self.table.save(self.path)


@dataclass(frozen=True)
class Received:
    """Results with the manifest of the bundle that they are of, and its checksum."""

    manifest: Manifest
    bundle: str
    results: bytes


def import_results(space: Space, path: Path, tables: Path, *, bundles: tuple[Path, ...] = (Path(),)) -> Imported:
    """Bring results into the table of their device; `Imported.save` writes it.

    Args:
        space: of the bundle.
        path: the results; or a zip file or a folder with them and the bundle's manifest.
        tables: folder of the tables; the device's is made, or continued.
        bundles: where the bundle is looked for when only the results are given: zip files, or folders with such.

    Raises:
        UserError: something cannot be believed, or belongs to something else.
    """
    try:
        received = _receive(path, bundles)
        manifest = received.manifest
        results = read_results(io.BytesIO(received.results), manifest, received.bundle)
        _check_manifest(space, manifest)
    except UserError as error:
        raise UserError(f"{path} is refused: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    table_path = tables / f"{manifest.device.name}.parquet"
    table = _table_for(space, manifest.device, table_path, results)
    pairs, networks = _add(table, manifest, results)
    return Imported(table, table_path, pairs, networks, len(results.failed))


def _receive(path: Path, bundles: tuple[Path, ...]) -> Received:
    """Read what is in a file or folder; nothing of it is believed yet but that manifest and results belong together."""
    if not path.exists():
        raise UserError("there is no such file")
    if not path.is_dir() and not _is_zip(path):
        results = _read_file(path)
        bundle = bundle_of(io.BytesIO(results))
        return Received(_find_manifest(bundle, (path.parent, *bundles)), bundle, results)
    with Archive(path) as archive:
        content = archive.read(MANIFEST, LARGEST_MANIFEST)
        results = archive.read(RESULTS, LARGEST_RESULTS)
        manifest = Manifest.from_json(content)
        archive.check_files(manifest.checksums, {MANIFEST, RESULTS})
    return Received(manifest, hashlib.sha256(content).hexdigest(), results)


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _read_file(path: Path) -> bytes:
    if not path.is_file():
        raise UserError("it is no file")
    with path.open("rb") as file:
        content = file.read(LARGEST_RESULTS + 1)
    if len(content) > LARGEST_RESULTS:
        raise UserError(f"it has more than {LARGEST_RESULTS} bytes")
    return content


def _find_manifest(bundle: str, places: tuple[Path, ...]) -> Manifest:
    """The manifest with this checksum, out of bundles that are looked for in some places."""
    for place in places:
        folder = [place, *sorted(place.glob(BUNDLE_PATTERN))[:MOST_BUNDLES]] if place.is_dir() else [place]
        for candidate in folder:
            try:
                with Archive(candidate) as archive:
                    content = archive.read(MANIFEST, LARGEST_MANIFEST)
            except UserError:
                continue
            if hashlib.sha256(content).hexdigest() == bundle:
                return Manifest.from_json(content)
    looked = ", ".join(str(place) for place in dict.fromkeys(places))
    raise UserError(f"its bundle {bundle[:16]} is not in {looked}; say where it is: bundles=FOLDER")


def _check_manifest(space: Space, manifest: Manifest) -> None:
    """Make sure that a bundle is of this space and asks for what this space has.

    Raises:
        UserError: it is not.
    """
    if manifest.space_fingerprint != space.fingerprint:
        known = f"{manifest.space_name} {manifest.space_fingerprint[:16]}"
        mend = "give import the options of space and data that bundle was given"
        raise UserError(f"the bundle is of space {known}, not of {space.name} {space.fingerprint}; {mend}")
    description = manifest.device.describe()
    wanted, _ = pairs_of(space, np.random.default_rng(manifest.seed), manifest.max_pairs, description=description)
    unknown = set(manifest.pairs.values()).difference(wanted)
    if unknown:
        spec, lowering = min(unknown, key=lambda pair: (pair[0].to_json(), pair[1]))
        raise UserError(f"the bundle has {spec} {lowering}, which is not of space {space.name}; make the bundle again")
    for (architecture, lowerings), _ in manifest.networks.values():
        try:
            if space.architecture(architecture) != architecture:
                raise ValueError("it has choices that are not active")
            possible = [applicable(spec, description) for spec in space.layers(architecture)]
            if not all(name in names for name, names in zip(lowerings, possible, strict=True)):
                raise ValueError("its layers have other lowerings")
        except ValueError as error:
            raise UserError(f"the bundle has a network that is not of space {space.name}: {error}") from error


def _table_for(space: Space, device: Device, path: Path, results: Results) -> LatencyTable:
    """The device's table: what is there, or an empty one."""
    fingerprint = fingerprint_of(results.device)
    if not path.exists():
        created = datetime.now(UTC).isoformat(timespec="seconds")
        return LatencyTable(space.name, space.fingerprint, device.name, fingerprint, results.device, created=created)
    table = LatencyTable.load(path)
    table.check(space, device)
    if table.device_fingerprint != fingerprint:
        mend = "use another folder, or another name for the device"
        differs = changes(table.device, results.device)
        raise UserError(f"the table {path} is of another device than the results ({differs}); {mend}")
    return table


def _add(table: LatencyTable, manifest: Manifest, results: Results) -> tuple[int, int]:
    """Bring what is new into a table, at the speed of its anchors, or without such at the device's usual speed.

    Returns:
        How many pairs and networks are new.
    """
    anchors = [manifest.pairs[name] for name in manifest.anchors]
    if table.entries and set(anchors) != set(table.anchors):
        mend = "make a new bundle, it takes the table into account"
        raise UserError(f"the bundle was made before table {table.device_name} had what it has now; {mend}")
    new = not table.entries
    speed = Speed(len(anchors), None if new else [table.entries[pair].us for pair in anchors])
    timings: dict[str, Timing] = {}
    for index, batch in enumerate(results.batches):
        timings.update(zip(batch.names[len(anchors) :], speed.add(batch.times_us, batch.orders), strict=True))
        if new and (index == 0 or not any(name in manifest.networks for name in batch.names)):
            timings.update(zip(manifest.anchors, speed.anchor_timings(), strict=True))
    if new:
        table.anchors = tuple(anchors)
    scale = speed.scale
    scaled = {name: Timing(t.us * scale, t.spread_us * scale, t.count) for name, t in timings.items()}
    pairs = {manifest.pairs[name]: timing for name, timing in scaled.items() if name in manifest.pairs}
    known = {replace(network, us=0.0, spread_us=0.0, count=0) for network in table.networks}
    networks = [
        NetworkTiming(architecture, lowerings, t.us, t.spread_us, t.count, source)
        for name, ((architecture, lowerings), source) in manifest.networks.items()
        if (t := scaled.get(name)) and NetworkTiming(architecture, lowerings, 0.0, 0.0, 0, source) not in known
    ]
    fresh = {pair: timing for pair, timing in pairs.items() if pair not in table.entries}
    table.entries.update(fresh)
    table.networks.extend(networks)
    return len(fresh), len(networks)
