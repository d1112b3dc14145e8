"""What a module computes, written down as the steps of a program, without computing it.

A module runs once with tensors that have shapes and no memory; every operation that torch dispatches becomes a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from spaces.errors import UserError
from spaces.program import OPERATIONS, Batch, Shape, Step, Value

BATCH = 7919  # a prime, so that sizes which are multiples of it come from the batch
_SAME = ("detach", "alias", "clone", "lift_fresh", "lift_fresh_copy", "contiguous")
_RENAMED = {"view.default": "reshape", "_unsafe_view.default": "reshape", "reshape.default": "reshape"}
_KEEP_SHAPE = ("relu", "relu_", "hardtanh", "hardtanh_", "hardswish", "hardswish_", "hardsigmoid", "native_batch_norm")
_DROPPED = ("memory_format", "layout", "device", "pin_memory")


@dataclass(frozen=True)
class Named:
    """A weight, or what was made, as an argument of what is made."""

    name: str


@dataclass(frozen=True)
class Made:
    """A tensor that a module makes while it runs, of its weights or of nothing: positions, a table looked up by them.

    It is the same for every image, so it is a weight of what ships, and the operations that make it need no counterpart there.

    Args:
        operation: of torch.
        arguments: positional; `Named` stands for a tensor.
        named: by name.
    """

    operation: Callable[..., Any]
    arguments: tuple[Any, ...]
    named: Mapping[str, Any]

    def value(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The tensor, of others by name."""

        def resolved(argument: Any) -> Any:
            if isinstance(argument, Named):
                return tensors[argument.name]
            return [resolved(part) for part in argument] if isinstance(argument, list) else argument

        result: torch.Tensor = self.operation(*map(resolved, self.arguments), **self.named)
        return result


