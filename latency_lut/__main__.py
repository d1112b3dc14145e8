"""`python -m latency_lut`: profile devices for a space, print what was measured and how good the latency model is.

With `transfer=[...]` a device is not profiled: a few measurements and the tables of other devices give its table.

A word in front is another command, see `COMMANDS`: `python -m latency_lut report` tells what pays on measured devices,
`python -m latency_lut check` whether they are still what their tables say.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from latency_lut.command import run_hydra
from latency_lut.device import Device
from latency_lut.drift import Drift, age_days
from latency_lut.drift import check as check_drift
from latency_lut.pays_report import print_report, read_tables, report_of, write_report
from latency_lut.profile import LEAST_NETWORKS, profile
from latency_lut.refine import Refinement
from latency_lut.table import LatencyTable
from latency_lut.transfer import TransferStats, read_sources, transfer
from latency_lut.transferred import Transferred
from spaces.errors import UserError
from spaces.space import Space

DRIFT_STATUS = 3  # 1 is a bug, 2 a user's mistake


def main(config: DictConfig) -> None:
    """Profile every device of the configuration."""
    if not config.get("devices"):
        raise UserError("no device; give one, for example device=x86")
    space = instantiate(config.space, _convert_="all")
    devices = [instantiate(entry) for entry in config.devices.values()]
    for device in devices:
        (transfer_to if config.transfer else measure)(space, device, config)


def measure(space: Space, device: Device, config: DictConfig) -> None:
    """Profile one device and print a summary."""
    path = Path(config.tables) / f"{device.name}.parquet"
    limits = config.target_error, config.budget_s
    refinement = None if limits == (None, None) else Refinement(instantiate(config.wishes), *limits)
    console = Console()
    with _progress(device, console) as on_progress:
        table, stats = profile(
            space,
            device,
            path,
            seed=config.seed,
            max_pairs=config.max_pairs,
            networks=config.networks,
            rounds=config.rounds,
            visit_s=config.visit_s,
            refinement=refinement,
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
        _add_quality(summary, table, space, config)
    console.print(summary)
    if refinement is not None:
        console.print(_curve(table))
    console.print(f"table: {path}", soft_wrap=True)


def transfer_to(space: Space, device: Device, config: DictConfig) -> None:
    """Make a device's table from those of others and a few measurements, and print a summary."""
    folder, console = Path(config.tables), Console()
    path = folder / f"{device.name}.parquet"
    if isinstance(config.transfer, str):
        raise UserError(f"transfer is {config.transfer!r}; allowed is a list of devices, such as transfer=[x86,wasm]")
    sources = read_sources(folder, list(config.transfer), device, space)
    with _progress(device, console) as on_progress:
        table, stats = transfer(
            space,
            device,
            path,
            sources,
            instantiate(config.transfer_model),
            samples=config.samples,
            checked_networks=config.checked_networks,
            max_pairs=config.max_pairs,
            visit_s=config.visit_s,
            seed=config.seed,
            on_progress=on_progress,
        )
    transferred = table.transferred
    if transferred is None:
        raise RuntimeError("nothing was transferred")
    title = f"{device.name}: predicted from {', '.join(transferred.sources)}; {table.device['cpu']}, {device.runtime}"
    summary = Table(title=f"{title} {table.device['runtime_version']}")
    summary.add_column("what")
    summary.add_column("value", justify="right")
    summary.add_column("unit")
    samples = transferred.pair_samples + transferred.network_samples
    measured = f"{transferred.pair_samples} pairs, {transferred.network_samples} networks, measured"
    summary.add_row("samples", f"{samples}", measured)
    summary.add_row("measured now", f"{stats.pairs} + {stats.networks}", f"pairs + networks; {stats.seconds:.1f} s in all")
    for what, predicted, error in (
        ("pairs", transferred.pairs, transferred.pair_error),
        ("networks", transferred.networks, transferred.network_error),
    ):
        estimates = predicted.values() if isinstance(predicted, dict) else [network.estimate for network in predicted]
        std = float(np.median([e.std_us / e.us for e in estimates])) if predicted else 0.0
        summary.add_row(f"{what} predicted", f"{len(predicted)}", f"standard deviation {std:.1%}, in the median one")
        if error is not None:
            summary.add_row(f"{what}, mean error", f"{error:.1%}", "of the measured ones, leave-one-out")
    if config.latency_model is not None:
        _add_quality(summary, table, space, config)
    console.print(summary)
    console.print(_proposals(space, device.name, transferred, stats))
    console.print(f"table: {path}", soft_wrap=True)
    names = ",".join(transferred.sources)
    more = f"python -m latency_lut device={device.name} transfer=[{names}] samples={2 * samples}"
    console.print(f"to measure what is proposed, too, run: {more}", soft_wrap=True, highlight=False, markup=False)


