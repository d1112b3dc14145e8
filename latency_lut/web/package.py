"""The npm package onnxruntime-web: set up once in the user's cache, in the version of `package-lock.json`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from spaces.errors import UserError

FOLDER = Path(__file__).resolve().parent
LOCKED = ("package.json", "package-lock.json")
OLDEST_NODE = 18
PAGE_FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
SETUP_TIMEOUT_S = 900


@cache
def version() -> str:
    """The version of onnxruntime-web that is used."""
    return str(json.loads((FOLDER / "package.json").read_text())["dependencies"]["onnxruntime-web"])


def program(name: str) -> str:
    """Path of `node` or `npm`.

    Raises:
        UserError: it is not installed.
    """
    found = shutil.which(name)
    if found is None:
        mend = "install Node.js with npm, for example: apt-get install nodejs npm"
        raise UserError(f"{name} is not on the PATH; onnxruntime-web needs Node.js {OLDEST_NODE} or newer and npm; {mend}")
    return found


def node() -> tuple[str, str]:
    """Path and version of Node.

    Raises:
        UserError: it is not installed, too old, or does not start.
    """
    path = program("node")
    return path, _node_version(path)


@cache
def _node_version(path: str) -> str:
    ended = subprocess.run([path, "--version"], capture_output=True, text=True, check=False, timeout=60)
    said = ended.stdout.strip().removeprefix("v")
    major = said.partition(".")[0]
    if not major.isdigit() or int(major) < OLDEST_NODE:
        raise UserError(f"{path} says version {said!r}; allowed is Node.js {OLDEST_NODE} or newer; install one")
    return said


def installed() -> Path:
    """The folder with `node_modules/onnxruntime-web`; the first call on a machine sets it up and says so on stderr.

    The folder is `onnxruntime-web-VERSION` in `$XDG_CACHE_HOME/netwright` (`~/.cache/netwright`). It appears as a whole or not
    at all, also when several processes want it at once.

    Raises:
        UserError: npm is missing or fails, or the folder cannot be written.
    """
    home = os.environ.get("XDG_CACHE_HOME")
    folder = Path(home or Path.home() / ".cache") / "netwright" / f"onnxruntime-web-{version()}"
    if folder.is_dir():
        return folder
    npm = program("npm")
    print(f"setting up onnxruntime-web {version()} in {folder}, once", file=sys.stderr, flush=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".setup-") as scratch:
            _install(npm, Path(scratch) / "package")
            try:
                os.rename(Path(scratch) / "package", folder)
            except OSError:
                if not folder.is_dir():  # otherwise another process was faster
                    raise
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror or error}; set XDG_CACHE_HOME to a folder that you may write"
        ) from error
    return folder


def page_files() -> list[Path]:
    """The files of onnxruntime-web that a page needs.

    Raises:
        UserError: as `installed`.
    """
    return [installed() / "node_modules" / "onnxruntime-web" / "dist" / name for name in PAGE_FILES]


def _install(npm: str, folder: Path) -> None:
    folder.mkdir()
    for name in LOCKED:
        shutil.copy(FOLDER / name, folder)
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    try:
        ended = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, timeout=SETUP_TIMEOUT_S, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"npm ci was not done after {SETUP_TIMEOUT_S} s; check the network and run again") from None
    if ended.returncode:
        reason = " ".join(ended.stderr.split())[:300]
        raise UserError(f"npm ci of onnxruntime-web {version()} failed ({reason}); check the network and run again")
