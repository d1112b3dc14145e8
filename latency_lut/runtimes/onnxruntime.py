"""The runtime onnxruntime on this machine: loading, running and timing models.

Winners run with the options of `latency_lut.ort_session.session_options`, and so does everything that is timed here.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from latency_lut import ort_memory
from latency_lut.alone import alone_on_this_machine
from latency_lut.device import Borders, Device
from latency_lut.lowerings.transformer import exchanges_rows
from latency_lut.machine import describe_machine
from latency_lut.ort_session import Session, describe_kernels, session_options
from latency_lut.timing import steadied
from latency_lut.visits import interleaved
from spaces.layers import LayerSpec
from spaces.precision import FLOAT_BITS
from spaces.sparsity import GROUP_BLOCKS, kept_inputs


def version() -> str:
    """Version of the installed onnxruntime."""
    return str(ort.__version__)


def providers() -> list[str]:
    """Execution providers that the installed onnxruntime has."""
    return list(ort.get_available_providers())


def providers_elsewhere() -> list[str]:
    """All that onnxruntime knows."""
    return list(ort.get_all_providers())


def describe(device: Device) -> dict[str, str]:
    """Which integer kernels are taken, where those are not the default ones."""
    return describe_kernels(str(describe_machine()["instruction_sets"]), device.provider)


def load(model: bytes, device: Device) -> Session:
    """A serialized ONNX model, made ready to run."""
    return Session(model, device.provider, device.threads)


def time_interleaved(
    models: Sequence[bytes | Session], device: Device, rounds: int, visit_s: float, seed: int = 0
) -> np.ndarray:
    """Time models in turn, in a new order every round (see `latency_lut.timing`).

    Args:
        models: serialized or loaded models.
        device: where they run.
        rounds: visits of every model.
        visit_s: seconds of one visit.
        seed: of the order.

    Returns:
        `(models, rounds)` microseconds per run, without the machine's momentary slowness; the median of a row is the latency.
    """
    loaded = [load(model, device) if isinstance(model, bytes) else model for model in models]
    with alone_on_this_machine():
        times_us, orders = interleaved(loaded, rounds, visit_s, seed)
    return steadied(times_us, orders)


def optimized_operators(model: bytes, device: Device) -> list[str]:
    """Operator types of the graph that onnxruntime really runs, in its order."""
    options = session_options(device.threads)
    handle, path = tempfile.mkstemp(suffix=".onnx")
    os.close(handle)
    try:
        options.optimized_model_filepath = path
        ort.InferenceSession(model, options, providers=[device.provider])
        return [node.op_type for node in onnx.load_model_from_string(Path(path).read_bytes()).graph.node]
    finally:
        Path(path).unlink(missing_ok=True)


def measures_memory(device: Device) -> bool:
    """On CPUs, by the statistics of onnxruntime's arena."""
    return device.provider == "CPUExecutionProvider"


def peak_bytes(model: bytes, device: Device) -> int:
    """See `latency_lut.ort_memory`."""
    return ort_memory.peak_bytes(model, device.provider, device.threads)


def borders(spec: LayerSpec, lowering: str, description: Mapping[str, str | int]) -> Borders:
    """Layouts of a layer, as onnxruntime's optimizer chooses them (read off optimized graphs, where nine in ten agree in full).

    Float convolutions run on channels in blocks (NCHWc: ReorderInput, ReorderOutput), except grouped ones whose channels do not
    fill blocks; integer convolutions run with channels last (Transpose). Gather, Flatten and float arithmetic on bytes
    want channels first; so does attention. Layer norm takes and gives bytes with channels last.
    """
    block = _block(description)
    integer, gathers = spec.integer, lowering.startswith("gather")
    pool, conv = spec.operator == "global_pool", spec.operator == "conv2d"
    rows = integer or exchanges_rows(spec, lowering)
    blocked = bool(block_of(spec, lowering, description))
    if spec.input_bits == FLOAT_BITS:
        direct = not spec.depthwise and spec.in_channels < block  # such a convolution reads plain channels
        foreign_input = pool or (blocked and not gathers and not direct)
    else:
        foreign_input = gathers or not rows or (integer and not conv)
    if spec.output_bits == FLOAT_BITS:
        foreign_output = (blocked and not spec.skip_bits) or (pool and spec.input_bits == FLOAT_BITS)
    else:
        foreign_output = not rows or spec.skip_bits == FLOAT_BITS
    foreign_skip = 0 < spec.skip_bits < FLOAT_BITS and not rows
    return Borders(foreign_input, foreign_skip, foreign_output, blocked and spec.skip_bits == FLOAT_BITS)


def block_of(spec: LayerSpec, lowering: str, description: Mapping[str, str | int]) -> int:
    """Channels in a block of a float convolution that runs on blocks of channels (NCHWc); 0 for every other layer."""
    block = _block(description)
    floats = spec.operator == "conv2d" and not spec.integer and not lowering.startswith("dynamic")
    fills = floats and _fills_blocks(spec, lowering.startswith("gather"), block)
    return block if fills else 0


def _block(description: Mapping[str, str | int]) -> int:
    return 16 if "avx512f" in str(description.get("instruction_sets", "")) else 8


def _fills_blocks(spec: LayerSpec, gathers: bool, block: int) -> bool:
    if spec.depthwise:
        return spec.out_channels % 4 == 0
    if gathers:
        kept = kept_inputs(spec.sparsity, spec.in_channels)
        return kept % block == 0 and spec.out_channels // GROUP_BLOCKS % block == 0
    return spec.in_channels < block or spec.in_channels % 4 == 0
