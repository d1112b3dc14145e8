"""Sizes as proxies: hard to beat, so they stand beside the others. Both are counted from the layers, as objectives are."""

from __future__ import annotations

from search.proxies.proxy import Trial, proxy


@proxy("macs")
def macs(trial: Trial) -> float:
    """Multiply-accumulates of one image with the kept weights."""
    return float(trial.layers.macs)


@proxy("parameters")
def parameters(trial: Trial) -> float:
    """Kept weights and biases."""
    return float(trial.layers.parameters)
