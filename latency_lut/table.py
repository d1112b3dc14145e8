"""The latency table: measured microseconds per (layer, lowering) on one device for one space, with spread and provenance.

It also keeps the whole networks that were timed, which calibrate what a sum of layers misses, and apart from all of these what
was predicted from other devices (`latency_lut.transferred`). A table is one Parquet file, written atomically; nothing that is
read back is believed before it is checked.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from latency_lut.device import Device
from latency_lut.lowering import LOWERINGS, Description, model_kind
from latency_lut.timing import Timing
from latency_lut.transferred import Estimate, Transferred, TransferredNetwork
from spaces.choice import Architecture
from spaces.errors import UserError
from spaces.files import write_atomically
from spaces.layers import LayerSpec
from spaces.space import Space
from spaces.sparsity import as_shipped

SCHEMA_VERSION = 2
UNIT = "us"
STATISTIC = "median over interleaved visits at the machine's usual speed; spread is its robust standard error"
SOURCES = ("random", "graded", "chosen", "winner", "sample")

Pair = tuple[LayerSpec, str]
Entry = Timing

_SCHEMA = pa.schema(
    [
        ("kind", pa.string()),
        ("spec", pa.string()),
        ("lowering", pa.string()),
        ("anchor", pa.bool_()),
        ("architecture", pa.string()),
        ("lowerings", pa.string()),
        ("source", pa.string()),
        ("us", pa.float64()),
        ("spread_us", pa.float64()),
        ("count", pa.int64()),
    ]
)


@cache
def pair_key(spec: LayerSpec, lowering: str) -> Pair:
    """The key under which a layer's lowering is measured: the layer that runs the same kernels on tensors of the same sizes."""
    entry = LOWERINGS[lowering]
    return entry.runs_as(replace(spec, sparsity=as_shipped(spec.sparsity))), entry.measured_as


@dataclass(frozen=True)
class NetworkTiming:
    """A whole network that was timed.

    Args:
        architecture: of the table's space.
        lowerings: one per layer.
        us: microseconds per run, as in `Timing`.
        spread_us: as in `Timing`.
        count: visits.
        source: `random`; `graded`, see `latency_lut.profile.graded_networks`; `chosen`, wished by a model, see
            `latency_lut.refine`; `winner`, one that came back from an export; `sample`, see `latency_lut.transfer`.
    """

    architecture: Architecture
    lowerings: tuple[str, ...]
    us: float
    spread_us: float
    count: int = 1
    source: str = "random"


@dataclass(frozen=True)
class CurvePoint:
    """How good a latency model was after so much measuring.

    Args:
        pairs: in the table.
        networks: whole ones, in the table.
        seconds: of measuring so far, fits of the model between the steps included.
        error: its mean absolute relative error on whole networks, leave-one-out.
    """

    pairs: int
    networks: int
    seconds: float
    error: float


