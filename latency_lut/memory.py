"""Peak memory: how many bytes whole random networks hold at once while a device runs them.

Measured in the runtime, kept in a file of its own beside the device's latency table, and used to see how far predictions from
the layers (`predictors.memory`) are off.
"""

from __future__ import annotations

import json
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
NETWORKS = 60
UNIT = "bytes"
STATISTIC = "most bytes of tensors and scratch that the runtime holds at once in a run, without weights and input"


@dataclass(frozen=True)
class NetworkMemory:
    """A network whose peak was measured. `lowerings`: one per layer."""

    architecture: Architecture
    lowerings: tuple[str, ...]
    peak_bytes: int


@dataclass
class MemoryTable:
    """What networks of a space hold in memory on a device. `device`: its description, see `Device.describe`."""

    space_fingerprint: str
    device_name: str
    device_fingerprint: str
    device: dict[str, str | int]
    networks: list[NetworkMemory] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write the table: whole or not at all.

        Raises:
            UserError: the folder cannot be written.
        """
        rows = [[n.architecture.to_json(), list(n.lowerings), n.peak_bytes] for n in self.networks]
        head = {"schema_version": SCHEMA_VERSION, "unit": UNIT, "statistic": STATISTIC}
        names = ("space_fingerprint", "device_name", "device_fingerprint", "device")
        write_atomically(path, json.dumps({**head, **{name: getattr(self, name) for name in names}, "networks": rows}))

    @staticmethod
    def load(path: Path) -> MemoryTable:
        """Read a table.

        Raises:
            UserError: the file is damaged or says something impossible.
        """
        try:
            values = json.loads(path.read_bytes())
            if (values["schema_version"], values["unit"]) != (SCHEMA_VERSION, UNIT):
                raise ValueError(f"schema version {values['schema_version']} in {values['unit']}")
            texts = [values[name] for name in ("space_fingerprint", "device_name", "device_fingerprint")]
            if not all(isinstance(text, str) for text in texts) or not isinstance(values["device"], dict):
                raise ValueError("metadata of the wrong type")
            networks = [_read(*row) for row in values["networks"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            raise UserError(f"{path} is damaged ({reason}); delete it, it is measured again in seconds") from error
        return MemoryTable(texts[0], texts[1], texts[2], values["device"], networks)


def _read(architecture: str, lowerings: list[str], peak_bytes: int) -> NetworkMemory:
    if not all(name in LOWERINGS for name in lowerings) or type(peak_bytes) is not int or peak_bytes <= 0:
        raise ValueError(f"a network of {peak_bytes!r} bytes with lowerings {str(lowerings)[:60]}")
    return NetworkMemory(Architecture.from_json(architecture), tuple(lowerings), peak_bytes)


def check_measures_memory(device: Device) -> None:
    """Make sure that memory can be measured on a device.

    Raises:
        UserError: its runtime does not tell.
    """
    if not device.load_runtime().measures_memory(device):
        allowed = "onnxruntime's CPUExecutionProvider does (device=x86); 'memory' is counted on every device"
        where = f"runtime {device.runtime} with provider {device.provider}"
        raise UserError(f"device {device.name}: {where} does not tell how much memory a run takes; {allowed}")


def measure_memory(
    space: Space,
    device: Device,
    path: Path,
    *,
    networks: int = NETWORKS,
    seed: int = 0,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> MemoryTable:
    """Measure what is missing in a table; a network takes some hundredths of a second.

    Args:
        space: of the networks.
        device: where.
        path: the table's file; created, or continued. One of another space or device is measured anew.
        networks: random networks of all sizes with random lowerings.
        seed: draws them.
        on_progress: called with what is measured, how many are done, and of how many.

    Raises:
        UserError: the device does not tell; the file is damaged or cannot be written.
    """
    if type(networks) is not int or networks < 1:
        raise UserError(f"networks is {networks!r}; allowed are integers from 1")
    check_measures_memory(device)
    runtime, description = device.load_runtime(), device.describe()
    empty = MemoryTable(space.fingerprint, device.name, device.fingerprint, description)
    table = MemoryTable.load(path) if path.exists() else empty
    if (table.space_fingerprint, table.device_fingerprint) != (empty.space_fingerprint, empty.device_fingerprint):
        table = empty
    rng = np.random.default_rng([seed, 5])
    for index in range(networks):
        architecture = space.sample_spread(rng) if index % 2 else space.sample(rng)
        network = space.network(architecture)
        lowerings = tuple(str(rng.choice(applicable(spec, description))) for spec in network.layers)
        if index < len(table.networks):
            continue
        model = build_random(network, lowerings, np.random.default_rng([seed, 6, index]), device)
        table.networks.append(NetworkMemory(architecture, lowerings, runtime.peak_bytes(model, device)))
        on_progress("memory", index + 1, networks)
    table.save(path)
    return table
