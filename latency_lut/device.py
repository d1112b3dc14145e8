"""A device: where networks are deployed, and everything that a measured number must say about it.

A `Device` is plain data. The runtime that it names is a module in `latency_lut/runtimes` with the functions of `Runtime`;
adding a runtime is adding such a module. Devices other than this machine are measured there, see `latency_lut.bundle`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, cast

import numpy as np

import latency_lut.runtimes
from latency_lut.machine import cores, describe_machine, fingerprint_of
from latency_lut.transports import Transport
from spaces.errors import UserError
from spaces.layers import LayerSpec

_ONNXRUNTIME_GPU = "for GPUs run: pip install onnxruntime-gpu"
_TORCH_GPU = "install an NVIDIA driver and a torch built for CUDA (pytorch.org/get-started), or take device=torch_cpu"
GPU_PROVIDERS = {  # what to do where they are missing
    "CUDAExecutionProvider": _ONNXRUNTIME_GPU,
    "TensorrtExecutionProvider": _ONNXRUNTIME_GPU,
    **dict.fromkeys(("cuda", "cuda-bf16", "cuda-fp16"), _TORCH_GPU),
}


METERS = ("rapl", "nvml")  # of energy
REACHES = ("here", "bundle")  # on this machine, or by a bundle that somebody carries there; or a transport


class LoadedModel(Protocol):
    """A model that is ready to run on a device, its inputs bound to random data."""

    def run(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        """The first output for the given inputs."""

    def visit(self, seconds: float) -> float:
        """Median microseconds of one run, from runs during about `seconds`."""


@dataclass(frozen=True)
class Borders:
    """In which memory layouts a layer takes and gives its tensors.

    A layer alone exchanges tensors in the layout called home: float ones with channels first, bytes with channels last. A
    runtime may want or produce another one, foreign, and then converts; what two neighbours would convert to and fro, a
    network leaves out.

    Args:
        foreign_input: whether the main input is wanted in the foreign layout.
        foreign_skip: whether the skip is.
        foreign_output: whether the output is produced in it.
        fuses_skip: whether the addition of the skip disappears when the skip comes in the foreign layout; the output is then
            foreign too.
    """

    foreign_input: bool
    foreign_skip: bool
    foreign_output: bool
    fuses_skip: bool


class Runtime(Protocol):
    """What a module in `latency_lut/runtimes` offers."""

    def version(self) -> str:
        """Version of the installed runtime."""

    def providers(self) -> list[str]:
        """Execution providers that the installed runtime has."""

    def providers_elsewhere(self) -> list[str]:
        """Those that a device elsewhere may have; none when its models cannot be sent elsewhere."""

    def describe(self, device: Device) -> Mapping[str, str | int]:
        """What else a number measured with it must say; nothing when version, provider and settings say it all."""

    def load(self, model: bytes, device: Device) -> LoadedModel:
        """A serialized model, made ready to run: ONNX, unless `describe` says another `model_kind`."""

    def optimized_operators(self, model: bytes, device: Device) -> list[str]:
        """Operator types of the graph that the runtime really runs."""

    def measures_memory(self, device: Device) -> bool:
        """Whether it tells how much memory a run takes on a device."""

    def peak_bytes(self, model: bytes, device: Device) -> int:
        """Most bytes of tensors and scratch that runs of a model hold at once. Not needed where nothing `measures_memory`."""

    def borders(self, spec: LayerSpec, lowering: str, description: Mapping[str, str | int]) -> Borders:
        """The layouts of a layer on a device with the given `Device.describe`."""


def runtimes() -> list[str]:
    """Names of the runtimes that Netwright has an adapter for."""
    return sorted(module.name for module in pkgutil.iter_modules(latency_lut.runtimes.__path__))


def load_runtime(name: str) -> Runtime:
    """The module of a runtime, out of `runtimes()`."""
    return cast(Runtime, importlib.import_module(f"latency_lut.runtimes.{name}"))


@dataclass(frozen=True)
class Device:
    """A deployment target.

    Args:
        name: names its table and its objectives (`latency@x86`).
        runtime: a module of `latency_lut/runtimes`.
        provider: the runtime's execution provider.
        threads: threads that one run may use.
        batch: samples per run.
        energy_meter: what its energy is read from, see `latency_lut.energy`; `None`: nothing, so it has none.
        reach: one out of `REACHES`, or the transport that reaches it.

    Raises:
        UserError: unknown runtime, provider, meter or reach, or `threads`, `batch` or `name` out of range.
    """

    name: str
    runtime: str = "onnxruntime"
    provider: str = "CPUExecutionProvider"
    threads: int = 1
    batch: int = 1
    energy_meter: str | None = None
    reach: str | Transport = "here"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or not self.name.replace("_", "").replace("-", "").isalnum():
            raise UserError(f"device name is {self.name!r}; allowed are letters, digits, '-' and '_'")
        for what, value in (("threads", self.threads), ("batch", self.batch)):
            if type(value) is not int or value < 1:
                raise UserError(f"device {self.name}: {what} is {value!r}; allowed are integers from 1")
        if self.energy_meter is not None and self.energy_meter not in METERS:
            raise UserError(f"device {self.name}: energy_meter is {self.energy_meter!r}; allowed are {', '.join(METERS)}, null")
        if self.reach not in REACHES and self.transport is None:
            allowed = f"{', '.join(REACHES)}, or a transport such as latency_lut.transports.Ssh"
            raise UserError(f"device {self.name}: reach is {self.reach!r}; allowed are {allowed}")
        if self.threads > cores() and not self.elsewhere:
            raise UserError(f"device {self.name}: threads is {self.threads}; this machine has {cores()} cores")
        if self.runtime not in runtimes():
            raise UserError(f"device {self.name}: runtime is {self.runtime!r}; allowed are {', '.join(runtimes())}")
        if self.elsewhere:
            self._check_provider_elsewhere()
        else:
            self._check_provider()

    def _check_provider(self) -> None:
        available = self.load_runtime().providers()
        if self.provider not in available:
            mend = f"; {GPU_PROVIDERS[self.provider]}" if self.provider in GPU_PROVIDERS else ""
            here = f"available here are {', '.join(available)}"
            raise UserError(f"device {self.name}: provider is {self.provider!r}; {here}{mend}")

    def _check_provider_elsewhere(self) -> None:
        possible = self.load_runtime().providers_elsewhere()
        if self.provider not in possible:
            allowed = f"allowed elsewhere are {', '.join(possible)}" if possible else f"{self.runtime} cannot be sent elsewhere"
            raise UserError(f"device {self.name}: provider is {self.provider!r}; {allowed}")

    @property
    def elsewhere(self) -> bool:
        """Whether it is another machine than this one: it is measured there, and what it is, its table tells."""
        return self.reach != "here"

    @property
    def transport(self) -> Transport | None:
        """The way to it, if Netwright can take it."""
        return None if isinstance(self.reach, str) or not hasattr(self.reach, "send") else self.reach

    def check_here(self, what: str) -> None:
        """Make sure that it is this machine.

        Raises:
            UserError: it is not; `what` cannot be had elsewhere.
        """
        if self.elsewhere:
            raise UserError(f"device {self.name} is elsewhere; {what} works on this machine's devices only")

    @property
    def twin(self) -> Device:
        """The same runtime with the same settings on this machine, to look at models for one elsewhere; one here is its own.

        Raises:
            UserError: this machine has no such provider.
        """
        if not self.elsewhere:
            return self
        return replace(self, reach="here", energy_meter=None, threads=min(self.threads, cores()))

    def load_runtime(self) -> Runtime:
        """The module that loads and times models on this device."""
        return load_runtime(self.runtime)

    @property
    def settings(self) -> dict[str, str | int]:
        """How models run on it."""
        return {"runtime": self.runtime, "provider": self.provider, "threads": self.threads, "batch": self.batch}

    def describe(self) -> dict[str, str | int]:
        """What a number measured on this device must say: processor, system, runtime and settings. Of a device elsewhere only
        the settings are known here."""
        if self.elsewhere:
            return {**self.settings, "reach": "elsewhere"}
        runtime = self.load_runtime()
        return {**describe_machine(), **self.settings, "runtime_version": runtime.version(), **runtime.describe(self)}

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest over `describe()`: equal on the same machine with the same runtime and settings."""
        return fingerprint_of(self.describe())
