"""A quantity of whole networks, measured on a device and kept in a file of its own beside the device's latency table.

What is read back is checked before it is believed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from latency_lut.device import Device
from latency_lut.lowering import LOWERINGS, applicable
from latency_lut.session import build_random
from spaces.choice import Architecture
from spaces.errors import UserError
from spaces.files import write_atomically
from spaces.space import Space

SCHEMA_VERSION = 1

Measure = Callable[[bytes], float]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class NetworkValue:
    """A network that was measured. `lowerings`: one per layer; `value`: in the unit of its table."""

    architecture: Architecture
    lowerings: tuple[str, ...]
    value: float


@dataclass
class NetworkTable:
    """Values of networks of a space on a device.

    Args:
        quantity: what was measured.
        unit: of the values.
        statistic: what of it, in words.
        space_fingerprint: of the space.
        device_name: the device.
        device_fingerprint: of the device.
        device: its description, see `Device.describe`.
        networks: in the order in which they were drawn.
    """

    quantity: str
    unit: str
    statistic: str
    space_fingerprint: str
    device_name: str
    device_fingerprint: str
    device: dict[str, str | int]
    networks: list[NetworkValue] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write the table: whole or not at all.

        Raises:
            UserError: the folder cannot be written.
        """
        rows = [[n.architecture.to_json(), list(n.lowerings), n.value] for n in self.networks]
        head = {name: getattr(self, name) for name in (*_TEXTS, "device")}
        write_atomically(path, json.dumps({"schema_version": SCHEMA_VERSION, **head, "networks": rows}))

    @staticmethod
    def load(path: Path) -> NetworkTable:
        """Read a table.

        Raises:
            UserError: the file is damaged or says something impossible.
        """
        try:
            values = json.loads(path.read_bytes())
            if values["schema_version"] != SCHEMA_VERSION:
                raise ValueError(f"schema version {values['schema_version']}")
            texts = [values[name] for name in _TEXTS]
            if not all(isinstance(text, str) for text in texts) or not isinstance(values["device"], dict):
                raise ValueError("metadata of the wrong type")
            networks = [_read(*row) for row in values["networks"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            raise UserError(f"{path} is damaged ({reason}); delete it, it is measured again") from error
        return NetworkTable(**dict(zip(_TEXTS, texts, strict=True)), device=values["device"], networks=networks)


_TEXTS = ("quantity", "unit", "statistic", "space_fingerprint", "device_name", "device_fingerprint")


def _read(architecture: str, lowerings: list[str], value: float) -> NetworkValue:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    if not number or not all(name in LOWERINGS for name in lowerings):
        raise ValueError(f"a network with the value {value!r} and lowerings {str(lowerings)[:60]}")
    return NetworkValue(Architecture.from_json(architecture), tuple(lowerings), value)


def measure_networks(
    space: Space,
    device: Device,
    path: Path,
    empty: NetworkTable,
    measure: Measure,
    networks: int,
    seed: int,
    on_progress: Progress,
) -> NetworkTable:
    """Measure what is missing in a table.

    Args:
        space: of the networks.
        device: where.
        path: the table's file; created, or continued. One of another space, device or quantity is measured anew.
        empty: the table without networks.
        measure: the value of a serialized model.
        networks: random networks of all sizes with random lowerings.
        seed: draws them.
        on_progress: called with what is measured, how many are done, and of how many.

    Raises:
        UserError: `networks` is out of range; the file is damaged or cannot be written.
    """
    if type(networks) is not int or networks < 1:
        raise UserError(f"networks is {networks!r}; allowed are integers from 1")
    table = NetworkTable.load(path) if path.exists() else empty
    if [getattr(table, name) for name in _TEXTS] != [getattr(empty, name) for name in _TEXTS]:
        table = empty
    rng = np.random.default_rng([seed, 5])
    for index in range(networks):
        architecture = space.sample_spread(rng) if index % 2 else space.sample(rng)
        network = space.network(architecture)
        lowerings = tuple(str(rng.choice(applicable(spec, table.device))) for spec in network.layers)
        if index < len(table.networks):
            continue
        model = build_random(network, lowerings, np.random.default_rng([seed, 6, index]), device)
        table.networks.append(NetworkValue(architecture, lowerings, measure(model)))
        on_progress(table.quantity, index + 1, networks)
        if index % 10 == 9:
            table.save(path)
    table.save(path)
    return table


def empty_table(quantity: str, unit: str, statistic: str, space: Space, device: Device) -> NetworkTable:
    """A table of a space and a device with nothing measured."""
    return NetworkTable(quantity, unit, statistic, space.fingerprint, device.name, device.fingerprint, device.describe())
