"""Times the models of a bundle on the machine that it runs on, and writes what every visit took.

    python NAME-bundle.zip [BUNDLE] [RESULTS]
    python runner.py [BUNDLE] [RESULTS]

Needs Python 3.9 or newer, numpy and onnxruntime, nothing else. BUNDLE is the zip file or the folder into which it was unpacked
(by default that of this file), RESULTS the file to write (by default `results.jsonl` beside the zip file or in the folder).

Results are lines of JSON, only ever appended; started again, only what is missing is measured. Nothing is computed here: the
numbers are what the clock said, and `python -m latency_lut import` makes a table of them. The lines are

    {"kind": "head", ...}                   what is measured where: the bundle, the device, its fingerprint
    {"kind": "visits", "batch", "id", ...}  one model: microseconds per run in each visit, and its position in the round
    {"kind": "failed", "id", "reason"}      a model that this onnxruntime does not take
    {"kind": "end", "complete": true, ...}  all is there; the sum of the bytes before

In every batch the anchors, the models that tie batches to one speed of the machine, come first.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort

from latency_lut.machine import cores, describe_machine, fingerprint_of
from latency_lut.ort_session import Session
from latency_lut.visits import interleaved

SCHEMA_VERSION = 1
FORMAT = "netwright-bundle"
UNIT = "us"
MANIFEST, RESULTS = "manifest.json", "results.jsonl"
LARGEST_MANIFEST = 2**27
FOLLOW_S = 0.5
USER_STATUS, INTERRUPTED_STATUS = 2, 130

Line = dict[str, Any]


class RunnerError(Exception):
    """What whoever runs this can mend, in one line."""


class Bundle:
    """The files of a bundle, read from the zip file or from the folder into which it was unpacked.

    Args:
        path: of either.

    Raises:
        RunnerError: it is not a bundle that this runner can measure.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._zip = None if path.is_dir() else _open_zip(path)
        content = self._read(MANIFEST, LARGEST_MANIFEST)
        self.fingerprint = hashlib.sha256(content).hexdigest()
        try:
            self.manifest = json.loads(content)
            version = self.manifest["schema_version"] if self.manifest["format"] == FORMAT else None
            self.device, self.anchors = self.manifest["device"], self.manifest["anchors"]
            self.protocol, self.seed = self.manifest["protocol"], self.manifest["seed"]
            self.models = {model["id"]: model for model in self.manifest["models"]}
        except (ValueError, KeyError, TypeError) as error:
            raise RunnerError(
                f"{path}: {MANIFEST} is damaged ({type(error).__name__}: {error}); copy the bundle again"
            ) from error
        if version != SCHEMA_VERSION:
            raise RunnerError(f"{path} is no bundle of version {SCHEMA_VERSION}; make it again: python -m latency_lut bundle")

    def model(self, name: str) -> bytes:
        """A serialized model.

        Raises:
            RunnerError: it is missing, or not the one that the manifest lists.
        """
        content = self._read(f"models/{name}.onnx", self.models[name]["size_bytes"])
        if hashlib.sha256(content).hexdigest() != self.models[name]["sha256"]:
            raise RunnerError(f"{self.path}: models/{name}.onnx has another checksum than its manifest; copy the bundle again")
        return content

    def _read(self, name: str, most_bytes: int) -> bytes:
        try:
            with (self.path / name).open("rb") if self._zip is None else self._zip.open(name) as file:
                return file.read(most_bytes)
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise RunnerError(f"{self.path}: cannot read {name} ({error}); copy the bundle again") from error


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise RunnerError(f"cannot read {path} ({error}); name a bundle: its zip file or its folder") from error


def describe(device: Mapping[str, Any]) -> dict[str, Any]:
    """What the numbers measured here have to say, like `latency_lut.device.Device.describe`.

    Raises:
        RunnerError: this machine cannot be the device.
    """
    if device["runtime"] != "onnxruntime":
        raise RunnerError(f"the bundle is for the runtime {device['runtime']}; this runner has onnxruntime")
    available = ort.get_available_providers()
    if device["provider"] not in available:
        raise RunnerError(f"the bundle is for {device['provider']}; onnxruntime has {', '.join(available)} here")
    if device["threads"] > cores():
        raise RunnerError(f"the bundle is for {device['threads']} threads; this machine has {cores()} cores")
    settings = {name: device[name] for name in ("runtime", "provider", "threads", "batch")}
    return {**describe_machine(), **settings, "runtime_version": str(ort.__version__)}


