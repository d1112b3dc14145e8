"""The words and numbers of a run's report: values with their units, and the sentences that are made of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from latency_lut import figures
from latency_lut.figures import number, ratio, shown
from predictors.automatic import compared_taus

Summary = Mapping[str, Any]

FAMILIES = {
    "uniform_int8": "uniform int8",
    "uniform_float": "uniform float",
    "largest_float": "largest float network",
    "random": "random search",
}
PER_DEVICE = ("table", "latency_model", "study", "front", "winners", "baselines", "beats", "pays", "does_not_pay")
CLAIMS = ("uniform_int8", "uniform_float", "largest_float")  # the baselines that the heading names


def percent(value: object) -> str:
    """A share as a percentage with two decimals."""
    return shown(value, ".2f", " %", 100)


def microseconds(value: object, unit: str = " µs") -> str:
    """Four significant figures: 8.231, 82.31, 823.1, 8,231."""
    finite = number(value)
    decimals = 1 if not finite else min(3, max(0, 3 - math.floor(math.log10(abs(finite)))))
    return shown(finite, f",.{decimals}f", unit)


def plus_minus(value: object, spread: object) -> str:
    """A latency and its spread with the same decimals, without the unit: `46.65 ± 0.37`."""
    text = microseconds(value, "")
    decimals = len(text.partition(".")[2])
    return text if number(value) is None else f"{text} ± {shown(spread, f',.{decimals}f')}"


def family_name(family: object) -> str:
    """What a family of baselines is called in prose."""
    return FAMILIES.get(str(family), str(family).replace("_", " "))


def prediction_error(winner: Mapping[str, Any]) -> float | None:
    """Signed relative error of a winner's predicted latency; positive where the prediction was too high."""
    predicted, measured = number(winner.get("predicted_us")), number(winner.get("measured_us"))
    return predicted / measured - 1 if predicted is not None and measured else None


