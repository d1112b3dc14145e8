"""What `strategies_cifar10` shows: figures per strategy, tables between the marks of `strategies.md`, and a picture."""

from __future__ import annotations

import io
import json
import platform
from collections.abc import Mapping, Sequence
from itertools import combinations, cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from scipy.stats import kendalltau

from benchmarks.strategies_bench import DEFAULT, GRADIENT, INT8, PLAIN, SEARCHING, Bench, is_focused, supernet_of
from search.objectives import hypervolume
from spaces.files import write_atomically

matplotlib.use("agg")
from matplotlib import pyplot

CHANCE = 0.1
BUDGETS = (0.25, 0.5)  # shares of the largest float network's latency
KINDS = {"inherited": "accuracy", "finished": "finished"}  # of accuracy on fronts, with their keys in the results
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
# Okabe and Ito, which colour-blind people can tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442", "#000000")

Figures = dict[str, Any]


def write(bench: Bench, strategies: Sequence[str], docs: Path | None) -> Figures:
    """Figures of all strategies; with a folder `docs` also its table and picture."""
    timing = json.loads(bench.result_path("timing").read_text())
    rows = {s: figures(bench, s, timing) for s in dict.fromkeys((*strategies, "random"))}
    result = {
        "strategies": rows,
        "supernet_pays": pays(bench),
        "over_uniform_int8": {kind: over_int8(timing, kind) for kind in KINDS} if INT8 in rows else None,
        "gap_points_by_epochs": curve(bench),
        "tau_between_seeds_alone": alone_agreement(bench),
        "processor_s": sum(json.loads(path.read_text())["cpu_s"] for path in bench.cost_path("all").parent.glob("*.json")),
        "setting": bench.setting,
        "rows": bench.rows,
        "epochs": bench.epochs,
        "machine": machine(bench, timing),
    }
    write_atomically(Path(bench.work) / "figures.json", json.dumps(result, indent=1))
    if docs is not None:
        picture(result, timing, docs / "strategies.png")
        path = docs / "strategies.md"
        text = path.read_text()
        before, _, rest = text.partition(BEGIN)
        write_atomically(path, before + BEGIN + "\n\n" + tables(result) + "\n" + END + rest.partition(END)[2])
    return result


def figures(bench: Bench, strategy: str, timing: Mapping[str, Any]) -> Figures:
    """One strategy: what its front is worth, how its supernet ranks, what it cost."""
    front = [r for r in timing["rows"] if r["strategy"] == strategy]
    reference_us = timing["largest_us"]
    points = [(1.0 - r["accuracy"], r["us"]) for r in front]
    volume = hypervolume(points, (1.0 - CHANCE, reference_us)) / ((1.0 - CHANCE) * reference_us)
    at_budget = {}
    for share in BUDGETS:
        fast = [r["accuracy"] for r in front if r["us"] <= share * reference_us]
        at_budget[f"{share * reference_us:.0f} us"] = max(fast, default=None)
    weights = supernet_of(strategy)
    supernet = bench.job(weights).run.facts("supernet")
    focus = bench.job(weights).run.facts("focus")
    searched = [f"search:{strategy}"] if strategy != "random" else []
    trained = [f"supernet:{weights}", *([f"focus:{weights}"] if is_focused(weights) else [])]
    costs = {phase: cost(bench, phase) for phase in (*trained, *searched)}
    return {
        "hypervolume": volume,
        "accuracy_at_budget": at_budget,
        "networks_on_front": len(front),
        **judged(bench, weights),
        "weights": weights,
        "train_macs": supernet["macs"] + focus.get("macs", 0),
        "train_epochs": supernet["epochs"] + focus.get("epochs", 0),
        "train_s": sum(costs[phase]["cpu_s"] for phase in trained),
        "search_s": costs[searched[0]]["cpu_s"] if searched else None,
        "peak_mib": max(c["peak_mib"] for c in costs.values()),
    }


def judged(bench: Bench, weights: str) -> Figures:
    """How a supernet's networks compare with those trained alone, which are in the whole space only."""
    if weights == INT8:
        return dict.fromkeys(("tau", "gap_points", "gap_finished_points"))
    alone, inherited = alone_accuracies(bench, "1.0"), accuracies(bench, f"inherited-{weights}")
    finished = accuracies(bench, f"finished-{weights}")
    return {
        "tau": float(kendalltau(inherited, alone).statistic),
        "gap_points": 100.0 * float(np.mean(alone) - np.mean(inherited)),
        "gap_finished_points": 100.0 * float(np.mean(alone) - np.mean(finished)),
    }


