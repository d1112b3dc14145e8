"""Peak memory of runs in onnxruntime, by what its arena tells in the profile of every kernel.

The arena keeps the most that was ever in use, and packing weights when a model is loaded may have taken more than a run does.
So runs are watched above a ballast: an output of the model, held from a run before. Where the runtime makes it first, that run
is watched too.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from latency_lut.ort_session import random_feeds, session_options
from spaces.errors import UserError

BALLAST = "ballast"
# Of the profile of a kernel: bytes requested and not given back, the same rounded to the arena's chunks, and the most of those.
_FIGURES = ("mem_bytes_requested_in_use", "mem_bytes_in_use", "mem_in_use_peak")


def peak_bytes(model: bytes, provider: str, threads: int) -> int:
    """Most bytes that the arena has handed out at once for a run, beyond what the loaded model holds before its first run.

    That is tensors, output included, and scratch of kernels, as requested; not the weights, the input, and what the arena keeps
    in reserve. The first run allocates tensor by tensor, later ones put all tensors into one block, laid out beforehand, so two
    runs show the most.

    Args:
        model: a serialized ONNX model with fixed shapes.
        provider: onnxruntime's execution provider.
        threads: of one run.

    Raises:
        UserError: the installed onnxruntime does not tell.
    """
    options = session_options(threads)
    with tempfile.TemporaryDirectory() as folder:
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "run")
        session = ort.InferenceSession(_with_ballast(model), options, providers=[provider])
        *inputs, items, shape = session.get_inputs()
        values = {name: ort.OrtValue.ortvalue_from_numpy(data) for name, data in random_feeds(inputs).items()}

        def run(count: int, size: int) -> ort.OrtValue:
            """The ballast. Memory is laid out by the shapes of inputs, so runs with another `count` are laid out anew."""
            given = {items.name: np.zeros(count, dtype=np.float32), shape.name: np.array([size], dtype=np.int64)}
            arrays = {name: ort.OrtValue.ortvalue_from_numpy(data) for name, data in given.items()}
            return session.run_with_ort_values(None, {**values, **arrays})[-1]

        ballast = run(1, 2 * len(model) // np.dtype(np.float32).itemsize)
        for _ in range(2):
            run(0, 0)
        del ballast
        events = [e for e in json.loads(Path(session.end_profiling()).read_bytes()) if e.get("cat") == "Node"]
    first = next(i for i, event in enumerate(events) if BALLAST in event["name"])
    kernels = [event["args"] for event in events[first:]]
    if not all(name in kernel for kernel in kernels for name in _FIGURES):
        mend = "pip install --upgrade onnxruntime (1.31 does)"
        raise UserError(f"onnxruntime {ort.__version__} does not tell how much memory its kernels hold; run: {mend}")
    figures = [[int(kernel[name]) for name in _FIGURES] for kernel in kernels]
    before, _, peak_before = figures[0]
    most = before
    for requested, in_use, peak in figures[1:]:
        scratch = peak - in_use if peak > peak_before else 0  # already given back when the kernel ends
        most, peak_before = max(most, requested + scratch), max(peak_before, peak)
    return most - before


def _with_ballast(model: bytes) -> bytes:
    """The model with a last output that has nothing to do with the others: the last input but one, expanded to the last one."""
    proto = onnx.load_model_from_string(model)
    graph, items, shape, output = proto.graph, *(f"{BALLAST}_{name}" for name in ("items", "shape", "output"))
    graph.input.append(helper.make_tensor_value_info(items, TensorProto.FLOAT, ["count"]))
    graph.input.append(helper.make_tensor_value_info(shape, TensorProto.INT64, [1]))
    graph.node.append(helper.make_node("Expand", [items, shape], [output], BALLAST))
    graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, ["size"]))
    return bytes(proto.SerializeToString())
