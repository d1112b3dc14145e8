"""Memory that is freed stays with the process, also in Dask's workers."""

from __future__ import annotations

import ctypes
import resource
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from search.heap import keep_freed_memory

PAGE, MIB = 4096, 1 << 20

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="no mallopt in this C library")


def faults_per_page(mib: int) -> float:
    """Page faults for each page of tensors that are made, written and dropped one after the other, in the best of four tries.

    What is not kept faults on every page of every try; a busy system may take pages of those that are kept.
    """

    def tried() -> float:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(4):
            torch.ones(mib * MIB // 4)
        return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / (4 * mib * MIB / PAGE)

    return min(tried() for _ in range(4))


def told_and_before_and_after(mib: int) -> tuple[bool, float, float]:
    before = faults_per_page(mib)
    return keep_freed_memory(), before, faults_per_page(mib)


def test_a_process_reuses_what_it_freed() -> None:
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        told, before, after = process.submit(told_and_before_and_after, 64).result()
    assert told
    assert after < 0.5 * before


def test_so_do_workers_of_dask() -> None:
    dask_pool = pytest.importorskip("search.dask_pool")
    pytest.importorskip("distributed")
    pool = dask_pool.DaskPool(1)
    try:
        assert dict(pool.each(faults_per_page, [16]))[0] < 0.5
    finally:
        pool.close()
