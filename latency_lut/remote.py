"""A bundle that is run on a device elsewhere: it goes there, results come back line by line, a broken link is taken up again.

On the device everything is in a folder named by the bundle's checksum; here the results are in a file that only grows. So
whatever breaks, the connection, this process, the device, the next attempt or the next call goes on from what is measured.
Nothing that comes from the device is believed here: lines are counted and kept, `latency_lut.importing` checks them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import TypeVar

from latency_lut.device import Device
from latency_lut.transports import LinkError, RemoteError, Transport
from latency_lut.transports.client import printable
from spaces.errors import UserError

RUNTIME = "onnxruntime"  # what the runner measures
ATTEMPTS = 8  # in a row that bring nothing new; with their pauses more than two minutes
LONGEST_PAUSE_S = 30.0
LARGEST_RESULTS = 2**28  # bytes; a device that sends more sends something else
NO_SUCH_PROGRAM = (126, 127)  # exit statuses of a shell

# Programs of one line, see `latency_lut.transports.ssh`. How many bytes a file there has (-1: no file), a digest of the first.
STATE = (
    "import hashlib,os,sys; path,size=sys.argv[1],int(sys.argv[2]); there=os.path.exists(path); "
    "print(os.path.getsize(path) if there else -1, hashlib.sha256(open(path,'rb').read(size) if there else b'').hexdigest())"
)
REMOVE = "import shutil,sys; shutil.rmtree(sys.argv[1])"


Taken = TypeVar("Taken")


@dataclass(frozen=True)
class Watch:
    """Who is told what happens, and may stop it.

    Args:
        on_progress: called with what is done, how much of it is done, and of how much.
        say: called with a sentence, when the connection breaks for one.
        stopped: when set, what runs ends soon, without an error.
    """

    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None
    say: Callable[[str], None] = lambda sentence: None
    stopped: Event = field(default_factory=Event)


WATCH = Watch()  # nobody


def transport_of(device: Device) -> Transport:
    """The way to a device elsewhere on which a bundle can be run.

    Raises:
        UserError: there is none, or its runtime has no runner.
    """
    if device.transport is None:
        mend = (
            f"run: python -m latency_lut bundle device={device.name}, there the bundle, here: python -m latency_lut import FILE"
        )
        raise UserError(f"device {device.name} is elsewhere and has no transport; {mend}")
    if device.runtime != RUNTIME:
        raise UserError(f"device {device.name}: runtime is {device.runtime!r}; allowed by a transport is {RUNTIME}")
    return device.transport


def carry_out(device: Device, bundle: Path, models: int, watch: Watch, believe: Callable[[Path], Taken]) -> Taken | None:
    """Run a bundle on its device and take in what comes back. In the end bundle and results are removed, there and here; when
    it breaks off they stay, and the same bundle goes on from them.

    Args:
        device: with a transport.
        bundle: the zip file; the results lie beside it meanwhile.
        models: how many the bundle has.
        watch: told what happens; stops it.
        believe: makes something of the file of the results, or raises `UserError` to refuse it.

    Returns:
        What `believe` made; `None` when it was stopped.

    Raises:
        UserError: as for `RemoteRun.run`, or what came back is refused, and is kept beside the bundle.
    """
    digest = hashlib.sha256(bundle.read_bytes()).hexdigest()[:8]
    results = bundle.with_name(f"{device.name}-{digest}-results.jsonl")  # another bundle has others, and disturbs none
    run = RemoteRun(device.name, transport_of(device), bundle, results, models, watch)
    try:
        run.run()
    except UserError:
        if not results.stat().st_size:  # nothing to go on from
            _remove(results, bundle)
        raise
    if watch.stopped.is_set():
        return None
    try:
        taken = believe(results)
    except UserError as error:
        kept = results.replace(bundle.with_name(f"{device.name}-refused.jsonl"))
        run.clean_up()
        raise UserError(f"{error}; they are kept as {kept}, the same command measures anew") from error
    run.clean_up()
    _remove(results, bundle)
    return taken


def _remove(*files: Path) -> None:
    for file in files:
        file.unlink(missing_ok=True)


class RemoteRun:
    """A bundle on its way: copied to a device, run there, its results brought back.

    Args:
        device_name: for messages.
        transport: the way to the device.
        bundle: the zip file.
        results: file of the results, made or continued; complete lines only.
        models: how many the bundle has.
        watch: told what happens; stops it.
    """

    def __init__(
        self, device_name: str, transport: Transport, bundle: Path, results: Path, models: int, watch: Watch = WATCH
    ) -> None:
        self.device_name, self.transport, self.bundle, self.results, self.models = (
            device_name,
            transport,
            bundle,
            results,
            models,
        )
        self._on_progress, self._say, self._stopped = watch.on_progress, watch.say, watch.stopped
        self._folder = f"{transport.folder}/{hashlib.sha256(bundle.read_bytes()).hexdigest()[:16]}"
        self._known: set[str] = set()
        self._complete = self._reached = False
        self._copied_bytes = self._results_bytes = self._most_bytes = 0
        kept = results.read_bytes() if results.exists() else b""
        self._begin(kept[: kept.rfind(b"\n") + 1])

    def run(self) -> None:
        """Bring back all results.

        Raises:
            UserError: the device cannot be reached, or not again; the runner fails there; a file cannot be written.
        """
        fruitless = 0
        while not self._complete and not self._stopped.is_set():
            try:
                self._copy(self.bundle, self._there("bundle.zip"))
                self._agree()
                self._stream()
            except LinkError as error:
                if not self._reached:
                    way = f"no way to {self.transport.name} ({error})"
                    raise UserError(f"device {self.device_name}: {way}; this has to work: {self.transport.trial}") from error
                here_bytes = self._copied_bytes + self._results_bytes
                fruitless = fruitless + 1 if here_bytes <= self._most_bytes else 1
                self._most_bytes = max(self._most_bytes, here_bytes)
                self._pause(fruitless, error)
            except RemoteError as error:
                raise UserError(f"device {self.device_name}: {self._reason(error)}") from error

    def clean_up(self) -> None:
        """Remove what is on the device, if it can be reached."""
        try:
            self._python(REMOVE, self._folder)
        except (LinkError, RemoteError) as error:
            self._say(f"{self.device_name}: {self._folder} is left on {self.transport.name} ({error})")

    # -- one attempt ------------------------------------------------------------------------------------------------------

    def _copy(self, source: Path, path: str) -> None:
        """Bring a file there, or what is missing of it."""
        content = source.read_bytes()
        for _ in range(2):
            size, digest = self._state(path, len(content))
            same = digest == hashlib.sha256(content[: max(size, 0)]).hexdigest()
            self._copied_bytes = max(size, 0)
            if same and size == len(content):
                return
            self._on_progress(f"copying {len(content) / 1e6:.1f} MB", 0, self.models)
            self.transport.send(source, path, size if same and 0 < size < len(content) else 0, stopped=self._stopped)
        size, digest = self._state(path, len(content))
        if (size, digest) != (len(content), hashlib.sha256(content).hexdigest()) and not self._stopped.is_set():
            raise self._mistake(f"{path} arrives with {size} bytes of {len(content)}, or others")

    def _agree(self) -> None:
        """Make the results here a beginning of the results there."""
        kept = self.results.read_bytes() if self._results_bytes else b""
        size, digest = self._state(self._there("results.jsonl"), len(kept))
        if kept and size <= 0:
            self._copy(self.results, self._there("results.jsonl"))
        elif size < len(kept) or digest != hashlib.sha256(kept).hexdigest():
            self._begin(b"")

    def _stream(self) -> None:
        """Run the runner, and keep what it writes."""
        bundle, results = self._there("bundle.zip"), self._there("results.jsonl")
        words = [self.transport.python, bundle, bundle, results, "--stream", str(self._results_bytes)]
        known_bytes = self._results_bytes
        self._on_progress("models", len(self._known), self.models)
        try:
            with self.results.open("ab") as file:
                for line in self.transport.run(words, stopped=self._stopped):
                    if self._results_bytes + len(line) > LARGEST_RESULTS:
                        raise self._mistake(f"more than {LARGEST_RESULTS} bytes of results come; that is no runner")
                    file.write(line)
                    file.flush()
                    self._count(line)
                    self._on_progress("models", len(self._known), self.models)
        except OSError as error:
            raise self._cannot_write(error) from error
        if self._complete or self._stopped.is_set():
            return
        if self._results_bytes == known_bytes:
            raise self._mistake("the runner ends without all results")
        raise LinkError("the results end in the middle")

    def _pause(self, fruitless: int, error: LinkError) -> None:
        here = f"{len(self._known)} of {self.models} models are here"
        if fruitless > ATTEMPTS:
            gone = f"{self.transport.name} is gone ({error}); {here}"
            raise UserError(f"device {self.device_name}: {gone}, the same command goes on with the others") from error
        pause_s = min(2.0 ** (fruitless - 1), LONGEST_PAUSE_S)
        attempt = f"attempt {fruitless} of {ATTEMPTS} in {pause_s:g} s"
        self._say(f"{self.device_name}: the connection broke ({error}); {here}; {attempt}")
        self._stopped.wait(pause_s)

    # -- parts ------------------------------------------------------------------------------------------------------------

    def _there(self, name: str) -> str:
        return f"{self._folder}/{name}"

    def _python(self, program: str, *arguments: str) -> bytes:
        words: Sequence[str] = [self.transport.python, "-c", program, *arguments]
        return b"".join(self.transport.run(words, stopped=self._stopped))

    def _state(self, path: str, size: int) -> tuple[int, str]:
        answer = self._python(STATE, path, str(size))
        if self._stopped.is_set():
            return -1, ""
        found = re.fullmatch(rb"(-1|\d{1,12}) ([0-9a-f]{64})\s*", answer)
        if found is None:
            raise self._mistake(f"Python answers {printable(answer[:400])!r}, not the state of a file")
        self._reached = True
        return int(found[1]), found[2].decode()

    def _begin(self, kept: bytes) -> None:
        """Make the file of results hold so much."""
        self._known, self._complete, self._results_bytes = set(), False, 0
        try:
            self.results.parent.mkdir(parents=True, exist_ok=True)
            self.results.touch()
            with self.results.open("r+b") as file:
                file.truncate(len(kept))
        except OSError as error:
            raise self._cannot_write(error) from error
        for line in kept.splitlines(keepends=True):
            self._count(line)

    def _mistake(self, what: str) -> UserError:
        return UserError(f"device {self.device_name}: {what} ({self.transport.name})")

    def _cannot_write(self, error: OSError) -> UserError:
        return UserError(f"cannot write {self.results}: {error.strerror or error}; choose another folder with tables=")

    def _count(self, line: bytes) -> None:
        """Take in a line of results as far as its number goes."""
        self._results_bytes += len(line)
        try:
            values = json.loads(line)
            kind, name = values["kind"], values.get("id")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return  # told by whoever checks the file
        self._complete = kind == "end"
        if kind in ("visits", "failed") and isinstance(name, str):
            self._known.add(name)

    def _reason(self, error: RemoteError) -> str:
        where, python = self.transport.name, self.transport.python
        if error.status in NO_SUCH_PROGRAM:
            return f"{python} does not run on {where} ({error.said}); name another with transport.python"
        missing = re.match(r"ModuleNotFoundError: No module named '(\w+)'", error.said)
        if missing:
            return f"{python} on {where} has no {missing[1]}; run there: {python} -m pip install numpy onnxruntime"
        return f"{where} says: {error.said.removeprefix('error: ')}" if error.said else f"the runner fails on {where} ({error})"
