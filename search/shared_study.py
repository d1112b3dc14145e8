"""One study, many workers: evaluations as trials of an Optuna study in a database that several processes share.

The process that holds the run (`search.claims`) leads: it asks for the networks of a round in one batch, as waiting trials.
Every process that was started with the same command and waits for the run takes trials meanwhile, evaluates them and stores the
result; so does the leader. When the leader dies, a waiting process takes the run over and goes on. The rounds follow from the
seed and from the evaluations, so their result does not depend on how many workers there were, nor on who did what.

Who evaluates a trial beats in the database while it does. When the beat stands still by the database's own clock, the trial is
failed and its network asked for again, so that no trial stays `RUNNING`. A network that two leaders asked for at once is
evaluated for the trial of the lower number only. A trial holds its architecture as an attribute and no parameters: a database
books each parameter for itself, which for sixty choices costs more than an evaluation. The archive in the run folder has them.
"""

from __future__ import annotations

import math
import os
import random
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import TypeVar

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import create_engine
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, NoSuchModuleError, SQLAlchemyError

from latency_lut.command import SECRET
from search.evaluation import Evaluation
from search.workers import Measure, Workers
from spaces.choice import Architecture
from spaces.errors import UserError

HEARTBEAT_S = 5
GRACE_S = 60
POLL_S = 0.5
KEPT = 16
PATIENCE_S = 600.0
ATTEMPTS = 5
REFUSED = re.compile("authentication failed|no password supplied|Access denied", re.IGNORECASE)
ALIVE = (TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE)

T = TypeVar("T")


def checked_url(text: str) -> URL:
    """The address of a database, with a driver that is installed.

    Raises:
        UserError: it does not read as one, holds a password, or its driver is missing.
    """
    try:
        url = make_url(text)
    except ArgumentError:
        raise UserError("study.storage is no address of a database; allowed is such as postgresql://user@host/name") from None
    secrets = [name for name in url.query if SECRET.search(f"?{name}=")]
    if url.password is not None or secrets:
        raise UserError(
            "study.storage has a password in it, which would be written down; give it by PGPASSWORD or ~/.pgpass "
            f"and the address without: {url._replace(password=None).difference_update_query(secrets).render_as_string()}"
        )
    if url.drivername == "postgresql" and find_spec("psycopg2") is None:
        url = url.set(drivername="postgresql+psycopg")
    try:
        url.get_dialect().import_dbapi()
    except (ImportError, NoSuchModuleError):
        raise UserError(
            f"study.storage: the driver of {url.drivername} is not installed; run: pip install -e '.[cluster]'"
        ) from None
    return url


def insist(operation: Callable[[], T], url: URL, say: Callable[[str], None], patience_s: float | None = None) -> T:
    """Try again while a database does not answer.

    Raises:
        UserError: it did not for `PATIENCE_S` seconds, or it refuses the user or the password.
    """
    begin, pause, told = time.monotonic(), 0.2, False
    where = url.render_as_string(hide_password=True)
    while True:
        try:
            return operation()
        except (StorageInternalError, SQLAlchemyError) as error:
            reason = " ".join(str(error.__cause__ or error).split())[:200]
            if REFUSED.search(reason):
                raise UserError(
                    f"the database {where} refuses ({reason}); give the password by PGPASSWORD or ~/.pgpass"
                ) from error
            if time.monotonic() - begin > (PATIENCE_S if patience_s is None else patience_s):
                raise UserError(
                    f"the database {where} does not answer ({reason}); start it and run the same command"
                ) from error
            if not told and not isinstance(error, IntegrityError):
                say(f"  the database {where} does not answer ({reason}); waiting")
                told = True
        time.sleep(pause * random.uniform(0.5, 1.5))
        pause = min(2 * pause, 5.0)


def check_answers(text: str, say: Callable[[str], None]) -> None:
    """Make sure that there is a database, before anything takes time.

    Raises:
        UserError: there is none, or it refuses.
    """
    url = checked_url(text)
    engine = create_engine(url)
    try:
        insist(lambda: engine.connect().close(), url, say, PATIENCE_S / 10)
    finally:
        engine.dispose()


