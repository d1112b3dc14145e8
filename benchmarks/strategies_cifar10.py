"""Training and search strategies side by side: `python -m benchmarks.strategies_cifar10 data=FOLDER [key=value ...]`.

FOLDER has `train.parquet` and `test.parquet` (CIFAR-10 in the usual Parquet layout).

* `setting=cpu|quick|cuda`, see `strategies_cifar10.yaml`; `--quick` is `setting=quick`; `KEY=VALUE` changes parts of a setting.
* `strategies=a,b`: some of them only.
* `work=FOLDER` (runs/strategies) keeps what is done, so that the same command goes on where it was stopped.
* `docs=FOLDER` receives `strategies.png`, and the tables between the marks of `strategies.md`.

JSON with the figures of every strategy on the last line.

Every training strategy trains a supernet of its own for as many epochs as take the arithmetic of `epochs` of the plain sandwich
rule (`bignas`); multiply-accumulates are counted, not seconds. It is searched by `python -m search` with as many evaluations as
take the arithmetic of the gradient strategies, which search in the default strategy's supernet, as search strategies do.
`focused` is the default: a quarter of the arithmetic for single paths, the rest for the stage `focus`. `uniform_int8` is the
same in a space of dense int8 networks; its front and the default's are also finished.
`strategies_bench.py` has the settings, `strategies_phases.py` what strategies are judged by, `strategies_report.py` how it is
shown. Each phase is a process of its own, so its memory is known.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from benchmarks import strategies_report
from benchmarks.strategies_bench import (
    ALL,
    DEFAULT,
    GRADIENT,
    INT8,
    SEARCHING,
    TRAINING,
    Bench,
    arithmetic,
    is_focused,
    training_stages,
)
from benchmarks.strategies_phases import ALONE_PARTS, Phases
from latency_lut.command import CONFIG_FOLDER
from search.data.contract import digest, files_digest
from spaces.errors import UserError
from spaces.files import write_atomically

SETTINGS_FILE = Path(__file__).with_suffix(".yaml")


@dataclass(frozen=True)
class Options:
    """What the command line says; the rest of the settings is in `Bench`."""

    bench: Bench
    strategies: tuple[str, ...]
    docs: Path | None
    phase: str | None
    arguments: tuple[str, ...] = field(repr=False, default=())


def main() -> None:
    options = parse(sys.argv[1:])
    try:
        if options.phase is not None:
            Phases(options.bench).run(options.phase)
            return
        Schedule(options).run()
        result = strategies_report.write(options.bench, options.strategies, options.docs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps(result))


def parse(arguments: Sequence[str]) -> Options:
    """The options of a command line.

    Raises:
        SystemExit: a key or value that is not allowed.
    """
    pairs = dict(("setting", "quick") if a == "--quick" else (a.partition("=")[0], a.partition("=")[2]) for a in arguments)
    settings = OmegaConf.to_container(OmegaConf.load(SETTINGS_FILE))
    name = pairs.pop("setting", "cpu")
    if not isinstance(settings, dict) or name not in settings:
        raise SystemExit(f"error: setting={name}; allowed are cpu, quick, cuda")
    data, work, docs = pairs.pop("data", ""), Path(pairs.pop("work", "runs/strategies")), pairs.pop("docs", "")
    for part in ("train", "test"):
        if not (Path(data) / f"{part}.parquet").is_file():
            raise SystemExit(
                f"error: no file {Path(data) / f'{part}.parquet'}; pass data=FOLDER with train.parquet and test.parquet"
            )
    phase, chosen = pairs.pop("phase", None), pairs.pop("strategies", ",".join(ALL)).split(",")
    for strategy in chosen:
        if strategy not in ALL:
            raise SystemExit(f"error: strategies={strategy}; allowed are {', '.join(ALL)}")
    values: dict[str, Any] = dict(settings[name])
    for key, text in pairs.items():
        if key not in values:
            raise SystemExit(f"error: {key!r}; allowed are {', '.join(f.name for f in fields(Bench))}")
        values[key] = OmegaConf.to_container(OmegaConf.create(f"value: {text}"))["value"]  # type: ignore[call-overload, index]
    values["data"] = str(Path(data).absolute())
    key = digest([{k: v for k, v in values.items() if k not in ("jobs", "threads")}, recipes()])[:8]
    bench = Bench(work=str(work.absolute() / f"{name}-{key}"), setting=name, **values)
    return Options(bench, tuple(chosen), Path(docs) if docs else None, phase, tuple(a for a in arguments if "phase=" not in a))


def recipes() -> list[Any]:
    """The settings of `conf` that results depend on: with others nothing of what was done before holds."""
    folders = [CONFIG_FOLDER / name for name in ("space", "supernet", "relaxation")]
    files = sorted(path for folder in folders for path in folder.rglob("*.yaml"))
    search = OmegaConf.load(CONFIG_FOLDER / "search.yaml")
    stages = [OmegaConf.to_container(OmegaConf.select(search, name)) for name in ("focus", "finish")]
    return [files_digest(files, CONFIG_FOLDER), *stages]


@dataclass(frozen=True)
class Schedule:
    """Which phases there are, and in what order."""

    options: Options

    @property
    def bench(self) -> Bench:
        return self.options.bench

    @cached_property
    def training(self) -> list[str]:
        """Training strategies to run: the default always, as gradient searches and the equal arithmetic are made with it."""
        return [DEFAULT, *(s for s in TRAINING if s in self.options.strategies and s != DEFAULT)]

    def waves(self) -> Iterator[list[tuple[str, list[str]]]]:
        """Phases with their commands; those of a wave do not depend on each other, but on what the waves before left."""
        bench, chosen = self.bench, self.options.strategies
        own = [*self.training, *((INT8,) if INT8 in chosen else ())]
        searching, gradient = ([s for s in family if s in chosen] for family in (SEARCHING, GRADIENT))
        timing = "timing:" + "+".join((*own, *searching, *gradient))
        shorter = [f"{DEFAULT}@{length}" for length in bench.lengths]
        alone = [f"alone:{name}:{part}" for name in bench.alone for part in range(ALONE_PARTS)]
        yield [("tables", bench.search_command(DEFAULT, ["space", "tables"]))]
        yield [(f"tables:{s}", bench.search_command(s, ["space", "tables"])) for s in own if s == INT8]
        yield [(f"supernet:{s}", bench.search_command(s, ["space", "tables", "supernet"])) for s in (*own, *shorter)]
        focused = [s for s in (*own, *shorter) if is_focused(s)]
        yield [
            *((f"focus:{s}", bench.search_command(s, training_stages(s))) for s in focused),
            *((name, self.own(name)) for name in alone),
        ]
        yield [
            *((f"search:{s}", bench.search_command(s, ["predictors", "study"])) for s in own),
            *((f"judge:{s}", self.own(f"judge:{s}")) for s in (*self.training, *shorter)),
        ]
        yield [
            (f"search:{s}", bench.search_command(s, [*training_stages(s), "predictors", last]))
            for last, family in (("study", searching), ("relax", gradient))
            for s in family
        ]
        yield [(f"front:{s}", self.own(f"front:{s}")) for s in (DEFAULT, INT8) if INT8 in chosen]
        yield [(timing, self.own(timing))]

    def own(self, phase: str) -> list[str]:
        """The command of a phase that this benchmark does itself."""
        return [sys.executable, "-m", "benchmarks.strategies_cifar10", *self.options.arguments, f"phase={phase}"]

    def run(self) -> None:
        """Do what is not done yet.

        Raises:
            UserError: a phase failed.
        """
        arithmetic(self.bench)
        for wave in self.waves():
            with ThreadPoolExecutor(self.bench.jobs) as pool:
                list(pool.map(self._do, wave))

    def _do(self, phase: tuple[str, list[str]]) -> None:
        name, command = phase
        done = self.bench.cost_path(name)
        if done.exists():
            return
        begin = time.perf_counter()
        log = done.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=self._environment())
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            last = (log.read_text().strip() or "no message").splitlines()[-1]
            raise UserError(f"phase {name} ended with status {process.returncode}: {last[:300]} (all of it in {log})")
        cost = {
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "wall_s": time.perf_counter() - begin,
            "peak_mib": usage.ru_maxrss / 1024,
        }
        write_atomically(done, json.dumps(cost))
        print(
            f"{name}: {cost['cpu_s']:.0f} s of processor, {cost['wall_s']:.0f} s, {cost['peak_mib']:.0f} MiB", file=sys.stderr
        )

    def _environment(self) -> dict[str, str]:
        threads = {} if self.bench.threads is None else {"OMP_NUM_THREADS": str(self.bench.threads)}
        return {**os.environ, **threads}


if __name__ == "__main__":
    main()
