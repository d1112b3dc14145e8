"""A worker in Node, over pipes."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from typing import IO, cast

from latency_lut.web import package
from latency_lut.web.worker import LENGTHS, WebError, check_lengths

# WebAssembly starts in the code of a fast compiler, which is replaced function by function once it runs hot; meanwhile timings
# fall to a third and less. Optimized code from the start has the speed at which that ends.
STEADY_CODE = "--no-liftoff"


class NodeChannel:
    """A process of Node.

    Args:
        threads: of one run.

    Raises:
        UserError: Node is missing, or onnxruntime-web cannot be set up.
    """

    def __init__(self, threads: int) -> None:
        path, _ = package.node()
        script, folder = package.FOLDER / "node.mjs", package.installed()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the process)
        self._process = subprocess.Popen(
            [path, STEADY_CODE, str(script), str(folder), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        self._stdin, self._stdout = cast(IO[bytes], self._process.stdin), cast(IO[bytes], self._process.stdout)

    @property
    def pid(self) -> int:
        return self._process.pid

    def exchange(self, frame: bytes) -> tuple[bytes, bytes]:
        """Write a message, read the answer."""
        try:
            self._stdin.write(frame)
            self._stdin.flush()
        except OSError:
            raise self._ended() from None
        header_length, payload_length = LENGTHS.unpack(self._read(LENGTHS.size))
        check_lengths(header_length, payload_length)
        return self._read(header_length), self._read(payload_length)

    def _read(self, length: int) -> bytes:
        data = self._stdout.read(length)
        if len(data) < length:
            raise self._ended()
        return data

    def _ended(self) -> WebError:
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read()[-20000:].decode(errors="replace").splitlines()
        said = [line.strip() for line in lines if "Error" in line] or [line.strip() for line in lines if line.strip()]
        return WebError(f"Node ended with status {status}{': ' if said else ''}{said[0][:300] if said else ''}")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._stdin, self._stdout, self._errors):
            with contextlib.suppress(OSError):  # what was not flushed is not wanted any more
                stream.close()
