"""Results of a runner, read with suspicion: `latency_lut.runner` says what its lines are."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from latency_lut.machine import fingerprint_of
from latency_lut.manifest import Manifest, integer, sha256_of, strict_json, text
from latency_lut.runner import SCHEMA_VERSION, UNIT
from spaces.errors import UserError

LARGEST_LINE = 2**16
LONGEST_US = 1e9  # of one run
MOST_FACTS = 40
FACTS = ("cpu", "instruction_sets", "cores", "os", "runtime_version")  # that a device says of itself, with its settings
FIELDS = {
    "head": {"kind", "schema_version", "bundle", "unit", "device", "fingerprint"},
    "visits": {"kind", "batch", "id", "us", "position"},
    "failed": {"kind", "id", "reason"},
    "outputs": {"kind", "id", "first", "values"},
    "end": {"kind", "complete", "measured", "failed", "fingerprint", "sha256"},
}


@dataclass(frozen=True)
class Batch:
    """Models that were visited in turn.

    Args:
        names: of the models, the anchors first.
        times_us: `(models, rounds)` microseconds per run.
        orders: `(rounds, models)`, the models in the order of each round.
    """

    names: tuple[str, ...]
    times_us: np.ndarray
    orders: np.ndarray


@dataclass(frozen=True)
class Results:
    """What a runner measured.

    Args:
        device: as it describes itself.
        batches: what was visited in turn.
        failed: why models did not load, by their name.
        outputs: what models answered, `(samples, values)`, likewise; as it came, so it may not be finite.
    """

    device: dict[str, str | int]
    batches: list[Batch]
    failed: dict[str, str]
    outputs: dict[str, np.ndarray] = field(default_factory=dict)


def bundle_of(stream: BinaryIO) -> str:
    """The checksum of the manifest of the bundle that results are of, from their first line.

    Raises:
        UserError: they do not say.
    """
    try:
        return sha256_of(strict_json(_line(stream)), "bundle")
    except (ValueError, KeyError, RecursionError) as error:
        raise _damaged(1, error) from error


def read_results(stream: BinaryIO, manifest: Manifest, bundle: str) -> Results:
    """Read all results of a bundle.

    Args:
        stream: at their beginning.
        manifest: of the bundle.
        bundle: its checksum.

    Raises:
        UserError: a line is damaged, missing or there twice, says something impossible, or is of something else.
    """
    reader, number = _Reader(manifest, bundle), 0
    try:
        while not reader.ended:
            number += 1
            reader.take(_line(stream))
        number += 1
        if stream.read(1):
            raise ValueError("something stands behind the end")
        return reader.results()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(number, error) from error


def _damaged(number: int, error: BaseException) -> UserError:
    reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
    return UserError(f"line {number}: {reason or type(error).__name__}")


def _line(stream: BinaryIO) -> bytes:
    line = stream.readline(LARGEST_LINE + 1)
    if len(line) > LARGEST_LINE:
        raise ValueError(f"longer than {LARGEST_LINE} bytes")
    if not line.endswith(b"\n"):
        raise ValueError("the results end in the middle; run the runner again, it goes on, and copy all of the file")
    return line


class _Reader:
    """Takes line after line."""

    def __init__(self, manifest: Manifest, bundle: str) -> None:
        self._manifest, self._bundle = manifest, bundle
        self._sum = hashlib.sha256()
        self._device: dict[str, str | int] = {}
        self._fingerprint = ""
        self._batches: list[dict[str, tuple[list[float], list[int]]]] = []
        self._measured: set[str] = set()
        self._failed: dict[str, str] = {}
        self._outputs: dict[str, dict[int, np.ndarray]] = {}
        self.ended = False

    def take(self, line: bytes) -> None:
        values = strict_json(line)
        kind = values.get("kind")
        if not isinstance(kind, str) or kind not in FIELDS or set(values) != FIELDS[kind]:
            raise ValueError(f"a line of kind {str(kind)[:40]!r} with fields {str(sorted(values))[:80]}")
        if (kind == "head") == bool(self._device):
            raise ValueError("the head has to stand first, and once")
        takers = {"head": self._head, "visits": self._visits, "failed": self._fail, "outputs": self._answer, "end": self._end}
        takers[kind](values)
        self._sum.update(line)

    def _head(self, values: Mapping[str, Any]) -> None:
        if values["schema_version"] != SCHEMA_VERSION or type(values["schema_version"]) is not int:
            raise ValueError(f"schema version {str(values['schema_version'])[:40]}, not {SCHEMA_VERSION}")
        if values["unit"] != UNIT:
            raise ValueError(f"unit {str(values['unit'])[:40]!r}, not {UNIT!r}")
        if sha256_of(values, "bundle") != self._bundle:
            raise ValueError(f"of another bundle, {values['bundle'][:16]}, not of {self._bundle[:16]}")
        device = values["device"]
        if not isinstance(device, dict) or not device or len(device) > MOST_FACTS:
            raise ValueError("no description of a device")
        for name in device:
            fact = integer(device, name, 0, 2**53) if isinstance(device[name], int) else text(device, name, 500)
            self._device[text({"name": name}, "name", 40)] = fact
        if isinstance(self._device.get("cores"), str) or not set(FACTS) <= set(device):
            raise ValueError(f"the device has to say {', '.join(FACTS)}")
        for name, value in self._manifest.device.settings.items():
            if device.get(name) != value or type(device.get(name)) is not type(value):
                raise ValueError(f"measured with {name} {str(device.get(name))[:40]!r}; the bundle is for {value!r}")
        self._fingerprint = text(values, "fingerprint")
        if self._fingerprint != fingerprint_of(self._device):
            raise ValueError(f"fingerprint {self._fingerprint[:16]!r} is not that of its device")

    def _visits(self, values: Mapping[str, Any]) -> None:
        name = self._known(values)
        batch = integer(values, "batch", max(0, len(self._batches) - 1), len(self._batches))
        if batch == len(self._batches):
            self._batches.append({})
        rows = self._batches[batch]
        anchor = name in self._manifest.anchors
        if name in rows or (not anchor and name in self._measured):
            raise ValueError(f"{name} is there twice")
        if not anchor and not rows.keys() >= set(self._manifest.anchors):
            raise ValueError(f"{name} stands before the anchors of its batch")
        times_us = [_microseconds(value) for value in values["us"]]
        positions = [integer({"position": value}, "position", 0, 2**20) for value in values["position"]]
        if len(positions) != len(times_us):
            raise ValueError(f"{name} has {len(times_us)} times and {len(positions)} positions")
        rows[name] = times_us, positions
        self._measured.add(name)

    def _fail(self, values: Mapping[str, Any]) -> None:
        name = self._known(values)
        if name in self._manifest.anchors or name in self._measured:
            raise ValueError(f"{name} failed, though it has to be measured")
        self._failed[name] = text(values, "reason", 1000)

    def _answer(self, values: Mapping[str, Any]) -> None:
        name = self._known(values)
        asked = self._manifest.outputs.get(name)
        if asked is None or name not in self._measured:
            raise ValueError(f"outputs of {name}, which was not asked for them, or before its visits")
        first = integer(values, "first", 0, asked.samples - 1)
        parts = self._outputs.setdefault(name, {})
        if first in parts or first % asked.rows:
            raise ValueError(f"outputs of {name} from sample {first} on are there twice, or begin in the middle of a line")
        content = base64.b64decode(text(values, "values", LARGEST_LINE), validate=True)
        count = min(asked.rows, asked.samples - first) * asked.values
        if len(content) != 4 * count:
            raise ValueError(f"outputs of {name} have {len(content)} bytes; {4 * count} were asked for")
        parts[first] = np.frombuffer(content, "<f4").reshape(-1, asked.values)

    def _known(self, values: Mapping[str, Any]) -> str:
        name = text(values, "id", 20)
        if name not in self._manifest.models:
            raise ValueError(f"model {name!r} is not in the bundle")
        if name in self._failed:
            raise ValueError(f"{name} is there twice")
        return name

    def _end(self, values: Mapping[str, Any]) -> None:
        counts = integer(values, "measured", 0, 2**31), integer(values, "failed", 0, 2**31)
        if values["complete"] is not True or counts != (len(self._measured), len(self._failed)):
            raise ValueError("the end does not fit what stands before it")
        if values["fingerprint"] != self._fingerprint:
            raise ValueError("the end has another fingerprint than the head")
        if sha256_of(values) != self._sum.hexdigest():
            raise ValueError("the checksum at the end is not that of the lines before")
        self.ended = True

    def results(self) -> Results:
        missing = sorted(set(self._manifest.models) - self._measured - set(self._failed))
        if missing:
            raise ValueError(f"{len(missing)} models are missing, {missing[0]} for one; run the runner again, it goes on")
        batches = [self._batch(rows) for rows in self._batches if rows.keys() >= set(self._manifest.anchors)]
        if not batches:
            raise ValueError("nothing was measured")
        return Results(self._device, batches, self._failed, self._all_outputs())

    def _all_outputs(self) -> dict[str, np.ndarray]:
        whole = {}
        for name, asked in self._manifest.outputs.items():
            if name in self._failed:
                continue
            parts = self._outputs.get(name, {})
            if sum(len(part) for part in parts.values()) != asked.samples:
                raise ValueError(f"outputs of {name} are missing; run the runner again, it goes on")
            whole[name] = np.concatenate([parts[first] for first in sorted(parts)])
        return whole

    def _batch(self, rows: dict[str, tuple[list[float], list[int]]]) -> Batch:
        """A batch as arrays; one whose anchors are not all there was cut off and has nothing else."""
        names = (*self._manifest.anchors, *(name for name in rows if name not in self._manifest.anchors))
        kinds = {"pair" if name in self._manifest.pairs else "network" for name in names[len(self._manifest.anchors) :]}
        rounds = {self._manifest.protocol[kind].rounds for kind in kinds or {"pair"}}
        if len(kinds) > 1 or {len(rows[name][0]) for name in names} != rounds:
            raise ValueError("a batch with pairs and networks, or with another number of visits than the bundle asks for")
        positions = np.array([rows[name][1] for name in names])
        orders = positions.argsort(axis=0)
        in_order = np.take_along_axis(positions, orders, axis=0)
        if np.any(in_order[1:] == in_order[:-1]):
            raise ValueError("two models were visited at the same position of a round")
        return Batch(names, np.array([rows[name][0] for name in names]), orders.T)


def _microseconds(value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= LONGEST_US:
        raise ValueError(f"a time of {str(value)[:40]} us")
    return float(value)
