"""One model in onnxruntime: loaded with the options that ship, run and timed.

Needs numpy and onnxruntime only: it is part of a bundle's runner, which works where Netwright is not installed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime as ort

SPIN_US = 200
PRECISE = "precise"
_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8, "tensor(int8)": np.int8, "tensor(int64)": np.int64}


def session_options(threads: int) -> ort.SessionOptions:
    """The options under which models are timed and deployed: all optimizations, so many threads.

    A session's threads wait actively for its next run, by default for tens of milliseconds: those of the models visited before
    would take the cores from the one that is visited. They wait for longer than the time between two runs, and no longer.

    On x86 CPUs without VNNI, products of bytes are added in 16 bits, which integer weights of 8 bits overflow: outputs would be
    wrong. There, and only there, the precise mode takes kernels that add in 32 bits, for every layer with a weight beyond 64 in
    magnitude; those of 7 bits keep the fast ones.
    """
    options = ort.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options


def describe_kernels(instruction_sets: str, provider: str) -> dict[str, str]:
    """What the precise mode of `session_options` changes, to be said beside every number measured with it.

    Args:
        instruction_sets: of the processor, as `latency_lut.machine` names them.
        provider: onnxruntime's execution provider.
    """
    sets = set(instruction_sets.split())
    overflows = "sse4_2" in sets and not sets & {"avx_vnni", "avx512_vnni"}
    return {"integer_kernels": PRECISE} if overflows and provider == "CPUExecutionProvider" else {}


class Session:
    """One loaded model. Its inputs are bound to random data of the declared types and shapes.

    Args:
        model: a serialized ONNX model with fixed shapes.
        provider: onnxruntime's execution provider.
        threads: of one run.
    """

    def __init__(self, model: bytes, provider: str, threads: int) -> None:
        self._session = ort.InferenceSession(model, session_options(threads), providers=[provider])
        self._binding = self._session.io_binding()
        for name, data in random_feeds(self._session.get_inputs()).items():
            self._binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(data))
        self._binding.bind_output(self._session.get_outputs()[0].name)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the first input, the batch in front."""
        return tuple(self._session.get_inputs()[0].shape)

    def answer(self, batch: np.ndarray) -> np.ndarray:
        """The first output for a batch of the first input."""
        return self.run({self._session.get_inputs()[0].name: batch})

    def run(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        """The first output for the given inputs, by name."""
        return np.asarray(self._session.run(None, dict(feeds))[0])

    def visit(self, seconds: float) -> float:
        """Median microseconds of one run, from runs during about `seconds` (at least three) after one that warms up."""
        run, binding, clock = self._session.run_with_iobinding, self._binding, time.perf_counter
        run(binding)
        durations = []
        end = clock() + seconds
        while True:
            begin = clock()
            run(binding)
            now = clock()
            durations.append(now - begin)
            if now > end and len(durations) >= 3:
                return float(np.median(durations)) * 1e6


def random_feeds(inputs: Sequence[ort.NodeArg]) -> dict[str, np.ndarray]:
    """Data of the declared type and shape for each input of a model, by name."""
    rng, feeds = np.random.default_rng(0), {}
    for declared in inputs:
        dtype = _NUMPY_TYPES[declared.type]
        integer = np.issubdtype(dtype, np.integer)
        data = rng.integers(0, 127, declared.shape) if integer else rng.standard_normal(declared.shape)
        feeds[declared.name] = data.astype(dtype)
    return feeds
