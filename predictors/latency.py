"""Latency of a network on a device: the table's layers, priced in their context.

A network does not cost the sum of its layers timed alone. A layer alone pays the start of a run; and it converts its tensors
between the layout in which single layers exchange them and the one that its kernel wants (see `latency_lut.device.Borders`),
while neighbours of one mind leave the conversions out. So

    T = a * sum(layer) + b * layers + c + d * saved + e * saved kilo-elements + f * skips + g * gathers + h * cold kilobytes

where `saved` counts the conversions (and fused additions) that the network does without, and `cold` are the weights beyond what
a core's cache keeps from one run to the next: a layer alone finds its weights there. The eight coefficients are fitted to
the relative errors of whole networks that were timed, and shrunk towards what is expected of any device: a = 1, the start of a
run saved per layer, a fraction of it per conversion. Layers that were not measured are fitted by a Gaussian process over
features of the layer, in the logarithm of the time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from scipy.stats import spearmanr

from latency_lut.device import Borders, load_runtime
from latency_lut.lowering import applicable
from latency_lut.table import LatencyTable, NetworkTiming, Pair, pair_key
from predictors.pairs import PairRegressor
from spaces.errors import UserError
from spaces.layers import INPUT, LayerSpec, Network
from spaces.precision import FLOAT, FLOAT_BITS
from spaces.space import Space

COEFFICIENTS = (
    "layer_sum",
    "layers_us",
    "network_us",
    "saved_conversions_us",
    "saved_kilo_elements_us",
    "skips_us",
    "gathers_us",
    "cold_weights_us_per_kilobyte",
)
# Of the start of a run, about two thirds of the cheapest measured pair: what a layer, a conversion and a second input save.
START_SHARE = 0.65
PRIOR_STARTS = np.array([0.0, -1.0, 0.0, -0.25, 0.0, -0.33, 0.0, 0.0])
SHRINKAGE = 0.01
WARM_KILOBYTES = 500.0
SMALLEST_SHARE = 0.1
LEAST_NETWORKS = 4
LEAST_ERROR = 0.01

Row = tuple[float, int, float, int, float, int, int, float]


@dataclass(frozen=True)
class LatencyQuality:
    """Errors on whole networks that the model was not fitted to; relative errors are shares of the measured latency.

    Args:
        mape: mean of the absolute relative errors.
        p95: their 95th percentile.
        p99: their 99th percentile.
        spearman: rank correlation of predicted and measured latency.
        n: networks.
        predicted_us: predictions.
        measured_us: measurements.
    """

    mape: float
    p95: float
    p99: float
    spearman: float
    n: int
    predicted_us: tuple[float, ...]
    measured_us: tuple[float, ...]

    @staticmethod
    def of(predicted_us: Sequence[float], measured_us: Sequence[float]) -> LatencyQuality:
        """The errors of predictions; at least two."""
        predicted, measured = np.asarray(predicted_us), np.asarray(measured_us)
        errors = np.abs(predicted / measured - 1.0)
        p95, p99 = np.quantile(errors, [0.95, 0.99])
        rank = float(spearmanr(predicted, measured).statistic)
        values = (tuple(map(float, predicted)), tuple(map(float, measured)))
        return LatencyQuality(float(errors.mean()), float(p95), float(p99), rank, len(errors), *values)


@dataclass(frozen=True)
class LayerPrice:
    """What one lowering of a layer costs alone.

    Args:
        lowering: its name.
        us: microseconds.
        std_us: their standard deviation.
        measured: whether they come from the table.
        borders: the layouts of its tensors.
        gathers: whether it computes on fewer channels than the dense layer.
    """

    lowering: str
    us: float
    std_us: float
    measured: bool
    borders: Borders
    gathers: bool


@dataclass(frozen=True)
class _Priced:
    """The lowerings of a layer, its output's kilo-elements when that is float (0 otherwise), and kilobytes of its weights."""

    options: tuple[LayerPrice, ...]
    float_kilo_elements: float
    has_skip: bool
    weight_kilobytes: float


