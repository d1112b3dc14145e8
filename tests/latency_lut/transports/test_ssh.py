"""The ssh transport against a real sshd on loopback."""

import os
import sys
import threading

import pytest

from latency_lut.transports import LinkError, RemoteError, Ssh, ssh
from spaces.errors import UserError
from tests.latency_lut import loopback_sshd

pytestmark = pytest.mark.skipif(bool(loopback_sshd.missing()), reason=loopback_sshd.missing())

# What a shell, ssh or Python might read as something else than a word.
HOSTILE_WORDS = [
    "",
    " ",
    "a b",
    "'",
    '"',
    "$(id)",
    "`id`",
    "$HOME",
    ";id",
    "&",
    "|",
    ">x",
    "*",
    "~",
    "\\",
    "-o",
    "--",
    "é",
    "a\nb",
    "!!",
]


@pytest.fixture
def pi(sshd, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", sshd.path)
    return Ssh("pi", str(tmp_path / "there"), sys.executable)


def test_every_word_arrives_as_it_is(pi):
    program = "import sys; print(ascii(sys.argv[1:]))"
    (line,) = pi.run([pi.python, "-c", program, *HOSTILE_WORDS])
    assert line.decode() == f"{HOSTILE_WORDS!a}\n"


def test_lines_come_while_the_command_runs(pi, tmp_path):
    (tmp_path / "more").touch()
    program = (
        f"import os,time; print(1,flush=True)\nwhile os.path.exists({str(tmp_path / 'more')!r}): time.sleep(0.01)\nprint(2)"
    )
    lines = pi.run([pi.python, "-c", program])
    assert next(lines) == b"1\n"
    (tmp_path / "more").unlink()
    assert list(lines) == [b"2\n"]


def test_a_failing_command_is_no_broken_link(pi):
    with pytest.raises(RemoteError) as caught:
        list(pi.run([pi.python, "-c", "import sys; print('first', file=sys.stderr); sys.exit('too bad')"]))
    assert (caught.value.status, caught.value.said) == (1, "too bad")
    with pytest.raises(RemoteError) as caught:
        list(pi.run(["no_such_program"]))
    assert caught.value.status == 127


def test_what_a_device_says_cannot_move_the_cursor(pi):
    with pytest.raises(RemoteError) as caught:
        list(pi.run([pi.python, "-c", r"import sys; sys.exit('\x1b[2J\x07gone\r' * 100)"]))
    assert caught.value.said.isprintable()
    assert len(caught.value.said) <= 200


def test_a_killed_connection_is_told_from_a_failing_command(pi, sshd):
    lines = pi.run([pi.python, "-c", "import time; print(1,flush=True); time.sleep(60)"])
    next(lines)
    assert sshd.kill_sessions() >= 1
    with pytest.raises(LinkError):
        next(lines)


def test_a_link_that_falls_silent_is_noticed(pi, sshd, monkeypatch):
    monkeypatch.setitem(ssh.OPTIONS, "ServerAliveInterval", "1")
    monkeypatch.setitem(ssh.OPTIONS, "ServerAliveCountMax", "1")
    lines = Ssh("cut", pi.folder, pi.python).run([pi.python, "-c", "import time; print(1,flush=True); time.sleep(30)"])
    next(lines)
    sshd.link.silence()
    with pytest.raises(LinkError, match="not responding"):
        next(lines)


@pytest.mark.parametrize(
    ("host", "said"), [("stranger", "Host key verification failed"), ("no.such.host.invalid", "resolve|refused")]
)
def test_a_host_that_cannot_be_had_is_a_broken_link(pi, host, said):
    with pytest.raises(LinkError, match=said):
        list(Ssh(host, pi.folder, pi.python).run(["true"]))


def test_a_copy_goes_on_from_where_it_broke(pi, tmp_path):
    source, there = tmp_path / "source", tmp_path / "there" / "deep" / "copy"
    content = os.urandom(300_000)
    source.write_bytes(content)
    pi.send(source, str(there), 0)
    assert there.read_bytes() == content
    there.write_bytes(b"0" * 100_000)
    pi.send(source, str(there), 100_000)
    assert there.read_bytes() == b"0" * 100_000 + content[100_000:]


def test_a_stopped_command_ends_soon_and_says_nothing(pi):
    stopped = threading.Event()
    lines = pi.run([pi.python, "-c", "import time; print(1,flush=True); time.sleep(60)"], stopped=stopped)
    next(lines)
    stopped.set()
    assert list(lines) == []


def test_input_reaches_the_command(pi, tmp_path):
    (tmp_path / "in").write_bytes(b"\x00\xffabc")
    with (tmp_path / "in").open("rb") as file:
        (line,) = pi.run([pi.python, "-c", "import sys; print(sys.stdin.buffer.read())"], stdin=file)
    assert line == b"b'\\x00\\xffabc'\n"


def test_a_client_that_is_not_there_is_a_mistake(pi, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"cannot run ssh .*; install it or put it on the PATH"):
        list(pi.run(["true"]))
