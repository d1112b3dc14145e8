"""What pays on a device: measured ratios of precision and sparsity against the dense float layer, by kind and size of layer.

Only pairs that were measured count; nothing here is fitted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from latency_lut.lowering import applicable
from latency_lut.table import LatencyTable
from spaces.layers import LayerSpec
from spaces.precision import FLOAT, FLOAT_BITS

SIZE_NAMES = ("small", "medium", "large")
MARGIN = 1.02
RANK_SHARES = 8  # ranks are named by a share with at most this denominator


@dataclass(frozen=True)
class Pays:
    """One choice for one kind and size of layer.

    Args:
        kind: of layer, see `LayerSpec.kind`.
        size_class: `small`, `medium` or `large` with its bound in dense MACs.
        choice: precision, sparsity and rank, such as `int8 group@1/2`.
        pairs: layers that were measured both ways.
        median_ratio: time of the dense float layer over the time of this choice; above 1 is faster.
        share_faster: share of the layers for which the choice is faster.
    """

    kind: str
    size_class: str
    choice: str
    pairs: int
    median_ratio: float
    share_faster: float

    @property
    def pays(self) -> bool:
        """Whether the choice is faster in the median, by more than the noise."""
        return self.median_ratio > MARGIN


def what_pays(table: LatencyTable) -> list[Pays]:
    """Rows for every kind, size and choice of which layers were measured."""
    specs = {spec for spec, _ in table.entries}
    fastest: dict[LayerSpec, float] = {}
    for spec in specs:
        measured = [entry.us for name in applicable(spec) if (entry := table.entry(spec, name)) is not None]
        if len(measured) == len(applicable(spec)):
            fastest[spec] = min(measured)
    ratios: dict[tuple[str, int, str], list[float]] = defaultdict(list)
    bounds = _bounds([_dense_float(spec) for spec in fastest])
    for spec, us in fastest.items():
        for reference in _references(spec):
            if reference != spec and reference in fastest:
                size = int(np.searchsorted(bounds[reference.kind], reference.macs, side="right"))
                ratios[reference.kind, size, _choice(spec)].append(fastest[reference] / us)
                break
    rows = []
    for (kind, size, choice), values in sorted(ratios.items()):
        faster = float(np.mean(np.array(values) > 1.0))
        name = _size_text(size, bounds[kind])
        rows.append(Pays(kind, name, choice, len(values), float(np.median(values)), faster))
    return rows


def never_pays(rows: Sequence[Pays]) -> list[str]:
    """A sentence for each choice that is slower in every size class of a kind."""
    by_choice: dict[tuple[str, str], list[Pays]] = defaultdict(list)
    for row in rows:
        by_choice[row.kind, row.choice].append(row)
    sentences = []
    for (kind, choice), group in by_choice.items():
        if not any(row.pays for row in group):
            ratios = [row.median_ratio for row in group]
            sentences.append(
                f"{choice} {kind}: {min(ratios):.2f} to {max(ratios):.2f} times the speed of dense float in every size"
            )
    return sentences


def _dense_float(spec: LayerSpec) -> LayerSpec:
    return replace(spec, precision=FLOAT, sparsity="dense", rank=0)


def _references(spec: LayerSpec) -> list[LayerSpec]:
    """Dense float layers to compare with: between float neighbours, else between the neighbours that the layer has."""
    dense = _dense_float(spec)
    free = replace(dense, input_bits=FLOAT_BITS, output_bits=FLOAT_BITS, skip_bits=FLOAT_BITS if spec.skip_bits else 0)
    return [free, dense]


def _choice(spec: LayerSpec) -> str:
    precision = "" if spec.precision == FLOAT else "int8" if spec.precision == "w8a8" else spec.precision
    sparsity = "" if spec.sparsity == "dense" else spec.sparsity
    rank = f"rank {Fraction(spec.rank, spec.full_rank).limit_denominator(RANK_SHARES)}" if spec.rank else ""
    return " ".join(part for part in (precision, sparsity, rank) if part) or "float beside int8"


def _bounds(specs: Sequence[LayerSpec]) -> dict[str, np.ndarray]:
    macs: dict[str, list[int]] = defaultdict(list)
    for spec in set(specs):
        macs[spec.kind].append(spec.macs)
    return {kind: np.quantile(values, [1 / 3, 2 / 3]) for kind, values in macs.items()}


def _size_text(size: int, bounds: np.ndarray) -> str:
    if size < len(bounds):
        return f"{SIZE_NAMES[size]} (up to {bounds[size] / 1e3:.0f}k MACs)"
    return f"{SIZE_NAMES[-1]} (above {bounds[-1] / 1e3:.0f}k MACs)"