@dataclass
class Recording:
    """What ran: value 0 is the input, `names` are those of weights, `steps` are stored under the number of what they make.

    Tensors that were made stand in `made` and have a name, as weights have.
    """

    names: dict[int, str] = field(default_factory=dict)
    steps: dict[int, Step] = field(default_factory=dict)
    made: dict[int, Made] = field(default_factory=dict)
    shapes: dict[int, Shape] = field(default_factory=dict)
    output: int = 0

    def needed(self) -> dict[int, Step]:
        """The steps that the output depends on."""
        wanted = {self.output}
        for index in reversed(self.steps):
            if index in wanted:
                wanted.update(self.steps[index].values())
        return {index: step for index, step in self.steps.items() if index in wanted}

    def made_by_name(self) -> dict[str, Made]:
        """What the module makes itself, in order."""
        return {self.names[index]: made for index, made in self.made.items()}

    def constants(self) -> set[int]:
        """Values that do not depend on the input."""
        known = set(self.names)
        for index, step in self.steps.items():
            if all(value in known for value in step.values()):
                known.add(index)
        return known


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down every operation that runs."""

    def __init__(self, recording: Recording, tensors: Mapping[int, torch.Tensor], what: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording, self.what = recording, what
        self.kept = list(tensors.values())  # an address must not be given to another tensor
        self.known = {id(tensor): index for index, tensor in tensors.items()}
        self.stacked: dict[int, tuple[list[int], int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        packet, _, overload = str(func).removeprefix("aten.").partition(".")
        if packet != "empty" and self._makes(func, args, given):
            return self._make(func, args, given)
        result = _quickly(packet, args) if packet in _KEEP_SHAPE else func(*args, **given)
        if packet == "empty":
            return result  # what batch norm keeps for a backward pass that never comes
        base = packet if packet.startswith("_") and not packet.endswith("_") else packet.rstrip("_")
        if base in _SAME or (base == "_to_copy" and result.dtype == args[0].dtype):
            self._name(result, self.known[id(args[0])])
            return result
        if base in ("split", "split_with_sizes"):
            self._split(result, *args, **given)
            return result
        name = f"{base}.{overload}"
        named = {key: value for key, value in given.items() if key not in _DROPPED}
        if base in ("cat", "stack"):
            (self._cat if base == "cat" else self._stack)(result, *args, **named)
            return result
        if base in ("sum", "mean") and id(args[0]) in self.stacked and self._reduced(result, base, *args):
            return result
        if name == "_adaptive_avg_pool2d.default" and list(args[1]) == [1, 1]:
            name, args = "mean.dim", (args[0], [2, 3], True)
        self._add(result, Step(_RENAMED.get(name, name), self._arguments(args), tuple(self._arguments(named.items()))))
        return result

    def _makes(self, func: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> bool:
        """Whether an operation reads nothing, or what was made and weights beside it, and makes something without the batch."""
        if torch.Tag.nondeterministic_seeded in func.tags or any(isinstance(x, torch.Tensor) for x in named.values()):
            return False  # what is drawn at random is another one for every image
        tensors = [x for x in _parts(args) if isinstance(x, torch.Tensor) and (x.is_meta or x.dim())]
        read = [self.known.get(id(x), 0) for x in tensors]
        if any(type(x) is int and x and x % BATCH == 0 for x in _parts(args)):
            return False
        return all(i in self.recording.names for i in read) and (not read or any(i in self.recording.made for i in read))

    def _make(self, func: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if not any(isinstance(x, torch.Tensor) for x in _parts(args)):
            named = {**named, "device": torch.device("meta")}
        result = func(*args, **named)
        if not isinstance(result, torch.Tensor):
            raise UserError(f"{self.what} uses {func} on what it makes itself, which cannot be exported")
        index = len(self.recording.shapes)
        kept = {key: value for key, value in named.items() if key not in _DROPPED}
        self.recording.made[index] = Made(func, tuple(map(self._kept, args)), kept)
        self.recording.names[index], self.recording.shapes[index] = f"made:{index}", tuple(result.shape)
        self._name(result, index)
        return result

    def _kept(self, argument: Any) -> Any:
        """An argument of what is made: as it is, tensors by number."""
        if isinstance(argument, torch.Tensor) and (argument.is_meta or argument.dim()):
            return Named(self.recording.names[self.known[id(argument)]])
        return [self._kept(part) for part in argument] if isinstance(argument, tuple | list) else argument

    def _add(self, result: Any, step: Step) -> int:
        if step.name.endswith(".Tensor") and len(step.arguments) == 2 and not isinstance(step.arguments[1], Value):
            step = replace(step, name=step.name.replace(".Tensor", ".Scalar"))
        if step.name not in OPERATIONS:
            allowed = "allowed are those of spaces/program.py"
            raise UserError(f"{self.what} uses aten.{step.name}, which cannot be exported; {allowed}")
        first = result[0] if isinstance(result, tuple | list) else result
        index = len(self.recording.shapes)
        self.recording.steps[index], self.recording.shapes[index] = step, tuple(first.shape)
        self._name(first, index)
        return index

    def _name(self, tensor: torch.Tensor, index: int) -> None:
        self.known[id(tensor)] = index
        self.kept.append(tensor)

    def _cat(self, result: torch.Tensor, parts: Sequence[torch.Tensor], dim: int = 0) -> None:
        """Two at a time, so that each step reads two tensors."""
        before, *more = (self._arguments((part,))[0] for part in parts)
        size, sizes = parts[0].shape[dim], [part.shape[dim] for part in parts[1:]]
        for part, added in zip(more, sizes, strict=True):
            size += added
            shape = list(result.shape)
            shape[dim] = size
            whole = result if size == result.shape[dim] else result.new_empty(shape)
            before = Value(self._add(whole, Step("cat.default", ((before, part), dim))))
        self._name(result, before.index)

    def _stack(self, result: torch.Tensor, parts: Sequence[torch.Tensor], dim: int = 0) -> None:
        """A concatenation of maps with one more size; never seen where `_reduced` is all that becomes of it."""
        self.stacked[id(result)] = [value.index for value in self._arguments(parts)], dim
        shape = list(result.shape)
        shape[dim] = 1
        rows = []
        for part in parts:
            rows.append(result.new_empty(shape))
            self._add(rows[-1], Step("unsqueeze.default", (*self._arguments((part,)), dim)))
        self._cat(result, rows, dim)

    def _reduced(self, result: torch.Tensor, base: str, x: torch.Tensor, dims: Any = (), keep: bool = False) -> bool:
        """Sums and means of stacked maps as additions, two at a time; returns whether it was such a one."""
        parts, dim = self.stacked[id(x)]
        if list(dims) != [dim] or keep:
            return False
        before = parts[0]
        for index, part in enumerate(parts[1:], 2):
            whole = result if index == len(parts) and base == "sum" else torch.empty_like(result)
            before = self._add(whole, Step("add.Tensor", (Value(before), Value(part))))
        if base == "mean":
            before = self._add(result, Step("div.Scalar", (Value(before), len(parts))))
        self._name(result, before)
        return True

    def _split(self, results: Sequence[torch.Tensor], x: torch.Tensor, sizes: Any, dim: int = 0) -> None:
        (whole,), first = self._arguments((x,)), 0
        for part in results:
            last = first + part.shape[dim]
            self._add(part, Step("slice.Tensor", (whole, dim, first, last)))
            first = last

    def _arguments(self, arguments: Any) -> tuple[Any, ...]:
        return tuple(self._argument(argument) for argument in arguments)

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, torch.Tensor):
            if argument.dim() == 0 and not argument.is_meta:
                return argument.item()  # a number of Python's, wrapped on its way here
            if id(argument) not in self.known:
                raise UserError(f"{self.what} uses a tensor that is neither a parameter nor a buffer; register it as a buffer")
            return Value(self.known[id(argument)])
        if isinstance(argument, tuple | list):
            return self._arguments(argument)
        if type(argument) is int and argument and argument % BATCH == 0:
            return Batch(argument // BATCH)
        if argument is not None and not isinstance(argument, int | float | str | bool):
            raise UserError(f"{self.what} uses an argument of type {type(argument).__name__}, which cannot be exported")
        return argument


def _parts(arguments: Any) -> list[Any]:
    return [x for part in arguments for x in _parts(part)] if isinstance(arguments, tuple | list) else [arguments]


def _quickly(packet: str, args: tuple[Any, ...]) -> Any:
    """The result of an operation that keeps the shape: torch works out shapes of those in milliseconds."""
    result = args[0] if packet.endswith("_") else torch.empty_like(args[0])
    return (result, result.new_empty(0), result.new_empty(0)) if packet == "native_batch_norm" else result


def recorded(module: nn.Module, input_shape: Shape, what: str) -> Recording:
    """Record a module in evaluation mode.

    Args:
        module: on the meta device.
        input_shape: `(channels, height, width)`.
        what: how errors call it.

    Raises:
        UserError: it cannot be traced, or has an operation that programs do not have.
    """
    image = torch.empty((BATCH, *input_shape), device="meta")
    tensors, recording = {0: image}, Recording()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        index = len(tensors)
        tensors[index], recording.names[index] = tensor, name
    recording.shapes = {index: tuple(tensor.shape) for index, tensor in tensors.items()}
    recorder = _Recorder(recording, tensors, what)
    try:
        with torch.no_grad(), recorder:
            output = module(image)
    except UserError:
        raise
    except Exception as error:  # what a module of the user's raises is not known beforehand
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{what} cannot be traced with images {input_shape} ({reason})") from error
    if not isinstance(output, torch.Tensor) or output.dim() != 2 or output.shape[0] != BATCH:
        shape = list(getattr(output, "shape", ()))[1:]
        raise UserError(f"{what} gives {shape or type(output).__name__} for an image; allowed is one row of logits")
    recording.output = recorder.known[id(output)]
    recording.steps = recording.needed()
    return recording
