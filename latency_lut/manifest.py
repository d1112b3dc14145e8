"""What a bundle holds: the models to time, how, for which device, and the checksum of every file.

A manifest is a JSON file. One that comes back from elsewhere is not believed before it is checked.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from latency_lut.device import Device
from latency_lut.lowering import LOWERINGS
from latency_lut.runner import FORMAT, LINE_VALUES, SCHEMA_VERSION, UNIT
from latency_lut.session import Drawn
from latency_lut.table import SOURCES, Pair
from spaces.choice import Architecture
from spaces.errors import UserError
from spaces.layers import LayerSpec

LARGEST_MODEL = 2**30
MOST_MODELS = 50_000
KINDS = ("pair", "network")


@dataclass(frozen=True)
class Stored:
    """A file of a bundle: its size, and SHA-256 in hex."""

    size_bytes: int
    sha256: str

    def fits(self, content: bytes) -> bool:
        """Whether this is the content of the file."""
        return len(content) == self.size_bytes and hashlib.sha256(content).hexdigest() == self.sha256


@dataclass(frozen=True)
class Asked:
    """What a model is run on besides: `samples` of the file `file` of the bundle, one after the other in little-endian single
    precision; its output for each has so many `values`."""

    file: str
    samples: int
    values: int

    @property
    def rows(self) -> int:
        """Samples whose outputs are in one line of the results."""
        return max(1, LINE_VALUES // self.values)


@dataclass(frozen=True)
class Protocol:
    """How models are timed: `rounds` visits of `visit_s` seconds, `batch` models and the anchors at once."""

    rounds: int
    visit_s: float
    batch: int


@dataclass(frozen=True)
class Manifest:
    """What a bundle holds.

    Args:
        space_name: of the space.
        space_fingerprint: of the space.
        device: that is measured elsewhere.
        seed: of what is drawn: pairs, networks, orders.
        max_pairs: pairs to measure in all, those that a table has already included.
        protocol: by kind of model.
        anchors: names of the models that are visited in every batch.
        pairs: by the name of their model.
        networks: with their source, likewise.
        models: the files of the models, likewise.
        outputs: what models are run on besides, likewise.
        files: the other files, by their path in the bundle; without the manifest itself.
    """

    space_name: str
    space_fingerprint: str
    device: Device
    seed: int
    max_pairs: int
    protocol: dict[str, Protocol]
    anchors: tuple[str, ...] = ()
    pairs: dict[str, Pair] = field(default_factory=dict)
    networks: dict[str, tuple[Drawn, str]] = field(default_factory=dict)
    models: dict[str, Stored] = field(default_factory=dict)
    outputs: dict[str, Asked] = field(default_factory=dict)
    files: dict[str, Stored] = field(default_factory=dict)

    @property
    def checksums(self) -> dict[str, Stored]:
        """All files of the bundle but the manifest, by their path."""
        return {**self.files, **{f"models/{name}.onnx": stored for name, stored in self.models.items()}}

    def to_json(self) -> str:
        """The content of the manifest's file."""
        models: list[dict[str, object]] = []
        for name, (spec, lowering) in self.pairs.items():
            models.append({"id": name, "kind": "pair", "spec": spec.to_json(), "lowering": lowering})
        for name, ((architecture, lowerings), source) in self.networks.items():
            what = {"architecture": architecture.to_json(), "lowerings": list(lowerings), "source": source}
            models.append({"id": name, "kind": "network", **what})
        for model in models:
            model |= asdict(self.models[str(model["id"])])
            if model["id"] in self.outputs:
                model["outputs"] = asdict(self.outputs[str(model["id"])])
        values = {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "unit": UNIT,
            "space": {"name": self.space_name, "fingerprint": self.space_fingerprint},
            "device": {"name": self.device.name, **self.device.settings},
            "seed": self.seed,
            "max_pairs": self.max_pairs,
            "protocol": {kind: asdict(protocol) for kind, protocol in self.protocol.items()},
            "anchors": list(self.anchors),
            "files": {path: asdict(stored) for path, stored in self.files.items()},
            "models": models,
        }
        return json.dumps(values, indent=1) + "\n"

    @staticmethod
    def from_json(content: bytes) -> Manifest:
        """Read a manifest.

        Raises:
            UserError: it says something impossible, or not what this version can read.
        """
        try:
            return _read(strict_json(content))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:160]
            raise UserError(f"the manifest is damaged ({reason or type(error).__name__})") from error


def strict_json(content: bytes) -> dict[str, Any]:
    """An object out of JSON, as the standard has it: no NaN, no infinity, no name twice.

    Raises:
        ValueError: it is something else.
    """

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            raise ValueError("a name is there twice")
        return values

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not a number")

    values = json.loads(content.decode("utf-8"), object_pairs_hook=object_of, parse_constant=refuse)
    if not isinstance(values, dict):
        raise ValueError("not an object")
    return values


