"""A real sshd on loopback, for every module that reaches a device over it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.latency_lut import loopback_sshd


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[loopback_sshd.Sshd]:
    server = loopback_sshd.Sshd(tmp_path_factory.mktemp("sshd"))
    yield server
    server.close()
