"""Latency of a network on a device: the table's layers, priced in their context.

`predictors.prices` says what layers cost alone (those that were not measured are fitted), `predictors.context` what their
places in a network change.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from latency_lut.table import LatencyTable, NetworkTiming
from predictors.context import (
    COEFFICIENTS,
    LEAST_NETWORKS,
    SMALLEST_SHARE,
    cheapest,
    chosen_prices,
    expected_coefficients,
    fit_coefficients,
    row_of,
    sources_of,
)
from predictors.prices import LayerPrice, LayerPrices
from predictors.quality import LatencyQuality
from spaces.errors import UserError
from spaces.layers import LayerSpec, Network
from spaces.space import Space


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
        self._prices = LayerPrices(table)

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
        coefficients, error = fit_coefficients(rows, measured, variances, prior)
        held = [random[i] for i in order[:held_out]]
        predicted = unfitted._design(held, space)[0] @ coefficients
        quality = LatencyQuality.of(predicted, [timing.us for timing in held])
        fitted = cls(table, coefficients, error, quality)
        fitted._prices = unfitted._prices
        return fitted

    # -- layers -------------------------------------------------------------------------------------------------------------

    def price(self, spec: LayerSpec) -> tuple[str, float, float, bool]:
        """Of a layer's fastest lowering alone: name, microseconds, their standard deviation, whether measured."""
        best = min(self.prices(spec), key=lambda price: price.us)
        return best.lowering, best.us, best.std_us, best.measured

    def prices(self, spec: LayerSpec) -> tuple[LayerPrice, ...]:
        """What each applicable lowering of a layer costs alone."""
        return self._prices.of([spec])[0].options

    # -- networks -------------------------------------------------------------------------------------------------------------

    def plan(self, network: Network) -> tuple[str, ...]:
        """The lowering of each layer with which the network is predicted to be fastest."""
        layers = self._prices.of(network.layers)
        return tuple(price.lowering for price in cheapest(self._coefficients, layers, sources_of(network)))

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
        layers, sources = self._prices.of(network.layers), sources_of(network)
        if lowerings is None:
            chosen = cheapest(self._coefficients, layers, sources)
        else:
            chosen = chosen_prices(network, layers, lowerings)
        row = row_of(layers, sources, chosen)
        us = sum([c * value for c, value in zip(self._coefficients, row, strict=True)])
        # Far outside of what was timed a linear model can go below any sense; a network never costs a tenth of its layers.
        us = max(us, SMALLEST_SHARE * row[0])
        variance = sum([price.std_us**2 for price in chosen])
        return us, math.sqrt((self.error * us) ** 2 + self._coefficients[0] ** 2 * variance)

    def _design(self, timings: Sequence[NetworkTiming], space: Space) -> tuple[np.ndarray, np.ndarray]:
        """Rows `(n, 9)` that the coefficients multiply, and the variance of their layer sums."""
        rows, variances = [], []
        for timing in timings:
            network = space.network(timing.architecture)
            layers = self._prices.of(network.layers)
            chosen = chosen_prices(network, layers, timing.lowerings)
            rows.append(row_of(layers, sources_of(network), chosen))
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
