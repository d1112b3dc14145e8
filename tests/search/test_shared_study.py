"""One study in a database, many workers: nothing is lost, nothing counts twice, nothing stays running."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from search.evaluation import Evaluation
from search.shared_study import SharedStudy, checked_url
from search.workers import Measure
from spaces.choice import Architecture
from spaces.errors import UserError
from tests.cluster import postgresql

Call = Callable[..., Any]
Job = tuple[str, ...]
WORKER = Path(__file__).with_name("study_worker.py")


@pytest.fixture(scope="module")
def server() -> Iterator[postgresql.Server]:
    if postgresql.missing():
        pytest.skip(postgresql.missing())
    with postgresql.Server() as server:
        yield server


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts workers; those that are left are killed in the end."""
    started: list[subprocess.Popen[str]] = []
    (tmp_path / "done").mkdir()

    def start_one(url: str, seconds: float, *count: str) -> subprocess.Popen[str]:
        arguments = [sys.executable, str(WORKER), url, "key", str(tmp_path / "done"), str(seconds), *count]
        environment = {**os.environ, "PYTHONPATH": str(WORKER.parents[2])}
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment)
        started.append(process)
        return process

    yield start_one
    for process in started:
        process.kill()
        process.communicate()


def evaluated(folder: Path) -> Counter[int]:
    return Counter(int(line) for file in (folder / "done").iterdir() for line in file.read_text().splitlines())


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_killed_worker_and_a_restarted_database_lose_nothing(server: Any, start: Any, tmp_path: Path) -> None:
    helpers = [start(server.url, 0.03) for _ in range(3)]
    assert [helper.stdout.readline() for helper in helpers] == ["ready\n"] * 3
    leader = start(server.url, 0.03, "200")
    done = tmp_path / "done"
    until(lambda: len(list(done.iterdir())) == 4 and evaluated(tmp_path).total() > 60)
    os.kill(helpers[0].pid, signal.SIGKILL)
    until(lambda: evaluated(tmp_path).total() > 100)
    server.stop()
    time.sleep(1.0)
    server.start()
    assert leader.stdout is not None
    assert leader.stdout.readline() == "ready\n"
    result = {number: (accuracy, loss) for number, accuracy, loss in json.loads(leader.stdout.readline())}
    assert result == {number: (number / 1000, 0.5) for number in range(200)}
    study = SharedStudy(server.url, "key", never)
    trials = study.study.trials
    study.close()
    states = Counter(trial.state for trial in trials)
    assert states[TrialState.COMPLETE] == 200
    assert states[TrialState.RUNNING] == states[TrialState.WAITING] == 0
    numbers = Counter(t.user_attrs["architecture"] for t in trials if t.state == TrialState.COMPLETE)
    assert set(numbers.values()) == {1}
    assert len([file for file in done.iterdir() if file.read_text()]) == 4


def never(architecture: Architecture) -> Evaluation:
    raise AssertionError(f"{architecture} is not to be evaluated here")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'study.db'}"


Open = Callable[..., SharedStudy]


@pytest.fixture
def shared(url: str) -> Iterator[Open]:
    """Joins a study of that database; left again in the end."""
    joined: list[SharedStudy] = []

    def join(measure: Measure, key: str = "key", url: str = url) -> SharedStudy:
        joined.append(SharedStudy(url, key, measure))
        return joined[-1]

    yield join
    for study in joined:
        study.close()


def numbered(count: int) -> list[Architecture]:
    return [Architecture({"number": number}) for number in range(count)]


def test_what_is_known_is_not_evaluated_again(shared: Open) -> None:
    asked: list[Architecture] = []

    def measure(architecture: Architecture) -> Evaluation:
        asked.append(architecture)
        return Evaluation(int(architecture["number"]) / 10, 0.25)

    first = dict(shared(measure).evaluate(numbered(4)))
    assert first == {a: Evaluation(int(a["number"]) / 10, 0.25) for a in numbered(4)}
    assert sorted(asked, key=repr) == numbered(4)
    again = dict(shared(measure).evaluate(numbered(5)))
    assert again == {**first, numbered(5)[4]: Evaluation(0.4, 0.25)}
    assert asked[4:] == numbered(5)[4:]
    assert dict(shared(never).evaluate(numbered(5))) == again