def over_int8(timing: Mapping[str, Any], kind: str) -> Figures:
    """The default's front against that of dense int8 networks, by measured latency and a kind of test accuracy.

    At each latency of the int8 front, the points by which the default's best network that is not slower is more accurate; at
    each accuracy, how many times faster its fastest network that is not less accurate is. Medians and extremes, where there are
    such.
    """
    fronts = {name: [(r["us"], r[KINDS[kind]]) for r in timing["rows"] if r["strategy"] == name] for name in (DEFAULT, INT8)}
    points, speedups = [], []
    for us, accuracy in fronts[INT8]:
        as_fast = [own for own_us, own in fronts[DEFAULT] if own_us <= us]
        as_good = [own_us for own_us, own in fronts[DEFAULT] if own >= accuracy]
        points += [100.0 * (max(as_fast) - accuracy)] if as_fast else []
        speedups += [us / min(as_good)] if as_good else []
    return {
        f"{name}{suffix}": float(function(values)) if values else None
        for name, values in (("points", points), ("speedup", speedups))
        for suffix, function in (("", np.median), ("_lowest", min), ("_highest", max))
    }


def pays(bench: Bench) -> Figures:
    """The networks out of one supernet, finished, against as many trained alone that took the same arithmetic together."""
    parts = {"inherited": f"inherited-{DEFAULT}", "finished": f"finished-{DEFAULT}", "alone_equal": "alone-equal"}
    means = {name: float(np.mean(accuracies(bench, kind))) for name, kind in parts.items()}
    together = {name: sum(r["macs"] for r in results(bench, parts[name])) for name in ("finished", "alone_equal")}
    facts = bench.job(DEFAULT).run.facts
    supernet = facts("supernet")["macs"] + facts("focus")["macs"]
    better = np.array(accuracies(bench, parts["finished"])) > np.array(accuracies(bench, parts["alone_equal"]))
    return {
        **{f"accuracy_{name}": value for name, value in means.items()},
        "accuracy_alone_same_epochs": float(np.mean(alone_accuracies(bench, "1.0"))),
        "networks": bench.networks,
        "networks_better": int(better.sum()),
        "macs_supernet": supernet,
        "macs_finishing": together["finished"],
        "macs_alone_equal": together["alone_equal"],
        "epochs_alone_equal": results(bench, "alone-equal")[0]["epochs"],
    }


def curve(bench: Bench) -> dict[int, float]:
    """Gap between networks trained alone and inherited ones in points, by epochs of both."""
    points = {}
    for length in (*bench.lengths, 1.0):
        name = DEFAULT if length == 1.0 else f"{DEFAULT}@{length}"
        alone, inherited = alone_accuracies(bench, str(length)), accuracies(bench, f"inherited-{name}")
        points[bench.alone_epochs(str(length), 0.0)] = 100.0 * float(np.mean(alone) - np.mean(inherited))
    return points


def alone_accuracies(bench: Bench, length: str) -> list[float]:
    """Of each network, trained alone for that long; the mean of all seeds."""
    by_seed = [accuracies(bench, f"alone-{name}") for name, (own, _) in bench.alone.items() if own == length]
    return [float(mean) for mean in np.mean(by_seed, axis=0)]


def alone_agreement(bench: Bench) -> float | None:
    """Kendall's tau between seeds of the same networks trained alone, mean of all pairs: what chance leaves of a ranking."""
    names = [name for name, (length, _) in bench.alone.items() if length == "1.0"]
    by_seed = [accuracies(bench, f"alone-{name}") for name in names]
    taus = [float(kendalltau(a, b).statistic) for a, b in combinations(by_seed, 2)]
    return float(np.mean(taus)) if taus else None


def results(bench: Bench, kind: str) -> list[dict[str, Any]]:
    return [json.loads(bench.result_path(f"{kind}-{index}").read_text()) for index in range(bench.networks)]


def accuracies(bench: Bench, kind: str) -> list[float]:
    return [r["accuracy"] for r in results(bench, kind)]


def cost(bench: Bench, phase: str) -> dict[str, float]:
    values: dict[str, float] = json.loads(bench.cost_path(phase).read_text())
    return values


def machine(bench: Bench, timing: Mapping[str, Any]) -> Figures:
    """What all of this ran on."""
    return {**timing["device"], "torch": torch.__version__, "python": platform.python_version(), "jobs": bench.jobs}


# -- shown --------------------------------------------------------------------------------------------------------------------


def tables(result: Mapping[str, Any]) -> str:
    """Markdown."""
    rows, pays_, by_epochs = result["strategies"], result["supernet_pays"], result["gap_points_by_epochs"]
    budgets = list(next(iter(rows.values()))["accuracy_at_budget"])
    head = ["strategy", "hypervolume", *(f"accuracy within {b}" for b in budgets), "tau", "gap", "gap finished"]
    head += ["epochs", "training, TMAC", "training, s", "search, s", "memory, MiB"]
    body = []
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["hypervolume"]):
        at_budget = [shown(row["accuracy_at_budget"][b], "{:.1%}") for b in budgets]
        forms = {"tau": "{:.2f}", "gap_points": "{:+.1f}", "gap_finished_points": "{:+.1f}"}
        gaps = [shown(row[key], form) for key, form in forms.items()]
        own = gaps if row["weights"] == name else ["as " + row["weights"], "", ""]
        costs = [
            str(row["train_epochs"]),
            f"{row['train_macs'] / 1e12:.3f}",
            f"{row['train_s']:.0f}",
            shown(row["search_s"], "{:.0f}"),
        ]
        body.append([f"`{name}`", f"{row['hypervolume']:.3f}", *at_budget, *own, *costs, f"{row['peak_mib']:.0f}"])
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body)]
    size = f"{result['rows'] or 'all'} rows of the training file, the arithmetic of {result['epochs']} epochs of `{PLAIN}`"
    described = "; ".join(f"{key} {value}" for key, value in result["machine"].items())
    lines += ["", f"Setting `{result['setting']}`: {size}. {described}.", "", *paid(pays_, result["tau_between_seeds_alone"])]
    if over := result["over_uniform_int8"]:
        lines += ["", *(against_int8(over[kind], kind) for kind in KINDS)]
    by_length = ", ".join(f"{epochs}: {gap:+.1f}" for epochs, gap in by_epochs.items())
    lines += ["", f"Gap without any retraining, in points, by epochs of the networks trained alone: {by_length}."]
    lines += ["", f"All phases together took {result['processor_s'] / 60:.0f} minutes of processor."]
    return "\n".join(lines) + "\n"


