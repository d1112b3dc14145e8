"""The runtime torch: exported programs on this machine's CPU, or on an NVIDIA GPU by CUDA graphs.

A program runs operator by operator, as `torch.export.load(...).module()` runs it; on a GPU one run is recorded as a CUDA graph
and replayed, which takes Python's share out. With the providers `cpu` and `cuda` float layers compute in single precision, with
`cpu-bf16`, `cpu-fp16`, `cuda-bf16` and `cuda-fp16` in bfloat16 or half precision too, layer by layer as it is faster.

What needs a GPU here was written without one, and has never been run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import cast

import numpy as np
import torch
from torch.fx.graph import CodeGen

from latency_lut.device import Borders, Device
from latency_lut.lowerings.base import LOWERINGS, PROGRAM
from latency_lut.programs import operators_of, read_module, read_program
from spaces.errors import UserError
from spaces.layers import LayerSpec
from spaces.precision import FLOAT_BITS

BF16_CAPABILITY = 80  # that is, 8.0
WARM_RUNS = 3  # before a CUDA graph is recorded: libraries choose kernels and allocate in the first ones
READING_S = 1e-4  # of replays that CUDA events measure at once


def version() -> str:
    """Version of the installed torch, with what it was built for."""
    return str(torch.__version__)


def providers() -> list[str]:
    """Where torch can run here, and in which smaller floats."""
    places = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [place + ending for place in places for ending in ("", "-bf16", "-fp16")]


def providers_elsewhere() -> list[str]:
    """None yet: programs of torch cannot be sent elsewhere."""
    return []


def describe(device: Device) -> dict[str, str | int]:
    """The kind of model, and of a GPU its name, compute capability and libraries.

    Raises:
        UserError: the GPU has no kernels for the provider's floats.
    """
    said: dict[str, str | int] = {"model_kind": PROGRAM, "half": half_of(device.provider)}
    if torch_device(device).type == "cpu":
        return said
    major, minor = torch.cuda.get_device_capability()
    capability = 10 * major + minor
    if said["half"] == "bf16" and capability < BF16_CAPABILITY:
        mend = f"run with devices.{device.name}.provider=cuda-fp16"
        raise UserError(f"device {device.name}: bfloat16 needs compute capability 8.0, this GPU has {major}.{minor}; {mend}")
    said |= {"gpu": torch.cuda.get_device_name(), "capability": capability, "tf32": "off"}
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return said | {"cuda": str(torch.version.cuda), "cudnn": str(cudnn)}


def half_of(provider: str) -> str:
    """The smaller floats in which layers may compute too: `bf16`, `fp16` or none."""
    return provider.partition("-")[2]


def torch_device(device: Device) -> torch.device:
    """Where torch runs the models of a device."""
    return torch.device(device.provider.partition("-")[0])


class Session:
    """One loaded program, its inputs filled with random data.

    Args:
        model: a serialized program.
        device: says where, and with how many threads.

    Raises:
        UserError: the model is no program.
    """

    def __init__(self, model: bytes, device: Device) -> None:
        program, module = read_module(model)
        self._device, self._threads = torch_device(device), device.threads
        self.operators = operators_of(program)
        self.names = list(program.graph_signature.user_inputs)
        module = module.to(self._device)
        module.graph.set_codegen(CodeGen())  # plain arguments and results: nothing to flatten in every run
        module.recompile()
        self._module = module
        rng = np.random.default_rng(0)
        metas = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in self.names]
        self._inputs = [self._tensor(_random(rng, meta)) for meta in metas]
        self._graph: torch.cuda.CUDAGraph | None = None

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device).contiguous(memory_format=torch.channels_last)

    def run(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        """The first output for the given inputs, by name."""
        with _threads(self._threads), _single_precision(), torch.inference_mode():
            output = self._module(*(self._tensor(np.ascontiguousarray(feeds[name])) for name in self.names))
        return np.asarray(output[0].cpu().numpy())

    def visit(self, seconds: float) -> float:
        """Median microseconds of one run, from runs during about `seconds` (at least three) after one that warms up.

        On a GPU a reading is as many replays of the CUDA graph as take a tenth of a millisecond, between two CUDA events.
        """
        with _threads(self._threads), _single_precision(), torch.inference_mode():
            return self._visit_gpu(seconds) if self._device.type == "cuda" else self._visit_cpu(seconds)

    def _visit_cpu(self, seconds: float) -> float:
        module, inputs, clock = self._module, self._inputs, time.perf_counter
        module(*inputs)
        durations = []
        end = clock() + seconds
        while True:
            begin = clock()
            module(*inputs)
            now = clock()
            durations.append(now - begin)
            if now > end and len(durations) >= 3:
                return float(np.median(durations)) * 1e6

    def _visit_gpu(self, seconds: float) -> float:
        graph = self._graph = self._graph or self._recorded()
        once_s = _replayed_s(graph, 1)
        replays = max(1, round(READING_S / max(once_s, 1e-7)))
        readings: list[float] = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(readings) < 3:
            readings.append(_replayed_s(graph, replays) / replays)
        return float(np.median(readings)) * 1e6

    def _recorded(self) -> torch.cuda.CUDAGraph:
        """One run as a CUDA graph; it reads and writes the same memory in every replay."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_RUNS):
                self._module(*self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._output = self._module(*self._inputs)  # kept: its memory is written by every replay
        return graph


def load(model: bytes, device: Device) -> Session:
    """A serialized program, made ready to run.

    Raises:
        UserError: it is none.
    """
    return Session(model, device)


def optimized_operators(model: bytes, device: Device) -> list[str]:
    """Names of the aten operators that run, in their order: torch runs a program as it is."""
    return operators_of(read_program(model))


def measures_memory(device: Device) -> bool:
    """Not yet."""
    return False


def borders(spec: LayerSpec, lowering: str, description: Mapping[str, str | int]) -> Borders:
    """Where a layer alone converts between single precision and the smaller floats in which it computes."""
    converts = LOWERINGS[lowering].rounds
    into, out = (converts and bits == FLOAT_BITS for bits in (spec.input_bits, spec.output_bits))
    return Borders(into, converts and spec.skip_bits == FLOAT_BITS, out, fuses_skip=False)


def _random(rng: np.random.Generator, meta: torch.Tensor) -> np.ndarray:
    if meta.dtype == torch.uint8:
        return rng.integers(0, 127, tuple(meta.shape)).astype(np.uint8)
    return rng.standard_normal(tuple(meta.shape)).astype(np.float32)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """So many threads for torch's kernels; the process has its own number again afterwards."""
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _single_precision() -> AbstractContextManager[None]:
    """On GPUs cuDNN would round the inputs of convolutions in single precision to TF32: not here, where that is a choice."""
    return cast(AbstractContextManager[None], torch.backends.cudnn.flags(enabled=True, allow_tf32=False))


def _replayed_s(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """Seconds that so many replays take on the GPU."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
