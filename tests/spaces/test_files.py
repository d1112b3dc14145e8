"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spaces.errors import UserError
from spaces.files import write_atomically


@settings(max_examples=30, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.text(st.characters(exclude_categories=["Cs"]), max_size=200)))
def test_content_comes_back(tmp_path_factory: pytest.TempPathFactory, content: bytes | str) -> None:
    path = tmp_path_factory.getbasetemp() / "written" / "deep" / "file"
    write_atomically(path, content)
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_folder_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file" / "below", Path("/proc/nowhere/file")):
        with pytest.raises(UserError, match="cannot write") as caught:
            write_atomically(path, "new")
        assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_target_that_is_a_folder_stays_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "taken" / "inside").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot write"):
        write_atomically(tmp_path / "taken", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("event", ["open", "os.rename"])
def test_a_kill_at_any_step_leaves_the_old_content(tmp_path: Path, event: str) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")
    pid = os.fork()
    if pid == 0:
        import sys

        def watch(name: str, arguments: tuple[object, ...]) -> None:
            if name == event and any(str(path.parent) in str(a) for a in arguments):
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        write_atomically(path, "new" * 10_000)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new"