def paid(pays_: Mapping[str, Any], agreement: float | None) -> list[str]:
    """Whether the supernet pays, in words, and how far chance decides about the networks trained alone."""
    total, alone = ((pays_["macs_supernet"] + pays_["macs_finishing"]) / 1e12, pays_["macs_alone_equal"] / 1e12)
    found = [
        f"{pays_['networks']} networks out of one supernet, finished: {pays_['accuracy_finished']:.1%} on average "
        f"(inherited {pays_['accuracy_inherited']:.1%}), {total:.3f} TMAC in all.",
        f"The same networks trained alone for {pays_['epochs_alone_equal']} epochs: {pays_['accuracy_alone_equal']:.1%}, "
        f"{alone:.3f} TMAC in all; {pays_['networks_better']} of the {pays_['networks']} are better out of the supernet.",
        f"Trained alone for as many epochs as `{PLAIN}`: {pays_['accuracy_alone_same_epochs']:.1%}.",
    ]
    if agreement is not None:
        found.append(
            f"Two seeds of these agree on the ranking to a tau of {agreement:.2f}; strategies are compared with the mean."
        )
    return found


def against_int8(over: Mapping[str, float | None], kind: str) -> str:
    """The default's front and that of dense int8 networks, in words."""
    forms = {"points": "{:+.1f}", "speedup": "{:.2f}x"}
    at = {name: [shown(over[name + end], form) for end in ("", "_lowest", "_highest")] for name, form in forms.items()}
    return (
        f"`{DEFAULT}` against `{INT8}`, {kind}, median over the latter's front (lowest and highest): at equal measured "
        "latency {} points ({}, {}), at equal accuracy {} faster ({}, {}).".format(*at["points"], *at["speedup"])
    )


def shown(value: float | None, form: str) -> str:
    return "none" if value is None else form.format(value)


def picture(result: Mapping[str, Any], timing: Mapping[str, Any], path: Path) -> None:
    """Measured fronts, how far inherited and finished networks are from those trained alone, and that over the length."""
    rows = result["strategies"]
    figure, (left, right, last) = pyplot.subplots(
        1, 3, figsize=(14, 5.5), layout="constrained", gridspec_kw={"width_ratios": (5, 5, 2)}
    )
    for colour, strategy in zip(cycle(COLOURS), rows, strict=False):
        front = sorted((r["us"], 100.0 * r["accuracy"]) for r in timing["rows"] if r["strategy"] == strategy)
        dashes = "--" if strategy in GRADIENT else ":" if strategy in (*SEARCHING, "random") else "-."
        style = "-" if strategy in (DEFAULT, INT8) else dashes
        left.plot([p[0] for p in front], [p[1] for p in front], style, marker="o", markersize=4, color=colour, label=strategy)
    left.set(xscale="log", xlabel="latency on x86, µs (measured)", ylabel="test accuracy, inherited, %")
    left.legend(fontsize=7, ncol=2, loc="lower right")
    own = [s for s in rows if rows[s]["weights"] == s and rows[s]["tau"] is not None]
    at = np.arange(len(own))
    for offset, kind, label in ((-0.2, "gap_points", "as inherited"), (0.2, "gap_finished_points", "finished")):
        right.bar(at + offset, [rows[s][kind] for s in own], 0.4, label=label, color=COLOURS[0 if offset < 0 else 1])
    right.axhline(0.0, color="black", linewidth=0.8)
    right.set_xticks(at, [f"{s}\ntau {rows[s]['tau']:.2f}" for s in own], fontsize=8)
    right.set_ylabel("points below the same networks trained alone")
    right.legend(fontsize=8)
    last.plot(*zip(*result["gap_points_by_epochs"].items(), strict=True), "o-", color=COLOURS[0])
    last.axhline(0.0, color="black", linewidth=0.8)
    last.set(xlabel="epochs of the networks\ntrained alone", title=f"{DEFAULT}, as inherited")
    last.axhline(5.0, color="black", linewidth=0.8, linestyle=":")  # the most that is asked
    last.set_xticks(list(result["gap_points_by_epochs"]))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": ""})
    pyplot.close(figure)
    write_atomically(path, buffer.getvalue())
