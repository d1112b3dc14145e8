"""A worker in a page of headless Chromium, over a WebSocket on this machine.

The page is served with the headers that isolate it from other origins: then `performance.now` has steps of 5 us (100 us
without) and threads may share memory. The server answers only paths that begin with a secret token.
"""

from __future__ import annotations

import os
import queue
import secrets
import shutil
import struct
import subprocess
import tempfile
import threading
import time
from base64 import b64encode
from functools import cache
from hashlib import sha1
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase
from pathlib import Path

import numpy as np

from latency_lut.web import package
from latency_lut.web.node import STEADY_CODE
from latency_lut.web.worker import LARGEST_HEADER, LARGEST_PAYLOAD, LENGTHS, WebError, check_lengths
from spaces.errors import UserError

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MACOS = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
ANSWER_TIMEOUT_S = 180.0
TYPES = {".mjs": "text/javascript", ".wasm": "application/wasm", ".html": "text/html; charset=utf-8"}
PAGE = b'<!doctype html><title>netwright</title><script type="module" src="page.mjs"></script>'


# Of a WebSocket's frames (RFC 6455, section 5.2).
WEBSOCKET_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
FINAL, BINARY, CONTROL, MASKED = 0x80, 0x02, 0x08, 0x80
SHORT, TWO_BYTES, EIGHT_BYTES = 126, 126, 127


def browser() -> tuple[str, str]:
    """Path and version of Chromium or Chrome: `$CHROME_BIN`, or what is on the PATH.

    Raises:
        UserError: there is none, or it does not start.
    """
    candidates = [os.environ.get("CHROME_BIN"), *NAMES, MACOS]
    for name in candidates:
        path = shutil.which(name) if name else None
        if path is not None:
            return path, _version(path)
    mend = "install one (for example: apt-get install chromium) or name it in the variable CHROME_BIN"
    raise UserError(f"no Chromium found (looked for {', '.join(NAMES)} on the PATH); {mend}")


@cache
def _version(path: str) -> str:
    ended = subprocess.run([path, "--version"], capture_output=True, text=True, check=False, timeout=60)
    said = " ".join(ended.stdout.split())
    if ended.returncode or not said:
        raise UserError(f"{path} --version ends with status {ended.returncode} and says {said!r}; install Chromium anew")
    return said


