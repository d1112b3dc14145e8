"""`python -m latency_lut`: profile devices for a space, print what was measured and how good the latency model is.

A word in front is another command, see `COMMANDS`: `python -m latency_lut report` tells what pays on measured devices,
`python -m latency_lut check` whether they are still what their tables say, `python -m latency_lut bundle` writes what is to be
measured on a device elsewhere, and `python -m latency_lut import` makes a table of what came back. With `transfer=[...]` a
device is not profiled: a few measurements and the tables of other devices give its table.
"""

from __future__ import annotations

import re
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path
from threading import Event

import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from latency_lut.bundle import write_bundle
from latency_lut.command import mistake, run_hydra
from latency_lut.device import Device
from latency_lut.drift import Drift, age_days
from latency_lut.drift import check as check_drift
from latency_lut.elsewhere import profile_elsewhere, take_there
from latency_lut.importing import import_results
from latency_lut.measuring import MeasuringSettings
from latency_lut.pays_report import print_report, read_tables, report_of, write_report
from latency_lut.profile import LEAST_NETWORKS, ProfileStats, profile
from latency_lut.refine import Refinement
from latency_lut.remote import Watch
from latency_lut.several import Turns, each
from latency_lut.table import LatencyTable
from latency_lut.transfer import Samples, read_sources, take_here, transfer
from latency_lut.transfer_report import next_command, proposals, summary_rows
from spaces.errors import UserError
from spaces.space import Space

DRIFT_STATUS = 3  # 1 is a bug, 2 a user's mistake


def main(config: DictConfig) -> None:
    """Profile every device of the configuration. One that fails does not stop the others.

    Raises:
        ExceptionGroup: what was raised, when several devices were given.
    """
    if not config.get("devices"):
        raise UserError("no device; give one, for example device=x86")
    space = instantiate(config.space, _convert_="all")
    devices: dict[str, Device] = {}
    failures: dict[str, Exception] = {}
    for key, entry in config.devices.items():
        try:
            device = instantiate(entry)
            if device.name in devices:
                raise UserError(f"devices.{key}.name is {device.name!r}, as that of another device; a table is of one")
            devices[device.name] = device
        except Exception as error:
            failures[str(key)] = error
    console, turns = Console(), Turns()
    with _progress(console) as progress:
        tasks = {name: progress.add_task(f"{name}: waits", total=None) for name in devices}

        def measure_one(device: Device, stopped: Event) -> None:
            def on_progress(what: str, done: int, total: int) -> None:
                progress.update(tasks[device.name], description=f"{device.name}: {what}", completed=done, total=total)

            try:
                measure(space, device, config, console, turns, Watch(on_progress, partial(_say, console), stopped))
            except Exception:
                if len(config.devices) > 1:
                    _say(console, f"{device.name}: failed; why is told in the end, the others go on")
                raise
            finally:
                progress.remove_task(tasks[device.name])

        failures |= each(list(devices.values()), measure_one)
    if failures and len(config.devices) == 1:
        raise next(iter(failures.values()))
    if failures:
        raise ExceptionGroup("devices failed", [_named(name, error) for name, error in failures.items()])


def _named(name: str, error: Exception) -> Exception:
    """An error that says which device it is about, where it is a user's mistake that does not."""
    line = mistake(error)
    return error if line is None or re.search(rf"\b{re.escape(name)}\b", line) else UserError(f"{name}: {line}")


def _say(console: Console, sentence: str) -> None:
    console.print(sentence, soft_wrap=True, highlight=False, markup=False)


def measure(space: Space, device: Device, config: DictConfig, console: Console, turns: Turns, watch: Watch) -> None:
    """Profile one device and print a summary."""
    path = Path(config.tables) / f"{device.name}.parquet"
    limits = config.target_error, config.budget_s
    refined = limits != (None, None)
    if config.transfer:
        _transfer_to(space, device, path, config, console, turns, watch)
        return
    settings = _settings(config)
    if device.elsewhere:
        if refined:
            raise UserError(f"device {device.name} is elsewhere; target_error and budget_s choose here, leave them away")
        measured = profile_elsewhere(space, device, path, settings, turn=turns.turn, watch=watch)
        if measured is None:
            return
        with turns.turn():
            _print_measured(*measured, space, path, config, console)
        return
    with turns.turn():
        refinement = Refinement(instantiate(config.wishes), *limits) if refined else None
        measured = profile(space, device, path, settings, refinement=refinement, on_progress=watch.on_progress)
        _print_measured(*measured, space, path, config, console)


def _settings(config: DictConfig) -> MeasuringSettings:
    return MeasuringSettings(**{field.name: config[field.name] for field in fields(MeasuringSettings)})


