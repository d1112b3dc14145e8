"""A worker: a process that runs JavaScript for Python, one message at a time.

A message is a header, an object, and a payload, bytes; so is the answer. Nothing that comes back is trusted: sizes are checked
before they are read, and an answer that is not as expected ends the worker. What carries the bytes is in `latency_lut.web.node`
and `latency_lut.web.chromium`; what answers them is `sessions.mjs`.
"""

from __future__ import annotations

import json
import struct
import threading
from collections import deque
from collections.abc import Mapping
from typing import Protocol

LENGTHS = struct.Struct("<II")
LARGEST_HEADER = 2**24
LARGEST_PAYLOAD = 2**30

Header = dict[str, object]


class WebError(RuntimeError):
    """What went wrong in a worker, in one line."""


class Channel(Protocol):
    """Carries messages to a process and back."""

    @property
    def pid(self) -> int:
        """Of the process."""

    def exchange(self, frame: bytes) -> tuple[bytes, bytes]:
        """Send a message; header and payload of the answer.

        Raises:
            WebError: the process has ended, or answers with something else than a message.
        """

    def close(self) -> None:
        """End the process."""


class Worker:
    """Calls into a worker's process; usable from several threads.

    Args:
        channel: to a process that was just started.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._lock = threading.Lock()
        self._released: deque[int] = deque()
        self.alive = True
        self.facts: Header = {}
        try:
            self.facts, _ = self.call("hello")
        except BaseException:
            self.close()
            raise

    def call(self, operation: str, payload: bytes = b"", /, **arguments: object) -> tuple[Header, bytes]:
        """One message and its answer.

        Args:
            operation: a key of `operations` in `sessions.mjs`.
            payload: bytes that it gets.
            arguments: the rest of the header.

        Raises:
            WebError: the operation failed or the process has ended.
        """
        with self._lock:
            if not self.alive:
                raise WebError("the worker of onnxruntime-web has ended; load the model again")
            released = [self._released.popleft() for _ in range(len(self._released))]
            try:
                header, data = self.channel.exchange(
                    encode({"operation": operation, "release": released, **arguments}, payload)
                )
                answer = json.loads(header)
                if not isinstance(answer, dict):
                    raise WebError("onnxruntime-web's worker answers with something else than an object")
            except ValueError as error:
                self.close()
                raise WebError(f"onnxruntime-web's worker answers with broken JSON: {error}") from error
            except BaseException:  # interrupted between message and answer, the next answer would be of this message
                self.close()
                raise
            if answer.get("broken"):
                self.close()
        if "error" in answer:
            raise WebError(" ".join(f"onnxruntime-web: {answer['error']}".split())[:500])
        return answer, data

    @property
    def pid(self) -> int:
        return self.channel.pid

    def release(self, session: int) -> None:
        """Let go of a session with the next message. Safe wherever garbage is collected, also inside of `call`."""
        self._released.append(session)

    def close(self) -> None:
        """End the process."""
        self.alive = False
        self.channel.close()


def encode(header: Mapping[str, object], payload: bytes) -> bytes:
    """A message as bytes: the lengths of both parts, the header as JSON, the payload.

    Raises:
        WebError: it is larger than a message may be.
    """
    text = json.dumps(header).encode()
    check_lengths(len(text), len(payload))
    return LENGTHS.pack(len(text), len(payload)) + text + payload


def check_lengths(header: int, payload: int) -> None:
    """Raise `WebError` when a message of these lengths may not be."""
    if header > LARGEST_HEADER or payload > LARGEST_PAYLOAD:
        raise WebError(f"a message has {header} + {payload} bytes; allowed are {LARGEST_HEADER} + {LARGEST_PAYLOAD}")
