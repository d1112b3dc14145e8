"""Energy of one run of a model, from a meter that the device declares. Without a meter there is no energy: it is never guessed.

- `rapl`: the energy counters of the processor's packages, read through Linux's powercap. They count all that the packages do,
  idle power and other processes too, so they want a machine that does nothing else.
- `nvml`: the energy counter of the first NVIDIA GPU (from Volta on), read with the package nvidia-ml-py.

The counters are coarse (RAPL: a millisecond, 15 to 61 uJ) and a run is short, so a model runs again and again for a second: its
energy is the mean power meanwhile, times what a run takes. Neither meter has been read on real hardware yet: RAPL's reader is
tested on a copy of powercap's folder, NVML's on a stand-in of its library.
"""

from __future__ import annotations

import importlib
import re
import time
from pathlib import Path
from typing import Protocol

import numpy as np

from latency_lut.device import METERS, Device, LoadedModel
from latency_lut.networks import NetworkTable, Progress, empty_table, measure_networks
from spaces.errors import UserError
from spaces.space import Space

POWERCAP = Path("/sys/class/powercap")
NETWORKS = 60
WINDOW_S = 1.0
VISITS = 10
STATISTIC = "microjoules of one run: mean power of the metered unit while the model runs again and again, times the median run"


class Meter(Protocol):
    """A counter of energy."""

    def start(self) -> None:
        """Begin to count."""

    def used_uj(self) -> float:
        """Microjoules since `start`; to be asked at least once a minute, as counters wrap around."""


class RaplMeter:
    """The processor's packages.

    Args:
        root: the folder of powercap.

    Raises:
        UserError: there are no packages, or their counters may not be read.
    """

    def __init__(self, root: Path | None = None) -> None:
        root = Path(POWERCAP) if root is None else root
        zones = sorted(path for path in root.glob("*rapl:*") if re.fullmatch(r"[a-z-]*rapl:\d+", path.name))
        self._packages = [zone for zone in zones if _text(zone / "name").startswith("package")]
        if not self._packages:
            mend = "take a machine with RAPL (Linux on Intel or AMD, not virtual), or energy_meter=null"
            raise UserError(f"energy meter rapl: no package in {root}; {mend}")
        self._ranges_uj = [_count(zone / "max_energy_range_uj") for zone in self._packages]
        self.start()

    def start(self) -> None:
        self._last_uj, self._used_uj = self._read(), 0.0

    def used_uj(self) -> float:
        now_uj = self._read()
        for now, last, whole in zip(now_uj, self._last_uj, self._ranges_uj, strict=True):
            self._used_uj += now - last if now >= last else now - last + whole  # a counter begins again after its range
        self._last_uj = now_uj
        return self._used_uj

    def _read(self) -> list[int]:
        return [_count(zone / "energy_uj") for zone in self._packages]


class NvmlMeter:
    """The first NVIDIA GPU.

    Raises:
        UserError: nvidia-ml-py or a GPU that counts its energy is missing.
    """

    def __init__(self) -> None:
        try:
            self._nvml = importlib.import_module("pynvml")
        except ImportError as error:
            raise UserError("energy meter nvml needs nvidia-ml-py; run: pip install nvidia-ml-py") from error
        try:
            self._nvml.nvmlInit()
            self._gpu = self._nvml.nvmlDeviceGetHandleByIndex(0)
            self.start()
        except self._nvml.NVMLError as error:
            mend = "take a machine with an NVIDIA GPU from Volta on and its driver, or energy_meter=null"
            raise UserError(f"energy meter nvml: {error}; {mend}") from error

    def start(self) -> None:
        self._start_mj = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu)

    def used_uj(self) -> float:
        return 1e3 * float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu) - self._start_mj)


def meter_of(device: Device) -> Meter:
    """The meter that a device declares.

    Raises:
        UserError: it declares none, that one cannot be read, or is elsewhere.
    """
    device.check_here("reading a meter")
    if device.energy_meter is None:
        allowed = f"where there is a meter, declare it: devices.{device.name}.energy_meter={'|'.join(METERS)}"
        raise UserError(f"device {device.name} has no energy meter, so there is no energy to search for; {allowed}")
    return RaplMeter() if device.energy_meter == "rapl" else NvmlMeter()


def run_energy_uj(model: LoadedModel, meter: Meter, window_s: float | None = None) -> float:
    """Microjoules of one run; the model runs for `window_s`, by default `WINDOW_S`.

    Raises:
        UserError: the meter stood still.
    """
    window_s = WINDOW_S if window_s is None else window_s
    model.visit(0.0)
    meter.start()
    begin = time.perf_counter()
    run_us = float(np.median([model.visit(window_s / VISITS) for _ in range(VISITS)]))
    seconds, used_uj = time.perf_counter() - begin, meter.used_uj()
    if used_uj <= 0:
        raise UserError(f"the energy meter stood still for {seconds:.2f} s; it cannot be believed: take energy_meter=null")
    return used_uj / seconds * run_us * 1e-6


def measure_energy(
    space: Space,
    device: Device,
    path: Path,
    *,
    networks: int = NETWORKS,
    seed: int = 0,
    window_s: float | None = None,
    on_progress: Progress = lambda what, done, total: None,
) -> NetworkTable:
    """Measure what is missing in a table; see `measure_networks`. A network takes `window_s` seconds.

    Raises:
        UserError: the device has no meter that can be read; the file is damaged or cannot be written.
    """
    meter, runtime = meter_of(device), device.load_runtime()
    empty = empty_table("energy", "uJ", f"{STATISTIC}; meter {device.energy_meter}", space, device)

    def measure(model: bytes) -> float:
        return run_energy_uj(runtime.load(model, device), meter, window_s)

    return measure_networks(space, device, path, empty, measure, networks, seed, on_progress)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except PermissionError as error:
        raise UserError(f"energy meter rapl: {path} may not be read; run: sudo chmod a+r {path}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"energy meter rapl: {path} cannot be read ({error})") from error


def _count(path: Path) -> int:
    text = _text(path)
    if not re.fullmatch(r"\d{1,20}", text):
        raise UserError(f"energy meter rapl: {path} says {text[:40]!r}; allowed is a number of microjoules")
    return int(text)