def _transfer_to(
    space: Space, device: Device, path: Path, config: DictConfig, console: Console, turns: Turns, watch: Watch
) -> None:
    """Make a device's table from those of others and a few measurements, and print a summary."""
    if isinstance(config.transfer, str):
        raise UserError(f"transfer is {config.transfer!r}; allowed is a list of devices, such as transfer=[x86,wasm]")
    sources = read_sources(path.parent, list(config.transfer), device, space)
    settings = _settings(config)

    def take(samples: Samples, table: LatencyTable) -> LatencyTable | None:
        if device.elsewhere:
            return take_there(space, device, path, samples, table, settings, turn=turns.turn, watch=watch)
        with turns.turn():
            return take_here(space, device, samples, table, settings, on_progress=watch.on_progress)

    numbers = {name: config[name] for name in ("samples", "checked_networks", "max_pairs", "seed")}
    model = instantiate(config.transfer_model)
    told = transfer(space, device, path, sources, model, take, **numbers, turn=turns.turn, on_progress=watch.on_progress)
    if told is None:
        return
    table, stats = told
    transferred = table.transferred
    if transferred is None:
        raise RuntimeError(f"nothing was transferred to {device.name}")
    with turns.turn():
        console.print(_summary(table, space, config, summary_rows(transferred, stats)))
    console.print(proposals(space, device.name, transferred, stats))
    console.print(f"table: {path}", soft_wrap=True)
    _say(console, f"to measure what is proposed, too, run: {next_command(device.name, transferred)}")


def _print_measured(
    table: LatencyTable, stats: ProfileStats, space: Space, path: Path, config: DictConfig, console: Console
) -> None:
    rows = [
        ("pairs in the table", f"{stats.pairs}", f"of {stats.reachable} seen in sampled networks"),
        ("measured now", f"{stats.measured} + {stats.networks}", f"pairs + networks in {stats.seconds:.1f} s"),
    ]
    if stats.measured:
        rows.append(("rate", f"{stats.pairs_per_min:,.0f}", "pairs/min"))
    console.print(_summary(table, space, config, rows))
    if (config.target_error, config.budget_s) != (None, None):
        console.print(_curve(table))
    console.print(f"table: {path}", soft_wrap=True)


def _summary(table: LatencyTable, space: Space, config: DictConfig, rows: list[tuple[str, str, str]]) -> Table:
    """What is in a table, and how good the latency model is that it makes; `rows` stand in front."""
    summary = Table(
        title=f"{table.device_name}: {table.device['cpu']}, {table.device['runtime']} {table.device['runtime_version']}"
    )
    summary.add_column("what")
    summary.add_column("value", justify="right")
    summary.add_column("unit")
    for row in rows:
        summary.add_row(*row)
    spread = float(np.median([entry.spread_us / entry.us for entry in table.entries.values()]))
    summary.add_row("spread of a pair", f"{spread:.1%}", "standard error, in the median pair")
    summary.add_row("networks in the table", f"{len(table.networks)}", "timed whole")
    if config.latency_model is not None and len(table.networks) >= LEAST_NETWORKS:
        quality = instantiate(config.latency_model)(table, space).quality
        summary.add_row("latency model, mean error", f"{quality.mape:.1%}", f"on {quality.n} held-out networks")
        summary.add_row("latency model, p95 error", f"{quality.p95:.1%}", "")
        summary.add_row("latency model, within 10 %", f"{quality.within_10:.0%}", "of them")
        summary.add_row("latency model, in the 90 % interval", f"{quality.coverage:.0%}", "of them")
        summary.add_row("latency model, Spearman", f"{quality.spearman:.3f}", "")
    return summary


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _update(progress: Progress, task: TaskID, done: int, total: int) -> None:
    progress.update(task, completed=done, total=total)


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
        numbers = {"pairs": config.check.pairs, "tolerance": config.check.tolerance, "seed": config.seed}
        watch = Watch(say=partial(_say, console))
        drift = check_drift(table, device, **numbers, folder=path.parent, watch=watch)
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


def bundle(config: DictConfig) -> None:
    """Write a bundle for every device of the configuration."""
    if not config.get("devices"):
        raise UserError("no device; give one, for example device=x86")
    if config.target_error is not None or config.budget_s is not None:
        raise UserError("a bundle is chosen before anything is measured; leave target_error and budget_s away")
    space, console = instantiate(config.space, _convert_="all"), Console()
    for device in (instantiate(entry) for entry in config.devices.values()):
        path = Path(config.bundles) / f"{device.name}-bundle.zip"
        with _progress(console) as progress:
            task = progress.add_task(f"{device.name}: models", total=None)
            manifest = write_bundle(
                space,
                device,
                Path(config.tables) / f"{device.name}.parquet",
                path,
                _settings(config),
                on_progress=partial(_update, progress, task),
            )
        counts = f"{len(manifest.pairs)} pairs, {len(manifest.networks)} networks, {path.stat().st_size / 1e6:.1f} MB"
        console.print(f"bundle: {path} ({counts})", soft_wrap=True, highlight=False)
        console.print(f"run it there: python {path.name}", soft_wrap=True, highlight=False)


def import_file(path: Path, config: DictConfig) -> None:
    """Make a table of what was measured elsewhere."""
    space, console = instantiate(config.space, _convert_="all"), Console()
    imported = import_results(space, path, Path(config.tables), bundles=(Path(config.bundles),))
    rows = [
        ("pairs in the table", f"{len(imported.table.entries)}", ""),
        ("new from the file", f"{imported.pairs} + {imported.networks}", "pairs + networks"),
    ]
    if imported.failed:
        rows.append(("did not load there", f"{imported.failed}", "models"))
    summary = _summary(imported.table, space, config, rows)
    imported.save()
    console.print(summary)
    console.print(f"table: {imported.path}", soft_wrap=True)


COMMANDS = {"report": report, "check": check, "bundle": bundle}
FILE_COMMANDS = {"import": import_file}


if __name__ == "__main__":
    run_hydra(main, "latency_lut", COMMANDS, FILE_COMMANDS)