def test_of_another_supernet_nothing_is_known(shared: Open) -> None:
    dict(shared(lambda a: Evaluation(0.5, 1.0), "one").evaluate(numbered(1)))
    assert dict(shared(lambda a: Evaluation(0.25, 1.0), "two").evaluate(numbered(1))) == {numbered(1)[0]: Evaluation(0.25, 1.0)}


def test_a_network_asked_for_by_two_is_evaluated_once(shared: Open) -> None:
    study = shared(lambda a: Evaluation(0.5, 1.0))
    study._ask([numbered(1)[0].to_json()] * 2)
    assert [study.serve_some() for _ in range(3)] == [1, 1, 0]
    states = Counter(trial.state for trial in study.study.trials)
    assert states == {TrialState.COMPLETE: 1, TrialState.FAIL: 1}
    assert dict(study.evaluate(numbered(1))) == {numbered(1)[0]: Evaluation(0.5, 1.0)}


def test_an_evaluation_that_fails_is_told_and_not_tried_for_ever(shared: Open) -> None:
    def fails(architecture: Architecture) -> Evaluation:
        raise ZeroDivisionError("by nothing")

    with pytest.raises(ZeroDivisionError):
        dict(shared(fails).evaluate(numbered(1)))
    with pytest.raises(UserError, match="ZeroDivisionError: by nothing"):
        dict(shared(never).evaluate(numbered(1)))


@pytest.mark.parametrize("attributes", [{}, {"loss": "low"}, {"loss": float("nan")}])
def test_figures_in_the_database_are_not_believed(shared: Open, attributes: dict[str, Any]) -> None:
    study = shared(never)
    text = numbered(1)[0].to_json()
    study.study.add_trial(optuna.trial.create_trial(value=0.5, user_attrs={"architecture": text, **attributes}))
    with pytest.raises(UserError, match="delete that study"):
        dict(study.evaluate(numbered(1)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nonsense", "is no address"),
        ("postgresql://me:secret@host/name", "PGPASSWORD"),
        ("oracle://host/name", "is not installed"),
        ("nosuch://host/name", "is not installed"),
    ],
)
def test_addresses_that_are_not_allowed(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as told:
        checked_url(text)
    assert "secret" not in str(told.value)


def test_a_database_that_does_not_answer_is_one_line(call: Call, finished: Path, tmp_path: Path, tiny_job: Job) -> None:
    constants = {"search.shared_study.PATIENCE_S": 1.0}
    url = "study.storage=postgresql://nobody@127.0.0.1:9/none"
    ended = call(tmp_path, *tiny_job, "run=run", url, constants=constants)
    assert ended.status == 2
    assert len(ended.err.splitlines()) == 1
    assert "does not answer" in ended.err


def test_a_run_by_a_shared_study_is_the_run_of_one_process(call: Call, finished: Path, tmp_path: Path, tiny_job: Job) -> None:
    ended = call(tmp_path, *tiny_job, "run=run", f"study.storage=sqlite:///{tmp_path / 'study.db'}")
    assert ended.status == 0, ended.err
    assert (tmp_path / "run" / "front.csv").read_bytes() == (finished / "front.csv").read_bytes()
    written = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not any(b"study.db" in content for content in written)


@pytest.mark.parametrize(
    "given",
    [
        ("study.storage=postgresql://me:secret@127.0.0.1/name",),
        ("-m", "seed=0,1", "study.storage=postgresql://me:secret@127.0.0.1/name"),
        ("-m", "seed=0,1", "study.storage=postgresql://me:a/secret@127.0.0.1/name"),
        ("-m", "seed=0,1", 'study.storage="postgresql://me@127.0.0.1/name?password=secret"'),
        ("-m", "seed=0,1", "evaluator.address=me:secret@head:8786"),
        ("-m", "seed=0,1", "devices.x86.reach.host=me:secret@pi"),
    ],
)
def test_a_password_is_refused_and_written_nowhere(call: Call, tmp_path: Path, tiny_job: Job, given: tuple[str, ...]) -> None:
    ended = call(tmp_path, *given, *tiny_job)
    assert ended.status == 2
    assert len(ended.err.splitlines()) == 1
    assert "PGPASSWORD" in ended.err
    assert "secret" not in ended.err + ended.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("url", ["postgresql://me:secret@host/name", "postgresql://me@host/name?sslpassword=secret"])
def test_a_password_of_a_configuration_is_refused(url: str) -> None:
    with pytest.raises(UserError, match=r"the address without: postgresql://me@host/name$"):
        checked_url(url)


def test_a_password_of_the_environment_is_written_nowhere(tiny_job: Job, tmp_path: Path) -> None:
    """A server that asks for one; first with a wrong one, which is told without it."""
    if postgresql.missing():
        pytest.skip(postgresql.missing())
    with postgresql.Server(password="open-sesame") as server:
        stages = "stages=[tables,supernet,predictors]"
        command = [sys.executable, "-m", "search", *tiny_job, "run=run", f"study.storage={server.url}", stages]
        ends = []
        for password in ("no-such-word", "open-sesame"):
            environment = {**os.environ, "PYTHONPATH": str(WORKER.parents[2]), "PGPASSWORD": password}
            ends.append(subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240))
    assert [ended.returncode for ended in ends] == [2, 0], ends
    assert len(ends[0].stderr.splitlines()) == 1
    assert "password authentication failed" in ends[0].stderr
    assert "give the password by PGPASSWORD" in ends[0].stderr
    assert "tables" not in ends[0].stdout  # nothing was measured before
    written = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    said = [(ended.stdout + ended.stderr).encode() for ended in ends]
    assert not any(word in text for word in (b"no-such-word", b"open-sesame") for text in (*written, *said))