class Results:
    """The file of results: read once, then only appended to.

    Args:
        path: of the file; made when it is not there.
        head: its first line.

    Raises:
        RunnerError: it cannot be written, is being written by another process, or holds results of something else.
    """

    def __init__(self, path: Path, head: Line) -> None:
        self.path, self._streams = path, False
        self.unread = False  # nobody reads stdout any more
        try:
            self._file = path.open("a+b")
            _lock(self._file.fileno(), path)
            self._file.seek(0)
            content = self._file.read()
            content = content[: content.rfind(b"\n") + 1]  # without a line that was being written when the machine stopped
            self._file.truncate(len(content))
        except OSError as error:
            raise RunnerError(f"cannot write {path}: {error.strerror or error}; name another file") from error
        self._sum = hashlib.sha256()
        self.done: set[str] = set()
        self.failed = 0
        self.batches, self.complete = 0, False
        for index, line in enumerate(content.splitlines(keepends=True)):
            self._sum.update(line)
            self._know(line, head if index == 0 else None)
        if not content:
            self.append(head)

    def _know(self, line: bytes, head: Line | None) -> None:
        """Take in a line of the file; the first has to be `head`."""
        mend = "delete it or name another file"
        try:
            known = json.loads(line)
            kind = known["kind"]
            if kind == "visits":
                self.batches = max(self.batches, known["batch"] + 1)
            if kind in ("visits", "failed"):
                self.done.add(known["id"])
        except (ValueError, KeyError, TypeError) as error:
            raise RunnerError(f"{self.path} is damaged; {mend}") from error
        if head is not None and known != head:
            differs = [name for name in ("bundle", "device") if known.get(name) != head[name]]
            raise RunnerError(f"{self.path} holds results of another {' and '.join(differs) or 'version'}; {mend}")
        self.failed += kind == "failed"
        self.complete = kind == "end"

    def append(self, line: Line) -> None:
        """Write a line."""
        content = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        self._sum.update(content)
        self._file.write(content)
        self._file.flush()
        if line["kind"] in ("visits", "failed"):
            self.done.add(line["id"])
        self.failed += line["kind"] == "failed"
        if self._streams:
            try:
                sys.stdout.buffer.write(content)
                sys.stdout.buffer.flush()
            except BrokenPipeError:  # told when the batch is in the file
                self._streams, self.unread = False, True

    def append_end(self, fingerprint: str) -> None:
        """Write the last line."""
        counts = {"measured": len(self.done) - self.failed, "failed": self.failed}
        self.append({"kind": "end", "complete": True, **counts, "fingerprint": fingerprint, "sha256": self._sum.hexdigest()})
        os.fsync(self._file.fileno())
        self.complete = True

    def close(self) -> None:
        """Close the file, and let others write it."""
        self._file.close()

    def stream_from(self, offset: int) -> None:
        """Write what the file holds from a byte on to stdout, and from now on every line that is appended.

        Raises:
            RunnerError: the file is shorter.
        """
        size = self._file.seek(0, os.SEEK_END)
        if offset > size:
            raise RunnerError(
                f"{self.path} has {size} bytes, fewer than the {offset} that are known; begin anew with --stream 0"
            )
        self._file.seek(offset)
        sys.stdout.buffer.write(self._file.read())
        sys.stdout.buffer.flush()
        self._streams = True


def follow(path: Path, offset: int) -> int:
    """Stream what another runner still writes to a file: one that a broken connection left behind.

    Returns:
        The byte behind what was streamed.
    """
    while _locked(path):
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read()
        content = content[: content.rfind(b"\n") + 1]
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
        offset += len(content)
        time.sleep(FOLLOW_S)
    return offset


