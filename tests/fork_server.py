"""A process that has imported `search` once and runs the command line in forks of itself, one per line of standard input.

A line is a JSON object: `arguments`, `folder` (current directory), `out` and `err` (files for the streams), and optionally
- `kill_before`: `[text, n]`; the process kills itself with SIGKILL when it is about to bring a file to a path that contains
  `text` for the n-th time;
- `file_bytes`: no file may grow beyond, as on a full disk;
- `no_locks`: no file can be locked, as on some network file systems;
- `constants`: `module.NAME` to value, set before it starts;
- `environment`: variables of its environment.

The answer is the exit status, negative for a signal.
"""

from __future__ import annotations

import errno
import gc
import importlib
import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

import search.__main__
from latency_lut.command import CONFIG_FOLDER


def run(job: dict[str, Any]) -> None:
    """Become the command line; never returns."""
    status = 1
    os.chdir(job["folder"])
    for name, stream in (("out", 1), ("err", 2)):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(job.get("environment", {}))
    for name, value in job.get("constants", {}).items():
        module, _, constant = name.rpartition(".")
        setattr(importlib.import_module(module), constant, value)
    if "kill_before" in job:
        text, left = job["kill_before"]

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if event == "os.rename" and text in os.fsdecode(arguments[1]):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
    if job.get("no_locks"):

        def refuse(event: str, arguments: tuple[Any, ...]) -> None:
            if event in ("fcntl.flock", "fcntl.lockf", "os.link", "os.symlink"):
                raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        sys.addaudithook(refuse)
    if "file_bytes" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_bytes"], resource.RLIM_INFINITY))
    sys.argv = [str(Path(search.__main__.__file__)), *job["arguments"]]
    try:
        search.__main__.command()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def warm_up() -> None:
    """Load once what every call would load: Hydra's plugins and the grammar of its overrides."""
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        compose("search", ["space.stages=[{widths:[8]}]", "hydra.searchpath=[]"], return_hydra_config=True)
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    warm_up()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            run(json.loads(line))
        _, ended = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(ended), flush=True)