class ChromiumChannel:
    """A process of Chromium with one page, and the server that it talks to.

    Args:
        threads: of one run.

    Raises:
        UserError: Chromium is missing, or onnxruntime-web cannot be set up.
    """

    def __init__(self, threads: int) -> None:
        path, _ = browser()
        files = {file.name: file for file in package.page_files()}
        files |= {name: package.FOLDER / name for name in ("page.mjs", "sessions.mjs")}
        self._server = _Server(files)
        self._profile = tempfile.TemporaryDirectory(prefix="netwright-chromium-", ignore_cleanup_errors=True)
        arguments = [
            "--headless=new",
            f"--user-data-dir={self._profile.name}",
            f"--js-flags={STEADY_CODE}",
            "--no-first-run",
            "--no-default-browser-check",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-extensions",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--remote-debugging-pipe",  # Chromium ends when this pipe does, so it never outlives Python
        ]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            arguments.append("--no-sandbox")  # Chromium's sandbox refuses to run as root
        # Chromium expects its debugging pipe as descriptors 3 and 4.
        command = ["/bin/sh", "-c", 'exec "$@" 3<&0 4>&1', "sh", path, *arguments, f"{self._server.url}?threads={threads}"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def url(self) -> str:
        """Of the page."""
        return self._server.url

    def exchange(self, frame: bytes) -> tuple[bytes, bytes]:
        """Hand the page a message, wait for its answer."""
        self._server.messages.put(frame)
        end = time.monotonic() + ANSWER_TIMEOUT_S
        while True:
            try:
                answer = self._server.answers.get(timeout=1.0)
                break
            except queue.Empty:
                if self._process.poll() is not None:
                    raise WebError(f"Chromium ended with status {self._process.returncode}") from None
                if time.monotonic() > end:
                    raise WebError(f"the page in Chromium did not answer within {ANSWER_TIMEOUT_S:.0f} s") from None
        if len(answer) < LENGTHS.size:
            raise WebError("the page in Chromium is gone")
        header_length, payload_length = LENGTHS.unpack_from(answer)
        check_lengths(header_length, payload_length)
        if len(answer) != LENGTHS.size + header_length + payload_length:
            raise WebError("the page in Chromium answers with a message of another length than it says")
        split = LENGTHS.size + header_length
        return answer[LENGTHS.size : split], answer[split:]

    def close(self) -> None:
        """End the browser and the server."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._server.close()
        self._profile.cleanup()


class _Server:
    """Serves the page and carries messages, in threads of its own."""

    def __init__(self, files: dict[str, Path]) -> None:
        self.messages: queue.Queue[bytes | None] = queue.Queue()
        self.answers: queue.Queue[bytes] = queue.Queue()
        token = secrets.token_urlsafe(24)
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(f"/{token}/", files, self.messages, self.answers))
        self._http.daemon_threads = True
        self._http.block_on_close = False
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/{token}/"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.messages.put(None)
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


def _handler(
    prefix: str, files: dict[str, Path], messages: queue.Queue[bytes | None], answers: queue.Queue[bytes]
) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1  # head and body leave together

        def do_GET(self) -> None:
            name = self.path.partition("?")[0].removeprefix(prefix)
            if not self.path.startswith(prefix) or (name and name not in files and name != "socket"):
                self._send(HTTPStatus.NOT_FOUND, b"", ".html")
            elif name == "socket":
                self._talk()
            else:
                self._send(HTTPStatus.OK, files[name].read_bytes() if name else PAGE, Path(name).suffix or ".html")

        def _send(self, status: HTTPStatus, body: bytes, suffix: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", TYPES[suffix])
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
            self.end_headers()
            self.wfile.write(body)

        def _talk(self) -> None:
            """Become a WebSocket (RFC 6455): send what is in `messages`, put what comes back into `answers`."""
            self.close_connection = True
            key = self.headers.get("Sec-WebSocket-Key", "")
            self.send_response(HTTPStatus.SWITCHING_PROTOCOLS)
            self.send_header("Upgrade", "websocket")
            self.send_header("Connection", "Upgrade")
            self.send_header("Sec-WebSocket-Accept", b64encode(sha1((key + WEBSOCKET_GUID).encode()).digest()).decode())
            self.end_headers()
            self.wfile.flush()
            try:
                while (message := messages.get()) is not None:
                    self.wfile.write(frame_head(len(message)) + message)
                    self.wfile.flush()
                    answers.put(read_message(self.rfile))
            except (OSError, EOFError):
                answers.put(b"")  # no message: tells whoever waits that the page is gone

        def log_message(self, *args: object) -> None:
            """Nothing: by default every request is a line on stderr."""

    return Handler


def frame_head(length: int) -> bytes:
    """What stands before a binary WebSocket message of one unmasked frame."""
    if length < SHORT:
        return struct.pack("!BB", FINAL | BINARY, length)
    if length < 2**16:  # browsers refuse a longer form than needed
        return struct.pack("!BBH", FINAL | BINARY, TWO_BYTES, length)
    return struct.pack("!BBQ", FINAL | BINARY, EIGHT_BYTES, length)


def read_message(stream: BufferedIOBase) -> bytes:
    """The next WebSocket message that a browser sends, out of one or several masked frames.

    Raises:
        EOFError: the stream ends, the browser closes the connection, or the message is larger than a message may be.
    """
    parts: list[bytes] = []
    while True:
        first, second = _read(stream, 2)
        length = second & 0x7F
        if length == TWO_BYTES:
            (length,) = struct.unpack("!H", _read(stream, 2))
        elif length == EIGHT_BYTES:
            (length,) = struct.unpack("!Q", _read(stream, 8))
        if first & CONTROL or not second & MASKED or sum(map(len, parts)) + length > LARGEST_HEADER + LARGEST_PAYLOAD:
            raise EOFError("not a message")
        key = np.frombuffer(_read(stream, 4), np.uint8)
        parts.append((np.frombuffer(_read(stream, length), np.uint8) ^ np.resize(key, length)).tobytes())
        if first & FINAL:
            return b"".join(parts)


def _read(stream: BufferedIOBase, length: int) -> bytes:
    data = stream.read(length)
    if len(data) < length:
        raise EOFError("the stream has ended")
    return data
