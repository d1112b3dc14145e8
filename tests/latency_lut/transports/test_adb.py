"""The adb transport against a stand-in of adb that writes down what it is asked, and does it on this machine."""

import json
import os
import sys

import pytest

from latency_lut.transports import Adb, LinkError, RemoteError

# As the real one: `shell` hands its arguments, joined, to the device's shell and has its status; complaints have status 1.
STAND_IN = """#!{python}
import json, os, shutil, subprocess, sys
with open({log!r}, "a") as log:
    print(json.dumps(sys.argv[1:]), file=log)
flag, serial, verb, *rest = sys.argv[1:]
if flag != "-s" or serial != "phone-1":
    sys.exit(f"adb: device '{{serial}}' not found")
if verb == "shell":
    sys.exit(subprocess.run(["sh", "-c", " ".join(rest)]).returncode)
if verb == "push":
    shutil.copyfile(*rest)
    print(rest[0] + ": 1 file pushed, 0 skipped.")
    sys.exit(0)
sys.exit(f"adb: unknown command {{verb}}")
"""


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """A list of what was asked so far."""
    stand_in = tmp_path / "bin" / "adb"
    stand_in.parent.mkdir()
    stand_in.write_text(STAND_IN.format(python=sys.executable, log=str(tmp_path / "log")))
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stand_in.parent}:{os.environ['PATH']}")
    return lambda: [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]


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
