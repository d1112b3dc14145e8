"""Serves the page of a bundle to a browser, so that it can be measured.

    python NAME-bundle.zip [--host HOST] [--port PORT]
    python serve.py [--host HOST] [--port PORT]

Needs Python 3.9 or newer, nothing else. The headers isolate the page from other origins, which gives it a fine clock and
threads, as long as the browser runs on this machine. With `--host 0.0.0.0` others see the page too, a phone for one; unless
something in front of it speaks https, browsers then give it a coarser clock and one thread.
"""

from __future__ import annotations

import argparse
import json
import sys
import zipfile
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".mjs": "text/javascript",
    ".wasm": "application/wasm",
    ".json": "application/json",
    ".onnx": "application/octet-stream",
}
PAGE, MANIFEST = "index.html", "manifest.json"


def read_files(path: Path) -> dict[str, bytes]:
    """The files of a bundle that a browser needs, by their path, from its zip file or its folder."""
    archive = None if path.is_dir() else zipfile.ZipFile(path)

    def read(name: str) -> bytes:
        return (path / name).read_bytes() if archive is None else archive.read(name)

    manifest = json.loads(read(MANIFEST))
    names = [MANIFEST, *manifest["files"], *(f"models/{model['id']}.onnx" for model in manifest["models"])]
    found = {name: read(name) for name in names if Path(name).suffix in TYPES}
    if archive is not None:
        archive.close()
    return found


def handler(files: dict[str, bytes]) -> type[BaseHTTPRequestHandler]:
    """What answers requests for these files, and for nothing else."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            name = self.path.partition("?")[0].lstrip("/") or PAGE
            status = HTTPStatus.OK if name in files else HTTPStatus.NOT_FOUND
            body = files.get(name, b"")
            self.send_response(status)
            self.send_header("Content-Type", TYPES.get(Path(name).suffix, "text/plain"))
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Nothing: by default every request is a line on stderr."""

    return Handler


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; the exit status."""
    parser = argparse.ArgumentParser(description="Serve the page of a bundle to a browser.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all of this machine")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    given = parser.parse_args(arguments)
    files = read_files(Path(__file__).resolve().parent)
    try:
        server = ThreadingHTTPServer((given.host, given.port), handler(files))
    except OSError as error:
        print(
            f"error: cannot listen on {given.host} port {given.port} ({error.strerror}); choose another --port", file=sys.stderr
        )
        return 2
    print(f"open http://{given.host}:{server.server_address[1]}/ in the browser to be measured; end with Ctrl-C", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