def _locked(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            _lock(file.fileno(), path)
    except FileNotFoundError:
        return False
    except RunnerError:
        return True
    return False


def _lock(descriptor: int, path: Path) -> None:
    """Let no other process write the file; where the system has no such locks, nothing happens."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise RunnerError(f"{path} is being written by another process; wait for it or end it") from error


class Progress:
    """A line on stderr about what is done: rewritten on a terminal, else a new one every `EVERY_S` seconds."""

    EVERY_S = 5.0

    def __init__(self, total: int) -> None:
        self._total, self._begin, self._told_s = total, time.monotonic(), 0.0
        self._terminal = sys.stderr.isatty()

    def tell(self, done: int, what: str) -> None:
        """Say that so many of the models are done."""
        now_s = time.monotonic()
        if not self._terminal and now_s - self._told_s < self.EVERY_S and done < self._total:
            return
        self._told_s = now_s
        text = f"{done}/{self._total} models, {what}, {now_s - self._begin:.0f} s"
        print(f"\r{text}   " if self._terminal else text, end="" if self._terminal else "\n", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leave the line."""
        if self._terminal:
            print(file=sys.stderr)


def measure(bundle: Bundle, results: Results, description: Mapping[str, Any]) -> None:
    """Measure what is missing in the results.

    Raises:
        RunnerError: a model is damaged, or an anchor does not load.
    """
    progress = Progress(len(bundle.models))
    anchors: dict[str, Session] = {}
    for name in bundle.anchors:
        try:
            anchors[name] = _load(bundle, name)
        except ModelError as error:
            raise RunnerError(f"onnxruntime {ort.__version__} does not take {error}; install a newer one") from error
    for kind, names in _batches(bundle, results.done):
        sessions = dict(anchors)
        for name in names:
            try:
                sessions[name] = _load(bundle, name)
            except ModelError as error:
                results.append({"kind": "failed", "id": name, "reason": str(error)})
        protocol = bundle.protocol[kind]
        times_us, orders = interleaved(list(sessions.values()), protocol["rounds"], protocol["visit_s"], bundle.seed)
        positions = orders.argsort(axis=1).T
        for name, us, position in zip(sessions, times_us, positions):  # noqa: B905 (strict= came with Python 3.10)
            visits = {"us": [round(float(value), 4) for value in us], "position": position.tolist()}
            results.append({"kind": "visits", "batch": results.batches, "id": name, **visits})
        results.batches += 1
        if results.unread:
            raise BrokenPipeError
        progress.tell(len(results.done), f"{results.failed} failed" if results.failed else kind + "s")
    results.append_end(fingerprint_of(description))
    progress.end()


class ModelError(Exception):
    """A model that onnxruntime does not take, and why, in one line."""


def _load(bundle: Bundle, name: str) -> Session:
    content = bundle.model(name)
    try:
        return Session(content, bundle.device["provider"], bundle.device["threads"])
    except Exception as error:  # onnxruntime has no base class for what it raises
        raise ModelError(f"{name}: {' '.join(str(error).split())[:300]}") from error


def _batches(bundle: Bundle, done: set[str]) -> Iterator[tuple[str, Sequence[str]]]:
    """What is to be measured together with the anchors: pairs, then networks. The first batch may be the anchors alone."""
    for kind, protocol in bundle.protocol.items():
        of_kind = [name for name, model in bundle.models.items() if model["kind"] == kind]
        missing = [name for name in of_kind if name not in done and name not in bundle.anchors]
        for first in range(0, len(missing), protocol["batch"]):
            yield kind, missing[first : first + protocol["batch"]]
    if len(bundle.models) == len(bundle.anchors) and not done.issuperset(bundle.anchors):
        yield "pair", []


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; the exit status."""
    parser = argparse.ArgumentParser(prog="runner.py", description="Measure the models of a bundle on this machine.")
    parser.add_argument("bundle", nargs="?", type=Path, default=Path(__file__).resolve().parent, help="zip file or folder")
    parser.add_argument("results", nargs="?", type=Path, help=f"file to write or to continue; by default {RESULTS} there")
    parser.add_argument(
        "--stream", type=int, metavar="BYTES", help="write the results to stdout too, those after so many bytes"
    )
    given = parser.parse_args(arguments)
    path = given.results or (given.bundle if given.bundle.is_dir() else given.bundle.resolve().parent) / RESULTS
    try:
        bundle = Bundle(given.bundle)
        description = describe(bundle.device)
        head = {"kind": "head", "schema_version": SCHEMA_VERSION, "bundle": bundle.fingerprint, "unit": UNIT}
        head |= {"device": description, "fingerprint": fingerprint_of(description)}
        offset = None if given.stream is None else follow(path, given.stream)
        with contextlib.closing(Results(path, head)) as results:
            if offset is not None:
                results.stream_from(offset)
            if not results.complete:
                measure(bundle, results, description)
    except RunnerError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_STATUS
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is written", file=sys.stderr)
        return INTERRUPTED_STATUS
    except BrokenPipeError:  # whoever read stdout is gone; what is measured is in the file
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return USER_STATUS
    print(f"complete: {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