def integer(values: Mapping[str, Any], name: str, least: int, most: int) -> int:
    """A field that is an integer in a range.

    Raises:
        ValueError: it is not.
    """
    value = values[name]
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} is {str(value)[:40]!r}; allowed are integers from {least} to {most}")
    return value


def text(values: Mapping[str, Any], name: str, most: int = 200) -> str:
    """A field that is a printable text of so many characters at most.

    Raises:
        ValueError: it is not.
    """
    value = values[name]
    if not isinstance(value, str) or not value.isprintable() or len(value) > most:
        raise ValueError(f"{name} is {str(value)[:40]!r}; allowed is printable text up to {most} characters")
    return value


def sha256_of(values: Mapping[str, Any], name: str = "sha256") -> str:
    """A field that is a SHA-256 in hex.

    Raises:
        ValueError: it is not.
    """
    value = text(values, name)
    if len(value) != 64 or not set(value) <= set("0123456789abcdef"):
        raise ValueError(f"{name} is {value[:40]!r}; allowed are 64 hexadecimal digits")
    return value


def _read(values: dict[str, Any]) -> Manifest:
    if values["format"] != FORMAT:
        raise ValueError("not of a bundle")
    if values["schema_version"] != SCHEMA_VERSION or type(values["schema_version"]) is not int:
        raise ValueError(f"schema version {str(values['schema_version'])[:40]}, not {SCHEMA_VERSION}")
    if values["unit"] != UNIT:
        raise ValueError(f"unit {str(values['unit'])[:40]!r}, not {UNIT!r}")
    stated = values["device"]
    names = text(stated, "name", 60), text(stated, "runtime"), text(stated, "provider")
    device = Device(*names, integer(stated, "threads", 1, 2**20), integer(stated, "batch", 1, 2**20), reach="bundle")
    models = values["models"]
    if len(models) > MOST_MODELS:
        raise ValueError(f"{len(models)} models; allowed are {MOST_MODELS}")
    files = {_model_name(model): _stored(model) for model in models}
    pairs = {model["id"]: _pair(model) for model in models if model["kind"] == "pair"}
    networks = {model["id"]: _network(model) for model in models if model["kind"] == "network"}
    if len(files) < len(models) or len(pairs) + len(networks) < len(models) or len(set(pairs.values())) < len(pairs):
        raise ValueError("a model is there twice, or of no known kind")
    anchors = tuple(values["anchors"])
    if not anchors or len(set(anchors)) < len(anchors) or not set(anchors) <= set(pairs):
        raise ValueError("anchors have to be pairs of the bundle, each once")
    stored = {text({"path": path}, "path"): _stored(file) for path, file in values["files"].items()}
    return Manifest(
        text(values["space"], "name"),
        text(values["space"], "fingerprint"),
        device,
        integer(values, "seed", 0, 2**63),
        integer(values, "max_pairs", 1, 2**31),
        {kind: _protocol(values["protocol"][kind]) for kind in KINDS},
        anchors,
        pairs,
        networks,
        files,
        {model["id"]: _asked(model["outputs"], stored) for model in models if "outputs" in model},
        stored,
    )


def _protocol(values: Mapping[str, Any]) -> Protocol:
    visit_s = values["visit_s"]
    if not isinstance(visit_s, (int, float)) or isinstance(visit_s, bool) or not 0 < visit_s < 60 or math.isnan(visit_s):
        raise ValueError(f"visit_s is {str(visit_s)[:40]!r}; allowed are seconds above 0 and below 60")
    return Protocol(integer(values, "rounds", 3, 10_000), float(visit_s), integer(values, "batch", 1, 10_000))


def _stored(values: Mapping[str, Any]) -> Stored:
    return Stored(integer(values, "size_bytes", 0, LARGEST_MODEL), sha256_of(values))


def _asked(values: Mapping[str, Any], files: Mapping[str, Stored]) -> Asked:
    asked = Asked(text(values, "file"), integer(values, "samples", 1, 2**31), integer(values, "values", 1, LINE_VALUES))
    if asked.file not in files:
        raise ValueError(f"file {asked.file[:40]!r} is not in the bundle")
    return asked


def _model_name(values: Mapping[str, Any]) -> str:
    name = text(values, "id", 20)
    if not name.isascii() or not name.isalnum():
        raise ValueError(f"model {name!r}; allowed are letters and digits")
    return name


def _pair(values: Mapping[str, Any]) -> Pair:
    return LayerSpec.from_json(text(values, "spec", 2000)), _lowering(values["lowering"])


def _network(values: Mapping[str, Any]) -> tuple[Drawn, str]:
    architecture = Architecture.from_json(text(values, "architecture", 20_000))
    if values["source"] not in SOURCES:
        raise ValueError(f"source {str(values['source'])[:40]!r}")
    return (architecture, tuple(_lowering(lowering) for lowering in values["lowerings"])), values["source"]


def _lowering(name: object) -> str:
    if not isinstance(name, str) or name not in LOWERINGS:
        raise ValueError(f"lowering {str(name)[:40]!r}")
    return name
