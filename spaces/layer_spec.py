"""The specification of one deployable layer, independent of its position: the key of every table.

Bits say how a tensor *is*: 32 is float, 8 a quantized integer.

Tokens are the positions of a map: a sequence of `width` tokens with `channels` features is `(n, channels, 1, width)`, patches
of an image are `(n, channels, height, width)`. A linear layer over every token is therefore a `conv2d` with kernel 1.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from functools import cached_property

from spaces.precision import FLOAT, FLOAT_BITS, PER_CHANNEL, PER_INPUT, PER_TENSOR, Precision, parse_precision
from spaces.program import Program, Shape, as_map
from spaces.sparsity import check_sparsity, kept_weights

OPERATOR_NAMES = ("conv2d", "linear", "global_pool", "layer_norm", "attention", "traced")
TOKEN_OPERATORS = ("layer_norm", "attention")
ACTIVATIONS = ("none", "relu", "hard_swish", "relu6")


@dataclass(frozen=True)
class LayerSpec:
    """One deployable layer.

    Args:
        operator: `conv2d`, `linear`, `global_pool`, `layer_norm` (over the channels of every token), `attention` (the core of
            multi-head self-attention, whose input holds queries, keys and values; see `spaces.tokens` for their order) or
            `traced` (operations of a foreign network that are none of these; see `spaces.tracing`).
        in_channels: channels (features) of the input.
        out_channels: channels (features) of the output.
        height: rows of the input; 1 for `linear`.
        width: columns of the input; 1 for `linear`.
        kernel: side of the square kernel; padding is `kernel // 2`.
        stride: in both directions.
        groups: convolution groups; `in_channels` for a depthwise convolution.
        activation: `none`, `relu`, `hard_swish` or `relu6`, applied last.
        precision: of weights and arithmetic, such as `fp32`, `w8a8`, `w4@32` (see `spaces.precision`).
        input_bits: how the input tensor arrives. An integer layer that gets a float input quantizes it itself.
        output_bits: how the output tensor leaves.
        skip_bits: how the tensor that is added before the activation arrives (of `traced`: its second input); 0: there is none.
        sparsity: pattern and kept share of the weight, `dense` or e.g. `group@1/2` (see `spaces.sparsity`).
        rank: the weight is a product of two factors that meet in so many channels; 0: it is one matrix.
        heads: of `attention`; 0 for every other operator.
        program: of `traced`, see `spaces.program`; empty for every other operator.
    """

    operator: str
    in_channels: int
    out_channels: int
    height: int = 1
    width: int = 1
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    activation: str = "none"
    precision: str = FLOAT
    input_bits: int = FLOAT_BITS
    output_bits: int = FLOAT_BITS
    skip_bits: int = 0
    sparsity: str = "dense"
    rank: int = 0
    heads: int = 0
    program: str = ""

    def __post_init__(self) -> None:
        sizes = (self.in_channels, self.out_channels, self.height, self.width, self.kernel, self.stride, self.groups)
        if min(sizes) < 1 or self.kernel % 2 == 0 or self.in_channels % self.groups or self.out_channels % self.groups:
            raise ValueError(f"not a layer: {self}; sizes start at 1, kernels are odd, groups divide the channels")
        if self.operator not in OPERATOR_NAMES or self.activation not in ACTIVATIONS:
            allowed = f"{', '.join(OPERATOR_NAMES)} with activation {' or '.join(ACTIVATIONS)}"
            raise ValueError(f"not a layer: {self.operator!r} with activation {self.activation!r}; allowed are {allowed}")
        bits = (self.input_bits, self.output_bits, self.skip_bits or FLOAT_BITS)
        if not set(bits) <= {8, FLOAT_BITS}:
            raise ValueError(f"not a layer: bits {bits}; allowed are 8 and {FLOAT_BITS}")
        if not self.weight_shape and not self.arithmetic.float_weights:
            raise ValueError(f"not a layer: {self.operator} with precision {self.precision}; it has no weights, so {FLOAT}")
        if not self.arithmetic.has_zero and self.sparsity != "dense":
            raise ValueError(f"not a layer: {self}; weights that {self.precision} cannot make 0 are dense")
        if self.weight_shape:
            check_sparsity(self.sparsity, self.weight_shape)
        self._check_rank()
        self._check_tokens()
        self._check_program()
        if self.operator == "linear" and (self.height, self.width, self.skip_bits) != (1, 1, 0):
            raise ValueError(f"not a layer: {self}; a linear layer reads (n, channels, 1, 1) and adds no skip")

    def _check_rank(self) -> None:
        if not self.rank:
            return
        most = self.full_rank
        dynamic = self.arithmetic.rounds_input
        if self.groups > 1 or not 1 <= self.rank <= most or self.sparsity != "dense" or dynamic:
            raise ValueError(
                f"not a layer: rank {self.rank} of {self}; allowed is 1 to {most} of a dense weight without groups"
            )

    def _check_tokens(self) -> None:
        attends = self.operator == "attention"
        if attends != (self.heads > 0) or self.heads < 0:
            raise ValueError(f"not a layer: {self.heads} heads of {self.operator}; attention has at least 1, others have 0")
        if self.operator not in TOKEN_OPERATORS:
            return
        if (self.kernel, self.stride, self.groups) != (1, 1, 1):
            raise ValueError(f"not a layer: {self}; {self.operator} has kernel, stride and groups 1")
        if not attends and self.in_channels != self.out_channels:
            raise ValueError(f"not a layer: {self}; layer_norm keeps the number of channels")
        if attends and (self.in_channels != 3 * self.out_channels or self.out_channels % self.heads):
            raise ValueError(f"not a layer: {self}; {self.heads} heads read 3 * {self.heads} * width channels, give a third")

    def _check_program(self) -> None:
        if (self.operator == "traced") != bool(self.program):
            raise ValueError(f"not a layer: program {self.program[:80]!r} of {self.operator}; traced has one, others have none")
        if not self.program:
            return
        shapes = ((self.in_channels, self.height, self.width), self.out_channels, bool(self.skip_bits))
        inputs, output = self.traced.inputs, as_map(self.traced.output)
        if shapes != (as_map(inputs[0]), output[0], len(inputs) == 2) or (self.kernel, self.stride, self.groups) != (1, 1, 1):
            raise ValueError(f"not a layer: {self}; its sizes are those of its program, and it has one input or two")

    @property
    def traced(self) -> Program:
        """The program, taken apart."""
        return Program.from_json(self.program)

    @cached_property
    def arithmetic(self) -> Precision:
        """The precision, taken apart."""
        return parse_precision(self.precision)

    @property
    def integer(self) -> bool:
        """Whether the layer computes in integers, with quantized tensors at both of its sides."""
        return self.arithmetic.integer

    @property
    def quantizes_sum(self) -> bool:
        """Whether an integer layer rounds to a grid before it is done: a kernel fuses neither additions nor hard-swish."""
        return self.integer and (self.skip_bits > 0 or self.activation == "hard_swish")

    @property
    def full_rank(self) -> int:
        """The smaller side of the weight as a matrix; 0 without weights."""
        shape = self.weight_shape
        return min(shape[0], math.prod(shape[1:])) if shape else 0

    @property
    def out_height(self) -> int:
        if self.program:
            return as_map(self.traced.output)[1]
        return 1 if self.operator == "global_pool" else (self.height - 1) // self.stride + 1

    @property
    def out_width(self) -> int:
        if self.program:
            return as_map(self.traced.output)[2]
        return 1 if self.operator == "global_pool" else (self.width - 1) // self.stride + 1

    @property
    def depthwise(self) -> bool:
        return self.groups == self.in_channels == self.out_channels and self.groups > 1

    @property
    def kind(self) -> str:
        """What people call the layer: `depthwise`, `pointwise`, `conv`, `linear`, `pool`, or its operator."""
        if self.operator != "conv2d":
            return "pool" if self.operator == "global_pool" else self.operator
        return "depthwise" if self.depthwise else "pointwise" if self.kernel == 1 else "conv"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the stored weight, `(out, in / groups, kernel, kernel)` or `(out, in)`; `()` without one."""
        if self.operator == "conv2d":
            return (self.out_channels, self.in_channels // self.groups, self.kernel, self.kernel)
        return (self.out_channels, self.in_channels) if self.operator == "linear" else ()

    @property
    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the two factors of a layer with a rank: `(rank, in, ...)`, which comes first, and `(out, rank, 1, ...)`."""
        out_channels, *inputs = self.weight_shape
        return (self.rank, *inputs), (out_channels, self.rank, *[1] * (len(inputs) - 1))

    @property
    def kept_weights(self) -> int:
        """Weights left by the sparsity pattern, in both factors where there are two."""
        if not self.weight_shape:
            return 0
        if self.rank:
            return sum(math.prod(shape) for shape in self.factor_shapes)
        return kept_weights(self.sparsity, self.weight_shape)

    @property
    def parameters(self) -> int:
        """Kept weights and biases."""
        if self.program:
            return self.traced.parameters
        if self.operator == "layer_norm":
            return 2 * self.out_channels
        return self.kept_weights + (self.out_channels if self.weight_shape else 0)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one sample with only the kept weights counted.

        Mean, variance and affine map of a layer norm are one each per element; a softmax is not counted.
        """
        if self.operator == "global_pool":
            return self.input_elements
        if self.program:
            return self.traced.macs
        if self.operator == "layer_norm":
            return 3 * self.input_elements
        if self.operator == "attention":
            return 2 * self.out_channels * self.tokens**2
        return self.kept_weights * self.out_height * self.out_width

    @property
    def weight_bytes(self) -> int:
        """Bytes of the kept weights at their precision, 4 per bias, and 4 per scale where weights are quantized."""
        if not self.weight_shape:
            return 4 * self.parameters
        shapes = self.factor_shapes if self.rank else (self.weight_shape,)
        scales = 0 if self.arithmetic.float_weights else sum(self._scales(shape) for shape in shapes)
        return math.ceil(self.kept_weights * self.arithmetic.bits / 8) + 4 * (self.out_channels + scales)

    def _scales(self, shape: tuple[int, ...]) -> int:
        shared = self.arithmetic.scales
        if isinstance(shared, int):
            return shape[0] * math.ceil(math.prod(shape[1:]) / shared)
        return {PER_CHANNEL: shape[0], PER_TENSOR: 1, PER_INPUT: shape[1]}[shared]

    @property
    def tokens(self) -> int:
        """Positions of the input."""
        return self.height * self.width

    @property
    def scratch_bytes(self) -> int:
        """Bytes of one sample that exist only while the layer runs: the float scores of attention, of every pair of tokens."""
        return 4 * self.heads * self.tokens**2

    @property
    def input_shapes(self) -> tuple[Shape, ...]:
        """Shapes of the inputs without the batch: of the main one and, where there is one, of the skip."""
        if self.program:
            return self.traced.inputs
        shapes = (self.in_channels, self.height, self.width), (self.out_channels, self.out_height, self.out_width)
        return shapes if self.skip_bits else shapes[:1]

    @property
    def input_elements(self) -> int:
        return self.in_channels * self.height * self.width

    @property
    def output_elements(self) -> int:
        return self.out_channels * self.out_height * self.out_width

    @property
    def output_bytes(self) -> int:
        """Bytes of one sample's output tensor."""
        return self.output_elements * self.output_bits // 8

    def to_json(self) -> str:
        """One line of JSON; fields that have their default are left out."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return json.dumps(values, sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> LayerSpec:
        """The inverse of `to_json`.

        Raises:
            ValueError: unknown fields, or values of another type.
        """
        values = json.loads(text)
        known = {f.name: str if f.type == "str" else int for f in fields(LayerSpec)}
        if not isinstance(values, dict) or not {"operator", "in_channels", "out_channels"} <= set(values) <= set(known):
            raise ValueError(f"not a layer: {text[:120]!r}")
        for name, value in values.items():
            if type(value) is not known[name] or (isinstance(value, int) and not 0 <= value < 2**31):
                raise ValueError(f"layer field {name} has the value {value!r}; allowed is {known[name].__name__} >= 0")
        return LayerSpec(**values)

    def __str__(self) -> str:
        text = f"{self.kind} {self.in_channels}->{self.out_channels} {self.height}x{self.width}"
        text += f" k{self.kernel}" if self.operator == "conv2d" else ""
        text += f" s{self.stride}" if self.stride > 1 else ""
        text += f" {self.precision} {self.input_bits}->{self.output_bits}"
        text += f" +{self.skip_bits}" if self.skip_bits else ""
        text += f" {self.activation}" if self.activation != "none" else ""
        text += f" rank {self.rank}" if self.rank else ""
        text += f" {self.heads} heads" if self.heads else ""
        text += f" ({self.traced.operations})" if self.program else ""
        return text + (f" {self.sparsity}" if self.sparsity != "dense" else "")
