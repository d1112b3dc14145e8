"""Programs: small graphs of torch operations as text, for what no layer specification describes.

A gate of squeeze-and-excitation, a channel shuffle, a pooling window: networks of other people have operations that `LayerSpec`
has no fields for. Such a piece is a `Program`: shapes of inputs and weights, and operations of torch (aten) on them. Its text
is complete, so it can be the key of a table; it is data and not code, and only the operations named here can stand in it.

Shapes are without the batch. A size that is a multiple of the batch (heads that are folded into it, say) is written as one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import nn

Shape = tuple[int, ...]
aten = torch.ops.aten

OPERATIONS: dict[str, Callable[..., Any]] = {
    "reshape": torch.reshape,
    **{
        str(operation).removeprefix("aten."): operation
        for operation in (
            *(aten.relu.default, aten.hardtanh.default, aten.hardswish.default, aten.hardsigmoid.default),
            *(aten.sigmoid.default, aten.silu.default, aten.gelu.default, aten.tanh.default, aten.leaky_relu.default),
            *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor),
            *(aten.add.Scalar, aten.sub.Scalar, aten.mul.Scalar, aten.div.Scalar),
            *(aten.cat.default, aten.slice.Tensor, aten.select.int, aten.constant_pad_nd.default),
            *(aten.permute.default, aten.transpose.int, aten.t.default),
            *(aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim),
            *(aten.max_pool2d_with_indices.default, aten.avg_pool2d.default, aten.mean.dim),
            *(aten.convolution.default, aten.native_batch_norm.default, aten.native_layer_norm.default),
            *(aten.mm.default, aten.bmm.default, aten.addmm.default, aten._softmax.default),
        )
    },
}


@dataclass(frozen=True)
class Value:
    """An argument that is a tensor: the inputs are numbered first, then the weights, then the results."""

    index: int


@dataclass(frozen=True)
class Batch:
    """An argument that is so many times the batch."""

    times: int


@dataclass(frozen=True)
class Step:
    """One operation: its name in `OPERATIONS`, positional arguments, and those by name. Of several results the first counts."""

    name: str
    arguments: tuple[Any, ...]
    named: tuple[tuple[str, Any], ...] = ()

    def values(self) -> list[int]:
        """Numbers of the tensors among the arguments, in order."""
        return [a.index for a in _leaves([self.arguments, [value for _, value in self.named]]) if isinstance(a, Value)]


@dataclass(frozen=True)
class Program:
    """Operations on inputs and weights; the last result is the output.

    Args:
        inputs: shapes without the batch.
        weights: shapes.
        steps: the operations.
    """

    inputs: tuple[Shape, ...]
    weights: tuple[Shape, ...]
    steps: tuple[Step, ...]

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """Shapes of all values for a batch of one, in order.

        Raises:
            ValueError: the operations do not fit each other.
        """
        tensors = [torch.empty((1, *shape), device="meta") for shape in self.inputs]
        weights = [torch.empty(shape, device="meta") for shape in self.weights]
        try:
            values = run_steps(self.steps, [*tensors, *weights], 1)
        except (RuntimeError, TypeError, IndexError, NotImplementedError) as error:
            raise ValueError(f"not a program: {str(error).splitlines()[0][:120]}") from error
        return tuple(tuple(value.shape) for value in values)

    @property
    def output(self) -> Shape:
        """Shape of the output without the batch."""
        return self.shapes[-1][1:]

    @property
    def parameters(self) -> int:
        """Numbers in the weights."""
        return sum(math.prod(shape) for shape in self.weights)

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates of convolutions and products for one sample."""
        first, total = len(self.inputs) + len(self.weights), 0
        for index, step in enumerate(self.steps, first):
            out, read = math.prod(self.shapes[index]), [self.shapes[i] for i in step.values()]
            if step.name == "convolution.default":
                total += out * math.prod(read[1][1:])
            elif step.name in ("mm.default", "bmm.default", "addmm.default"):
                total += out * read[-1][-2]
        return total

    @property
    def operations(self) -> str:
        """The operations in short, such as `hardsigmoid, mul`."""
        return ", ".join(step.name.partition(".")[0] for step in self.steps)

    def to_json(self) -> str:
        """One line of JSON."""
        steps = [[s.name, _plain(s.arguments), {name: _plain(value) for name, value in s.named}] for s in self.steps]
        return json.dumps([self.inputs, self.weights, steps], separators=(",", ":"))

    @staticmethod
    @lru_cache(maxsize=4096)
    def from_json(text: str) -> Program:
        """The inverse of `to_json`.

        Raises:
            ValueError: it is not one, has an operation that is not allowed, or operations that do not fit each other.
        """
        try:
            inputs, weights, rows = json.loads(text)
            steps = tuple(Step(name, _parsed(a), tuple((k, _parsed(v)) for k, v in n.items())) for name, a, n in rows)
            program = Program(tuple(map(_shape, inputs)), tuple(map(_shape, weights)), steps)
        except (TypeError, AttributeError, KeyError, ValueError) as error:
            raise ValueError(f"not a program: {text[:80]!r}") from error
        first = len(program.inputs) + len(program.weights)
        for index, step in enumerate(steps, first):
            if step.name not in OPERATIONS or any(not 0 <= i < index for i in step.values()):
                raise ValueError(f"not a program: operation {step.name!r}; allowed are {', '.join(OPERATIONS)}")
        if not program.inputs or not steps or not program.output:
            raise ValueError(f"not a program: {text[:80]!r}; it has an input and an operation at least")
        return program


