"""Training on several processes: who starts them, and one reduction of the gradients per step.

Every process trains the same sampled networks on its own share of each batch. A step has several backward passes, each through
another part of the weights, so gradients are averaged once at its end instead of in every pass as
`torch.nn.parallel.DistributedDataParallel` does. On one machine the process that was started first starts the others
(`python -m search` with the same run and that stage alone); under `srun` or `torchrun` they are there already.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed
from pytorch_lightning.strategies import DDPStrategy

from spaces.errors import UserError

# Processes that srun has started wait while the first one measures tables; those that it starts itself only while it evaluates.
JOIN_FROM_OUTSIDE = timedelta(hours=24)
JOIN = timedelta(minutes=30)
WORKER_PATIENCE_S = 60
RANK_VARIABLES = ("RANK", "SLURM_PROCID")
OWN_GROUP = "netwright"  # names the group of processes that the first one starts


@dataclass(frozen=True)
class Processes:
    """On what the supernet is trained, and focused, and with a process each what is finished or trained alone.

    Args:
        accelerator: Lightning's, `cpu` or `gpu`.
        devices: processes per node.
        num_nodes: nodes.

    Raises:
        UserError: a value that is not allowed, or a GPU that is not there.
    """

    accelerator: str = "cpu"
    devices: int = 1
    num_nodes: int = 1

    def __post_init__(self) -> None:
        for name, value in (("devices", self.devices), ("num_nodes", self.num_nodes)):
            if type(value) is not int or value < 1:
                raise UserError(f"trainer.{name} is {value!r}; allowed are integers from 1")
        if self.accelerator not in ("cpu", "gpu"):
            raise UserError(f"trainer.accelerator is {self.accelerator!r}; allowed are cpu and gpu")
        if self.accelerator == "gpu" and torch.cuda.device_count() < self.devices:
            found = f"{torch.cuda.device_count()} GPUs"
            raise UserError(f"trainer.devices is {self.devices} and torch sees {found}; allowed is trainer.accelerator=cpu")
        if self.count > 1 and int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
            raise UserError(  # Lightning would not know which processes share a node
                f"srun was called with --ntasks; allowed is --nodes={self.num_nodes} --ntasks-per-node={self.devices}"
            )

    @property
    def count(self) -> int:
        """Processes in all."""
        return self.devices * self.num_nodes

    @property
    def single(self) -> Processes:
        """One process of the kind, for networks that are trained alone."""
        return replace(self, devices=1, num_nodes=1)

    @property
    def rank(self) -> int:
        """Which of them this is; the first one, 0, does all that is not training."""
        if self.count == 1:
            return 0
        return next((int(os.environ[name]) for name in RANK_VARIABLES if os.environ.get(name, "").isdigit()), 0)

    @property
    def from_outside(self) -> bool:
        """Whether something else, such as `srun`, has started all processes."""
        return self._placed and os.environ.get("TORCHELASTIC_RUN_ID") != OWN_GROUP

    @property
    def _placed(self) -> bool:
        """Whether the environment says which process this is."""
        return any(name in os.environ for name in RANK_VARIABLES)

    def strategy(self) -> DDPStrategy | str:
        """For Lightning's trainer."""
        if self.count == 1:
            return "auto"
        backend = "nccl" if self.accelerator == "gpu" else "gloo"
        return OneReduction(process_group_backend=backend, timeout=JOIN_FROM_OUTSIDE if self.from_outside else JOIN)

    @contextmanager
    def started(self, command: Sequence[str]) -> Iterator[None]:
        """Start the other processes of this machine, unless something else has, and end them.

        Args:
            command: arguments of `python -m search` with which the others train.

        Raises:
            UserError: `num_nodes` above 1 where nothing has started processes on the other nodes.
        """
        if self.count == 1 or self._placed:
            yield
            return
        if self.num_nodes > 1:
            raise UserError(
                f"trainer.num_nodes is {self.num_nodes}, and nothing has started the processes; start them: "
                f"srun --nodes={self.num_nodes} --ntasks-per-node={self.devices} --kill-on-bad-exit python -m search ..."
            )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(self.count)}
        group |= {"LOCAL_WORLD_SIZE": str(self.count), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": OWN_GROUP}
        environments = [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(self.count)]
        workers = [
            subprocess.Popen([sys.executable, "-m", "search", *command], env=os.environ | own, stdout=subprocess.DEVNULL)
            for own in environments[1:]
        ]
        try:
            os.environ.update(environments[0])
            yield
            for worker in workers:
                with suppress(subprocess.TimeoutExpired):  # the weights are here already
                    worker.wait(WORKER_PATIENCE_S)
        except RuntimeError as error:
            # Reductions fail when a process is gone.
            gone = [worker.returncode for worker in workers if worker.poll() not in (None, 0)]
            if gone:
                raise UserError(
                    f"a process of the training ended with status {gone[0]}; the same command goes on from the last epoch"
                ) from error
            raise
        finally:
            for name in environments[0]:
                os.environ.pop(name, None)
            for worker in workers:
                worker.kill()
                worker.wait()
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


class OneReduction(DDPStrategy):
    """Lightning's process group without the wrapper that reduces in every backward pass."""

    def configure_ddp(self) -> None:
        model = self.lightning_module
        if model is None:
            raise RuntimeError("no module to train")
        for value in (*model.parameters(), *model.buffers()):
            torch.distributed.broadcast(value.data, 0)


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace gradients by their mean over all processes; nothing where there is one.

    The same networks were trained everywhere, so the same parameters have gradients everywhere.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for gradient, mean in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def mean_over_processes(value: float) -> float:
    """The mean of a figure over all processes."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=_device())
    torch.distributed.all_reduce(total)
    return total.item() / torch.distributed.get_world_size()


def text_of_the_first(make: Callable[[], str]) -> str:
    """A text that the first process makes while the others wait, on all of them."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return make()
    content = make().encode() if torch.distributed.get_rank() == 0 else b""
    size = torch.tensor(len(content), device=_device())
    torch.distributed.broadcast(size, 0)
    values = torch.frombuffer(bytearray(content or bytes(int(size))), dtype=torch.uint8).to(_device())
    torch.distributed.broadcast(values, 0)
    return bytes(values.tolist()).decode()


def _device() -> torch.device:
    """Where tensors have to be for the group's reductions."""
    return torch.device("cuda" if torch.distributed.get_backend() == "nccl" else "cpu")
