"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
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
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose a folder that you may write") from error
