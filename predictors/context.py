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
a fraction of it per conversion, nothing for the rest. `predictors.effects` and `predictors.likeness` correct them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from predictors.effects import LAYOUT_STEP, PRODUCER_STEP, Effects
from predictors.prices import LayerPrice, PricedLayer
from spaces.layers import INPUT, Network

WARM_KILOBYTES = 500.0


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


def row_of(
    layers: Sequence[PricedLayer], sources: Sequence[tuple[int, int]], chosen: Sequence[LayerPrice], effects: Effects
) -> np.ndarray:
    """What the coefficients multiply, `(columns,)`: those of `Effects.names` in their order, then those of `likeness`."""
    count = len(chosen)
    row = [0.0] * len(effects.names)
    foreign_output, alone = [False] * count, [0] * count
    home_readers, foreign_readers = [False] * count, [False] * count
    saved, skips = 0, 0
    for index, (layer, (source, skip), price) in enumerate(zip(layers, sources, chosen, strict=True)):
        borders, spec = price.borders, layer.spec
        foreign_output[index] = borders.foreign_output
        for column, value in price.effects:
            row[column] += value
        if source >= 0:
            if borders.foreign_input:
                alone[source] += 1
                foreign_readers[source] = True
            else:
                home_readers[source] = True
        column = layer.border_column + LAYOUT_STEP * borders.foreign_input
        if source >= 0:
            column += PRODUCER_STEP * layers[source].producer + 2 * LAYOUT_STEP * foreign_output[source]
        row[column] += 1.0
        row[column + 1] += layer.input_kilo_elements
        if spec.skip_bits:
            skips += 1
            source_foreign = skip >= 0 and foreign_output[skip]
            fused = borders.fuses_skip and source_foreign
            if fused:
                saved += 1
                foreign_output[index] = True
            if skip >= 0:
                alone[skip] += borders.foreign_skip
                (foreign_readers if fused or borders.foreign_skip else home_readers)[skip] = True
            column = effects.skip_column(spec, fused, source_foreign)
            row[column] += 1.0
            row[column + 1] += layer.output_kilo_elements
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
    common = (layers_us, count, 1.0, saved, kilo_elements, skips, gathers, cold_kilobytes, tensor_kilobytes)
    row[: len(common)] = common
    own_us, integers = sum([price.own_us for price in chosen]), sum([layer.spec.integer for layer in layers])
    row[effects.wholes :] = effects.whole(own_us, integers / count)
    if not chosen[0].likeness.size:
        return np.array(row)
    return np.concatenate([row, np.add.reduce([price.likeness for price in chosen])])


def cheapest(
    coefficients: Sequence[float], layers: Sequence[PricedLayer], sources: Sequence[tuple[int, int]]
) -> list[LayerPrice]:
    """The cheapest choice, from the last layer to the first: main inputs form a tree, so costs add up along it.

    A tensor with two readers is treated as two edges, additions as if they were not fused, and all choices as if they made
    equally large networks; `row_of` is exact in all three.

    Args:
        coefficients: of the columns of `Effects`.
        layers: of a network, as `LayerPrices.settled` prices them.
        sources: as `sources_of` gives them.
    """
    d, e = coefficients[3], coefficients[4]
    costs = [[price.cost_us for price in layer.options] for layer in layers]
    borders_us: list[list[float]] = []  # both sides home, only the reader foreign, only the producer, both
    for layer, (source, _) in zip(layers, sources, strict=True):
        if source < 0 or len(layer.options) * len(layers[source].options) == 1:
            borders_us.append([0.0] * 4)
            continue
        column, kilo_elements = layer.border_column + PRODUCER_STEP * layers[source].producer, layer.input_kilo_elements
        border = [
            coefficients[i] + coefficients[i + 1] * kilo_elements
            for i in (column, column + LAYOUT_STEP, column + 2 * LAYOUT_STEP, column + 3 * LAYOUT_STEP)
        ]
        border[3] += 2.0 * (d + e * layers[source].float_kilo_elements)  # neither side converts
        borders_us.append(border)
    for index in range(len(layers) - 1, -1, -1):
        above = sources[index][0]
        if above < 0 or len(layers[above].options) == 1:
            continue
        border = borders_us[index]
        best = [math.inf, math.inf]
        for cost, price in zip(costs[index], layers[index].options, strict=True):
            wanted = price.borders.foreign_input
            best = [min(best[0], cost + border[wanted]), min(best[1], cost + border[2 + wanted])]
        row = costs[above]
        for option, price in enumerate(layers[above].options):
            row[option] += best[price.borders.foreign_output]
    chosen: list[LayerPrice] = []
    for layer, row, border, (above, _) in zip(layers, costs, borders_us, sources, strict=True):
        options = layer.options
        if len(options) == 1:
            chosen.append(options[0])
            continue
        if above >= 0:
            foreign = 2 * chosen[above].borders.foreign_output
            row = [c + border[foreign + p.borders.foreign_input] for c, p in zip(row, options, strict=True)]
        chosen.append(options[row.index(min(row))])
    return chosen
