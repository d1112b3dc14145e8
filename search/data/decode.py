"""Image files to bytes in memory: decoded by Pillow in parallel threads, converted, resized, never kept as files."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.progress import Progress

from spaces.errors import UserError

# Formats that Pillow decodes by itself; others start programs (EPS) or are rarely meant.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
CHUNK_IMAGES = 256
QUIET_S = 2.0
"""Decoding that is done sooner shows no progress bar."""

MODES = {1: "L", 3: "RGB"}


def decode_image(data: bytes | Path, size: int, channels: int) -> NDArray[np.uint8]:
    """Decodes one image to uint8 [channels, size, size].

    Grey becomes colour and colour grey as needed, transparency is dropped, 16-bit grey is cut to its high byte. An image of
    another size is scaled (bilinear) to cover the square, and what hangs over is cut off on both sides alike.

    Raises:
        Exception: whatever Pillow makes of broken data; there is no common class.
    """
    with Image.open(BytesIO(data) if isinstance(data, bytes) else data, formats=FORMATS) as opened:
        image: Image.Image = opened
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise ValueError(f"pixels of mode {image.mode} have no known range; store 8 or 16 bits")
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        if image.mode != MODES[channels]:
            image = image.convert(MODES[channels])
        if image.size != (size, size):
            image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
        return np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)


def allocate(count: int, channels: int, size: int) -> NDArray[np.uint8]:
    """Room for decoded images, uint8 [count, channels, size, size].

    Raises:
        UserError: no image, channels or size that cannot be, or more than the free memory.
    """
    if channels not in MODES:
        raise UserError(f"channels={channels} is not possible; allowed are 1 (grey) and 3 (colour); pass data.channels=1 or 3")
    if size < 1:
        raise UserError(f"size={size} is not possible; pass data.size=PIXELS, 1 or more")
    need_bytes, free_bytes = count * channels * size * size, psutil.virtual_memory().available
    if need_bytes > 0.9 * free_bytes:
        need, free = need_bytes / 2**30, free_bytes / 2**30
        raise UserError(f"{count} images of {size}x{size} take {need:.1f} GiB, {free:.1f} are free; pass a smaller data.size")
    return np.empty((count, channels, size, size), np.uint8)


def decode_all(chunks: Iterable[Sequence[bytes | Path | None]], out: NDArray[np.uint8], where: Callable[[int], str]) -> None:
    """Decodes images into `out`, in order.

    Args:
        chunks: encoded images or the paths of image files, some at a time; read while decoding, a few chunks ahead.
        out: uint8 [N, C, size, size], filled from the front.
        where: names the i-th image in an error.

    Raises:
        UserError: an image is missing or cannot be decoded; the first one in order.
    """

    def decode(start: int, chunk: Sequence[bytes | Path | None]) -> int:
        for index, data in enumerate(chunk, start):
            if data is None:
                raise UserError(f"{where(index)} has no image; every row must hold the bytes of one")
            try:
                out[index] = decode_image(data, out.shape[2], out.shape[1])
            except Exception as error:  # decoders of broken data raise nearly everything
                raise UserError(f"{where(index)} is not an image that can be decoded: {_reason(error)}") from error
        return len(chunk)

    workers = min(os.cpu_count() or 1, 16)
    running: deque[Future[int]] = deque()
    pool, bar = ThreadPoolExecutor(workers), _Bar(len(out))
    try:
        start = 0
        for chunk in chunks:
            running.append(pool.submit(decode, start, chunk))
            start += len(chunk)
            if len(running) > 2 * workers:
                bar.advance(running.popleft().result())
        while running:
            bar.advance(running.popleft().result())
    finally:
        pool.shutdown(cancel_futures=True)
        bar.stop()


class _Bar:
    """A progress bar on a terminal, which appears when the work takes longer than `QUIET_S`."""

    def __init__(self, total: int) -> None:
        self._began, self._done, self._total = time.monotonic(), 0, total
        self._progress: Progress | None = None

    def advance(self, images: int) -> None:
        self._done += images
        if self._progress is None and time.monotonic() - self._began > QUIET_S:
            console = Console(stderr=True)
            self._progress = Progress(console=console, transient=True, disable=not console.is_terminal)
            self._task = self._progress.add_task("decoding images", total=self._total)
            self._progress.start()
        if self._progress is not None:
            self._progress.update(self._task, completed=self._done)

    def stop(self) -> None:
        if self._progress is not None and not self._progress.disable:
            self._progress.stop()


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"none of {', '.join(FORMATS)}"
    return (str(error).splitlines() or [type(error).__name__])[0]