class SharedStudy(Workers):
    """Evaluate by a shared study.

    Args:
        url: of the database.
        key: fingerprint of supernet and data; evaluations with another key are of another study.
        measure: evaluates an architecture in this process.
        say: tells a line.

    Raises:
        UserError: the database does not answer, or its address is not allowed.
    """

    def __init__(self, url: str, key: str, measure: Measure, say: Callable[[str], None] = lambda line: None) -> None:
        self.url, self.key, self.measure, self.say = checked_url(url), key, measure, say
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            self.storage = insist(self._connect, self.url, self.say, PATIENCE_S / 10)
        self.study = self._insist(self._join)
        self._id = self.study._study_id
        self._swept = 0.0
        self._random = random.Random(os.getpid())
        self._kept: list[tuple[FrozenTrial, int]] = []

    def _connect(self) -> RDBStorage:
        return RDBStorage(
            self.url.render_as_string(hide_password=False),
            engine_kwargs={"pool_pre_ping": True},
            heartbeat_interval=HEARTBEAT_S,
            grace_period=GRACE_S,
        )

    def _join(self) -> optuna.Study:
        sampler = optuna.samplers.RandomSampler()  # never asked: every trial comes with its architecture
        name = f"netwright-{self.key}"
        return optuna.create_study(
            storage=self.storage, study_name=name, direction="maximize", sampler=sampler, load_if_exists=True
        )

    # -- asking ---------------------------------------------------------------------------------------------------------------

    def evaluate(self, architectures: Sequence[Architecture]) -> Iterator[tuple[Architecture, Evaluation]]:
        open_ = {a.to_json(): a for a in architectures}
        while open_:
            states = self._look()
            for text in [text for text in open_ if text in states]:
                done = next((t for t in states[text] if t.state == TrialState.COMPLETE), None)
                if done is not None:
                    yield open_.pop(text), _evaluation(done)
            missing = [text for text in open_ if not any(t.state in ALIVE for t in states.get(text, []))]
            for text in missing:
                self._complain(states.get(text, []))
            self._ask(missing)
            if open_ and not missing and not self._serve_kept():
                time.sleep(POLL_S)

    def _look(self) -> dict[str, list[FrozenTrial]]:
        """Trials by their architecture, without those left to another trial of the same network; keeps some that wait.

        Reading the study costs more the more trials wait, so a worker takes several from one look. It keeps few, and at
        random: of many kept by several workers most would be taken when it comes to them.
        """
        self._fail_stale()
        states: dict[str, list[FrozenTrial]] = {}
        for trial in self._insist(lambda: self.study.get_trials(deepcopy=False)):
            if "same_as" not in trial.user_attrs:
                states.setdefault(str(trial.user_attrs.get("architecture")), []).append(trial)
        waiting = [(trial, of) for of in states.values() for trial in of if trial.state == TrialState.WAITING]
        kept = self._random.sample(waiting, min(KEPT, math.ceil(len(waiting) / 4)))
        self._kept = [(trial, next(t.number for t in of if t.state in ALIVE)) for trial, of in kept]
        return states

    def _complain(self, failed: Sequence[FrozenTrial]) -> None:
        errors = [str(trial.user_attrs["error"]) for trial in failed if "error" in trial.user_attrs]
        if errors or len(failed) >= ATTEMPTS:
            why = errors[-1] if errors else "their workers died"
            raise UserError(
                f"an evaluation failed {len(failed)} times: {why}; mend that and delete the study {self.study.study_name}"
            )

    def _ask(self, texts: Sequence[str]) -> None:
        trials = [create_trial(state=TrialState.WAITING, user_attrs={"architecture": text}) for text in texts]
        for trial in trials:
            self._insist(lambda trial=trial: self.study.add_trial(trial))  # type: ignore[misc]

    # -- working --------------------------------------------------------------------------------------------------------------

    def serve_some(self) -> int:
        """Evaluate waiting trials for about half a second, at least one if there are any; returns how many."""
        self._look()
        return self._serve_kept()

    def _serve_kept(self) -> int:
        served, end = 0, time.monotonic() + POLL_S
        while self._kept and (not served or time.monotonic() < end):
            trial, first = self._kept.pop()
            if self._insist(lambda trial=trial: self._take(trial)):  # type: ignore[misc]
                self._work_on(trial, first)
                served += 1
        return served

    def _take(self, trial: FrozenTrial) -> bool:
        # The beat comes first: a trial that runs without one would never be called stale.
        self.storage.record_heartbeat(trial._trial_id)
        try:
            return self.storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
        except UpdateFinishedTrialError:
            return False

    def _work_on(self, trial: FrozenTrial, first: int) -> None:
        """Evaluate a trial that was taken; `first` is the lowest number of a trial of the same network that has not failed."""
        with self._beating(trial._trial_id):
            if first < trial.number:
                self._finish(trial, TrialState.FAIL, {"same_as": first})
                return
            try:
                measured = self.measure(Architecture.from_json(str(trial.user_attrs["architecture"])))
            except Exception as error:
                self._finish(trial, TrialState.FAIL, {"error": f"{type(error).__name__}: {error}"[:500]})
                raise
            self._finish(trial, TrialState.COMPLETE, {"loss": measured.loss}, measured.accuracy)

    def _finish(self, trial: FrozenTrial, state: TrialState, attributes: dict[str, object], value: float | None = None) -> None:
        def write() -> None:
            for name, content in attributes.items():
                self.storage.set_trial_user_attr(trial._trial_id, name, content)
            self.storage.set_trial_state_values(trial._trial_id, state, None if value is None else [value])

        with suppress(UpdateFinishedTrialError):  # written before the connection broke, or given to somebody else
            self._insist(write)

    @contextmanager
    def _beating(self, trial_id: int) -> Iterator[None]:
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(HEARTBEAT_S):
                with suppress(StorageInternalError, SQLAlchemyError):  # the work itself will tell
                    self.storage.record_heartbeat(trial_id)
            self.storage.remove_session()  # of this thread

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _fail_stale(self) -> None:
        if time.monotonic() - self._swept > HEARTBEAT_S:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                self._insist(lambda: fail_stale_trials(self.study))
            self._swept = time.monotonic()

    # -- a database that goes away --------------------------------------------------------------------------------------------

    def _insist(self, operation: Callable[[], T]) -> T:
        return insist(operation, self.url, self.say)

    def close(self) -> None:
        """Leave the database."""
        self.storage.remove_session()
        self.storage.engine.dispose()


def _evaluation(trial: FrozenTrial) -> Evaluation:
    accuracy, loss = trial.values[0], trial.user_attrs.get("loss")
    if not 0.0 <= accuracy <= 1.0 or not isinstance(loss, float) or not math.isfinite(loss):
        raise UserError(f"trial {trial.number} of the shared study has accuracy {accuracy} and loss {loss}; delete that study")
    return Evaluation(accuracy, loss)
