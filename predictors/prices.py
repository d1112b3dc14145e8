"""What layers cost alone on a device: measured where a table has them, else predicted from other devices, else fitted."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from latency_lut.device import Borders, load_runtime
from latency_lut.lowering import applicable
from latency_lut.table import LatencyTable, Pair, pair_key
from predictors.effects import COEFFICIENTS, FLOAT_PRODUCER, INTEGER_PRODUCER, Effects, Values
from predictors.likeness import Likeness
from predictors.pairs import PairRegressor
from spaces.layers import LayerSpec
from spaces.precision import FLOAT, FLOAT_BITS

LAYER_SUM, GATHERS = COEFFICIENTS.index("layer_sum"), COEFFICIENTS.index("gathers_us")


@dataclass(frozen=True)
class LayerPrice:
    """What one lowering of a layer costs alone.

    Args:
        lowering: its name.
        pair: under which it is measured.
        us: microseconds.
        std_us: their standard deviation.
        measured: whether they come from the table.
        borders: the layouts of its tensors.
        gathers: whether it computes on fewer channels than the dense layer.
        effects: what else it costs depends on, as columns of `predictors.effects.Effects` and their values.
        own_us: microseconds beyond the start of a run.
        likeness: `(columns,)`, see `predictors.likeness`; none before `LayerPrices.settled`.
        point: `(coordinates,)`, likewise.
        cost_us: what it adds to a network whatever its neighbours are, by the coefficients given to `LayerPrices.settled`.
    """

    lowering: str
    pair: Pair
    us: float
    std_us: float
    measured: bool
    borders: Borders
    gathers: bool
    effects: Values
    own_us: float
    likeness: np.ndarray = field(default_factory=lambda: np.empty(0), compare=False)
    point: np.ndarray = field(default_factory=lambda: np.empty(0), compare=False)
    cost_us: float = math.nan


@dataclass(frozen=True)
class PricedLayer:
    """A layer with the prices of its lowerings, and what else its place in a network costs depends on.

    Args:
        spec: the layer.
        options: one price per applicable lowering.
        producer: how the layer computes, as `predictors.effects` tells it to the border after it.
        border_column: first column of the border before it, see `Effects.border_column`.
        input_kilo_elements: 1000 elements of its main input.
        output_kilo_elements: of its output.
        float_kilo_elements: of its output when that is float, 0 otherwise.
        weight_kilobytes: of its weights in memory.
        input_kilobytes: of its main input, for one sample; a kilobyte of tensors is 1024 bytes.
        output_kilobytes: of its output.
        tensor_kilobytes: of both, and of the second input.
    """

    spec: LayerSpec
    options: tuple[LayerPrice, ...]
    producer: int
    border_column: int
    input_kilo_elements: float
    output_kilo_elements: float
    float_kilo_elements: float
    weight_kilobytes: float
    input_kilobytes: float
    output_kilobytes: float
    tensor_kilobytes: float


class LayerPrices:
    """Prices of layers on the device of a table; each layer is looked up or fitted once.

    Args:
        table: measured pairs and those predicted from other devices; what it lacks is fitted to them (`PairRegressor`) when it
            is first asked for.
    """

    def __init__(self, table: LatencyTable) -> None:
        self.table = table
        self.effects = Effects(table)
        self._runtime = load_runtime(str(table.device["runtime"]))
        self._regressor: PairRegressor | None = None
        self._layers: dict[LayerSpec, PricedLayer] = {}
        self._model: tuple[np.ndarray, Likeness | None] | None = None
        # What is fitted to predictions is no surer than they are.
        stds = [estimate.std_us / estimate.us for estimate in table.estimates().values()]
        self._transfer_std = statistics.median(stds) if stds else 0.0

    def settled(self, coefficients: np.ndarray, likeness: Likeness | None = None) -> LayerPrices:
        """The same prices, with what a fitted model says of every layer in whatever place.

        Args:
            coefficients: `(columns,)` of the effects, then of the columns of `likeness`.
            likeness: fitted to the networks that the coefficients were fitted to; `None`: it has no columns.
        """
        prices = copy.copy(self)
        prices._model, prices._layers = (coefficients, likeness), {}
        prices._keep(self._layers.values())
        return prices

    def of(self, specs: Sequence[LayerSpec]) -> list[PricedLayer]:
        """Layers with their prices, in the order given."""
        layers = self._layers
        try:
            return [layers[spec] for spec in specs]
        except KeyError:
            self._learn({spec for spec in specs if spec not in layers})
            return [layers[spec] for spec in specs]

    def _learn(self, specs: Iterable[LayerSpec]) -> None:
        """Price layers that were not asked for before; one call of the regressor for all."""
        names = {spec: applicable(spec, self.table.device) for spec in specs}
        pairs = {spec: [pair_key(spec, name) for name in names[spec]] for spec in specs}
        entries, estimates = self.table.entries, self.table.estimates()
        missing = list({p for keys in pairs.values() for p in keys if p not in entries and p not in estimates})
        fitted: dict[Pair, tuple[float, float]] = {}
        if missing:
            if self._regressor is None:
                self._regressor = PairRegressor(self.table)
            for pair, us in zip(missing, self._regressor.predict_us(missing), strict=True):
                fitted[pair] = float(us), float(us) * math.hypot(self._regressor.std[pair[1]], self._transfer_std)
        layers = []
        for spec, keys in pairs.items():
            options, weight_kilobytes = [], _resident_bytes(spec) / 1e3
            for name, key in zip(names[spec], keys, strict=True):
                entry, estimate = entries.get(key), estimates.get(key)
                if entry is not None:
                    us, std_us = entry.us, entry.spread_us
                else:
                    us, std_us = fitted[key] if estimate is None else (estimate.us, estimate.std_us)
                borders = self._runtime.borders(spec, name, self.table.device)
                effects = self.effects.of(spec, key[1], us, entry is not None, weight_kilobytes)
                gathers = key[0].sparsity != "dense"
                own_us = self.effects.own_us(us)
                options.append(LayerPrice(name, key, us, std_us, entry is not None, borders, gathers, effects, own_us))
            layer = PricedLayer(
                spec,
                tuple(options),
                producer=INTEGER_PRODUCER if spec.integer else FLOAT_PRODUCER,
                border_column=self.effects.border_column(spec),
                input_kilo_elements=spec.input_elements / 1e3,
                output_kilo_elements=spec.output_elements / 1e3,
                float_kilo_elements=spec.output_elements / 1e3 if spec.output_bits == FLOAT_BITS else 0.0,
                weight_kilobytes=weight_kilobytes,
                input_kilobytes=(input_kilobytes := spec.input_elements * spec.input_bits / 8 / 1024),
                output_kilobytes=spec.output_bytes / 1024,
                tensor_kilobytes=input_kilobytes + (spec.output_bytes + spec.output_elements * spec.skip_bits / 8) / 1024,
            )
            layers.append(layer)
        self._keep(layers)

    def _keep(self, layers: Iterable[PricedLayer]) -> None:
        """Remember layers, with what the model says of them when there is one."""
        layers = list(layers)
        if self._model is not None and layers:
            coefficients, likeness = self._model
            options = [price for layer in layers for price in layer.options]
            alike = points = np.empty((len(options), 0))
            if likeness is not None:
                alike, points = likeness.of([price.pair for price in options], [price.own_us for price in options])
            learned_us = alike @ coefficients[len(self.effects.names) :]
            told = zip(options, learned_us.tolist(), alike, points, strict=True)
            settled = iter([_settled(price, coefficients, *of_it) for price, *of_it in told])
            layers = [replace(layer, options=tuple(next(settled) for _ in layer.options)) for layer in layers]
        self._layers |= {layer.spec: layer for layer in layers}


def _settled(
    price: LayerPrice, coefficients: np.ndarray, learned_us: float, likeness: np.ndarray, point: np.ndarray
) -> LayerPrice:
    """A price with its columns of likeness, which the coefficients say cost `learned_us`, and its point."""
    cost_us = coefficients[LAYER_SUM] * price.us + coefficients[GATHERS] * price.gathers + learned_us
    cost_us += sum(coefficients[column] * value for column, value in price.effects)
    return replace(price, likeness=likeness, point=point, cost_us=float(cost_us))


def _resident_bytes(spec: LayerSpec) -> int:
    """Bytes of a layer's weights in memory: codes for float arithmetic are unpacked when the model is loaded."""
    return (spec if spec.integer else replace(spec, precision=FLOAT)).weight_bytes
