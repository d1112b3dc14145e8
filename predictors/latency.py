"""Latency of a network on a device: the table's layers, priced in their context.

`predictors.prices` says what layers cost alone (those that were not measured are fitted), `predictors.context` and
`predictors.effects` what can change in their places, `predictors.likeness` how far what holds for one layer holds for another,
and `predictors.regression` learns from whole networks by how much.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np
from scipy.stats import norm

from latency_lut.session import Drawn
from latency_lut.table import LatencyTable, NetworkTiming, Pair
from predictors.context import cheapest, chosen_prices, row_of, sources_of
from predictors.effects import COEFFICIENTS
from predictors.likeness import Likeness
from predictors.prices import LayerPrice, LayerPrices
from predictors.quality import LatencyQuality
from predictors.regression import Regression, fit_regression
from spaces.errors import UserError
from spaces.layers import LayerSpec, Network
from spaces.space import Space

SMALLEST_SHARE = 0.1
LEAST_NETWORKS = 4
LENGTHS = (2.0, 6.0)  # of the likeness of layers, in standard deviations of their features


class LatencyPredictor:
    """Predicts the latency of networks of a space on a device. Make one with `fit`.

    Args:
        prices: of the layers.
        regression: what places in a network change.
        quality: errors on held-out networks.
        likeness: its columns are the last ones of the regression; `None`: it has no such columns.
    """

    def __init__(
        self, prices: LayerPrices, regression: Regression, quality: LatencyQuality, likeness: Likeness | None = None
    ) -> None:
        self.table, self.regression, self.quality = prices.table, regression, quality
        self.held_out: list[NetworkTiming] = []  # networks of the table that `quality` is of
        self._prices = prices.settled(regression.coefficients, likeness)
        self._coefficients, self._likeness = regression.coefficients.tolist(), likeness

    @property
    def coefficients(self) -> dict[str, float]:
        """All coefficients with a name; those that are 0 on this device are left out, but never one of `COEFFICIENTS`."""
        names = self._prices.effects.names
        named = zip(names, self._coefficients[: len(names)], strict=True)
        return {name: value for name, value in named if value or name in COEFFICIENTS}

    @classmethod
    def fit(cls, table: LatencyTable, space: Space, held_out: int = 20, seed: int = 0) -> LatencyPredictor:
        """Fit to a table's whole networks, and to those that were predicted from other devices, which weigh less.

        Args:
            table: layers and networks.
            space: the table's space.
            held_out: random networks that are kept for `quality`, at most half of them, where networks were transferred all.
                Winners are never held out.
            seed: draws the held-out networks.

        Raises:
            UserError: the table has too few networks.
        """
        random = [timing for timing in table.networks if timing.source == "random"]
        transferred = [] if table.transferred is None else table.transferred.networks
        held_out = min(held_out, len(random) if transferred else len(random) // 2)
        if len(random) + len(transferred) - held_out < LEAST_NETWORKS or held_out < 2:
            mend = f"run: python -m latency_lut device={table.device_name} networks=40"
            raise UserError(f"the table has {len(random)} timed networks, the latency model needs {2 * LEAST_NETWORKS}; {mend}")
        order = np.random.default_rng(seed).permutation(len(random))
        kept = [random[i] for i in order[held_out:]] + [timing for timing in table.networks if timing.source != "random"]
        held = [random[i] for i in order[:held_out]]
        prices = LayerPrices(table)
        known = [(timing.architecture, timing.lowerings) for timing in [*kept, *transferred]]
        rows, variances, layers = _design(known, space, prices)
        known_us = np.array([timing.us for timing in kept] + [network.estimate.us for network in transferred])
        stds = np.array([timing.spread_us for timing in kept] + [n.estimate.std_us for n in transferred]) / known_us
        effects = prices.effects

        def fitted(likeness: Likeness | None) -> Regression:
            columns = np.empty((len(rows), 0)) if likeness is None else likeness.rows
            alike = columns.shape[1]
            expected, scales = np.append(effects.expected, np.zeros(alike)), np.append(effects.scales, np.ones(alike))
            if likeness is None:
                scales[effects.wholes :] = 0.0
            wide = np.hstack([rows, columns])
            return fit_regression(wide, known_us, variances, expected, scales, len(COEFFICIENTS), stds, alike)

        regression, likeness = fitted(None), None
        # A few networks cannot tell such fine effects from chance, so the plain model stays unless another is clearly better.
        fine = [(fitted(each), each) for each in (Likeness(layers, known_us, length) for length in LENGTHS)]
        best, of_best = min(fine, key=lambda told: told[0].loo_error)
        if best.clearly_better(regression):
            regression, likeness = best, of_best
        if table.transferred is not None and transferred:
            # The fit says how well the predictions are reproduced; how wrong these may be comes on top of it.
            error = math.hypot(regression.error, float(np.median(stds[len(kept) :])))
            loo_error = table.transferred.network_error or regression.loo_error
            regression = replace(regression, error=error, loo_error=loo_error, widening=max(1.0, regression.widening))
        unknown = LatencyQuality.of([1.0, 2.0], [1.0, 1.0], [1.0, 2.0])
        predictor = cls(prices, regression, unknown, likeness)
        predictor.held_out = held
        predicted = [predictor.predict(space.network(timing.architecture), timing.lowerings) for timing in held]
        means_us, stds_us = zip(*predicted, strict=True)
        predictor.quality = LatencyQuality.of(means_us, stds_us, [timing.us for timing in held])
        return predictor

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
        row, us, chosen = self._explain(network, lowerings)
        unlike_us2 = 0.0
        if self._likeness is not None:
            own_us, points = np.array([price.own_us for price in chosen]), np.array([price.point for price in chosen])
            unlike_us2 = self._likeness.unlike_us2(points, own_us, row[len(self._prices.effects.names) :])
        layers_variance = sum([price.std_us**2 for price in chosen])
        return us, math.sqrt(self.regression.variance_us2(row, us, layers_variance, unlike_us2))

    def predict_us(self, network: Network, lowerings: Sequence[str] | None = None) -> float:
        """The microseconds of `predict` without their standard deviation, and so in less time."""
        return self._explain(network, lowerings)[1]

    def explain(
        self, network: Network, lowerings: Sequence[str] | None = None
    ) -> tuple[np.ndarray, float, tuple[tuple[float, bool], ...]]:
        """What a prediction is made of.

        Args:
            network: as in `predict`.
            lowerings: as in `predict`.

        Returns:
            The row `(columns,)` that the coefficients multiply, the prediction in microseconds, and for each layer the standard
            deviation of its price in microseconds and whether that was measured.
        """
        row, us, chosen = self._explain(network, lowerings)
        return row, us, tuple((price.std_us, price.measured) for price in chosen)

    def _explain(self, network: Network, lowerings: Sequence[str] | None) -> tuple[np.ndarray, float, list[LayerPrice]]:
        layers, sources = self._prices.of(network.layers), sources_of(network)
        if lowerings is None:
            chosen = cheapest(self._coefficients, layers, sources)
        else:
            chosen = chosen_prices(network, layers, lowerings)
        row = row_of(layers, sources, chosen, self._prices.effects)
        # Far outside of what was timed a linear model can go below any sense; a network never costs a tenth of its layers.
        us = max(float(row @ self.regression.coefficients), SMALLEST_SHARE * float(row[0]))
        return row, us, chosen

    def interval(
        self, network: Network, lowerings: Sequence[str] | None = None, coverage: float = 0.9
    ) -> tuple[float, float, float]:
        """Lower end, prediction and upper end, in microseconds; of networks like those timed the share `coverage` lies between.

        Args:
            network: as in `predict`.
            lowerings: as in `predict`.
            coverage: above 0 and below 1; calibrated at 0.9, by the normal distribution elsewhere.

        Raises:
            ValueError: as in `predict`, or `coverage` is out of range.
        """
        if not 0.0 < coverage < 1.0:
            raise ValueError(f"coverage is {coverage}; allowed is above 0 and below 1")
        us, std_us = self.predict(network, lowerings)
        half = float(norm.ppf(0.5 + coverage / 2)) * std_us
        return max(0.0, us - half), us, us + half

    def to_json(self) -> str:
        """Coefficients, error and quality, for people and other programs; a predictor is fitted again from its table."""
        values = {
            "device": self.table.device_name,
            "device_fingerprint": self.table.device_fingerprint,
            "coefficients": self.coefficients,
            "error": self.regression.error,
            "widening": self.regression.widening,
            "loo_error": self.regression.loo_error,
            "quality": asdict(self.quality),
        }
        return json.dumps(values, indent=2)


def _design(
    known: Sequence[Drawn], space: Space, prices: LayerPrices
) -> tuple[np.ndarray, np.ndarray, list[list[tuple[Pair, float]]]]:
    """Rows `(n, columns)` that the coefficients multiply, the variances `(n,)` of their layer sums, and each one's layers."""
    rows, variances, own = [], [], []
    for architecture, lowerings in known:
        network = space.network(architecture)
        layers = prices.of(network.layers)
        chosen = chosen_prices(network, layers, lowerings)
        rows.append(row_of(layers, sources_of(network), chosen, prices.effects))
        variances.append(sum(price.std_us**2 for price in chosen))
        own.append([(price.pair, price.own_us) for price in chosen])
    return np.array(rows), np.array(variances), own
