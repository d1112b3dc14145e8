"""The command line's edge: Hydra, with one line and exit status 2 for what a user can mend.

Used by `python -m latency_lut` and `python -m search`. A bug keeps its traceback and exit status 1.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from spaces.errors import UserError
from spaces.files import is_full, not_written

Command = Callable[[DictConfig], None]
FileCommand = Callable[[Path, DictConfig], None]

CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "conf"
SECRET = re.compile(r"://[^/@\s]*:[^@\s]*@|[?&]\w*(?:password|passwd|passphrase|secret|token)=", re.IGNORECASE)
SECRET_OF_A_HOST = re.compile(r"""['"]?[^/@\s]*:[^@\s]*@""")
USER_STATUS = 2
INTERRUPTED_STATUS = 130


def run_hydra(
    main_function: Command,
    config_name: str,
    commands: Mapping[str, Command] | None = None,
    file_commands: Mapping[str, FileCommand] | None = None,
) -> None:
    """Run a function with the configuration that the command line asks for; with `-m`, once per combination.

    Configurations may use `${scratch_folder:}`, a folder that is removed at the end.

    Args:
        main_function: gets the composed configuration.
        config_name: primary configuration in `conf`.
        commands: what to run instead, by the word that may stand first on the command line.
        file_commands: likewise; behind the word stands the path of a file.

    Raises:
        SystemExit: with status 2 after a user's mistake, told in one line on stderr, or after a group of them; of several jobs
            the others still run.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing and exiting
    process, mistakes = os.getpid(), []
    chosen = main_function

    def job(config: DictConfig) -> None:
        try:
            chosen(config)
        except Exception as error:
            # Elsewhere (a launcher's worker) nobody reads the list; the launcher brings the exception back.
            if os.getpid() != process:
                raise
            errors = error.exceptions if isinstance(error, ExceptionGroup) else [error]
            for line in (line for one in errors if (line := mistake(one)) is not None):
                _print_error(line)
                mistakes.append(line)
            bugs = [one for one in errors if mistake(one) is None]
            if bugs:
                raise (ExceptionGroup(str(error), bugs) if len(bugs) > 1 else bugs[0]) from None

    with tempfile.TemporaryDirectory() as scratch:
        OmegaConf.register_new_resolver("scratch_folder", lambda: scratch, replace=True)
        try:
            if commands is not None:
                chosen = _take_command(commands, file_commands or {}) or main_function
            _check_arguments()
            hydra.main(version_base="1.3", config_path=str(CONFIG_FOLDER), config_name=config_name)(job)()
        except KeyboardInterrupt:
            _print_error("interrupted; the same command goes on from what is saved")
            sys.exit(INTERRUPTED_STATUS)
        except Exception as error:
            line = mistake(error)
            if line is None:
                raise
            _print_error(line)
            mistakes.append(line)
    if mistakes:
        sys.exit(USER_STATUS)


def mistake(error: BaseException) -> str | None:
    """One line about an error when it is a user's, `None` when it is a bug."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return _one_line(str(cause))
        cause = cause.__cause__
    if isinstance(error, InstantiationException):
        return _one_line(str(error)) if _names_wrongly(error) else None
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return _one_line(str(error))
    full = _full_disk(error)
    if full is not None:
        return _one_line(not_written(full.filename or "a file", full))
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # numpy's and Python's, torch's
        return _one_line(f"not enough memory: {error}")[:200].rstrip(": ") + "; with more the same command goes on"
    if _is_of_a_launcher(error):
        return _one_line(f"a job ended without a result: {error}")[:300] + "; the same command does what is missing"
    return None


def _full_disk(error: BaseException | None) -> OSError | None:
    """The error behind an error that says that a disk is full; libraries raise their own meanwhile."""
    while error is not None:
        if isinstance(error, OSError) and is_full(error):
            return error
        error = error.__cause__ or error.__context__
    return None


def _is_of_a_launcher(error: BaseException) -> bool:
    """Whether a launcher says that the process of a job is gone; launchers need not be installed."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return type(error).__module__.partition(".")[0] == "submitit" or bool(names & {"TerminatedWorkerError", "RayError"})


def _names_wrongly(error: InstantiationException) -> bool:
    """Whether a `_target_` cannot be found, or the keys beside it are not its arguments."""
    if isinstance(error.__cause__, TypeError):
        return "argument" in str(error.__cause__)
    return isinstance(error.__cause__, (ImportError, OmegaConfBaseException)) or "locat" in str(error)


def _take_command(commands: Mapping[str, Command], file_commands: Mapping[str, FileCommand]) -> Command | None:
    """The command that stands first on the command line, taken off it with its file; `None` without one.

    Raises:
        UserError: it is none of them, or its file is missing.
    """
    first = sys.argv[1] if len(sys.argv) > 1 else ""
    if not re.fullmatch(r"\w+", first):
        return None
    if first not in commands and first not in file_commands:
        allowed = ", ".join([*commands, *file_commands])
        raise UserError(f"command {first!r}; allowed are {allowed}, or none, to measure; options are KEY=VALUE")
    del sys.argv[1]
    if first in commands:
        return commands[first]
    if len(sys.argv) < 2:
        raise UserError(f"{first} needs a file: {first} FILE")
    return partial(file_commands[first], Path(sys.argv.pop(1)))


def _check_arguments() -> None:
    """Let the argument parser's complaints be one line too, and refuse passwords before anything is written."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UserError(f"{message}; options such as -m come before KEY=VALUE; see --help")

    parser = get_args_parser()
    parser.__class__ = Parser
    parser.parse_args()
    for text in sys.argv[1:]:
        name, _, value = text.partition("=")
        if SECRET.search(value) or (name.endswith(("host", "address")) and SECRET_OF_A_HOST.match(value)):
            raise UserError(
                f"{name} has a password in it, which would be written down; give the address without, and the password by the "
                "environment or the program's own file (of PostgreSQL: PGPASSWORD or ~/.pgpass)"
            )


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    text = text.partition(" Config search path:")[0].partition(" full_key:")[0]
    return re.sub(r"\. To append to your config use \+.*", "; see --help", text)


def _print_error(line: str) -> None:
    print(f"error: {line}", file=sys.stderr)
