"""What a data module must give, and how a run tells that its data changed.

`check_batch` looks at values, so it belongs on the first batch of a module, not on every batch of an epoch.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor

from spaces.errors import UserError

# Up to here files are known by what is in them, so that a copied or touched file is still the same data. Above, reading
# everything to skip a stage costs too much: path, size and time of the last change stand in.
CONTENT_DIGEST_BYTES = 64 * 2**20


def check_batch(images: object, labels: object, channels: int, classes: int) -> None:
    """Checks one batch of any data module.

    Args:
        images: must be float32 [N, channels, H, W], finite, N at least 1.
        labels: must be int64 [N] with values in 0..classes-1.
        channels: what the configuration says (`data.channels`).
        classes: what the configuration says (`data.classes`).

    Raises:
        UserError: the first thing that is wrong.
    """
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
        found = f"{type(images).__name__} and {type(labels).__name__}"
        raise UserError(f"a batch is {found}; the data module must give two tensors, images and labels")
    if images.dtype != torch.float32 or images.ndim != 4 or not images.numel():
        found = f"{_name(images.dtype)} {list(images.shape)}"
        raise UserError(f"the images of a batch are {found}; the data module must give float32 [N, {channels}, H, W]")
    if images.shape[1] != channels:
        raise UserError(
            f"the images of a batch have {images.shape[1]} channels, not {channels}; pass data.channels={images.shape[1]}"
        )
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        found = f"{_name(labels.dtype)} {list(labels.shape)}"
        raise UserError(f"the labels of a batch are {found}; the data module must give int64 [{len(images)}]")
    finite = images.isfinite().flatten(1).all(1)
    if not finite.all():
        raise UserError(
            f"image {int(finite.int().argmin())} of a batch holds nan or inf; the data module must give finite values"
        )
    allowed = (labels >= 0) & (labels < classes)
    if not allowed.all():
        index = int(allowed.int().argmin())
        raise UserError(
            f"label {index} of a batch is {int(labels[index])}; allowed are 0..{classes - 1} (data.classes={classes})"
        )


def fingerprint(module: LightningDataModule) -> str:
    """Hex digest of a module's data and settings: as long as it is the same, what was computed from the data holds.

    A module that has a method `fingerprint() -> str` says it itself (those of this package digest their files, split and
    settings). Any other is known by its class, the source of that class, and the hyperparameters that it saved with
    `save_hyperparameters()`; a change of files that only such a module knows of is not seen.

    Raises:
        UserError: a file of the module is missing or unreadable.
    """
    own = getattr(module, "fingerprint", None)
    if callable(own):
        return str(own())
    kind = type(module)
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):  # defined in an interactive session
        source = ""
    return digest([f"{kind.__module__}.{kind.__qualname__}", source, _stable(dict(module.hparams))])


def digest(value: object) -> str:
    """Hex digest of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def files_digest(paths: Sequence[Path], root: Path) -> str:
    """Hex digest of the files that a data set consists of, named relative to `root`.

    Raises:
        UserError: a file cannot be read.
    """
    try:
        stats = [path.stat() for path in paths]
        if sum(stat.st_size for stat in stats) <= CONTENT_DIGEST_BYTES:
            marks = [[str(path.relative_to(root)), hashlib.sha256(path.read_bytes()).hexdigest()] for path in paths]
        else:
            marks = [[str(path), f"{stat.st_size} {stat.st_mtime_ns}"] for path, stat in zip(paths, stats, strict=True)]
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    return digest(marks)


def _stable(value: object) -> object:
    """A JSON value that is the same in every process; of an object that JSON does not know, its class."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _stable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_stable(item) for item in value]
    named = value if callable(value) and hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{getattr(named, '__qualname__', '')}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