def pareto(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points `(cost, value)` that no other point dominates, by ascending cost."""
    best: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or value > best[-1][1]:
            best.append((cost, value))
    return best


# -- sentences -----------------------------------------------------------------------------------------------------------


def takeaway(summary: Summary) -> str:
    """The run in two or three sentences of plain text; only what was measured is claimed."""
    winners, front, beats = summary.get("winners") or [], summary.get("front") or [], summary.get("beats") or {}
    if not winners:
        return f"The front has {len(front)} networks; none is exported and measured yet." if front else ""
    text = f"{verified(winners)} of {len(winners)} winners are verified on {device_of(summary).get('name', 'the device')}."
    names = {family: family_name(family).replace("largest", "the largest") for family in CLAIMS}
    won = [f"{ratio(beats[f].get('median_speedup'))} faster than {names[f]}" for f in CLAIMS if beaten(beats.get(f))]
    lost = [names[f] for f in CLAIMS if beats.get(f) and not beaten(beats[f])]
    if won:
        text += f" At equal or better test accuracy they are {_joined(won)} (measured; medians over the baselines they beat)."
    if lost:
        text += f" They do not beat {_joined(lost)}."
    mape = number((summary.get("latency_model") or {}).get("mape"))
    return text if mape is None else f"{text} Latency of whole networks is predicted to {100 * mape:.1f} %."


def condition(summary: Summary) -> str:
    """Device, runtime, threads, batch and statistic of every latency of the run."""
    return figures.condition(device_of(summary), (summary.get("table") or {}).get("statistic"))


def measured_where(summary: Summary) -> str:
    """Where the figures of winners of a device elsewhere were measured; empty where all were measured on this machine."""
    winners = summary.get("winners") or []
    where = (winners[0].get("measured_on") or {}) if winners else {}
    if len(set(where.values())) < 2:
        return ""
    figures = {"latency": ("latency",), "accuracy": ("outputs", "accuracy in the runtime"), "graph": ("the optimized graph",)}
    places: dict[str, list[str]] = {}
    for figure, names in figures.items():
        places.setdefault(str(where.get(figure, "n/a")), []).extend(names)
    text = "; ".join(f"{_joined(names)} on {place}" for place, names in places.items())
    return f"Of winners and baselines were measured: {text}."


def noise(summary: Summary) -> str:
    """How much an accuracy means on a test set of this size."""
    images = number((summary.get("data") or {}).get("test"))
    accuracies = [a for a in (number(w.get("accuracy_runtime")) for w in summary.get("winners") or []) if a is not None]
    if not images or not accuracies:
        return ""
    best = max(accuracies)
    points = 100 * math.sqrt(max(0.0, best * (1 - best)) / images)
    return f"With {images:,.0f} test images, one standard error of an accuracy of {100 * best:.1f} % is {points:.1f} points."


def shares_weights(summary: Summary) -> bool:
    """Whether there was a supernet; else networks were trained one by one."""
    return bool((summary.get("space") or {}).get("shares_weights", True))


def accuracy_predictor(summary: Summary) -> str:
    """Which predictor of accuracy was used, and how it was chosen."""
    used = summary.get("accuracy_predictor") or {}
    name, compared = str(used.get("kind", "n/a")).replace("_", " "), used.get("compared") or {}
    how = "evaluated with the supernet's weights" if shares_weights(summary) else "trained one by one"
    text = f"Predictor {name}, fitted to {shown(used.get('n'), ',.0f')} architectures {how}."
    proxies = used.get("proxies") or {}
    if proxies:
        taus = [shown(tau, ".2f") for tau in (used.get("kendall_tau"), proxies.get("kendall_tau_without"))]
        text += (
            f" It also sees the zero-cost proxies {', '.join(proxies['names'])}: Kendall tau {taus[0]}, without them {taus[1]}."
        )
    if not compared:
        return text
    return f"{text} It was chosen by Kendall tau in cross-validation, without those held out: {compared_taus(compared)}."


def gain(summary: Summary) -> str:
    """Hypervolume of the search over that of random search, and a word where it is not above it."""
    study = summary.get("study") or {}
    found, by_random = number(study.get("hypervolume")), number(study.get("hypervolume_random"))
    if found is None or not by_random:
        return ""
    text = f"{100 * (found / by_random - 1):+.1f} % over random search at equal budget"
    return text if found > by_random else f"{text}, so {study.get('strategy', 'the search')} does not beat it"


def supernet_cost(summary: Summary) -> str:
    """What the supernet cost in networks trained alone, and what finishing the winners added."""
    supernet = summary.get("supernet") or {}
    macs, alone = number(supernet.get("macs")), number(supernet.get("winner_alone_macs"))
    if not macs or not alone:
        return ""
    text = (
        f"Training took {macs:.2g} multiply-accumulates, as much as {macs / alone:.1f} networks like the winners trained alone "
        "for as many epochs."
    )
    pays = number(supernet.get("pays_from_winners"))
    each = number(supernet.get("winner_finishing_macs"))
    if each:
        text += f" Finishing took {100 * each / macs:.1f} % of that for each winner."
    return f"{text} So it pays from {pays:.0f} winners on." if pays else f"{text} Finishing costs more than training alone."


def focusing(summary: Summary) -> str:
    """Where the supernet was trained further."""
    found = summary.get("focus") or {}
    fronts, macs = found.get("fronts") or [], number(found.get("macs"))
    whole = number((summary.get("supernet") or {}).get("macs"))
    if not fronts or not macs or not whole:
        return ""
    where = " and ".join(found.get("devices") or [])
    anew = f", {len(fronts)} times, each time with the weights as they were" if len(fronts) > 1 else ""
    return (
        f"Before the study the supernet was trained further on networks near the fronts that were predicted for {where}{anew}: "
        f"{found.get('epochs')} epochs, {100 * macs / whole:.0f} % of all its arithmetic."
    )


def relaxation(summary: Summary) -> str:
    """What a gradient search found, and whether it beats as many random networks."""
    found = summary.get("relaxation") or {}
    members = found.get("members") or []
    if not members:
        return ""
    name = found.get("strategy", "")
    seconds = sum(number(m.get("seconds")) or 0.0 for m in members)
    errors = [(shown(fit.get("mape"), ".1f", " %", 100), fit.get("cost")) for fit in (found.get("fits") or {}).values()]
    fits = ", ".join(f"{error} for {cost}" for error, cost in errors)
    text = (
        f"Before the study the gradient search {name} was run with {len(members)} weights of the cost, "
        f"{shown(seconds, ',.0f')} s in all; the study went on from what it found. "
        f"Its gradient came from a sum over options, whose mean error was {fits}."
    )
    for view in views(summary):
        alone, by_random = [*map(number, (view.get("study") or {}).get("hypervolume_relaxed") or []), None, None][:2]
        if alone is None or by_random is None:
            continue
        where = f" on {device_of(view).get('name', 'a device')}" if len(views(summary)) > 1 else ""
        beats = "" if alone > by_random else f", so {name} does not beat random search"
        text += f" Its networks alone have a hypervolume of {alone:.3f}{where}, as many random ones {by_random:.3f}{beats}."
    return text


def finishing(summary: Summary) -> str:
    """What finishing brought."""
    networks = summary.get("finish") or []
    if not networks:
        return ""
    kept = [n for n in networks if n.get("kept") == "finished"]
    gain = 100 * sum(n["accuracy_after"] - n["accuracy_before"] for n in kept) / len(networks)
    return (
        f"{len(networks)} winners were finished, each trained on its own for a little longer: mean validation accuracy "
        f"{gain:+.1f} points; {len(networks) - len(kept)} did not become better and kept the supernet's weights."
    )


def nearest_miss(summary: Summary) -> str:
    """What came closest where nothing is feasible."""
    miss = (summary.get("study") or {}).get("nearest_miss") or {}
    told = miss.get("text") or f"{miss.get('constraint', '')} (reached {miss.get('value', 'n/a')} {miss.get('unit', '')})"
    return f"Nearest miss: {told}" if miss else ""


def views(summary: Summary) -> list[Summary]:
    """The summary as each device sees it: parts that are per device are its own. Only the summary where there is one device."""
    devices = summary.get("devices") or {}
    if len(devices) < 2:
        return [summary]
    shared = {name: value for name, value in summary.items() if name not in (*PER_DEVICE, "devices")}
    return [{**shared, **(parts or {})} for parts in devices.values()]


def device_of(summary: Summary) -> Mapping[str, Any]:
    """The device of the table; empty without one."""
    return (summary.get("table") or {}).get("device") or {}


def verified(winners: Sequence[Mapping[str, Any]]) -> int:
    """How many winners passed every check."""
    return sum(bool(w.get("verified")) for w in winners)


def beaten(beat: Mapping[str, Any] | None) -> bool:
    """Whether any baseline of a family is beaten."""
    return bool(beat and number(beat.get("beaten")) and number(beat.get("median_speedup")))


def _joined(parts: Sequence[str]) -> str:
    return " and ".join((", ".join(parts[:-1]), parts[-1])) if len(parts) > 1 else parts[0]
