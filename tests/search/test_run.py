"""A run's folder: stages are skipped, done again or continued, and the record is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from search.run import Run, digest
from spaces.errors import UserError


class Work:
    """An action that counts its calls and leaves a file."""

    def __init__(self, run: Run, facts: dict[str, Any] | None = None) -> None:
        self.run, self.facts, self.calls = run, facts or {}, 0

    def __call__(self) -> dict[str, Any]:
        self.calls += 1
        (self.run.path / "folder").mkdir(exist_ok=True)
        (self.run.path / "folder" / f"{self.calls}").touch()
        (self.run.path / "file").write_text("made")
        return dict(self.facts)


LEAVES = ("folder", "file")


def test_a_stage_is_done_once_and_skipped_after(tmp_path: Path) -> None:
    run = Run(tmp_path / "deep" / "run")
    work = Work(run, {"figure": 3})
    assert run.do("study", "a", LEAVES, work)
    assert not run.do("study", "a", LEAVES, work)
    again = Run(run.path)
    assert not again.do("study", "a", LEAVES, work)
    assert work.calls == 1
    record = again.record("study")
    assert record is not None
    assert (record.done, record.fingerprint, record.output, record.facts) == (True, "a", "a", {"figure": 3})
    assert record.seconds >= 0
    assert again.facts("study") == {"figure": 3}
    assert (again.record("export"), again.facts("export")) == (None, {})


def test_another_fingerprint_removes_what_was_left_and_does_it_again(tmp_path: Path) -> None:
    run = Run(tmp_path)
    (tmp_path / "other").write_text("of another stage")
    work = Work(run)
    run.do("study", "a", LEAVES, work)
    assert run.do("study", "b", LEAVES, work)
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["2"]
    assert (tmp_path / "other").exists()
    record = run.record("study")
    assert record is not None
    assert record.fingerprint == "b"


def test_what_a_killed_stage_left_stays_for_its_next_attempt(tmp_path: Path) -> None:
    run = Run(tmp_path)

    def killed() -> dict[str, Any]:
        (tmp_path / "file").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.do("study", "a", LEAVES, killed)
    record = Run(tmp_path).record("study")
    assert record is not None
    assert not record.done
    with pytest.raises(UserError, match=r"stage study has not finished .* run: python -m search run="):
        Run(tmp_path).output("study")
    again = Run(tmp_path)
    again.do("study", "a", LEAVES, lambda: {"seen": (tmp_path / "file").read_text()})
    assert again.facts("study") == {"seen": "half"}
    finished = Run(tmp_path).record("study")
    assert finished is not None
    assert finished.done
    assert finished.seconds >= record.seconds


def test_leftovers_of_a_stage_that_no_record_knows_are_not_believed(tmp_path: Path) -> None:
    """`stages.json` was deleted, as the message about a damaged one advises: nothing tells which settings left these files."""
    (tmp_path / "file").write_text("of unknown settings")
    Run(tmp_path).do("study", "a", ("file",), dict)
    assert not (tmp_path / "file").exists()


def test_the_output_is_what_an_action_says_it_made(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.do("tables", "a", (), lambda: {"output": "b", "pairs": 3})
    assert (run.output("tables"), run.facts("tables")) == ("b", {"pairs": 3})


def test_links_are_removed_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").touch()
    run = Run(tmp_path / "run")
    run.do("study", "a", ("link",), dict)
    (tmp_path / "run" / "link").symlink_to(tmp_path / "elsewhere")
    run.do("study", "b", ("link",), dict)
    assert (tmp_path / "elsewhere" / "precious").exists()
    assert not (tmp_path / "run" / "link").exists()


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "3", '{"study": null}', '{"study": {"done": true}}', '{"study": {"colour": 1}}', "\x00", '"text"'],
)
def test_a_damaged_record_is_one_line_and_stays(tmp_path: Path, content: str) -> None:
    (tmp_path / "stages.json").write_text(content)
    with pytest.raises(UserError, match=r"stages\.json is damaged") as caught:
        Run(tmp_path)
    assert "\n" not in str(caught.value)
    assert "delete it" in str(caught.value)
    assert (tmp_path / "stages.json").read_text() == content


def test_a_record_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "stages.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="damaged"):
        Run(tmp_path)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/nowhere")):
        with pytest.raises(UserError, match=r"cannot make the run folder .* run=FOLDER"):
            Run(path)


def test_digests_tell_values_apart() -> None:
    values: list[tuple[object, ...]] = [(), (1,), ("1",), (1, 2), ([1, 2],), ({"a": 1},), ({"a": 2},), (None,), (0.1,)]
    assert len({digest(*v) for v in values}) == len(values)
    assert digest({"a": 1, "b": 2}) == digest(json.loads('{"b": 2, "a": 1}'))