def _proposals(space: Space, name: str, transferred: Transferred, stats: TransferStats) -> Table:
    """What would tell most if it were measured next, and what is predicted of it."""
    table = Table(title=f"{name}: proposed to be measured next")
    table.add_column("what")
    for column in ("predicted, us", "standard deviation"):
        table.add_column(column, justify="right")
    networks = {(network.architecture, network.lowerings): network.estimate for network in transferred.networks}
    rows = [(f"{spec} {lowering}", transferred.pairs[spec, lowering]) for spec, lowering in stats.proposed_pairs]
    for drawn in stats.proposed_networks:
        network = space.network(drawn[0])
        rows.append((f"network, {len(network.nodes)} layers, {network.macs / 1e6:.2f} M MACs", networks[drawn]))
    for what, estimate in rows:
        table.add_row(what, f"{estimate.us:.1f}", f"{estimate.std_us / estimate.us:.1%}")
    return table


@contextmanager
def _progress(device: Device, console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Bars of what is done on a device, one for each of the names that the function is called with."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        tasks = {}

        def on_progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(f"{device.name}: {what}", total=total)
            progress.update(tasks[what], completed=done, total=total)

        yield on_progress


def _add_quality(summary: Table, table: LatencyTable, space: Space, config: DictConfig) -> None:
    quality = instantiate(config.latency_model)(table, space).quality
    summary.add_row("latency model, mean error", f"{quality.mape:.1%}", f"on {quality.n} held-out networks")
    summary.add_row("latency model, p95 error", f"{quality.p95:.1%}", "")
    summary.add_row("latency model, within 10 %", f"{quality.within_10:.0%}", "of them")
    summary.add_row("latency model, in the 90 % interval", f"{quality.coverage:.0%}", "of them")
    summary.add_row("latency model, Spearman", f"{quality.spearman:.3f}", "")


def _curve(table: LatencyTable) -> Table:
    curve = Table(title=f"{table.device_name}: error of the latency model, leave-one-out, against what was measured")
    for column in ("pairs", "networks", "seconds", "mean error"):
        curve.add_column(column, justify="right")
    for point in table.curve:
        curve.add_row(f"{point.pairs}", f"{point.networks}", f"{point.seconds:.0f}", f"{point.error:.2%}")
    return curve


def report(config: DictConfig) -> None:
    """Tell what pays on every device of the configuration, from the files of its tables; without devices, on all of them."""
    folder = Path(config.tables)
    told = report_of(read_tables(folder, [str(name) for name in config.get("devices") or ()]))
    console = Console()
    print_report(told, console)
    for path in write_report(told, folder):
        console.print(f"{path.suffix[1:]}: {path}", soft_wrap=True)


def check(config: DictConfig) -> None:
    """Tell whether the devices of the configuration still cost what their tables say.

    Raises:
        SystemExit: with status 3 when one of them does not.
    """
    if not config.get("devices"):
        raise UserError("no device; give one, for example device=x86")
    console, drifted = Console(), False
    for device in (instantiate(entry) for entry in config.devices.values()):
        path = Path(config.tables) / f"{device.name}.parquet"
        table = LatencyTable.load(path)
        drift = check_drift(table, device, pairs=config.check.pairs, tolerance=config.check.tolerance, seed=config.seed)
        if drift.moved:
            console.print(_moved_entries(device.name, drift))
        age = f"{age_days(table):.1f} days old"
        verdict = f"has drifted; measure again: delete it and run: python -m latency_lut device={device.name}"
        console.print(f"{path}, {age}: {verdict if drift.drifted else 'still holds'}", soft_wrap=True)
        for sentence in drift.sentences():
            console.print(f"  {sentence}", soft_wrap=True, highlight=False, markup=False)
        drifted = drifted or drift.drifted
    if drifted:
        sys.exit(DRIFT_STATUS)


def _moved_entries(name: str, drift: Drift) -> Table:
    entries = Table(title=f"{name}: entries that moved")
    entries.add_column("layer")
    entries.add_column("lowering")
    for column in ("table, us", "now, us", "change"):
        entries.add_column(column, justify="right")
    for pair in drift.moved:
        spec, lowering = pair.pair
        entries.add_row(str(spec), lowering, f"{pair.was_us:.1f}", f"{pair.now_us:.1f}", f"{pair.factor - 1:+.1%}")
    return entries


COMMANDS = {"report": report, "check": check}


if __name__ == "__main__":
    run_hydra(main, "latency_lut", COMMANDS)
