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
    {"kind": "outputs", "id", "first", ...} what a model answers for samples of the bundle from one on: floats, in base64
    {"kind": "end", "complete": true, ...}  all is there; the sum of the bytes before

In every batch the anchors, the models that tie batches to one speed of the machine, come first. While models are visited, the
lock of the machine is held, as by everything here that measures: one at a time.
"""

from __future__ import annotations

import argparse
import base64
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

import numpy as np
import onnxruntime as ort

from latency_lut.alone import alone_on_this_machine
from latency_lut.machine import cores, describe_machine, fingerprint_of
from latency_lut.ort_session import Session, describe_kernels
from latency_lut.outputs import outputs_of
from latency_lut.results_file import Results, RunnerError, follow
from latency_lut.visits import interleaved

SCHEMA_VERSION = 1
FORMAT = "netwright-bundle"
UNIT = "us"
MANIFEST, RESULTS = "manifest.json", "results.jsonl"
LARGEST_MANIFEST = 2**27
LINE_VALUES = 8192  # of outputs in a line
USER_STATUS, INTERRUPTED_STATUS = 2, 130


class Bundle:
    """The files of a bundle, read from the zip file or from the folder into which it was unpacked.

    Args:
        path: of either.

    Raises:
        RunnerError: it is not a bundle that this runner can measure.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._zip = None if path.is_dir() else zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise RunnerError(f"cannot read {path} ({error}); name a bundle: its zip file or its folder") from error
        content = self._read(MANIFEST, LARGEST_MANIFEST)
        self.fingerprint = hashlib.sha256(content).hexdigest()
        try:
            self.manifest = json.loads(content)
            version = self.manifest["schema_version"] if self.manifest["format"] == FORMAT else None
            self.device, self.anchors = self.manifest["device"], self.manifest["anchors"]
            self.protocol, self.seed, self.files = (self.manifest[name] for name in ("protocol", "seed", "files"))
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
        return self._checked(f"models/{name}.onnx", self.models[name])

    def samples(self, name: str) -> np.ndarray:
        """What a model is to answer, `(samples, values)`; likewise."""
        asked = self.models[name]["outputs"]
        content = self._checked(asked["file"], self.files[asked["file"]])
        return np.frombuffer(content, "<f4").reshape(asked["samples"], -1)

    def _checked(self, name: str, stored: Mapping[str, Any]) -> bytes:
        content = self._read(name, stored["size_bytes"])
        if hashlib.sha256(content).hexdigest() != stored["sha256"]:
            raise RunnerError(f"{self.path}: {name} has another checksum than its manifest; copy the bundle again")
        return content

    def _read(self, name: str, most_bytes: int) -> bytes:
        try:
            with (self.path / name).open("rb") if self._zip is None else self._zip.open(name) as file:
                return file.read(most_bytes)
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise RunnerError(f"{self.path}: cannot read {name} ({error}); copy the bundle again") from error


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
    machine = describe_machine()
    kernels = describe_kernels(str(machine["instruction_sets"]), device["provider"])
    return {**machine, **settings, "runtime_version": str(ort.__version__), **kernels}


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


def measure(bundle: Bundle, results: Results) -> None:
    """Time the models that are missing in the results.

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
    for kind, names in _batches(bundle, results.measured | results.failed):
        sessions = dict(anchors)
        for name in names:
            try:
                sessions[name] = _load(bundle, name)
            except ModelError as error:
                results.append({"kind": "failed", "id": name, "reason": str(error)})
        protocol = bundle.protocol[kind]
        with alone_on_this_machine():
            times_us, orders = interleaved(list(sessions.values()), protocol["rounds"], protocol["visit_s"], bundle.seed)
        positions, batch = orders.argsort(axis=1).T, results.batches
        for name, us, position in zip(sessions, times_us, positions):  # noqa: B905 (strict= came with Python 3.10)
            visits = {"us": [round(float(value), 4) for value in us], "position": position.tolist()}
            results.append({"kind": "visits", "batch": batch, "id": name, **visits})
        if results.unread:
            raise BrokenPipeError
        done = len(results.measured) + len(results.failed)
        progress.tell(done, f"{len(results.failed)} failed" if results.failed else kind + "s")
    progress.end()


def answer(bundle: Bundle, results: Results) -> None:
    """Run the models that are asked for their outputs on samples of the bundle, as far as that is missing in the results.

    Raises:
        RunnerError: a file is damaged.
    """
    for name, model in bundle.models.items():
        if "outputs" not in model or name in results.failed:
            continue
        rows = max(1, LINE_VALUES // model["outputs"]["values"])
        missing = [n for n in range(0, model["outputs"]["samples"], rows) if (name, n) not in results.answered]
        if not missing:
            continue
        session, samples = _load(bundle, name), bundle.samples(name)
        batch, *shape = session.input_shape
        for first in missing:
            values = outputs_of(session.answer, samples[first : first + rows].reshape(-1, *shape), batch)
            text = base64.b64encode(values.astype("<f4").tobytes()).decode()
            results.append({"kind": "outputs", "id": name, "first": first, "values": text})
        if results.unread:
            raise BrokenPipeError


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
                measure(bundle, results)
                answer(bundle, results)
                results.append_end(fingerprint_of(description))
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
