"""Any torch module as a `Network`: its operations are recorded, known ones become layers, the rest becomes programs.

Known are convolutions, with the batch norm, the addition and the activation after them; linear layers; global pooling.
Neighbouring operations that are none of these become one layer of the operator `traced` as long as they read at most two
tensors. Where even that fails, the whole network is one such layer. Nothing is computed: a module is traced without memory, and
one whose control flow depends on data cannot be traced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from spaces.layers import INPUT, LayerSpec, Network, Node
from spaces.program import Program, Shape, Step, Value
from spaces.recording import BATCH, Recording, recorded
from spaces.traced import Traced, TracedLayer, traced_spec

MOST_INPUTS = 2


def trace(module: nn.Module, input_shape: Shape, what: str = "the module") -> Traced:
    """Trace a module in evaluation mode.

    Args:
        module: on the meta device; takes images `(n, *input_shape)`, gives logits `(n, classes)`.
        input_shape: `(channels, height, width)`.
        what: how errors call it.

    Raises:
        UserError: it cannot be traced, or has an operation that programs do not have.
    """
    recording = recorded(module.eval(), input_shape, what)
    try:
        return _Cut(recording, input_shape).traced()
    except _UncuttableError:
        return _whole(recording, input_shape)


# -- cutting ------------------------------------------------------------------------------------------------------------------


class _UncuttableError(Exception):
    """A piece reads more tensors than a layer can, or one whose first size is not the batch."""


@dataclass
class _Piece:
    """Operations that become one layer; `steps` are numbers of values, the last is its result."""

    steps: list[int]
    inputs: list[int]
    known: tuple[LayerSpec, TracedLayer] | None = None


class _Cut:
    """Cuts a recording into layers."""

    def __init__(self, recording: Recording, input_shape: Shape) -> None:
        self.recording, self.steps, self.shapes = recording, recording.steps, recording.shapes
        self.input_shape = input_shape
        self.constants = recording.constants()
        self.readers: dict[int, list[int]] = {}
        for index, step in self.steps.items():
            for value in dict.fromkeys(step.values()):
                self.readers.setdefault(value, []).append(index)
        self.done: set[int] = set()
        self.same: dict[int, int] = {}  # flattened values, by what they are made of
        self.pieces: dict[int, _Piece] = {}  # by their result

    def traced(self) -> Traced:
        """The network.

        Raises:
            _UncuttableError: it cannot be cut.
        """
        for index in self.steps:
            if index in self.done or index in self.constants:
                continue
            self._take(index)
        nodes, layers, names = [], {}, {0: INPUT}
        taken: set[str] = set()
        for result in sorted(self._read()):
            piece = self.pieces[result]
            spec, where = piece.known or self._program(piece)
            name = self._name(result, spec, where, taken)
            names[result] = name
            nodes.append(Node(name, spec, tuple(names[i] for i in piece.inputs)))
            layers[name] = where
        if not nodes or names.get(self._origin(self.recording.output)) != nodes[-1].name:
            raise _UncuttableError
        c, h, w = self.input_shape
        return Traced(Network((c, h, w), tuple(nodes)), layers, self.recording.made_by_name())

    def _read(self) -> set[int]:
        """The pieces that the output depends on; some were only needed as parts of others."""
        wanted, waiting = set(), [self._origin(self.recording.output)]
        while waiting:
            result = waiting.pop()
            if result in self.pieces and result not in wanted:
                wanted.add(result)
                waiting += self.pieces[result].inputs
        return wanted

    def _take(self, index: int) -> None:
        step = self.steps[index]
        if self._flattens(index):
            self.same[index] = self._origin(step.values()[0])
            return
        piece = self._convolution(index) or self._linear(index) or self._pool(index)
        if piece is None:
            piece = self._joined(index)
        self.done.update(piece.steps)
        self.pieces[piece.steps[-1]] = piece

    def _origin(self, value: int) -> int:
        return self.same.get(value, value)

    def _inputs(self, index: int) -> list[int]:
        """What a step reads that depends on the image, each once."""
        values = (v for v in self.steps[index].values() if v not in self.constants)
        return list(dict.fromkeys(self._origin(v) for v in values))

    def _next(self, index: int) -> tuple[int, Step] | None:
        """The step that reads a value, if it is the only one."""
        readers = self.readers.get(index, [])
        return (readers[0], self.steps[readers[0]]) if len(readers) == 1 and index != self.recording.output else None

    def _flattens(self, index: int) -> bool:
        """Whether a step only takes the trailing ones off a pooled map."""
        step = self.steps[index]
        if step.name != "reshape":
            return False
        before, after = self.shapes[step.values()[0]], self.shapes[index]
        return len(before) == 4 and before[2:] == (1, 1) and after == before[:2]

    # -- layers that are known ----------------------------------------------------------------------------------------------

    def _convolution(self, index: int) -> _Piece | None:
        step = self.steps[index]
        if step.name != "convolution.default":
            return None
        x, weight, bias, stride, padding, dilation, transposed, _, groups = step.arguments
        shape, read = self.shapes[weight.index], self.shapes[x.index]
        plain = len(shape) == 4 and shape[2] == shape[3] and shape[2] % 2 == 1 and not transposed
        plain = plain and len(set(stride)) == len(set(padding)) == len(set(dilation)) == 1
        plain = plain and dilation[0] == 1 and padding[0] == shape[2] // 2 and weight.index in self.recording.names
        if not plain or (bias is not None and bias.index not in self.recording.names):
            return None
        weights = tuple(self.recording.names[w.index] for w in (weight, bias) if w is not None)
        steps, inputs = [index], [self._origin(x.index)]
        norm, epsilon = self._norm(steps)
        skip = self._skip(steps)
        inputs += [] if skip is None else [skip]
        spec = LayerSpec(
            "conv2d",
            read[1],
            shape[0],
            read[2],
            read[3],
            kernel=shape[2],
            stride=stride[0],
            groups=groups,
            activation=self._activation(steps),
            skip_bits=0 if skip is None else 32,
        )
        return _Piece(steps, inputs, (spec, TracedLayer(weights, norm, epsilon)))

    def _norm(self, steps: list[int]) -> tuple[tuple[str, ...], float]:
        after = self._next(steps[-1])
        if after is None or after[1].name != "native_batch_norm.default":
            return (), 0.0
        _, *tensors, training, _, epsilon = after[1].arguments
        if training or not all(isinstance(t, Value) and t.index in self.recording.names for t in tensors):
            return (), 0.0
        steps.append(after[0])
        return tuple(self.recording.names[t.index] for t in tensors), float(epsilon)

    def _skip(self, steps: list[int]) -> int | None:
        """The tensor that is added, where it is there before the convolution runs."""
        after = self._next(steps[-1])
        if after is None or after[1].name != "add.Tensor" or after[1].named or len(set(after[1].values())) != 2:
            return None
        other = next(v for v in after[1].values() if v != steps[-1])
        same = self.shapes[other] == self.shapes[steps[-1]] and other not in self.constants
        if not same or self._origin(other) > steps[0]:
            return None
        steps.append(after[0])
        return self._origin(other)

    def _activation(self, steps: list[int]) -> str:
        after = self._next(steps[-1])
        if after is None:
            return "none"
        index, step = after
        limits = step.arguments[1:] or (-1.0, 1.0)
        name = {"relu.default": "relu", "hardswish.default": "hard_swish"}.get(step.name)
        if step.name == "hardtanh.default" and tuple(map(float, limits)) == (0.0, 6.0):
            name = "relu6"
        if name is None:
            return "none"
        steps.append(index)
        return name

    def _linear(self, index: int) -> _Piece | None:
        step = self.steps[index]
        if step.name not in ("addmm.default", "mm.default") or step.named:
            return None
        *bias, x, turned = step.arguments
        origin = self.steps.get(turned.index)
        names = self.recording.names
        if origin is None or origin.name != "t.default" or x.index in self.constants or len(self.shapes[x.index]) != 2:
            return None
        weight = origin.values()[0]
        if weight not in names or any(b.index not in names for b in bias) or self.shapes[x.index][0] != BATCH:
            return None
        out_channels, in_channels = self.shapes[weight]
        steps = [index]
        spec = LayerSpec("linear", in_channels, out_channels, activation=self._activation(steps))
        where = TracedLayer((names[weight], *(names[b.index] for b in bias)))
        return _Piece(steps, [self._origin(x.index)], (spec, where))

    def _pool(self, index: int) -> _Piece | None:
        step = self.steps[index]
        if step.name != "mean.dim":
            return None
        x, dims, *_ = step.arguments
        shape = self.shapes[x.index]
        if len(shape) != 4 or {dim % 4 for dim in dims} != {2, 3} or shape[0] != BATCH:
            return None
        spec = LayerSpec("global_pool", shape[1], shape[1], shape[2], shape[3])
        return _Piece([index], [self._origin(x.index)], (spec, TracedLayer()))

    # -- the rest -----------------------------------------------------------------------------------------------------------

    def _joined(self, index: int) -> _Piece:
        """A step, with the pieces before it that nobody else reads as long as they read no more tensors together."""
        steps, inputs = [index], self._inputs(index)
        for value in list(inputs):
            before = self.pieces.get(value)
            if before is None or before.known is not None:
                continue
            if self._next(value) is None and self.shapes[value][0] == BATCH:
                continue  # it has other readers; what no layer can hand on is made for each of them
            together = list(dict.fromkeys([*before.inputs, *(i for i in inputs if i != value)]))
            if len(together) <= MOST_INPUTS:
                steps, inputs = [*before.steps, *steps], together
        return _Piece(sorted(set(steps)), inputs)

    def _program(self, piece: _Piece) -> tuple[LayerSpec, TracedLayer]:
        if len(piece.inputs) > MOST_INPUTS:
            raise _UncuttableError
        # A constant, or a map that was flattened, is made where it is read.
        needed = sorted(_with_origins(self.recording, piece.steps, set(piece.inputs)))
        inputs = piece.inputs
        if any(self.shapes[i][0] != BATCH for i in (*inputs, piece.steps[-1])):
            raise _UncuttableError
        return _traced_layer(self.recording, needed, inputs)

    def _name(self, result: int, spec: LayerSpec, where: TracedLayer, taken: set[str]) -> str:
        if spec.operator in ("conv2d", "linear"):
            name = where.weights[0].rpartition(".")[0] or spec.operator
        else:
            name = f"{self.steps[result].name.partition('.')[0].strip('_')}{len(taken)}"
        while name in taken:
            name += "'"
        taken.add(name)
        return name


def _with_origins(recording: Recording, steps: Sequence[int], given: set[int]) -> set[int]:
    """Steps, and those before them that make what is neither given nor a weight."""
    needed, waiting = set(steps), list(steps)
    while waiting:
        for value in recording.steps[waiting.pop()].values():
            if value not in given and value not in needed and value in recording.steps:
                needed.add(value)
                waiting.append(value)
    return needed


def _traced_layer(recording: Recording, steps: Sequence[int], inputs: Sequence[int]) -> tuple[LayerSpec, TracedLayer]:
    """A layer of the operator `traced`."""
    read = (value for index in steps for value in recording.steps[index].values())
    weights = list(dict.fromkeys(v for v in read if v in recording.names))
    number = {value: place for place, value in enumerate((*inputs, *weights, *steps))}

    def renumbered(argument: Any) -> Any:
        if isinstance(argument, Value):
            return Value(number[argument.index])
        return tuple(renumbered(part) for part in argument) if isinstance(argument, tuple) else argument

    program = Program(
        tuple(recording.shapes[i][1:] for i in inputs),
        tuple(recording.shapes[i] for i in weights),
        tuple(
            replace(s, arguments=renumbered(s.arguments), named=renumbered(s.named))
            for s in (recording.steps[index] for index in steps)
        ),
    )
    return traced_spec(program), TracedLayer(tuple(recording.names[i] for i in weights))


def _whole(recording: Recording, input_shape: Shape) -> Traced:
    spec, where = _traced_layer(recording, list(recording.steps), [0])
    c, h, w = input_shape
    return Traced(Network((c, h, w), (Node("network", spec, (INPUT,)),)), {"network": where}, recording.made_by_name())
