"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from spaces.errors import UserError


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file so that whoever reads it, also after a kill or a power cut, finds the old content or the new.

    Args:
        path: the file; its folder is made.
        content: text is written as UTF-8.

    Raises:
        UserError: the folder cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(not_written(path, error)) from error


def is_full(error: OSError) -> bool:
    """Whether a file was not written because there was no room for it."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def not_written(path: Path | str, error: OSError) -> str:
    """What to tell about a file that could not be written."""
    todo = "make room and run the same command" if is_full(error) else "choose a folder that you may write"
    return f"cannot write {path}: {error.strerror or error}; {todo}"
