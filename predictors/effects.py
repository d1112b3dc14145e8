"""What a layer costs beyond its price, by what it is and by what it meets: the columns of the latency model and their priors.

The first nine, `COEFFICIENTS`, are the same on every device (see `predictors.context`). The others correct them: a layer's
price by kind and lowering, its weights, prices that were fitted instead of measured; every border between two layers by the
layouts on both of its sides, bytes or floats, and the arithmetic before it (there a runtime puts reorders, transpositions,
Quantize and Dequantize); every addition of a skip by whether it is fused, and by its bytes; and the time that all layers take,
by how large the network is and how much of it computes in integers, because a network does not run its layers as warm as one
layer alone runs again and again.
"""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np

from latency_lut.table import LatencyTable
from spaces.layers import LayerSpec
from spaces.precision import FLOAT_BITS

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
EXPECTED_STARTS = (0.0, -1.0, 0.0, -0.25, 0.0, -0.33, 0.0, 0.0, 0.0)
NETWORK_STARTS = 10.0
WHOLE_SHARE = 0.2  # how far the time of all layers may depend on the whole network, for `Effects.scales`

NO_PRODUCER, FLOAT_PRODUCER, INTEGER_PRODUCER = range(3)
PRODUCER_STEP, LAYOUT_STEP = 2, 12  # see `Effects.border_column`
_BORDERS = tuple(itertools.product((0, 1), (0, 1), (0, 1), range(3)))
_SKIPS = tuple(itertools.product((0, 1), (0, 1), (0, 1), (0, 1), (0, 1)))
_PRODUCERS = ("input", "float", "integer")
_LAYOUTS = ("home", "foreign")
_BITS = ("floats", "bytes")
_WHOLES = ("size", "size squared", "integers", "integers squared", "size times integers")

Values = tuple[tuple[int, float], ...]


class Effects:
    """The columns for the device of a table.

    Args:
        table: its pairs say which kinds of layers and lowerings there are, and what sizes their effects may have.

    Attributes:
        wholes: the first of the columns that are about a whole network.
        names: of the columns; those of effects per layer end in `_us`, per 1000 elements in `_us_per_kilo_element`.
        expected: `(columns,)`, what the coefficients are before any network was timed.
        scales: `(columns,)`, how far from that they may be, up to a common factor: a share of the price, the cheapest pair for
            a layer, what an element costs in the median pair for an element.
    """

    def __init__(self, table: LatencyTable) -> None:
        known_us = table.known_us()
        start_us = min(known_us.values(), default=1.0)
        self._start_us = START_SHARE * start_us
        self._least_us = start_us - self._start_us
        layers = [len(network.lowerings) for network in table.networks]
        own_us = [self.own_us(us) for us in known_us.values()]
        self._typical_us = statistics.median(own_us or [1.0]) * statistics.median(layers or [1])
        element_us = [1e3 * us / spec.input_elements for (spec, _), us in known_us.items()]
        kilo_us = float(np.median(element_us)) if element_us else 1.0
        names, scales = list(COEFFICIENTS), [1.0, *[start_us] * 8]
        scales[COEFFICIENTS.index("network_us")] *= NETWORK_STARTS
        for name in ("saved_kilo_elements_us", "cold_weights_us_per_kilobyte", "tensors_us_per_kilobyte"):
            scales[COEFFICIENTS.index(name)] = kilo_us
        self._types: dict[tuple[str, str], int] = {}
        for kind, lowering in sorted({(spec.kind, lowering) for spec, lowering in known_us}):
            self._types[kind, lowering] = len(names)
            names += [f"{kind} {lowering}_us", f"{kind} {lowering} share"]
            scales += [start_us, 1.0]
        self._weights = len(names)
        names += ["float weights_us_per_kilobyte", "integer weights_us_per_kilobyte", "fitted share"]
        scales += [kilo_us, kilo_us, 1.0]
        self._borders = len(names)
        for source, wanted, bits, producer in _BORDERS:
            border = f"border {_PRODUCERS[producer]} {_BITS[bits]} {_LAYOUTS[source]}-{_LAYOUTS[wanted]}"
            names += [f"{border}_us", f"{border}_us_per_kilo_element"]
            scales += [start_us, kilo_us]
        self._skips = len(names)
        for fused, source, bits, output, integer in _SKIPS:
            skip = f"skip {_BITS[bits]}-{_BITS[output]} {_LAYOUTS[source]}{' fused' * fused}{' integer' * integer}"
            names += [f"{skip}_us", f"{skip}_us_per_kilo_element"]
            scales += [start_us, kilo_us]
        self.wholes = len(names)
        names += [f"whole {what} share" for what in _WHOLES]
        scales += [WHOLE_SHARE] * len(_WHOLES)
        self.names, self.scales = tuple(names), np.array(scales)
        self.expected = np.zeros(len(names))
        self.expected[: len(COEFFICIENTS)] = START_SHARE * start_us * np.array(EXPECTED_STARTS) if known_us else 0.0
        self.expected[0] = 1.0

    def of(self, spec: LayerSpec, lowering: str, us: float, measured: bool, weight_kilobytes: float) -> Values:
        """Columns and values of a layer in whatever place.

        Args:
            spec: the layer.
            lowering: under which it is measured (see `latency_lut.table.pair_key`).
            us: its price.
            measured: whether that was measured.
            weight_kilobytes: of its weights in memory.
        """
        values = [(self._weights + spec.integer, weight_kilobytes)]
        column = self._types.get((spec.kind, lowering))
        if column is not None:
            values += [(column, 1.0), (column + 1, us)]
        if not measured:
            values.append((self._weights + 2, us))
        return tuple(values)

    def own_us(self, us: float) -> float:
        """What a layer that costs `us` alone takes beyond the start of a run."""
        return max(us - self._start_us, self._least_us)

    def whole(self, own_us: float, integer_share: float) -> tuple[float, ...]:
        """The columns from `wholes` on, for a network whose layers take `own_us` together, the share of them in integers."""
        size, integers = math.log(own_us / self._typical_us), integer_share - 0.5
        return tuple(own_us * by for by in (size, size * size, integers, integers * integers, size * integers))

    def border_column(self, spec: LayerSpec) -> int:
        """The first column of the border before a layer, when nothing produces its input and both sides are home.

        A producer adds `PRODUCER_STEP` times its number; a reader that wants the foreign layout `LAYOUT_STEP`, a producer that
        gives it twice that. The column after the one so found is per 1000 elements.
        """
        return self._borders + LAYOUT_STEP // 2 * (spec.input_bits < FLOAT_BITS)

    def skip_column(self, spec: LayerSpec, fused: bool, source_foreign: bool) -> int:
        """The first of the two columns of the addition in a layer."""
        bits = 2 * (spec.skip_bits < FLOAT_BITS) + (spec.output_bits < FLOAT_BITS)
        return self._skips + 2 * (((2 * fused + source_foreign) * 4 + bits) * 2 + spec.integer)
