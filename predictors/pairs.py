"""Latency of single layers that were not measured, fitted to those that were."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from latency_lut.lowering import LOWERINGS
from latency_lut.table import LatencyTable, Pair
from spaces.errors import UserError
from spaces.layers import ACTIVATIONS, OPERATOR_NAMES, LayerSpec
from spaces.precision import FLOAT_BITS
from spaces.sparsity import PATTERNS, parse

MAX_EXAMPLES = 3000


class PairRegressor:
    """Latency of pairs that were not measured: a Gaussian process on the logarithm, linear trend plus Matern-3/2.

    Args:
        table: its pairs, measured ones and those predicted from other devices, are the examples (`MAX_EXAMPLES` at most).
        length: length scale in standardized features.
        noise: variance of the noise relative to that of the process.

    Attributes:
        std: by lowering, root mean square of the leave-one-out residuals of the logarithm.
    """

    def __init__(self, table: LatencyTable, length: float = 8.0, noise: float = 0.01) -> None:
        known_us = table.known_us()
        pairs = list(known_us)
        if len(pairs) > MAX_EXAMPLES:
            pairs = [pairs[i] for i in np.random.default_rng(0).choice(len(pairs), MAX_EXAMPLES, replace=False)]
        if not pairs:
            raise UserError(f"the table of {table.device_name} is empty; run: python -m latency_lut device={table.device_name}")
        raw = pair_features(pairs)
        self._length, self._mean, self._std = length, raw.mean(axis=0), raw.std(axis=0) + 1e-9
        target = np.log([known_us[pair] for pair in pairs])
        self._examples = self._standardized(raw)
        trend = _with_one(self._examples)
        self._trend = np.linalg.solve(trend.T @ trend + 1e-3 * np.eye(trend.shape[1]), trend.T @ target)
        kernel = self._kernel(self._examples) + noise * np.eye(len(pairs))
        inverse = cho_solve(cho_factor(kernel, lower=True), np.eye(len(pairs)))
        self._alpha = inverse @ (target - trend @ self._trend)
        residuals = self._alpha / np.diag(inverse)  # leave-one-out, Rasmussen and Williams (2006), equation 5.12
        everywhere = float(np.sqrt(np.mean(residuals**2)))
        names = np.array([name for _, name in pairs])
        self.std = dict.fromkeys(LOWERINGS, everywhere)
        self.std |= {str(name): float(np.sqrt(np.mean(residuals[names == name] ** 2))) for name in np.unique(names)}

    def predict_us(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Microseconds of pairs, `(n,)`."""
        x = self._standardized(pair_features(pairs))
        return np.asarray(np.exp(_with_one(x) @ self._trend + self._kernel(x) @ self._alpha))

    def _standardized(self, raw: np.ndarray) -> np.ndarray:
        return np.asarray((raw - self._mean) / self._std)

    def _kernel(self, x: np.ndarray) -> np.ndarray:
        return matern(x, self._examples, self._length)


def matern(x: np.ndarray, y: np.ndarray, length: float) -> np.ndarray:
    """Matern-3/2 kernel between two sets of points `(n, features)` and `(m, features)`: `(n, m)`."""
    squares = (x**2).sum(axis=1)[:, None] + (y**2).sum(axis=1) - 2 * x @ y.T
    distance = np.sqrt(3 * np.maximum(squares, 0.0)) / length
    return np.asarray((1 + distance) * np.exp(-distance))


def pair_features(pairs: Sequence[Pair]) -> np.ndarray:
    """Features of (layer, lowering) pairs for the regressor, `(n, features)`."""
    return np.array([_features(spec, lowering) for spec, lowering in pairs], dtype=float)


def _features(spec: LayerSpec, lowering: str) -> list[float]:
    sparsity, precision = parse(spec.sparsity), spec.arithmetic
    sizes = (
        spec.rank,
        spec.macs,
        spec.in_channels,
        spec.out_channels,
        spec.input_elements,
        spec.output_elements,
        spec.kept_weights,
        spec.heads,
        spec.scratch_bytes,
    )
    flags = (
        spec.depthwise,
        *(spec.activation == name for name in ACTIVATIONS),
        spec.integer,
        spec.input_bits < FLOAT_BITS,
        spec.output_bits < FLOAT_BITS,
        0 < spec.skip_bits < FLOAT_BITS,
        spec.skip_bits == FLOAT_BITS,
        *(spec.operator == name for name in OPERATOR_NAMES),
        *(lowering == name for name in LOWERINGS),
        *(sparsity.pattern == name for name in PATTERNS),
    )
    # Kernels work on 16 or 32 channels at once; what is left over costs as much as a full block.
    blocks = [c % block / block for c in (spec.in_channels, spec.out_channels) for block in (16, 32)]
    return [
        *np.log1p(sizes),
        spec.height,
        spec.kernel,
        spec.stride,
        float(sparsity.kept),
        precision.bits,
        *map(float, flags),
        *blocks,
    ]


def _with_one(x: np.ndarray) -> np.ndarray:
    return np.column_stack([np.ones(len(x)), x])
