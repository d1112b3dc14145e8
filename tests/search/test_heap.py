"""Memory that is freed stays with the process, also in Dask's workers."""

from __future__ import annotations

import ctypes
import resource
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from search.heap import keep_freed_memory

BYTES, PAGE = 1 << 24, 4096

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="no mallopt in this C library")


def faults_per_page(repeats: int) -> float:
    """Page faults of tensors that are made, written and dropped one after the other, for each page after the first two."""
    for _ in range(2):
        torch.ones(BYTES // 4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(repeats):
        torch.ones(BYTES // 4)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / (repeats * BYTES / PAGE)


def kept(repeats: int) -> tuple[bool, float]:
    return keep_freed_memory(), faults_per_page(repeats)


def test_a_process_reuses_what_it_freed() -> None:
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        told, faults = process.submit(kept, 8).result()
    assert told
    assert faults < 0.5


def test_so_do_workers_of_dask() -> None:
    dask_pool = pytest.importorskip("search.dask_pool")
    pytest.importorskip("distributed")
    pool = dask_pool.DaskPool(1)
    try:
        assert dict(pool.each(faults_per_page, [8]))[0] < 0.5
    finally:
        pool.close()
