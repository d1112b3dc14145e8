"""A bundle for browsers, really: served, opened in headless Chromium, measured, downloaded, imported."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from latency_lut.bundle import write_bundle
from latency_lut.device import Device
from latency_lut.importing import import_results
from latency_lut.measuring import MeasuringSettings
from latency_lut.profile import pairs_of
from latency_lut.table import LatencyTable
from latency_lut.web import chromium, package
from spaces.errors import UserError

BROWSER = Device("browser", "onnxruntime_web", "wasm-browser", reach="bundle")
QUICK = MeasuringSettings(max_pairs=14, networks=1, rounds=3, visit_s=0.0002)


def has(program, *arguments):
    try:
        program(*arguments)
    except UserError:
        return False
    return True


needs_node = pytest.mark.skipif(not has(package.program, "npm"), reason="npm is not installed")
needs_chromium = pytest.mark.skipif(not has(chromium.browser) or not has(package.program, "npm"), reason="no Chromium here")


class Page:
    """A page in headless Chromium, driven over its debugging pipe."""

    def __init__(self, process, url, downloads):
        self._process, self._last = process, 0
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))
        target = self.call("Target.createTarget", url=url)["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def call(self, method, session=None, **parameters):
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters, **({"sessionId": session} if session else {})}
        self._process.stdin.write(json.dumps(message).encode() + b"\0")
        self._process.stdin.flush()
        while True:
            answer = json.loads(b"".join(iter(lambda: self._process.stdout.read(1), b"\0")))
            if answer.get("id") == self._last:
                return answer.get("result", {})

    def evaluate(self, expression):
        """The value of an expression in the page; `None` too while the page is being loaded."""
        answer = self.call("Runtime.evaluate", self._session, expression=expression, returnByValue=True)
        return answer.get("result", {}).get("value")

    def wait_for(self, expression, seconds=90):
        end = time.monotonic() + seconds
        while not self.evaluate(expression):
            problem = self.evaluate("document.getElementById('problem')?.textContent")
            assert not problem, problem
            assert time.monotonic() < end, self.evaluate("document.body.innerText")
            time.sleep(0.1)


@contextmanager
def chromium_at(url, downloads):
    path, _ = chromium.browser()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless=new", f"--user-data-dir={profile}", "--no-first-run", "--disable-gpu", "--disable-dev-shm-usage"]
        options += ["--remote-debugging-pipe", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        command = ["/bin/sh", "-c", 'exec "$@" 3<&0 4>&1', "sh", path, *options]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            try:
                yield Page(process, url, downloads)
            finally:
                process.kill()


@contextmanager
def served(bundle):
    """The bundle's own server; its address."""
    command = [sys.executable, "-I", str(bundle), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/") as server:
        try:
            yield server.stdout.readline().split()[1]
        finally:
            server.kill()


@pytest.fixture(scope="module")
def bundle(tiny_space, tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "browser-bundle.zip"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("latency_lut.bundle.NETWORK_VISIT_S", 0.0002)
        patch.setattr("latency_lut.bundle.NETWORK_ROUNDS", 3)
        write_bundle(tiny_space, BROWSER, path.with_name("none"), path, QUICK)
    return path


@needs_chromium
def test_a_page_measures_and_offers_what_import_takes(tiny_space, bundle, tmp_path):
    with served(bundle) as url, chromium_at(url, tmp_path) as page:
        page.wait_for("!document.getElementById('start').disabled")
        assert page.evaluate("crossOriginIsolated")
        page.evaluate("document.getElementById('start').click()")
        page.wait_for("document.querySelector('progress').value >= 14")
        page.evaluate("location.reload()")  # in the middle: what is measured stays
        page.wait_for("document.getElementById('said')?.textContent.startsWith('Ready')")
        assert page.evaluate("document.querySelector('progress').value") >= 14
        page.evaluate("document.getElementById('start').click()")
        page.wait_for("!document.getElementById('download').hidden")
        page.evaluate("document.getElementById('download').click()")
        results = tmp_path / "results.jsonl"
        end = time.monotonic() + 20
        while not results.exists() and time.monotonic() < end:
            time.sleep(0.1)
    import_results(tiny_space, results, tmp_path, bundles=(bundle,)).save()
    table = LatencyTable.load(tmp_path / "browser.parquet")
    table.check(tiny_space, BROWSER)
    wanted, _ = pairs_of(tiny_space, np.random.default_rng(0), 14, description=BROWSER.describe())
    assert set(table.entries) == set(wanted)
    assert {network.source for network in table.networks} == {"random", "graded"}
    assert "Chrome/" in str(table.device["host"])
    assert table.device["runtime_version"] == package.version()
    assert min(entry.us for entry in table.entries.values()) > 0.5


@needs_node
def test_the_server_gives_the_files_of_the_bundle_and_nothing_else(bundle):
    with served(bundle) as url:
        with urllib.request.urlopen(url) as answer:
            assert b"<title>Netwright" in answer.read()
            assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        for name in ("serve.py", "../etc/passwd", "%2e%2e/etc/passwd", "/etc/passwd", "models", ""):
            if name:
                with pytest.raises(urllib.error.HTTPError, match="404") as raised:
                    urllib.request.urlopen(url + name)
                raised.value.close()


@needs_node
def test_the_pages_checksum_is_sha_256(tmp_path):
    lengths = (0, 1, 55, 56, 63, 64, 65, 1000)
    script = f"""import {{ sha256 }} from "{package.FOLDER / "sha256.mjs"}";
for (const n of {list(lengths)}) console.log(sha256(new Uint8Array(n).map((_, i) => i * 31 + n)));"""
    (tmp_path / "sums.mjs").write_text(script)
    said = subprocess.run([package.node()[0], tmp_path / "sums.mjs"], capture_output=True, text=True, check=True).stdout.split()
    assert said == [hashlib.sha256(bytes((i * 31 + n) % 256 for i in range(n))).hexdigest() for n in lengths]


@needs_node
def test_a_bundle_for_a_browser_is_the_same_bytes_every_time(tiny_space, bundle):
    again = bundle.with_name("again.zip")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("latency_lut.bundle.NETWORK_VISIT_S", 0.0002)
        patch.setattr("latency_lut.bundle.NETWORK_ROUNDS", 3)
        write_bundle(tiny_space, BROWSER, bundle.with_name("none"), again, QUICK)
    assert Path(again).read_bytes() == bundle.read_bytes()
