"""What networks teach of a layer holds for layers like it: columns of the latency model that say how alike layers are.

A layer costs more or less in networks than its price says, in proportion to its own time, and similar layers do so alike. These
corrections are a Gaussian process over the pairs of one kind of layer with one lowering, with a Matern-3/2 kernel over
`predictors.pairs.pair_features`; pairs of two kinds have nothing in common. A network is corrected by the sum over its layers,
so two networks are as alike as all pairs of their layers are together: an additive Gaussian process (Duvenaud, Nickisch and
Rasmussen, "Additive Gaussian Processes", 2011).

The columns are the principal components of that kernel on the networks that were timed (Schoelkopf, Smola and Mueller,
"Nonlinear component analysis as a kernel eigenvalue problem", 1998). A linear model with them, whose coefficients are as
uncertain as each other, is that process; and a network's columns are the sums of those of its layers, so that candidates are as
quick to predict as without. What networks have that no timed one has is in no column; `unlike_us2` says how much that is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from latency_lut.table import Pair
from predictors.pairs import matern, pair_features

COMPONENTS = 200
LEAST_SHARE = 1e-6  # of the largest component's variance; smaller ones are rounding
APART = 100.0  # between two kinds, as a coordinate of theirs: so far that they have nothing in common

Kind = tuple[str, str]


class Likeness:
    """The columns, for layers of networks.

    Args:
        networks: of each the pairs of its layers and their own times in microseconds (`Effects.own_us`).
        us: `(n,)` latencies of the networks; components are chosen for errors relative to them.
        length: length scale of the kernel in standardized features.

    Attributes:
        rows: `(n, columns)`, of the networks.
    """

    def __init__(self, networks: Sequence[Sequence[tuple[Pair, float]]], us: np.ndarray, length: float) -> None:
        known = list(dict.fromkeys(pair for network in networks for pair, _ in network))
        raw, members = pair_features(known), _members(known)
        self._length, self._mean, self._std = length, raw.mean(axis=0), raw.std(axis=0) + 1e-9
        self._kinds = {kind: index for index, kind in enumerate(members)}
        position = {pair: index for index, pair in enumerate(known)}
        weights = np.zeros((len(networks), len(known)))
        for index, network in enumerate(networks):
            for pair, own_us in network:
                weights[index, position[pair]] += own_us / us[index]
        examples = self._standardized(raw)
        parts = {kind: weights[:, ids] @ self._kernel(examples[ids], examples[ids]) for kind, ids in members.items()}
        covariance = sum(parts[kind] @ weights[:, ids].T for kind, ids in members.items())
        variances, vectors = np.linalg.eigh(covariance)
        kept = np.flatnonzero(variances > LEAST_SHARE * variances[-1])[-COMPONENTS:]
        roots = np.sqrt(variances[kept])
        self.rows = vectors[:, kept] * roots * us[:, None]
        loadings = weights.T @ (vectors[:, kept] / roots)
        self._examples = {kind: (examples[ids], loadings[ids]) for kind, ids in members.items()}

    def of(self, pairs: Sequence[Pair], own_us: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        """Columns of layers, all 0 where the networks had no layer of that kind with that lowering, and points of theirs.

        Args:
            pairs: of the layers.
            own_us: microseconds of each.

        Returns:
            `(n, columns)`, and `(n, coordinates)` for `unlike_us2`.
        """
        columns, kinds = np.zeros((len(pairs), self.rows.shape[1])), np.zeros(len(pairs))
        x = self._standardized(pair_features(pairs))
        for kind, ids in _members(pairs).items():
            kinds[ids] = APART * self._kinds.setdefault(kind, len(self._kinds))
            if kind in self._examples:
                examples, loadings = self._examples[kind]
                columns[ids] = self._kernel(x[ids], examples) @ loadings
        return np.asarray(columns * np.asarray(own_us)[:, None]), np.column_stack([x, kinds])

    def unlike_us2(self, points: np.ndarray, own_us: np.ndarray, row: np.ndarray) -> float:
        """Variance of what a network's columns leave out of the process, whose variance is 1 for a layer that takes 1 us.

        Args:
            points: `(n, coordinates)`, of its layers.
            own_us: `(n,)`, theirs.
            row: `(columns,)`, the sum of theirs.
        """
        return max(0.0, float(own_us @ self._kernel(points, points) @ own_us - row @ row))

    def _standardized(self, raw: np.ndarray) -> np.ndarray:
        return np.asarray((raw - self._mean) / self._std)

    def _kernel(self, x: np.ndarray, examples: np.ndarray) -> np.ndarray:
        return matern(x, examples, self._length)


def _members(pairs: Sequence[Pair]) -> dict[Kind, list[int]]:
    """Positions of the pairs of each kind of layer with each lowering."""
    members: defaultdict[Kind, list[int]] = defaultdict(list)
    for index, (spec, lowering) in enumerate(pairs):
        members[spec.kind, lowering].append(index)
    return dict(members)
