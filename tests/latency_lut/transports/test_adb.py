"""The adb transport against a stand-in of adb that writes down what it is asked, and does it on this machine."""

import sys

import pytest

from latency_lut.transports import Adb, LinkError, RemoteError
from tests.latency_lut import stand_in_adb


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """A function that tells what was asked so far."""
    return stand_in_adb.install(tmp_path, monkeypatch)


@pytest.fixture
def phone(tmp_path):
    return Adb("phone-1", str(tmp_path / "there"), sys.executable)


def test_every_word_arrives_as_it_is(asked, phone):
    words = ["", "a b", "'", '"', "$(id)", "`id`", ";id", "&&", "*", "~", "\\", "-s", "é"]
    (line,) = phone.run([phone.python, "-c", "import sys; print(ascii(sys.argv[1:]))", *words])
    assert line.decode() == f"{words!a}\n"
    ((flag, serial, verb, command),) = asked()
    assert (flag, serial, verb) == ("-s", "phone-1", "shell")
    assert command.startswith(f"{sys.executable} -c ")


def test_a_file_is_pushed_into_a_folder_that_is_made(asked, phone, tmp_path, monkeypatch):
    (tmp_path / "-source").write_bytes(b"\0content")
    monkeypatch.chdir(tmp_path)
    phone.send((tmp_path / "-source").relative_to(tmp_path), f"{phone.folder}/deep/copy", 5)
    assert (tmp_path / "there" / "deep" / "copy").read_bytes() == b"\0content"
    assert asked() == [
        ["-s", "phone-1", "shell", f"mkdir -p {phone.folder}/deep"],
        ["-s", "phone-1", "push", f"{tmp_path}/-source", f"{phone.folder}/deep/copy"],
    ]


def test_a_failing_command_is_told_from_a_device_that_is_gone(asked, phone):
    with pytest.raises(RemoteError, match=r"too bad \(status 3\)"):
        list(phone.run(["sh", "-c", "echo too bad >&2; exit 3"]))
    for command in ("echo error: closed >&2; exit 1", "exit 255"):
        with pytest.raises(LinkError):
            list(phone.run(["sh", "-c", command]))
    with pytest.raises(LinkError, match="device 'phone-2' not found"):
        list(Adb("phone-2").run(["true"]))
