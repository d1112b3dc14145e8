"""What pays on a device: measured ratios of precision and sparsity against the dense float layer, by kind and size of layer.

Only pairs that were measured count; nothing here is fitted. A float layer is compared with the dense one between the same
neighbours, an integer layer with the dense float one between float neighbours, where that was measured.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
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
BESIDE = "float beside int8"  # no choice: what a dense float layer costs when a neighbour is an integer layer

Bounds = Mapping[str, np.ndarray]


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


def what_pays(table: LatencyTable, bounds: Bounds | None = None) -> list[Pays]:
    """Rows for every kind, size and choice of which layers were measured.

    Args:
        table: of the device.
        bounds: of the size classes, see `size_bounds`; `None`: those of this table.
    """
    fastest = fastest_us(table)
    bounds = size_bounds([table]) if bounds is None else bounds
    ratios: dict[tuple[str, int, str], list[float]] = defaultdict(list)
    for spec, us in fastest.items():
        for reference in _references(spec):
            if reference != spec and reference in fastest:
                ratios[spec.kind, size_class(spec, bounds), _choice(spec)].append(fastest[reference] / us)
                break
    rows = []
    for (kind, size, choice), values in sorted(ratios.items()):
        faster = float(np.mean(np.array(values) > 1.0))
        name = _size_text(size, bounds[kind])
        rows.append(Pays(kind, name, choice, len(values), float(np.median(values)), faster))
    return rows


def fastest_us(table: LatencyTable) -> dict[LayerSpec, float]:
    """Microseconds of the fastest lowering of every layer of which all lowerings were measured."""
    fastest = {}
    for spec in dict.fromkeys(spec for spec, _ in table.entries):
        names = applicable(spec, table.device)
        measured = [entry.us for name in names if (entry := table.entry(spec, name)) is not None]
        if len(measured) == len(names):
            fastest[spec] = min(measured)
    return fastest


def size_bounds(tables: Iterable[LatencyTable]) -> dict[str, np.ndarray]:
    """By kind, the dense MACs that part the layers of tables into three size classes of equal number, `(2,)`."""
    macs: dict[str, list[int]] = defaultdict(list)
    for spec in dict.fromkeys(_dense_float(spec) for table in tables for spec in fastest_us(table)):
        macs[spec.kind].append(spec.macs)
    return {kind: np.quantile(values, [1 / 3, 2 / 3]) for kind, values in macs.items()}


def size_class(spec: LayerSpec, bounds: Bounds) -> int:
    """Index of a layer's size class in `SIZE_NAMES`, by the MACs that it has when it is dense.

    Raises:
        KeyError: there are no bounds for its kind.
    """
    return int(np.searchsorted(bounds[spec.kind], _dense_float(spec).macs, side="right"))


def never_pays(rows: Sequence[Pays]) -> list[str]:
    """A sentence for each choice that is slower in every size class of a kind."""
    by_choice: dict[tuple[str, str], list[Pays]] = defaultdict(list)
    for row in rows:
        if row.choice != BESIDE:
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


def between_floats(spec: LayerSpec) -> LayerSpec:
    """The layer with tensors as they are when all its neighbours are float layers."""
    skip_bits = FLOAT_BITS if spec.skip_bits else 0
    return replace(spec, input_bits=FLOAT_BITS, output_bits=FLOAT_BITS, skip_bits=skip_bits)


def rank_share(spec: LayerSpec) -> Fraction:
    """The rank as a share of the weight's smaller side, near enough to name it; 0 for a layer without a rank."""
    return Fraction(spec.rank, spec.full_rank).limit_denominator(RANK_SHARES) if spec.rank else Fraction(0)


def is_integer(spec: LayerSpec) -> bool:
    """Whether the layer computes in integers, so that the tensors at both its sides are quantized because of it."""
    return spec.integer


def _references(spec: LayerSpec) -> list[LayerSpec]:
    """Dense float layers to compare with, the first that was measured."""
    dense = _dense_float(spec)
    return [between_floats(dense), dense] if is_integer(spec) or spec == dense else [dense]


def _choice(spec: LayerSpec) -> str:
    precision = "" if spec.precision == FLOAT else "int8" if spec.precision == "w8a8" else spec.precision
    sparsity = "" if spec.sparsity == "dense" else spec.sparsity
    rank = f"rank {rank_share(spec)}" if spec.rank else ""
    return " ".join(part for part in (precision, sparsity, rank) if part) or BESIDE


def _size_text(size: int, bounds: np.ndarray) -> str:
    if size < len(bounds):
        return f"{SIZE_NAMES[size]} (up to {bounds[size] / 1e3:.0f}k MACs)"
    return f"{SIZE_NAMES[-1]} (above {bounds[-1] / 1e3:.0f}k MACs)"
