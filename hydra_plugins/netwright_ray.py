"""Hydra launcher `ray`: each job of a sweep is a task of Ray, on this machine or on a cluster that runs already.

`hydra/launcher=ray hydra.launcher.address=auto`. Hydra looks for launchers in packages of this folder's name. Its own for Ray
asks for a boto3 of 2021, to start machines of one cloud; this one leaves starting a cluster to `ray up`.
"""

import importlib
import logging
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, configure_log, filter_overrides, setup_globals
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

log = logging.getLogger(__name__)
PATIENCE_S = 10


@dataclass
class RayConf:
    """Settings of the launcher.

    Args:
        address: of a cluster that runs, or `auto` for the one of this machine; `null` starts one here for the sweep.
        num_cpus: that Ray counts for a job; so many jobs run at once as fit.
        num_gpus: that Ray counts for a job, and shows it.
    """

    _target_: str = "hydra_plugins.netwright_ray.RayLauncher"
    address: str | None = None
    num_cpus: float = 1
    num_gpus: float = 0


ConfigStore.instance().store(group="hydra/launcher", name="ray", node=RayConf, provider="netwright")


class RayLauncher(Launcher):
    """Runs jobs as tasks of Ray; for the arguments see `RayConf`.

    A job whose process dies is not run again by Ray: the sweep tells of it, and the same command does it alone.
    """

    def __init__(self, address: str | None = None, num_cpus: float = 1, num_gpus: float = 0) -> None:
        self.address, self.resources = address, {"num_cpus": num_cpus, "num_gpus": num_gpus}
        self._context: dict[str, Any] = {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._context = {"hydra_context": hydra_context, "task_function": task_function, "config": config}

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run all jobs and wait for them.

        Raises:
            HydraException: Ray is not installed, nobody answers at the address, or the process of a job died; the others are
                done by then.
        """
        try:
            ray = importlib.import_module("ray")
            execute_job = importlib.import_module("hydra_plugins.hydra_joblib_launcher._core").execute_job
        except ImportError as error:
            raise HydraException(f"hydra/launcher=ray: {error}; run: pip install -e '.[cluster]'") from error
        setup_globals()
        config = self._context["config"]
        configure_log(config.hydra.hydra_logging, config.hydra.verbose)
        Path(str(config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        _check_address(self.address)
        try:
            ray.init(address=self.address, include_dashboard=None if self.address else False, logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise HydraException(_nobody(self.address, error)) from error
        try:
            task = ray.remote(max_retries=0, **self.resources)(execute_job)
            state, begun = Singleton.get_state(), []
            for index, overrides in enumerate(job_overrides, initial_job_idx):
                log.info("\t#%d : %s", index, " ".join(filter_overrides(overrides)))
                begun.append(task.remote(index, overrides, **self._context, singleton_state=state))
            ray.wait(begun, num_returns=len(begun))
            return [ray.get(job) for job in begun]
        finally:
            ray.shutdown()


def _check_address(address: str | None) -> None:
    """Ray itself asks for minutes where nobody answers."""
    found = re.fullmatch(r"(?:ray://)?([\w.-]+|\[[0-9a-fA-F:]+\]):(\d+)", address or "")
    if found is None:
        return
    try:
        socket.create_connection((found[1].strip("[]"), int(found[2])), PATIENCE_S).close()
    except (OSError, OverflowError) as error:
        raise HydraException(_nobody(address, error)) from error


def _nobody(address: str | None, error: Exception) -> str:
    return f"hydra.launcher.address: no Ray answers at {address} ({error}); start one: ray start --head"