class ProgramModule(nn.Module):
    """A program that runs, on a batch of any size.

    Args:
        program: what to run.
        weights: its weights, in order.
    """

    def __init__(self, program: Program, weights: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.program = program
        for index, weight in enumerate(weights):
            self.register_buffer(f"weight{index}", weight)

    @property
    def weights(self) -> list[torch.Tensor]:
        """The weights, in order."""
        return [self.get_buffer(f"weight{index}") for index in range(len(self.program.weights))]

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Inputs `(n, *shape)` to the output `(n, *shape)`."""
        return run_steps(self.program.steps, [*inputs, *self.weights], inputs[0].shape[0])[-1]


def run_steps(steps: Sequence[Step], values: Sequence[torch.Tensor], batch: int) -> list[torch.Tensor]:
    """The values, and what steps make of them."""
    known = list(values)

    def resolved(argument: Any) -> Any:
        if isinstance(argument, Value):
            return known[argument.index]
        if isinstance(argument, Batch):
            return argument.times * batch
        return [resolved(part) for part in argument] if isinstance(argument, tuple) else argument

    for step in steps:
        named = {name: resolved(value) for name, value in step.named}
        result = OPERATIONS[step.name](*(resolved(a) for a in step.arguments), **named)
        known.append(result[0] if isinstance(result, tuple | list) else result)
    return known


def as_map(shape: Shape) -> tuple[int, int, int]:
    """A shape without the batch as `(channels, height, width)`; sizes beyond three are multiplied."""
    channels, height, *more = (*shape, 1, 1)
    return channels, height, math.prod(more)


def _leaves(argument: Any) -> list[Any]:
    return [x for part in argument for x in _leaves(part)] if isinstance(argument, tuple | list) else [argument]


def _plain(argument: Any) -> Any:
    if isinstance(argument, Value):
        return {"value": argument.index}
    if isinstance(argument, Batch):
        return {"batch": argument.times}
    return [_plain(part) for part in argument] if isinstance(argument, tuple) else argument


def _parsed(argument: Any) -> Any:
    if isinstance(argument, list):
        return tuple(_parsed(part) for part in argument)
    if isinstance(argument, Mapping):
        (kind, number), *more = argument.items()
        if more or kind not in ("value", "batch") or type(number) is not int:
            raise TypeError(f"argument {argument}")
        return Value(number) if kind == "value" else Batch(number)
    if argument is not None and not isinstance(argument, int | float | str | bool):
        raise TypeError(f"argument {argument}")
    return argument


def _shape(sizes: Any) -> Shape:
    if not isinstance(sizes, list) or not all(type(size) is int and 0 < size < 2**31 for size in sizes):
        raise TypeError(f"shape {sizes}")
    return tuple(sizes)
