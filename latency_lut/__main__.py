"""`python -m latency_lut`: profile devices for a space, print what was measured and how good the latency model is.

A word in front is another command, see `COMMANDS`: `python -m latency_lut report` tells what pays on measured devices.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from latency_lut.command import run_hydra
from latency_lut.device import Device
from latency_lut.pays_report import print_report, read_tables, report_of, write_report
from latency_lut.profile import profile
from spaces.errors import UserError
from spaces.space import Space

LEAST_NETWORKS = 8  # fewer are not enough to fit and to test the latency model


def main(config: DictConfig) -> None:
    """Profile every device of the configuration."""
    if not config.get("devices"):
        raise UserError("no device; give one, for example device=x86")
    space = instantiate(config.space, _convert_="all")
    devices = [instantiate(entry) for entry in config.devices.values()]
    for device in devices:
        measure(space, device, config)


def measure(space: Space, device: Device, config: DictConfig) -> None:
    """Profile one device and print a summary."""
    path = Path(config.tables) / f"{device.name}.parquet"
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        tasks = {}

        def on_progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(f"{device.name}: {what}", total=total)
            progress.update(tasks[what], completed=done, total=total)

        table, stats = profile(
            space,
            device,
            path,
            seed=config.seed,
            max_pairs=config.max_pairs,
            networks=config.networks,
            rounds=config.rounds,
            visit_s=config.visit_s,
            on_progress=on_progress,
        )
    spread = float(np.median([entry.spread_us / entry.us for entry in table.entries.values()]))
    summary = Table(title=f"{device.name}: {table.device['cpu']}, {device.runtime} {table.device['runtime_version']}")
    summary.add_column("what")
    summary.add_column("value", justify="right")
    summary.add_column("unit")
    summary.add_row("pairs in the table", f"{stats.pairs}", f"of {stats.reachable} seen in sampled networks")
    summary.add_row("spread of a pair", f"{spread:.1%}", "standard error, in the median pair")
    summary.add_row("networks in the table", f"{len(table.networks)}", "timed whole")
    summary.add_row("measured now", f"{stats.measured} + {stats.networks}", f"pairs + networks in {stats.seconds:.1f} s")
    if stats.measured:
        summary.add_row("rate", f"{stats.pairs_per_min:,.0f}", "pairs/min")
    if config.latency_model is not None and len(table.networks) >= LEAST_NETWORKS:
        quality = instantiate(config.latency_model)(table, space).quality
        summary.add_row("latency model, mean error", f"{quality.mape:.1%}", f"on {quality.n} held-out networks")
        summary.add_row("latency model, p95 error", f"{quality.p95:.1%}", "")
        summary.add_row("latency model, Spearman", f"{quality.spearman:.3f}", "")
    console.print(summary)
    console.print(f"table: {path}", soft_wrap=True)


def report(config: DictConfig) -> None:
    """Tell what pays on every device of the configuration, from the files of its tables; without devices, on all of them."""
    folder = Path(config.tables)
    told = report_of(read_tables(folder, [str(name) for name in config.get("devices") or ()]))
    console = Console()
    print_report(told, console)
    for path in write_report(told, folder):
        console.print(f"{path.suffix[1:]}: {path}", soft_wrap=True)


COMMANDS = {"report": report}


if __name__ == "__main__":
    run_hydra(main, "latency_lut", COMMANDS)
