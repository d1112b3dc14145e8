"""What a model answers for many samples, batch by batch.

Needs numpy only: it is part of a bundle's runner, which works where Netwright is not installed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def outputs_of(run: Callable[[np.ndarray], np.ndarray], samples: np.ndarray, batch: int) -> np.ndarray:
    """Run a model of a fixed batch on all samples; what is missing in the last batch is zeros.

    Args:
        run: gives the outputs `(batch, ...)` for an input `(batch, ...)`.
        samples: `(n, ...)`, at least one.
        batch: samples per run.

    Returns:
        `(n, values)`.
    """
    outputs = []
    for first in range(0, len(samples), batch):
        chunk = samples[first : first + batch]
        filled = np.concatenate([chunk, np.zeros((batch - len(chunk), *chunk.shape[1:]), chunk.dtype)])
        outputs.append(run(np.ascontiguousarray(filled))[: len(chunk)])
    return np.concatenate(outputs).reshape(len(samples), -1)
