"""Which options of a space's choices are nowhere faster on a device, so that a search need not look at them.

A choice `LAYER.precision`, `LAYER.sparsity` or `LAYER.rank` governs the layer `LAYER`. Each option is held against the dense
float one (the reference) on all measured layers of the kinds and size classes that this layer can have, with all else equal:
the other choices, and the layer's neighbours. An integer layer is held against a float layer between float neighbours and,
because a network with integer neighbours has only that alternative, against a float layer between integer neighbours too.

Whether something smaller is wanted is not known here: each verdict says what the option makes smaller.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

import numpy as np

from latency_lut.pays import MARGIN, Bounds, between_floats, fastest_us, is_integer, rank_share, size_bounds, size_class
from latency_lut.table import LatencyTable
from spaces.choice import Option
from spaces.layers import LayerSpec
from spaces.precision import FLOAT_BITS
from spaces.space import Space
from spaces.sparsity import as_shipped

FIELDS = {
    "precision": "precision",
    "sparsity": "sparsity",
    "rank": "rank",
}  # kinds of choices that are judged, with their field
SMALLER: dict[str, Callable[[LayerSpec], int]] = {  # by quantity
    "size": lambda spec: spec.weight_bytes,
    "parameters": lambda spec: spec.parameters,
    "macs": lambda spec: spec.macs,
    "memory": lambda spec: spec.input_elements * spec.input_bits + spec.output_elements * spec.output_bits,
}
LEAST_PAIRS = 5  # measured in a size class, unless a choice has fewer layers there
SHARE = 0.25  # of the pairs; up to so many may be faster by more than the margin, by chance or on odd shapes
SAMPLES = 400  # networks that are looked at to find which layers a choice governs

Group = tuple[str, int, bool]  # kind, size class, whether a neighbour is an integer layer


@dataclass(frozen=True)
class Unprofitable:
    """An option that is nowhere faster.

    Args:
        choice: its name.
        option: of the choice.
        instead: the dense float option.
        pairs: measured layers on which the verdict rests.
        lowest_ratio: of the medians over size classes and neighbours: time of the reference over that of the option.
        highest_ratio: likewise.
        smaller: quantities that the option makes smaller, out of `SMALLER`.
    """

    choice: str
    option: Option
    instead: Option
    pairs: int
    lowest_ratio: float
    highest_ratio: float
    smaller: frozenset[str]


@dataclass
class _Evidence:
    """What was measured of one value of one field: ratios by group and by the values of the other fields."""

    ratios: dict[Group, dict[tuple[Any, ...], list[float]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    judged: set[tuple[LayerSpec, bool]] = field(default_factory=set)

    def pairs(self, group: Group) -> int:
        return sum(len(values) for values in self.ratios.get(group, {}).values())


def unprofitable(table: LatencyTable, space: Space) -> list[Unprofitable]:
    """The options that are nowhere faster than the dense float one, in the order of the choices.

    An option is judged only where enough was measured: `LEAST_PAIRS` layers, or all that the choice has, in every size class
    and between both kinds of neighbours in which its layers can stand. It pays where more than `SHARE` of the pairs are faster
    by more than `MARGIN`. A choice without the dense float option keeps all its options.
    """
    bounds = size_bounds([table])
    evidence = {name: _evidence(table, name, bounds) for name in FIELDS.values()}
    seen, verdicts = _governed(space), []
    for choice in space.choices:
        governed = seen.get(choice.name) if choice.kind in FIELDS else None
        if governed is None or set(governed) != set(choice.options):
            continue  # a layer by another name, or too rare to be seen with every option
        name = FIELDS[choice.kind]
        of_option = {option: {_value(spec, name) for spec in specs} for option, specs in governed.items()}
        references = [option for option, values in of_option.items() if values == {_default(name)}]
        # Where float layers of the choice can stand: pooling takes over the numbers of the layer behind it, so a float
        # classifier never has an integer input.
        places = {(*_class(spec, bounds), _beside(spec)) for option in references for spec in governed[option]}
        for option in choice.options:
            if not references or option in references or len(of_option[option]) != 1:
                continue
            found = evidence[name].get(next(iter(of_option[option])), _Evidence())
            verdict = _judge(found, governed[option], name, places, bounds)
            if verdict is not None:
                smaller = frozenset(q for spec in governed[option] for q in _smaller(spec, name))
                verdicts.append(Unprofitable(choice.name, option, references[0], *verdict, smaller))
    return verdicts


def _governed(space: Space) -> dict[str, dict[Option, set[LayerSpec]]]:
    """By choice and option, the layers that were seen in sampled networks."""
    rng = np.random.default_rng(0)
    architectures = dict.fromkeys([space.largest(), space.smallest()])
    architectures |= dict.fromkeys(space.sample(rng) for _ in range(SAMPLES))
    seen: dict[str, dict[Option, set[LayerSpec]]] = defaultdict(lambda: defaultdict(set))
    for architecture in architectures:
        nodes = {node.name: node.spec for node in space.network(architecture).nodes}
        for name, option in architecture.items():
            layer, _, kind = name.rpartition(".")
            if kind in FIELDS and layer in nodes:
                seen[name][option].add(nodes[layer])
    return seen


def _evidence(table: LatencyTable, name: str, bounds: Bounds) -> dict[Any, _Evidence]:
    """All measured pairs that differ in one field, by the value of that field."""
    fastest = fastest_us(table)
    found: dict[Any, _Evidence] = defaultdict(_Evidence)
    others = [other for other in FIELDS.values() if other != name]
    for spec, us in fastest.items():
        for beside, reference in _references(spec, name):
            if reference in fastest:
                of_value = found[_value(spec, name)]
                rest = tuple(_value(spec, other) for other in others)
                of_value.ratios[*_class(spec, bounds), beside][rest].append(fastest[reference] / us)
                of_value.judged.add((spec, beside))
    return dict(found)


def _references(spec: LayerSpec, name: str) -> Iterator[tuple[bool, LayerSpec]]:
    """What a layer is held against, with whether that has an integer neighbour; nothing for a reference itself."""
    changes: dict[str, Any] = {name: _default(name)}
    same = replace(spec, **changes)
    if same == spec:
        return
    references = {_beside(same): same}
    if is_integer(spec) and not is_integer(same):
        references[False] = between_floats(same)
    yield from references.items()


def _judge(
    found: _Evidence, layers: set[LayerSpec], name: str, places: set[Group], bounds: Bounds
) -> tuple[int, float, float] | None:
    """Pairs, lowest and highest median ratio of an option that is nowhere faster; `None` for one that is, or may be."""
    own: dict[Group, set[tuple[LayerSpec, bool]]] = {place: set() for place in places}
    for spec in layers:
        for beside, _ in _references(spec, name):
            own.get((*_class(spec, bounds), beside), set()).add((spec, beside))
    medians = []
    for group, wanted in own.items():
        if found.pairs(group) < LEAST_PAIRS and not (wanted and wanted <= found.judged):
            return None
        for ratios in found.ratios.get(group, {}).values():
            if np.mean(np.array(ratios) > MARGIN) > SHARE:
                return None
            medians.append(float(np.median(ratios)))
    return sum(found.pairs(group) for group in own), min(medians), max(medians)


def _smaller(spec: LayerSpec, name: str) -> Iterator[str]:
    for _, reference in _references(spec, name):
        yield from (quantity for quantity, count in SMALLER.items() if count(spec) < count(reference))


def _class(spec: LayerSpec, bounds: Bounds) -> tuple[str, int]:
    return spec.kind, size_class(spec, bounds) if spec.kind in bounds else -1


def _beside(spec: LayerSpec) -> bool:
    return min(spec.input_bits, spec.output_bits, spec.skip_bits or FLOAT_BITS) < FLOAT_BITS


def _value(spec: LayerSpec, name: str) -> Any:
    """What a field says in terms that mean the same in layers of all shapes."""
    if name == "rank":
        return rank_share(spec)
    return as_shipped(spec.sparsity) if name == "sparsity" else getattr(spec, name)


def _default(name: str) -> Any:
    """The value of a field in a dense float layer."""
    default = next(f.default for f in fields(LayerSpec) if f.name == name)
    if default is MISSING:
        raise ValueError(f"field {name} of a layer has no default")
    return default
