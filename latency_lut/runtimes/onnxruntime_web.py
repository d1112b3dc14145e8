"""The runtime onnxruntime-web: models in WebAssembly (SIMD), in Node or in headless Chromium on this machine.

Models run as a page or a Node program would run them, `await session.run(feeds)`, copies of inputs and outputs included. The
clock and the loop of a visit are in JavaScript (`latency_lut/web/sessions.mjs`). WebGPU and WebNN are not done here.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable, Mapping

import numpy as np

from latency_lut.device import Borders, Device
from latency_lut.lowerings.transformer import exchanges_rows
from latency_lut.web import chromium, node, package
from latency_lut.web.worker import Channel, WebError, Worker
from spaces.layers import LayerSpec
from spaces.precision import FLOAT_BITS

_CHANNELS: dict[str, Callable[[int], Channel]] = {"wasm": node.NodeChannel, "wasm-chromium": chromium.ChromiumChannel}
_NUMPY_TYPES = {"float32": np.float32, "uint8": np.uint8, "int8": np.int8, "int32": np.int32, "int64": np.int64}

_workers: dict[tuple[int, str, int], Worker] = {}
_starting = threading.Lock()


def version() -> str:
    """Version of onnxruntime-web that is used; it is set up when a first model is loaded."""
    return package.version()


def providers() -> list[str]:
    """`wasm` runs in Node, `wasm-chromium` in headless Chromium."""
    return list(_CHANNELS)


def providers_elsewhere() -> list[str]:
    """`wasm-browser`: the browser in which a page is opened."""
    return ["wasm-browser"]


def describe(device: Device) -> dict[str, str]:
    """The program that runs the WebAssembly, with its version.

    Raises:
        UserError: it is not installed.
    """
    return {"host": f"Node {package.node()[1]}" if device.provider == "wasm" else chromium.browser()[1]}


class Session:
    """One loaded model in a worker; the worker lets go of it when this object is gone.

    Args:
        model: a serialized ONNX model with fixed shapes.
        worker: runs it.

    Raises:
        WebError: the runtime does not take the model.
    """

    def __init__(self, model: bytes, worker: Worker) -> None:
        self._worker = worker
        self._id = _integer(worker.call("load", model)[0], "session")
        weakref.finalize(self, worker.release, self._id).atexit = False

    def run(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        """The first output for the given inputs, by name."""
        arrays = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        described = [{"name": name, "type": a.dtype.name, "shape": a.shape} for name, a in arrays.items()]
        for name, array in arrays.items():
            if array.dtype.name not in _NUMPY_TYPES:
                raise ValueError(f"input {name} is {array.dtype.name}; allowed are {', '.join(_NUMPY_TYPES)}")
        payload = b"".join(array.tobytes() for array in arrays.values())
        answer, data = self._worker.call("run", payload, session=self._id, feeds=described)
        dtype, shape = _NUMPY_TYPES.get(str(answer.get("type"))), answer.get("shape")
        if dtype is None or not isinstance(shape, list):
            raise WebError(f"onnxruntime-web gives {answer.get('type')}{shape}; allowed are {', '.join(_NUMPY_TYPES)}")
        return np.frombuffer(data, dtype).reshape(shape).copy()

    def visit(self, seconds: float) -> float:
        """Median microseconds of one run, from readings during about `seconds` (at least three) after a run that warms up.

        A reading is one run, or where the clock is coarse as many as take twenty of its steps.
        """
        us = self._worker.call("visit", session=self._id, seconds=seconds)[0].get("us")
        if not isinstance(us, int | float) or not 0 < us < float("inf"):
            raise WebError(f"onnxruntime-web took {us!r} us for a run")
        return float(us)


def load(model: bytes, device: Device) -> Session:
    """A serialized ONNX model, made ready to run.

    Raises:
        UserError: Node, npm or Chromium is missing.
        WebError: the runtime does not take the model.
    """
    return Session(model, worker_of(device))


def optimized_operators(model: bytes, device: Device) -> list[str]:
    """Operator types of the nodes that onnxruntime-web really runs, in its order: those in the profile of one run."""
    operators = worker_of(device).call("operators", model)[0].get("operators")
    if not isinstance(operators, list):
        raise WebError("onnxruntime-web gave no profile")
    return [str(operator) for operator in operators]


def measures_memory(device: Device) -> bool:
    """Not yet."""
    return False


def borders(spec: LayerSpec, lowering: str, description: Mapping[str, str | int]) -> Borders:
    """Layouts of a layer, read off optimized graphs.

    WebAssembly has no blocked kernels: float tensors always have channels first. Integer convolutions run with channels last,
    while Gather, Flatten and float arithmetic on bytes want channels first; so does attention. Layer norm takes and gives
    bytes with channels last.
    """
    integer, conv = spec.integer, spec.operator == "conv2d"
    rows = integer or exchanges_rows(spec, lowering)
    foreign_input = spec.input_bits < FLOAT_BITS and (lowering.startswith("gather") or not rows or (integer and not conv))
    foreign_output = spec.output_bits < FLOAT_BITS and (not rows or spec.skip_bits == FLOAT_BITS)
    return Borders(foreign_input, 0 < spec.skip_bits < FLOAT_BITS and not rows, foreign_output, fuses_skip=False)


def worker_of(device: Device) -> Worker:
    """The worker of a device in this process, started when there is none."""
    key = (os.getpid(), device.provider, device.threads)
    with _starting:
        worker = _workers.get(key)
        if worker is None or not worker.alive:
            worker = _workers[key] = Worker(_CHANNELS[device.provider](device.threads))
    return worker


@atexit.register
def _close_workers() -> None:
    for (pid, _, _), worker in _workers.items():
        if pid == os.getpid() and worker.alive:
            worker.close()


def _integer(answer: Mapping[str, object], name: str) -> int:
    value = answer.get(name)
    if not isinstance(value, int):
        raise WebError(f"onnxruntime-web's worker gives {value!r} as {name}")
    return value
