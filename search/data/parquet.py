"""Images in Parquet files: a column of encoded images and a column of labels, the usual layout of an image data set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from search.data.contract import files_digest
from search.data.decode import CHUNK_IMAGES, allocate, decode_all
from search.data.memory import Indices, InMemoryImages, LabelledImages, stratified_split
from spaces.errors import UserError

READ_ERRORS = (pa.ArrowException, OSError, UnicodeError)
"""What pyarrow raises for a damaged file; the last one for names of columns."""


class ParquetImages(InMemoryImages):
    """Images and labels from one or two Parquet files, decoded once and kept in memory as bytes.

    Errors count rows from 0.

    Args:
        path: Parquet file for training and validation (and test, without a `test_path`).
        test_path: Parquet file for the test of the winners.
        channels: 1 or 3; images of the other kind are converted.
        classes: labels must be 0..classes-1.
        size: height and width to which images are brought, in pixels.
        image_column: a struct with the field `bytes`, or binary: JPEG, PNG, ... as in a file.
        label_column: integers.
        val_share: share of the images of `path` that is for validation.
        test_share: share of the images of `path` that is for test; without a `test_path` only.
        limit: take the first so many rows of each file only.
        batch_size: images in a batch, at most.
        seed: of the split.
        shift: training images are moved by up to so many pixels; 0 for none.
        flip: training images are mirrored at random.
    """

    def __init__(
        self,
        path: str,
        test_path: str | None = None,
        *,
        channels: int = 3,
        classes: int = 10,
        size: int = 32,
        image_column: str = "image",
        label_column: str = "label",
        val_share: float = 0.1,
        test_share: float = 0.1,
        limit: int | None = None,
        batch_size: int = 128,
        seed: int = 0,
        shift: int = 4,
        flip: bool = True,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, shift=shift, flip=flip)
        # Relative to where the program was started, wherever it goes from there.
        self.paths = {"data.path": Path(path).expanduser().absolute()}
        if test_path is not None:
            self.paths["data.test_path"] = Path(test_path).expanduser().absolute()
        self.channels, self.classes, self.size, self.limit = channels, classes, size, limit
        self.image_column, self.label_column = image_column, label_column
        self.shares = {"val": val_share} if test_path is not None else {"val": val_share, "test": test_share}

    def load(self) -> LabelledImages:
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit={self.limit} is not possible; pass data.limit=ROWS, 1 or more, or null for all")
        with ExitStack() as stack:
            files = [(path, stack.enter_context(_open(path, option))) for option, path in self.paths.items()]
            # Labels are a small part of a file: all of them are checked before the first image is decoded.
            labels = [self._labels(file, path) for path, file in files]
            counts = [len(part) for part in labels]
            parts = stratified_split(labels[0], self.shares, self.seed)
            if len(files) == 2:
                parts["test"] = np.arange(counts[0], sum(counts))
                if not counts[1]:
                    raise UserError(f"{files[1][0]} has no row; pass another data.test_path=FILE.parquet")
            images = allocate(sum(counts), self.channels, self.size)
            end = 0
            for (path, file), count in zip(files, counts, strict=True):
                rows, end = images[end : end + count], end + count
                decode_all(self._encoded(file, path, count), rows, partial(_row_of, path))
        indices = {name: torch.from_numpy(part) for name, part in parts.items()}
        return LabelledImages(torch.from_numpy(images), torch.from_numpy(np.concatenate(labels)), **indices)

    def source(self) -> Mapping[str, object]:
        for option, path in self.paths.items():
            _check_path(path, option)
        return {
            "files": [files_digest([path], path.parent) for path in self.paths.values()],
            "read": [self.channels, self.classes, self.size, self.image_column, self.label_column, self.limit],
            "shares": self.shares,
        }

    def _labels(self, file: pq.ParquetFile, path: Path) -> Indices:
        """The labels of a file, int64 [rows], all within 0..classes-1."""
        try:
            schema = file.schema_arrow
            names = schema.names
        except READ_ERRORS as error:
            raise _unreadable(path, error) from error
        for option, column in (("image_column", self.image_column), ("label_column", self.label_column)):
            if names.count(column) != 1:
                how = "no column" if column not in names else "more than one column"
                raise UserError(f"{path} has {how} {column}; it has {', '.join(names)}; pass data.module.{option}=NAME")
        label_type, image_type = schema.field(self.label_column).type, schema.field(self.image_column).type
        if not pa.types.is_integer(label_type):
            raise UserError(
                f"column {self.label_column} of {path} is {label_type}; labels must be integers 0..{self.classes - 1}"
            )
        content = image_type.field("bytes").type if _has_bytes(image_type) else image_type
        if not (pa.types.is_binary(content) or pa.types.is_large_binary(content)):
            raise UserError(f"column {self.image_column} of {path} is {image_type}; images must be binary or struct with bytes")
        try:
            column = file.read(columns=[self.label_column])[self.label_column].slice(0, self.limit)
        except READ_ERRORS as error:
            raise _unreadable(path, error) from error
        wrong = pc.fill_null(pc.or_(pc.less(column, 0), pc.greater_equal(column, self.classes)), True)
        row = pc.index(wrong, True).as_py()
        if row >= 0:
            value = column[row].as_py()
            raise UserError(
                f"label {'null' if value is None else value} in row {row} of {path} is outside 0..{self.classes - 1};"
                f" mend the file or pass data.classes=COUNT"
            )
        return np.asarray(column.cast(pa.int64()).to_numpy())

    def _encoded(self, file: pq.ParquetFile, path: Path, count: int) -> Iterator[list[bytes | None]]:
        """The encoded images of the first `count` rows, some at a time."""
        try:
            for batch in file.iter_batches(CHUNK_IMAGES, columns=[self.image_column], use_threads=False):
                column = batch.column(0).slice(0, count)
                yield (pc.struct_field(column, "bytes") if _has_bytes(column.type) else column).to_pylist()
                count -= len(column)
                if count <= 0:
                    return
        except READ_ERRORS as error:
            raise _unreadable(path, error) from error


def _row_of(path: Path, row: int) -> str:
    return f"row {row} of {path}"


def _check_path(path: Path, option: str) -> None:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{option}={path} {what}; pass {option}=FILE.parquet")


def _open(path: Path, option: str) -> pq.ParquetFile:
    _check_path(path, option)
    try:
        return pq.ParquetFile(path, page_checksum_verification=True)
    except READ_ERRORS as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(f"{path} is not a whole Parquet file: {reason}; write it again or pass another one")


def _has_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)
