"""Files that come back from elsewhere, in a zip file or in a folder: read with suspicion, and never unpacked."""

from __future__ import annotations

import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from latency_lut.manifest import MOST_MODELS, Stored
from spaces.errors import UserError

LARGEST_ARCHIVE = 2**32 - 1  # larger ones, and those with more files, have a directory of another form (ZIP64)
LARGEST_DIRECTORY = 2**25
MOST_FILES = min(MOST_MODELS + 100, 2**16 - 2)
_END = struct.Struct("<4s4H2LH")  # the end of a zip file's directory (APPNOTE.TXT, 4.3.16)
_ZIP64_LOCATOR_BYTES = 20
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*/?")


class Archive:
    """The files in a zip file or in a folder.

    Args:
        path: of either.

    Raises:
        UserError: it is damaged; a name leaves the folder or is there twice; something is a link, encrypted or too large.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[str, zipfile.ZipInfo] = {}
        self._zip = None
        if path.is_dir():
            return
        try:
            _check_directory(path)
            self._zip = zipfile.ZipFile(path)
        except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, struct.error) as error:
            raise UserError(f"not a zip file that can be read ({' '.join(str(error).split())[:100]})") from error
        try:
            self._take_entries(self._zip.infolist())
        except UserError:
            self.close()
            raise

    def _take_entries(self, entries: list[zipfile.ZipInfo]) -> None:
        for entry in entries:
            _check_entry(entry)
            if entry.filename.casefold() in self._entries:
                raise UserError(f"{entry.filename[:80]} is in it twice")
            self._entries[entry.filename.casefold()] = entry
        if sum(entry.file_size for entry in entries) > LARGEST_ARCHIVE:
            raise UserError(f"its files would have more than {LARGEST_ARCHIVE} bytes")

    def close(self) -> None:
        """Close the zip file."""
        if self._zip is not None:
            self._zip.close()

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __contains__(self, name: str) -> bool:
        if self._zip is None:
            return os.path.lexists(self.path / name)
        entry = self._entries.get(name.casefold())
        return entry is not None and entry.filename == name

    def read(self, name: str, most_bytes: int) -> bytes:
        """The content of a file.

        Args:
            name: its path in the archive.
            most_bytes: it may have.

        Raises:
            UserError: it is missing, damaged, larger, or a link.
        """
        if name not in self:
            raise UserError(f"{name} is missing in it")
        try:
            content = self._read_entry(self._zip, name, most_bytes) if self._zip else self._read_file(name, most_bytes)
        except UserError:
            raise
        except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
            raise UserError(f"{name} is damaged ({' '.join(str(error).split())[:100] or type(error).__name__})") from error
        if len(content) > most_bytes:
            raise UserError(f"{name} has more than {most_bytes} bytes")
        return content

    def _read_entry(self, zip_file: zipfile.ZipFile, name: str, most_bytes: int) -> bytes:
        entry = self._entries[name.casefold()]
        if entry.file_size > most_bytes:
            raise UserError(f"{name} has {entry.file_size} bytes; allowed are {most_bytes}")
        with zip_file.open(entry) as file:
            content = file.read(most_bytes + 1)
        if len(content) != entry.file_size:
            raise UserError(f"{name} is truncated")
        return content

    def _read_file(self, name: str, most_bytes: int) -> bytes:
        for part in (self.path / name, *(self.path / name).parents[: name.count("/")]):
            if part.is_symlink():
                raise UserError(f"{part.name} is a link")
        if not stat.S_ISREG((self.path / name).stat().st_mode):
            raise UserError(f"{name} is no file")
        with (self.path / name).open("rb") as file:
            return file.read(most_bytes + 1)

    def check_files(self, known: Mapping[str, Stored], others: set[str]) -> None:
        """Make sure that a zip file holds known files only, each with its checksum.

        Args:
            known: files that may be there; all of them or none.
            others: files that are checked elsewhere.

        Raises:
            UserError: it does not.
        """
        if self._zip is None:
            return
        names = {entry.filename for entry in self._entries.values() if not entry.is_dir()} - others
        if names and names != set(known):
            odd = sorted(names ^ set(known))[0]
            raise UserError(f"{odd[:80]} is {'not in its manifest' if odd in names else 'missing in it'}")
        for name in sorted(names):
            if not known[name].fits(self.read(name, known[name].size_bytes)):
                raise UserError(f"{name} has another checksum than its manifest says")


def _check_directory(path: Path) -> None:
    """Look at the end of a zip file before Python's reader builds an object for every entry that it claims to have."""
    size = path.stat().st_size
    if size > LARGEST_ARCHIVE:
        raise ValueError(f"{size} bytes; allowed are {LARGEST_ARCHIVE}")
    with path.open("rb") as file:
        file.seek(max(0, size - _END.size - _ZIP64_LOCATOR_BYTES))
        tail = file.read()
    signature, disk, first_disk, here, entries, directory, offset, comment = _END.unpack(tail[-_END.size :])
    if signature != b"PK\x05\x06" or comment or disk or first_disk or here != entries:
        raise ValueError("it does not end as one, or has a comment")
    if tail[: -_END.size].startswith(b"PK\x06\x07") or entries > MOST_FILES or directory > LARGEST_DIRECTORY:
        raise ValueError(f"{entries} files; allowed are {MOST_FILES}")
    if offset + directory + _END.size != size:
        raise ValueError("something stands before or behind its files")


def _check_entry(entry: zipfile.ZipInfo) -> None:
    name, kind = entry.filename, stat.S_IFMT(entry.external_attr >> 16)
    if not _SAFE_NAME.fullmatch(name) or entry.orig_filename != name:
        raise UserError(f"the name {ascii(name)[:80]} is not allowed in it")
    if kind not in (0, stat.S_IFDIR if entry.is_dir() else stat.S_IFREG):
        raise UserError(f"{name[:80]} is a link or something else than a file")
    if entry.flag_bits & 0x1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(f"{name[:80]} is encrypted or packed in an unknown way")
    if entry.is_dir() and entry.file_size:
        raise UserError(f"{name[:80]} is a folder with content")