class LatencyPredictor:
    """Predicts the latency of networks of a space on a device. Make one with `fit`.

    Attributes:
        coefficients: by the names in `COEFFICIENTS`, for a table in microseconds.
        error: relative standard deviation of what the model does not explain, apart from layers that were not measured.
        quality: errors on held-out networks.
    """

    def __init__(self, table: LatencyTable, coefficients: np.ndarray, error: float, quality: LatencyQuality) -> None:
        self.table, self.error, self.quality = table, error, quality
        self.coefficients = {name: float(value) for name, value in zip(COEFFICIENTS, coefficients, strict=True)}
        self._coefficients = tuple(map(float, coefficients))
        self._runtime = load_runtime(str(table.device["runtime"]))
        self._regressor: PairRegressor | None = None
        self._layers: dict[LayerSpec, _Priced] = {}

    @classmethod
    def fit(cls, table: LatencyTable, space: Space, held_out: int = 20, seed: int = 0) -> LatencyPredictor:
        """Fit to a table's whole networks.

        Args:
            table: layers and networks.
            space: the table's space.
            held_out: random networks that are kept for `quality`, at most half of them. Winners are never held out.
            seed: draws the held-out networks.

        Raises:
            UserError: the table has too few networks.
        """
        random = [timing for timing in table.networks if timing.source == "random"]
        held_out = min(held_out, len(random) // 2)
        if len(random) - held_out < LEAST_NETWORKS or held_out < 2:
            mend = f"run: python -m latency_lut device={table.device_name} networks=40"
            raise UserError(f"the table has {len(random)} timed networks, the latency model needs {2 * LEAST_NETWORKS}; {mend}")
        order = np.random.default_rng(seed).permutation(len(random))
        kept = [random[i] for i in order[held_out:]] + [timing for timing in table.networks if timing.source != "random"]
        prior = expected_coefficients(table)
        unfitted = cls(table, prior, 0.0, LatencyQuality.of([1.0, 2.0], [1.0, 2.0]))
        rows, variances = unfitted._design(kept, space)
        measured = np.array([timing.us for timing in kept])
        coefficients, error = _fit_coefficients(rows, measured, variances, prior)
        held = [random[i] for i in order[:held_out]]
        predicted = unfitted._design(held, space)[0] @ coefficients
        quality = LatencyQuality.of(predicted, [timing.us for timing in held])
        fitted = cls(table, coefficients, error, quality)
        fitted._regressor, fitted._layers = unfitted._regressor, unfitted._layers
        return fitted

    # -- layers -------------------------------------------------------------------------------------------------------------

    def price(self, spec: LayerSpec) -> tuple[str, float, float, bool]:
        """Of a layer's fastest lowering alone: name, microseconds, their standard deviation, whether measured."""
        best = min(self.prices(spec), key=lambda price: price.us)
        return best.lowering, best.us, best.std_us, best.measured

    def prices(self, spec: LayerSpec) -> tuple[LayerPrice, ...]:
        """What each applicable lowering of a layer costs alone."""
        return self._priced([spec])[0].options

    def _priced(self, specs: Sequence[LayerSpec]) -> list[_Priced]:
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
        missing = list({pair for keys in pairs.values() for pair in keys if pair not in self.table.entries})
        fitted: dict[Pair, tuple[float, float]] = {}
        if missing:
            if self._regressor is None:
                self._regressor = PairRegressor(self.table)
            for pair, us in zip(missing, self._regressor.predict_us(missing), strict=True):
                fitted[pair] = float(us), float(us) * self._regressor.std[pair[1]]
        for spec, keys in pairs.items():
            options = []
            for name, key in zip(names[spec], keys, strict=True):
                entry = self.table.entries.get(key)
                us, std_us = fitted[key] if entry is None else (entry.us, entry.spread_us)
                borders = self._runtime.borders(spec, name, self.table.device)
                options.append(LayerPrice(name, us, std_us, entry is not None, borders, key[0].sparsity != "dense"))
            kilo_elements = spec.output_elements / 1e3 if spec.output_bits == FLOAT_BITS else 0.0
            self._layers[spec] = _Priced(tuple(options), kilo_elements, spec.skip_bits > 0, _resident_bytes(spec) / 1e3)

    # -- networks -------------------------------------------------------------------------------------------------------------

    def plan(self, network: Network) -> tuple[str, ...]:
        """The lowering of each layer with which the network is predicted to be fastest."""
        layers = self._priced(network.layers)
        return tuple(price.lowering for price in self._cheapest(layers, _sources(network)))

    def predict(self, network: Network, lowerings: Sequence[str] | None = None) -> tuple[float, float]:
        """Latency of a network.

        Args:
            network: of the table's space.
            lowerings: one per node; by default those of `plan`.

        Returns:
            Microseconds per run, and their standard deviation.

        Raises:
            ValueError: another number of lowerings than nodes, or one that does not apply.
        """
        layers, sources = self._priced(network.layers), _sources(network)
        chosen = self._cheapest(layers, sources) if lowerings is None else _chosen(network, layers, lowerings)
        row = _row(layers, sources, chosen)
        us = sum([c * value for c, value in zip(self._coefficients, row, strict=True)])
        # Far outside of what was timed a linear model can go below any sense; a network never costs a tenth of its layers.
        us = max(us, SMALLEST_SHARE * row[0])
        variance = sum([price.std_us**2 for price in chosen])
        return us, math.sqrt((self.error * us) ** 2 + self._coefficients[0] ** 2 * variance)

    def _cheapest(self, layers: Sequence[_Priced], sources: Sequence[tuple[int, int]]) -> list[LayerPrice]:
        """The cheapest choice, from the last layer to the first: main inputs form a tree, so costs add up along it.

        A tensor with two readers is treated as two edges, and additions as if they were not fused; `predict` is exact in both.
        """
        a, _, _, d, e, _, g, _ = self._coefficients
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

    def _design(self, timings: Sequence[NetworkTiming], space: Space) -> tuple[np.ndarray, np.ndarray]:
        """Rows `(n, 8)` that the coefficients multiply, and the variance of their layer sums."""
        rows, variances = [], []
        for timing in timings:
            network = space.network(timing.architecture)
            layers = self._priced(network.layers)
            chosen = _chosen(network, layers, timing.lowerings)
            rows.append(_row(layers, _sources(network), chosen))
            variances.append(sum(price.std_us**2 for price in chosen))
        return np.array(rows), np.array(variances)

    # -- storing --------------------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """Coefficients, error and quality. The prices stay in the table, and the regressor is fitted again from it."""
        values = {
            "device": self.table.device_name,
            "device_fingerprint": self.table.device_fingerprint,
            "coefficients": self.coefficients,
            "error": self.error,
            "quality": asdict(self.quality),
        }
        return json.dumps(values, indent=2)

    @classmethod
    def from_json(cls, text: str, table: LatencyTable) -> LatencyPredictor:
        """The predictor that `to_json` stored, on the same table.

        Raises:
            UserError: the text is damaged, or of a table of another device.
        """
        try:
            values = json.loads(text)
            coefficients = np.array([float(values["coefficients"][name]) for name in COEFFICIENTS])
            stored = values["quality"]
            quality = LatencyQuality.of(stored["predicted_us"], stored["measured_us"])
            error, fingerprint = float(values["error"]), values["device_fingerprint"]
            if not np.isfinite([*coefficients, error]).all():
                raise ValueError("a coefficient is not finite")
        except (ValueError, KeyError, TypeError, AttributeError) as error_:
            raise UserError(f"the stored latency predictor is damaged ({error_}); delete it and run the job again") from error_
        if fingerprint != table.device_fingerprint:
            raise UserError(
                f"the stored latency predictor is of device {fingerprint}, the table of {table.device_fingerprint}; "
                "delete it and run the job again"
            )
        return cls(table, coefficients, error, quality)


def expected_coefficients(table: LatencyTable) -> np.ndarray:
    """What the coefficients are before any network was timed."""
    start_us = START_SHARE * min((entry.us for entry in table.entries.values()), default=0.0)
    return np.array([1.0, *[0.0] * 7]) + PRIOR_STARTS * start_us


def _resident_bytes(spec: LayerSpec) -> int:
    """Bytes of a layer's weights in memory: codes for float arithmetic are unpacked when the model is loaded."""
    return (spec if spec.integer else replace(spec, precision=FLOAT)).weight_bytes


def _sources(network: Network) -> list[tuple[int, int]]:
    """Positions of the nodes that each node's main input and skip come from, -1 for the network's own input or no skip."""
    position = {INPUT: -1}
    for index, node in enumerate(network.nodes):
        position[node.name] = index
    return [(position[n.inputs[0]], position[n.inputs[1]] if len(n.inputs) > 1 else -1) for n in network.nodes]


def _chosen(network: Network, layers: Sequence[_Priced], lowerings: Sequence[str]) -> list[LayerPrice]:
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


def _row(layers: Sequence[_Priced], sources: Sequence[tuple[int, int]], chosen: Sequence[LayerPrice]) -> Row:
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
    return sum([price.us for price in chosen]), count, 1.0, saved, kilo_elements, skips, gathers, cold_kilobytes


def _fit_coefficients(
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