def test_a_process_that_waits_for_the_run_works_for_it(call: Call, tiny_job: Job, tmp_path: Path) -> None:
    """The same command twice: one leads, the other evaluates; then the leader is killed, and the other ends the run."""
    command = [sys.executable, "-m", "search", *tiny_job, "run=run", f"study.storage=sqlite:///{tmp_path / 'study.db'}"]
    environment = {**os.environ, "PYTHONPATH": str(WORKER.parents[2])}
    command += ["evaluation.initial=120", "stages=[tables,supernet,predictors]"]
    names = ("one", "two")
    outs = [tmp_path / name for name in names]
    processes = []
    for out in outs:
        with out.open("w") as file:
            processes.append(subprocess.Popen(command, stdout=file, stderr=file, cwd=tmp_path, env=environment))
    try:
        until(lambda: any("evaluating for it" in out.read_text() for out in outs), 120)
        helper = next(i for i, out in enumerate(outs) if "evaluating for it" in out.read_text())
        until(lambda: _completed(tmp_path / "study.db") > 30, 120)
        processes[1 - helper].kill()
        assert processes[helper].wait(200) == 0, outs[helper].read_text()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert _completed(tmp_path / "study.db") == 120
    assert "predictors" in outs[helper].read_text()


def test_processes_that_share_a_study_go_on_with_the_focused_supernet(call: Call, tiny_job: Job, tmp_path: Path) -> None:
    """Networks are evaluated first with the supernet as it was trained, and again when it is focused."""
    own = [text for text in tiny_job if not text.startswith("focus.")]
    job = [*own, "focus.candidates=40", "evaluation.initial=60", "stages=[tables,supernet,predictors,focus,study]"]
    command = [sys.executable, "-m", "search", *job, "run=run", f"study.storage=sqlite:///{tmp_path / 'study.db'}"]
    environment = {**os.environ, "PYTHONPATH": str(WORKER.parents[2])}
    with (tmp_path / "out").open("w") as file:
        processes = [subprocess.Popen(command, stdout=file, stderr=file, cwd=tmp_path, env=environment) for _ in range(2)]
        ends = [process.wait(300) for process in processes]
    assert ends == [0, 0], (tmp_path / "out").read_text()
    assert call(tmp_path, *job, "run=alone").status == 0
    assert (tmp_path / "run" / "front.csv").read_bytes() == (tmp_path / "alone" / "front.csv").read_bytes()
    assert _completed(tmp_path / "study.db") >= 2 * 60


def _completed(database: Path) -> int:
    if not database.exists():
        return 0
    with contextlib.closing(sqlite3.connect(database)) as connection, contextlib.suppress(sqlite3.OperationalError):
        return int(connection.execute("select count(*) from trials where state = 'COMPLETE'").fetchone()[0])
    return 0
