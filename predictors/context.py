"""What a layer's place in a network adds to its price, and takes off it.

A network does not cost the sum of its layers timed alone. A layer alone pays the start of a run; it converts its tensors
between the layout in which single layers exchange them and the one that its kernel wants (see `latency_lut.device.Borders`),
while neighbours of one mind leave the conversions out; and in some runtimes a run copies its tensors in and out. So

    T = a * sum(layer) + b * layers + c + d * saved + e * saved kilo-elements + f * skips + g * gathers + h * cold kilobytes
        + i * tensor kilobytes

where `saved` counts the conversions (and fused additions) that the network does without, `cold` are the weights beyond what
a core's cache keeps from one run to the next (a layer alone finds its weights there), and `tensor kilobytes` are what the
layers alone take in and give out, less what the network itself does. The nine coefficients are fitted to the relative errors
of whole networks that were timed, and shrunk towards what is expected of any device: a = 1, the start of a run saved per layer,
a fraction of it per conversion, nothing for the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from latency_lut.table import LatencyTable
from predictors.prices import LayerPrice, PricedLayer
from spaces.layers import INPUT, Network

COEFFICIENTS = (
    "layer_sum",
    "layers_us",
    "network_us",
    "saved_conversions_us",
    "saved_kilo_elements_us",
    "skips_us",
    "gathers_us",
    "cold_weights_us_per_kilobyte",
    "tensors_us_per_kilobyte",
)
# Of the start of a run, about two thirds of the cheapest measured pair: what a layer, a conversion and a second input save.
START_SHARE = 0.65
PRIOR_STARTS = np.array([0.0, -1.0, 0.0, -0.25, 0.0, -0.33, 0.0, 0.0, 0.0])
SHRINKAGE = 0.01
WARM_KILOBYTES = 500.0
SMALLEST_SHARE = 0.1
LEAST_NETWORKS = 4
LEAST_ERROR = 0.01

Row = tuple[float, int, float, int, float, int, int, float, float]


def expected_coefficients(table: LatencyTable) -> np.ndarray:
    """What the coefficients are before any network was timed."""
    start_us = START_SHARE * min((entry.us for entry in table.entries.values()), default=0.0)
    return np.array([1.0, *[0.0] * 8]) + PRIOR_STARTS * start_us


def sources_of(network: Network) -> list[tuple[int, int]]:
    """Positions of the nodes that each node's main input and skip come from, -1 for the network's own input or no skip."""
    position = {INPUT: -1}
    for index, node in enumerate(network.nodes):
        position[node.name] = index
    return [(position[n.inputs[0]], position[n.inputs[1]] if len(n.inputs) > 1 else -1) for n in network.nodes]


def chosen_prices(network: Network, layers: Sequence[PricedLayer], lowerings: Sequence[str]) -> list[LayerPrice]:
    """The prices of the named lowerings, one per node.

    Raises:
        ValueError: another number of lowerings than nodes, or one that does not apply.
    """
    if len(lowerings) != len(layers):
        raise ValueError(f"{len(lowerings)} lowerings for {len(layers)} layers")
    chosen = []
    for node, layer, name in zip(network.nodes, layers, lowerings, strict=True):
        found = [price for price in layer.options if price.lowering == name]
        if not found:
            allowed = ", ".join(price.lowering for price in layer.options)
            raise ValueError(f"lowering {name!r} does not apply to {node.spec}; allowed are {allowed}")
        chosen.append(found[0])
    return chosen


def row_of(layers: Sequence[PricedLayer], sources: Sequence[tuple[int, int]], chosen: Sequence[LayerPrice]) -> Row:
    """What the coefficients multiply, in the order of `COEFFICIENTS`."""
    count = len(chosen)
    foreign_output, alone = [False] * count, [0] * count
    home_readers, foreign_readers = [False] * count, [False] * count
    saved, skips = 0, 0
    for index, (layer, (source, skip), price) in enumerate(zip(layers, sources, chosen, strict=True)):
        borders = price.borders
        foreign_output[index] = borders.foreign_output
        if source >= 0:
            if borders.foreign_input:
                alone[source] += 1
                foreign_readers[source] = True
            else:
                home_readers[source] = True
        if layer.has_skip:
            skips += 1
            fused = borders.fuses_skip and skip >= 0 and foreign_output[skip]
            if fused:
                saved += 1
                foreign_output[index] = True
            if skip >= 0:
                alone[skip] += borders.foreign_skip
                (foreign_readers if fused or borders.foreign_skip else home_readers)[skip] = True
    kilo_elements = 0.0
    for index, layer in enumerate(layers):
        if not (home_readers[index] or foreign_readers[index]):
            continue
        foreign = foreign_output[index]
        needed = home_readers[index] if foreign else foreign_readers[index]  # readers of one mind share a conversion
        conversions = alone[index] + foreign - needed
        saved += conversions
        kilo_elements += conversions * layer.float_kilo_elements
    gathers = sum([price.gathers for price in chosen])
    cold_kilobytes = max(0.0, sum([layer.weight_kilobytes for layer in layers]) - WARM_KILOBYTES)
    tensor_kilobytes = sum([layer.tensor_kilobytes for layer in layers])
    tensor_kilobytes -= layers[0].input_kilobytes + layers[-1].output_kilobytes
    layers_us = sum([price.us for price in chosen])
    return layers_us, count, 1.0, saved, kilo_elements, skips, gathers, cold_kilobytes, tensor_kilobytes


def cheapest(
    coefficients: Sequence[float], layers: Sequence[PricedLayer], sources: Sequence[tuple[int, int]]
) -> list[LayerPrice]:
    """The cheapest choice, from the last layer to the first: main inputs form a tree, so costs add up along it.

    A tensor with two readers is treated as two edges, and additions as if they were not fused; `predict` is exact in both.
    """
    a, _, _, d, e, _, g, *_ = coefficients
    costs = [[a * p.us + (g if p.gathers else 0.0) for p in layer.options] for layer in layers]
    agreed = [2.0 * (d + e * layer.float_kilo_elements) for layer in layers]  # both sides want the foreign layout
    for index in range(len(layers) - 1, -1, -1):
        above = sources[index][0]
        if above < 0:
            continue
        apart, own = min(costs[index]), layers[index].options
        saved_us = agreed[above]
        joined = min([c + saved_us if p.borders.foreign_input else c for c, p in zip(costs[index], own, strict=True)])
        row = costs[above]
        for option, price in enumerate(layers[above].options):
            row[option] += joined if price.borders.foreign_output else apart
    chosen: list[LayerPrice] = []
    for layer, row, (above, _) in zip(layers, costs, sources, strict=True):
        options = layer.options
        if len(options) == 1:
            chosen.append(options[0])
            continue
        if above >= 0 and chosen[above].borders.foreign_output:
            saved_us = agreed[above]
            row = [c + saved_us if p.borders.foreign_input else c for c, p in zip(row, options, strict=True)]
        chosen.append(options[row.index(min(row))])
    return chosen


def fit_coefficients(
    rows: np.ndarray, measured_us: np.ndarray, variances: np.ndarray, expected: np.ndarray
) -> tuple[np.ndarray, float]:
    """Ridge regression of relative errors towards the expected coefficients; the relative error that is left, leave-one-out."""
    relative = rows / measured_us[:, None]
    scale = np.abs(relative).mean(axis=0) + 1e-9
    x, prior = relative / scale, expected * scale
    inverse = np.linalg.inv(x.T @ x + SHRINKAGE * len(x) * np.eye(x.shape[1]))
    solution = prior + inverse @ x.T @ (1.0 - x @ prior)
    leverage = np.einsum("ij,jk,ik->i", x, inverse, x)
    residuals = (1.0 - x @ solution) / (1.0 - leverage)
    coefficients = solution / scale
    unexplained = residuals**2 - coefficients[0] ** 2 * variances / measured_us**2
    return coefficients, max(LEAST_ERROR, float(np.sqrt(max(0.0, unexplained.mean()))))
