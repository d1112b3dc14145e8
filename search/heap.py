"""Freed memory of large tensors, kept for the next ones."""

from __future__ import annotations

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of malloc.h: what may be free at the heap's top, and what does not come from the heap
MUCH = (1 << 30, 1 << 25)  # some versions of glibc refuse an mmap threshold above half of an arena


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed, in this process; returns whether it could be told so (glibc).

    By default it gives large blocks back to the system, which hands them out again page by page and zeroed: a step that makes
    the same activations over and over pays for them every time. Dask even has its workers do so with all that is freed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return any(mallopt(MMAP_THRESHOLD, much) for much in MUCH) and bool(mallopt(TRIM_THRESHOLD, MUCH[0]))