@dataclass
class LatencyTable:
    """What layers and networks of a space cost on a device.

    Args:
        space_name: the space.
        space_fingerprint: of the space.
        device_name: the device.
        device_fingerprint: of the device.
        device: its description, see `Device.describe`.
        entries: timings by `pair_key`; read them with `entry`.
        networks: whole networks.
        anchors: keys of the entries that tie sessions of measuring to one speed of the machine.
        created: when measuring began.
        curve: how the error fell, when what to measure was chosen by a model.
        transferred: what was predicted from other devices instead of measured here; `None`: nothing.
    """

    space_name: str
    space_fingerprint: str
    device_name: str
    device_fingerprint: str
    device: dict[str, str | int]
    entries: dict[Pair, Entry] = field(default_factory=dict)
    networks: list[NetworkTiming] = field(default_factory=list)
    anchors: tuple[Pair, ...] = ()
    created: str = ""
    curve: list[CurvePoint] = field(default_factory=list)
    transferred: Transferred | None = None

    @staticmethod
    def empty(space: Space, device: Device) -> LatencyTable:
        """A table of a space and a device, with nothing measured."""
        created = datetime.now(UTC).isoformat(timespec="seconds")
        return LatencyTable(space.name, space.fingerprint, device.name, device.fingerprint, device.describe(), created=created)

    def entry(self, spec: LayerSpec, lowering: str) -> Entry | None:
        """The measured cost of a layer's lowering, `None` when it was not measured."""
        return self.entries.get(pair_key(spec, lowering))

    def estimates(self) -> dict[Pair, Estimate]:
        """Pairs that were predicted from other devices, not measured."""
        return {} if self.transferred is None else self.transferred.pairs

    def known_us(self) -> dict[Pair, float]:
        """Microseconds of all pairs, measured ones and predicted ones: for fitting, not for telling."""
        measured = {pair: entry.us for pair, entry in self.entries.items()}
        return {pair: estimate.us for pair, estimate in self.estimates().items()} | measured

    @property
    def fingerprint(self) -> str:
        """Hex digest over all measurements: another one as soon as anything is measured again."""
        rows = [self.space_fingerprint, self.device_fingerprint, [list(row.values()) for row in self._rows()]]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]

    def check(self, space: Space, device: Device) -> None:
        """Make sure that the table is of this space and this device.

        Raises:
            UserError: it is of another.
        """
        mend = f"use another folder, or delete it and run: python -m latency_lut device={device.name}"
        found, wanted = self.space_fingerprint, space.fingerprint
        if found != wanted:
            raise UserError(f"the table is of space {self.space_name} {found}, not of {space.name} {wanted}; {mend}")
        here = device.describe() if not device.elsewhere else device.settings
        found, wanted = self.device_fingerprint, device.fingerprint if not device.elsewhere else self.device_fingerprint
        differs = changes(self.device, here)
        if found != wanted or differs:
            why = f" ({differs})" if differs else ""
            raise UserError(f"the table is of device {self.device_name} {found}, not of {device.name} {wanted}{why}; {mend}")

    # -- the file ---------------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write the table to a Parquet file: whole or not at all.

        Raises:
            UserError: the folder cannot be written.
        """
        metadata = {
            "schema_version": SCHEMA_VERSION,
            "unit": UNIT,
            "statistic": STATISTIC,
            "space_name": self.space_name,
            "space_fingerprint": self.space_fingerprint,
            "device_name": self.device_name,
            "device_fingerprint": self.device_fingerprint,
            "device": self.device,
            "created": self.created,
            "curve": [asdict(point) for point in self.curve],
            **({} if self.transferred is None else {"transferred": self.transferred.head()}),
        }
        table = pa.Table.from_pylist(self._rows(), schema=_SCHEMA.with_metadata({"netwright": json.dumps(metadata)}))
        content = io.BytesIO()
        pq.write_table(table, content)
        write_atomically(path, content.getvalue())

    def _rows(self) -> list[dict[str, object]]:
        empty: dict[str, object] = dict.fromkeys(_SCHEMA.names)
        rows = []
        for (spec, lowering), entry in self.entries.items():
            values = {"kind": "pair", "spec": spec.to_json(), "lowering": lowering, "anchor": (spec, lowering) in self.anchors}
            rows.append(empty | values | {"us": entry.us, "spread_us": entry.spread_us, "count": entry.count})
        for network in self.networks:
            values = {
                "kind": "network",
                "architecture": network.architecture.to_json(),
                "lowerings": json.dumps(network.lowerings),
                "source": network.source,
            }
            rows.append(empty | values | {"us": network.us, "spread_us": network.spread_us, "count": network.count})
        return rows + [empty | row for row in ([] if self.transferred is None else self.transferred.rows())]

    @staticmethod
    def load(path: Path | str) -> LatencyTable:
        """Read a table.

        Raises:
            UserError: there is none, or the file is damaged or says something impossible.
        """
        path = Path(path)
        mend = f"python -m latency_lut device={path.stem}"
        if not path.is_file():
            raise UserError(f"no table {path}; run: {mend}")
        try:
            table = pq.read_table(path)
            loaded = _without_rows(table.schema.metadata or {})
            missing = sorted(set(_SCHEMA.names) - set(table.column_names))
            if missing:
                raise ValueError(f"column {missing[0]} is missing")
            anchors = []
            for row in table.select(_SCHEMA.names).cast(_SCHEMA).to_pylist():
                pair = loaded._read_row(row)
                if pair is not None and row["anchor"]:
                    anchors.append(pair)
            loaded.anchors = tuple(anchors)
        except PermissionError as error:
            raise UserError(f"cannot read table {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, OSError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"table {path} is damaged ({reason}); delete it and run: {mend}") from error
        return loaded

    def _read_row(self, row: Mapping[str, object]) -> Pair | None:
        """Add a row of the file; the measured pair that it is about."""
        kind, us, spread_us, count = row["kind"], _number(row, "us"), _number(row, "spread_us"), int(_number(row, "count"))
        transferred = kind in ("transferred pair", "transferred network")
        if us == 0 or (count < 1) != transferred or (transferred and self.transferred is None):
            raise ValueError(f"{us} us in {count} visits of a {kind}")
        if kind in ("network", "transferred network"):
            architecture, lowerings = _read_network(row)
            if self.transferred is not None and transferred:
                self.transferred.networks.append(TransferredNetwork(architecture, lowerings, Estimate(us, spread_us)))
                return None
            if row["source"] not in SOURCES:
                raise ValueError(f"a network with source {row['source']!r}")
            self.networks.append(NetworkTiming(architecture, lowerings, us, spread_us, count, str(row["source"])))
            return None
        if kind not in ("pair", "transferred pair"):
            raise ValueError(f"a row of kind {kind!r}")
        spec, lowering = LayerSpec.from_json(_text(row, "spec")), _text(row, "lowering")
        if lowering not in LOWERINGS or not _makes(lowering, spec, self.device):
            raise ValueError(f"lowering {lowering!r} for {spec}")
        known = (spec, lowering) in self.entries or (spec, lowering) in self.estimates()
        if known or pair_key(spec, lowering) != (spec, lowering):
            raise ValueError(f"two entries for {spec} {lowering}")
        if self.transferred is not None and transferred:
            self.transferred.pairs[spec, lowering] = Estimate(us, spread_us)
            return None
        self.entries[spec, lowering] = Timing(us, spread_us, count)
        return spec, lowering


def changes(then: Description, now: Description) -> str:
    """What a device says of itself otherwise than it did; empty where it says the same."""
    return ", ".join(f"{key} {then.get(key)!r} -> {now[key]!r}" for key in now if then.get(key) != now[key])


def _read_network(row: Mapping[str, object]) -> tuple[Architecture, tuple[str, ...]]:
    lowerings = json.loads(_text(row, "lowerings"))
    if not isinstance(lowerings, list) or not all(isinstance(name, str) and name in LOWERINGS for name in lowerings):
        raise ValueError(f"a network with lowerings {str(lowerings)[:60]}")
    return Architecture.from_json(_text(row, "architecture")), tuple(lowerings)


def _makes(lowering: str, spec: LayerSpec, description: Description) -> bool:
    """Whether a device with this description can have measured a layer with a lowering."""
    entry = LOWERINGS[lowering]
    return entry.model_kind == model_kind(description) and entry.applies(spec)


def _without_rows(stored: Mapping[bytes, bytes]) -> LatencyTable:
    """A table with what a file's metadata says."""
    if b"netwright" not in stored:
        raise ValueError("not a latency table")
    values = json.loads(stored[b"netwright"])
    if values["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"schema version {values['schema_version']}, not {SCHEMA_VERSION}")
    if values["unit"] != UNIT:
        raise ValueError(f"unit {values['unit']!r}, not {UNIT!r}")
    names = ("space_name", "space_fingerprint", "device_name", "device_fingerprint")
    texts = [values[name] for name in (*names, "created")]
    device = values["device"]
    if not all(isinstance(text, str) for text in texts) or not isinstance(device, dict):
        raise ValueError("metadata of the wrong type")
    curve = [_curve_point(point) for point in values.get("curve", [])]
    transferred = Transferred.from_head(values["transferred"]) if "transferred" in values else None
    return LatencyTable(texts[0], texts[1], texts[2], texts[3], device, created=texts[4], curve=curve, transferred=transferred)


def _curve_point(stored: Mapping[str, object]) -> CurvePoint:
    """A point of the curve from a file."""
    counts = [int(_number(stored, name)) for name in ("pairs", "networks")]
    return CurvePoint(counts[0], counts[1], _number(stored, "seconds"), _number(stored, "error"))


def _number(row: Mapping[str, object], name: str) -> float:
    value = row[name]
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} is {value!r}")
    return float(value)


def _text(row: Mapping[str, object], name: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r}")
    return value
