"""Programs as ONNX nodes: one entry per operation that may stand in one (`spaces.program.OPERATIONS`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from latency_lut.graph import GraphBuilder, Tensor
from latency_lut.lowerings.base import LayerWeights, lowering
from spaces.layers import LayerSpec
from spaces.program import Batch, Program, Shape, Step, Value

END = 2**31 - 1


class _Nodes:
    """Makes the nodes of a program.

    Args:
        g: the graph.
        program: what to make.
        known: its inputs and weights.
    """

    def __init__(self, g: GraphBuilder, program: Program, known: Sequence[ir.Value]) -> None:
        self.g, self.program, self.known = g, program, list(known)
        shape = g.inputs[0].shape
        self.batch = 1 if shape is None else int(str(shape[0]))
        self.count = 0

    def op(self, kind: str, inputs: Sequence[ir.Value | None], **attributes: Any) -> ir.Value:
        self.count += 1
        return self.g.op(kind, inputs, f"{kind.lower()}{self.count}", **attributes)

    def constant(self, value: Any, dtype: Any = np.float32) -> ir.Value:
        self.count += 1
        return self.g.constant(f"constant{self.count}", np.array(value, dtype))

    def shape(self, value: Value) -> Shape:
        """Of a value, for a batch of one."""
        return self.program.shapes[value.index]

    def run(self) -> ir.Value:
        """The output."""
        for step in self.program.steps:
            arguments = [self._resolved(a) for a in step.arguments]
            self.known.append(OPERATIONS[step.name](self, step, *arguments, **dict(step.named)))
        return self.known[-1]

    def _resolved(self, argument: Any) -> Any:
        if isinstance(argument, Value):
            return self.known[argument.index]
        if isinstance(argument, Batch):
            return argument.times * self.batch
        return [self._resolved(part) for part in argument] if isinstance(argument, tuple) else argument


Operation = Callable[..., ir.Value]
OPERATIONS: dict[str, Operation] = {}


def _operation(*names: str) -> Callable[[Operation], Operation]:
    def register(make: Operation) -> Operation:
        OPERATIONS.update(dict.fromkeys(names, make))
        return make

    return register


def _elementwise(name: str, kind: str, **attributes: Any) -> None:
    OPERATIONS[name] = lambda n, step, x: n.op(kind, [x], **attributes)


_elementwise("relu.default", "Relu")
_elementwise("hardswish.default", "HardSwish")
_elementwise("hardsigmoid.default", "HardSigmoid", alpha=1.0 / 6.0, beta=0.5)
_elementwise("sigmoid.default", "Sigmoid")
_elementwise("tanh.default", "Tanh")


@_operation("silu.default")
def _silu(n: _Nodes, step: Step, x: ir.Value) -> ir.Value:
    return n.op("Mul", [x, n.op("Sigmoid", [x])])


@_operation("gelu.default")
def _gelu(n: _Nodes, step: Step, x: ir.Value, *, approximate: str = "none") -> ir.Value:
    return n.op("Gelu", [x], approximate=approximate)


@_operation("leaky_relu.default")
def _leaky_relu(n: _Nodes, step: Step, x: ir.Value, slope: float = 0.01) -> ir.Value:
    return n.op("LeakyRelu", [x], alpha=float(slope))


@_operation("hardtanh.default")
def _clip(n: _Nodes, step: Step, x: ir.Value, low: float = -1.0, high: float = 1.0) -> ir.Value:
    return n.op("Clip", [x, n.constant(low), n.constant(high)])


@_operation(*(f"{name}.{kind}" for name in ("add", "sub", "mul", "div") for kind in ("Tensor", "Scalar")))
def _binary(n: _Nodes, step: Step, x: ir.Value, y: Any, scale: float = 1, *, alpha: float = 1) -> ir.Value:
    other = y if isinstance(y, ir.Value) else n.constant(y)
    if scale * alpha != 1:
        other = n.op("Mul", [other, n.constant(scale * alpha)])
    return n.op(step.name.partition(".")[0].capitalize(), [x, other])


@_operation("cat.default")
def _cat(n: _Nodes, step: Step, parts: list[ir.Value], dim: int = 0) -> ir.Value:
    return n.op("Concat", parts, axis=dim)


@_operation("reshape")
def _reshape(n: _Nodes, step: Step, x: ir.Value, sizes: list[int]) -> ir.Value:
    return n.op("Reshape", [x, n.constant(sizes, np.int64)])


@_operation("expand.default")
def _expand(n: _Nodes, step: Step, x: ir.Value, sizes: list[int]) -> ir.Value:
    return n.op("Expand", [x, n.constant([1 if size == -1 else size for size in sizes], np.int64)])


@_operation("permute.default")
def _permute(n: _Nodes, step: Step, x: ir.Value, order: list[int]) -> ir.Value:
    return n.op("Transpose", [x], perm=[dim % len(order) for dim in order])


@_operation("transpose.int", "t.default")
def _transpose(n: _Nodes, step: Step, x: ir.Value, first: int = 0, second: int = -1) -> ir.Value:
    order = list(range(len(n.shape(step.arguments[0]))))
    order[first], order[second] = order[second], order[first]
    return n.op("Transpose", [x], perm=order)


@_operation("unsqueeze.default")
def _unsqueeze(n: _Nodes, step: Step, x: ir.Value, dim: int) -> ir.Value:
    return n.op("Unsqueeze", [x, n.constant([dim], np.int64)])


@_operation("squeeze.dim")
def _squeeze(n: _Nodes, step: Step, x: ir.Value, dim: int) -> ir.Value:
    return n.op("Squeeze", [x, n.constant([dim], np.int64)]) if n.shape(step.arguments[0])[dim] == 1 else x


@_operation("slice.Tensor")
def _slice(
    n: _Nodes, step: Step, x: ir.Value, dim: int = 0, start: int | None = None, end: int | None = None, by: int = 1
) -> ir.Value:
    limits = ([start or 0], [END if end is None else min(end, END)], [dim], [by])
    return n.op("Slice", [x, *(n.constant(limit, np.int64) for limit in limits)])


@_operation("select.int")
def _select(n: _Nodes, step: Step, x: ir.Value, dim: int, index: int) -> ir.Value:
    return n.op("Gather", [x, n.constant(index, np.int64)], axis=dim)


@_operation("constant_pad_nd.default")
def _pad(n: _Nodes, step: Step, x: ir.Value, sizes: list[int], value: float = 0.0) -> ir.Value:
    before, after = ([*reversed(sizes[side::2])] for side in (0, 1))  # torch begins with the last dimension
    unpadded = [0] * (len(n.shape(step.arguments[0])) - len(before))
    return n.op("Pad", [x, n.constant([*unpadded, *before, *unpadded, *after], np.int64), n.constant(value)])


@_operation("max_pool2d_with_indices.default")
def _max_pool(
    n: _Nodes,
    step: Step,
    x: ir.Value,
    kernel: list[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil: bool = False,
) -> ir.Value:
    window = _window(kernel, stride or kernel, padding)
    return n.op("MaxPool", [x], dilations=_pair(dilation), ceil_mode=int(ceil), **window)


@_operation("avg_pool2d.default")
def _average_pool(
    n: _Nodes,
    step: Step,
    x: ir.Value,
    kernel: list[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil: bool = False,
    count_padding: bool = True,
) -> ir.Value:
    window = _window(kernel, stride or kernel, padding)
    return n.op("AveragePool", [x], ceil_mode=int(ceil), count_include_pad=int(count_padding), **window)


@_operation("mean.dim")
def _mean(n: _Nodes, step: Step, x: ir.Value, dims: list[int], keep: bool = False) -> ir.Value:
    return n.op("ReduceMean", [x, n.constant(dims, np.int64)], keepdims=int(keep))


@_operation("convolution.default")
def _convolution(
    n: _Nodes,
    step: Step,
    x: ir.Value,
    weight: ir.Value,
    bias: ir.Value | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> ir.Value:
    inputs = [x, weight] if bias is None else [x, weight, bias]
    sizes = {"strides": stride, "pads": [*padding, *padding], "dilations": dilation, "group": groups}
    if transposed:
        return n.op("ConvTranspose", inputs, output_padding=output_padding, **sizes)
    return n.op("Conv", inputs, **sizes)


@_operation("native_batch_norm.default")
def _batch_norm(n: _Nodes, step: Step, x: ir.Value, *rest: Any) -> ir.Value:
    scale, shift, mean, variance, _, _, epsilon = rest
    channels = n.shape(step.arguments[0])[1]
    scale = n.constant(np.ones(channels)) if scale is None else scale
    shift = n.constant(np.zeros(channels)) if shift is None else shift
    return n.op("BatchNormalization", [x, scale, shift, mean, variance], epsilon=float(epsilon))


@_operation("native_layer_norm.default")
def _layer_norm(
    n: _Nodes, step: Step, x: ir.Value, sizes: list[int], scale: ir.Value | None, shift: ir.Value | None, epsilon: float
) -> ir.Value:
    scale = n.constant(np.ones(sizes)) if scale is None else scale
    inputs = [x, scale] if shift is None else [x, scale, shift]
    return n.op("LayerNormalization", inputs, axis=-len(sizes), epsilon=float(epsilon))


@_operation("mm.default", "bmm.default")
def _product(n: _Nodes, step: Step, x: ir.Value, y: ir.Value) -> ir.Value:
    return n.op("MatMul", [x, y])


@_operation("addmm.default")
def _product_and_sum(
    n: _Nodes, step: Step, z: ir.Value, x: ir.Value, y: ir.Value, *, alpha: float = 1.0, beta: float = 1.0
) -> ir.Value:
    return n.op("Gemm", [x, y, z], alpha=float(alpha), beta=float(beta))


@_operation("_softmax.default")
def _softmax(n: _Nodes, step: Step, x: ir.Value, dim: int, half: bool = False) -> ir.Value:
    return n.op("Softmax", [x], axis=dim)


def _pair(sizes: Sequence[int]) -> list[int]:
    return [sizes[0], sizes[-1]]


def _window(kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> dict[str, list[int]]:
    return {"kernel_shape": _pair(kernel), "strides": _pair(stride), "pads": _pair(padding) * 2}


@lowering("traced", lambda spec: spec.operator == "traced")
def traced(g: GraphBuilder, spec: LayerSpec, weights: LayerWeights, x: Tensor, second: Tensor | None) -> ir.Value:
    """The operations of a program, one after the other."""
    tensors = [g.constant(f"weight{index}", array) for index, array in enumerate(weights.traced)]
    inputs = [tensor.value for tensor in (x, second) if tensor is not None]
    return _Nodes(g, spec.traced, [*inputs, *tensors]).run()
