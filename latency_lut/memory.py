"""Peak memory: how many bytes whole random networks hold at once while a device runs them.

Measured in the runtime, and used to see how far predictions from the layers (`predictors.memory`) are off.
"""

from __future__ import annotations

from pathlib import Path

from latency_lut.device import Device
from latency_lut.networks import NetworkTable, Progress, empty_table, measure_networks
from spaces.errors import UserError
from spaces.space import Space

NETWORKS = 60
STATISTIC = "most bytes of tensors and scratch that the runtime holds at once in a run, without weights and input"


def check_measures_memory(device: Device) -> None:
    """Make sure that memory can be measured on a device.

    Raises:
        UserError: its runtime does not tell, or it is elsewhere.
    """
    device.check_here("measuring memory")
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
    on_progress: Progress = lambda what, done, total: None,
) -> NetworkTable:
    """Measure what is missing in a table; see `measure_networks`. A network takes some hundredths of a second.

    Raises:
        UserError: the device does not tell; the file is damaged or cannot be written.
    """
    check_measures_memory(device)
    runtime = device.load_runtime()
    empty = empty_table("memory", "bytes", STATISTIC, space, device)
    return measure_networks(
        space, device, path, empty, lambda model: runtime.peak_bytes(model, device), networks, seed, on_progress
    )
