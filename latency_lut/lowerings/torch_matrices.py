"""Layers as matrix multiplications in torch, for kernels that multiply matrices only: bytes, 8-bit floats, and weights of 2:4.

A convolution's input becomes a matrix with a row per output position: for kernels above 1 by copying every position's
neighbourhood (im2col), with kernel 1 and channels last by looking at it as one. Sides that a GPU's kernel wants to be multiples
of something are filled up with zeros, on the CPU too, so that a program is the same for both.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from latency_lut.lowerings.base import Description, LayerWeights, range_of
from latency_lut.lowerings.floating import computes_in_floats
from latency_lut.lowerings.integer import levels_of
from latency_lut.lowerings.nodes import bias_of, weight_of
from latency_lut.lowerings.torch_floating import FLOATS, Entrance, decoded, dense_key, factor_of, input_rounding
from latency_lut.lowerings.torch_layers import LARGEST_BYTE, Grid, to_dtype, torch_lowering, values
from spaces.layers import LayerSpec
from spaces.precision import PER_CHANNEL
from spaces.quantizers import LARGEST_FLOAT8, SMALLEST_SCALE, EncodedWeight
from spaces.sparsity import as_shipped

SIGN_BIT = 128
LEAST_ROWS, BYTES_MULTIPLE = 17, 8  # of torch._int_mm on GPUs
FLOAT8_CAPABILITY, FLOAT8_MULTIPLE = 89, 16  # of torch._scaled_mm
SPARSE_CAPABILITIES = (80, 90)  # from, and below which: torch refuses this kernel on any other GPU
# Of torch._sparse_semi_structured_mm: rows and columns of the weight, rows of the input.
SPARSE_OUTPUTS, SPARSE_INPUTS, SPARSE_ROWS = 32, 64, 8


def rows_of(x: torch.Tensor, kernel: int, stride: int) -> torch.Tensor:
    """A padded map `(n, channels, height, width)` as `(n * positions, kernel**2 * channels)`; `(n, features)` as it is."""
    if x.ndim == 2:
        return x
    if kernel == 1:
        return x[:, :, ::stride, ::stride].permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    windows = x.unfold(2, kernel, stride).unfold(3, kernel, stride)  # (n, channels, rows, columns, kernel, kernel)
    return windows.permute(0, 2, 3, 4, 5, 1).reshape(-1, kernel * kernel * x.shape[1])


def matrix_of(weight: torch.Tensor) -> torch.Tensor:
    """A weight `(out, in, kernel, kernel)` or `(out, in)` as `(out, inputs)`, in the order of `rows_of`."""
    return weight.permute(0, 2, 3, 1).flatten(1) if weight.ndim == 4 else weight


def map_of(y: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
    """`(n * positions, out)` as a map `(n, out, height, width)` with channels last; of a linear layer as it is."""
    if spec.operator == "linear":
        return y
    return y.reshape(-1, spec.out_height, spec.out_width, spec.out_channels).permute(0, 3, 1, 2)


def filled(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """A matrix with zeros below and to the right of it, up to so many rows and columns; no kernel where it has them."""
    more = (0, columns - x.shape[1], 0, rows - x.shape[0])
    return F.pad(x, more) if any(more) else x


def multiple(count: int, of: int) -> int:
    """The next multiple."""
    return -(-count // of) * of


# -- bytes --------------------------------------------------------------------------------------------------------------------


class ByteProduct(nn.Module):
    """Rows of bytes, less 128 so that they have a sign, times a matrix of bytes: 32-bit sums.

    Args:
        levels: int8 `(out, inputs)`.
    """

    levels: torch.Tensor

    def __init__(self, levels: torch.Tensor) -> None:
        super().__init__()
        self.outputs, inputs = levels.shape
        whole = filled(levels, multiple(self.outputs, BYTES_MULTIPLE), multiple(inputs, BYTES_MULTIPLE))
        self.register_buffer("levels", whole.contiguous())

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """`(rows, inputs)` uint8 to `(rows, out)` int32."""
        signed = torch.bitwise_xor(rows, SIGN_BIT).view(torch.int8)
        product = torch._int_mm(filled(signed, max(len(rows), LEAST_ROWS), self.levels.shape[1]), self.levels.t())
        return product[: len(rows), : self.outputs]


class StaticBytes(nn.Module):
    """A layer, or one factor of it, on an input with a fixed grid. What the 128 and the zero point add up to is in the bias."""

    scale: torch.Tensor
    bias: torch.Tensor

    def __init__(self, spec: LayerSpec, levels: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor, grid: Grid) -> None:
        super().__init__()
        matrix = matrix_of(levels)
        self.spec, self.grid, self.product = spec, grid, ByteProduct(matrix)
        scale = scales.double() * grid.scale
        shift = (SIGN_BIT - grid.zero_point) * matrix.double().sum(1)
        self.register_buffer("scale", scale.float())
        self.register_buffer("bias", (bias.double() + shift * scale).float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if x.dtype == torch.uint8 else self.grid.quantize(x)
        if self.spec.operator == "linear":
            x = x.flatten(1)
        elif self.spec.kernel > 1:
            x = F.pad(x, [self.spec.kernel // 2] * 4, value=float(self.grid.zero_point))
        product = self.product(rows_of(x, self.spec.kernel, self.spec.stride))
        return map_of(torch.addcmul(self.bias, product.float(), self.scale), self.spec)


class DynamicBytes(nn.Module):
    """A layer on an input that is quantized by each sample's own range."""

    scale: torch.Tensor
    bias: torch.Tensor
    sums: torch.Tensor

    def __init__(self, spec: LayerSpec, levels: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        matrix = matrix_of(levels)
        self.spec, self.product = spec, ByteProduct(matrix)
        for name, tensor in (("scale", scales), ("bias", bias), ("sums", matrix.float().sum(1))):
            self.register_buffer(name, tensor.float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, samples = to_dtype(x, torch.float32), len(x)
        flat = x.flatten(1)
        low, high = flat.amin(1).clamp_max(0.0), flat.amax(1).clamp_min(0.0)
        step = ((high - low) / LARGEST_BYTE).clamp_min(SMALLEST_SCALE)
        zero = torch.round(-low / step)
        if self.spec.operator == "linear":
            x = flat
        elif self.spec.kernel > 1:
            x = F.pad(x, [self.spec.kernel // 2] * 4)  # zeros fall on the zero point
        shape = (-1, *[1] * (x.ndim - 1))
        levels = (torch.round(x / step.view(shape)) + zero.view(shape)).clamp(0, LARGEST_BYTE).to(torch.uint8)
        product = self.product(rows_of(levels, self.spec.kernel, self.spec.stride)).float()
        by_sample = product.reshape(samples, -1, self.spec.out_channels)
        shifted = by_sample + (SIGN_BIT - zero).view(-1, 1, 1) * self.sums
        y = torch.addcmul(self.bias, shifted * step.view(-1, 1, 1), self.scale)
        return map_of(y.flatten(0, 1), self.spec)


def _levels(spec: LayerSpec, weight: torch.Tensor, encoded: EncodedWeight | None) -> tuple[torch.Tensor, torch.Tensor]:
    levels, scales = levels_of(spec, weight.numpy(), encoded)
    return torch.from_numpy(levels), torch.from_numpy(scales)


@torch_lowering(
    "torch_int8",
    lambda spec: spec.groups == 1 and not spec.rank and (spec.integer or _by_own_range(spec)),
    dense_key,
    integer_kernels=1,
)
def torch_int8(spec: LayerSpec, weights: LayerWeights, grid: Grid | None) -> nn.Module:
    """Integer arithmetic by `torch._int_mm`."""
    levels, scales = _levels(spec, torch.from_numpy(weight_of(weights)), weights.encoded)
    bias = torch.from_numpy(bias_of(weights))
    if not spec.integer:
        return DynamicBytes(spec, levels, scales, bias)
    return StaticBytes(spec, levels, scales, bias, _input_grid(spec, weights, grid))


def _by_own_range(spec: LayerSpec) -> bool:
    return spec.arithmetic.activations == "dynamic" and spec.arithmetic.scales == PER_CHANNEL


def _input_grid(spec: LayerSpec, weights: LayerWeights, grid: Grid | None) -> Grid:
    found = grid or input_rounding(spec, weights, grid)
    if found is None:
        raise ValueError(f"{spec} has no grid for its input")
    return found


@torch_lowering("torch_int8_factors", lambda spec: bool(spec.rank) and spec.integer, dense_key, integer_kernels=2)
def torch_int8_factors(spec: LayerSpec, weights: LayerWeights, grid: Grid | None) -> nn.Module:
    """Both factors by `torch._int_mm`; what is between them has a grid of its own."""
    first = replace(spec, out_channels=spec.rank, rank=0, skip_bits=0)
    height, width = spec.out_height, spec.out_width
    second = replace(spec, in_channels=spec.rank, height=height, width=width, kernel=1, stride=1, rank=0)
    middle = Grid.of(*range_of(weights.factor_range, "factor_range", spec))
    levels = _levels(spec, factor_of(weights), weights.factor_encoded)
    last = _levels(spec, torch.from_numpy(weight_of(weights)), weights.encoded)
    return nn.Sequential(
        StaticBytes(first, *levels, torch.zeros(spec.rank), _input_grid(spec, weights, grid)),
        StaticBytes(second, *last, torch.from_numpy(bias_of(weights)), middle),
    )


# -- 8-bit floats -------------------------------------------------------------------------------------------------------------


class Float8Product(nn.Module):
    """A layer on an input rounded to 8-bit floats by each sample's own range, by `torch._scaled_mm`.

    Scales are multiplied afterwards: a scale per sample and one per output channel, which not every GPU's kernel takes.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor
    one: torch.Tensor

    def __init__(self, spec: LayerSpec, grid: Grid | None, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.spec, self.grid = spec, grid
        matrix = matrix_of(weight)
        scale = (matrix.abs().amax(1) / LARGEST_FLOAT8).clamp_min(SMALLEST_SCALE)
        sides = (multiple(size, FLOAT8_MULTIPLE) for size in matrix.shape)
        whole = filled(matrix / scale[:, None], *sides).to(torch.float8_e4m3fn).contiguous()
        for name, tensor in (("weight", whole), ("scale", scale), ("bias", bias), ("one", torch.ones(()))):
            self.register_buffer(name, tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, samples = values(x, self.grid, torch.float32), len(x)
        if self.spec.operator == "linear":
            x = x.flatten(1)
        step = (x.flatten(1).abs().amax(1) / LARGEST_FLOAT8).clamp_min(SMALLEST_SCALE)
        x = (x / step.view(-1, *[1] * (x.ndim - 1))).to(torch.float8_e4m3fn).view(torch.uint8)  # copied as bytes, 0 is 0
        if self.spec.kernel > 1:
            x = F.pad(x, [self.spec.kernel // 2] * 4)
        rows = rows_of(x, self.spec.kernel, self.spec.stride)
        whole = filled(rows, len(rows), self.weight.shape[1]).view(torch.float8_e4m3fn)
        product = torch._scaled_mm(whole, self.weight.t(), self.one, self.one, out_dtype=torch.float32)
        by_sample = product[:, : self.spec.out_channels].reshape(samples, -1, self.spec.out_channels)
        y = torch.addcmul(self.bias, by_sample * step.view(-1, 1, 1), self.scale)
        return map_of(y.flatten(0, 1), self.spec)


@torch_lowering(
    "torch_fp8",
    lambda spec: spec.arithmetic.activations == "float8" and spec.groups == 1,
    dense_key,
    runs_on=lambda description: "capability" not in description or has_capability(description, FLOAT8_CAPABILITY),
    rounds=True,
)
def torch_fp8(spec: LayerSpec, weights: LayerWeights, grid: Grid | None) -> nn.Module:
    """8-bit floats, sums in single precision."""
    return Float8Product(spec, grid, decoded(spec, weights), torch.from_numpy(bias_of(weights)))


# -- 2:4 ----------------------------------------------------------------------------------------------------------------------


class SparseProduct(nn.Module):
    """A layer whose weight keeps 2 of 4 consecutive inputs (arXiv:2104.08378), by torch's semi-structured kernel of CUTLASS.

    The kept weights and their places lie in memory as that kernel wants them, which is made on the CPU too. It is the kernel of
    `torch.sparse.to_sparse_semi_structured` with `_FORCE_CUTLASS`. The other one, cuSPARSELt's, wants weights packed on the GPU
    that is to run them, which a program made elsewhere cannot have; it is not used here.
    """

    packed: torch.Tensor
    places: torch.Tensor
    bias: torch.Tensor

    def __init__(self, spec: LayerSpec, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.spec = spec
        self.packed, self.places = (nn.Buffer(tensor) for tensor in packed_2_4(matrix_of(weight)))
        self.register_buffer("bias", F.pad(bias, (0, len(self.packed) - len(bias))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.spec.kernel > 1:
            x = F.pad(x, [self.spec.kernel // 2] * 4)
        rows = rows_of(x, self.spec.kernel, self.spec.stride)
        whole = filled(rows, multiple(len(rows), SPARSE_ROWS), 2 * self.packed.shape[1])
        product = torch._sparse_semi_structured_addmm(self.bias, self.packed, self.places, whole.t())
        return map_of(product[: self.spec.out_channels, : len(rows)].t().contiguous(), self.spec)


def packed_2_4(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix `(out, inputs)` that is 2:4, in 16-bit floats, filled up with zeros: kept weights, and where they were."""
    whole = filled(matrix, multiple(len(matrix), SPARSE_OUTPUTS), multiple(matrix.shape[1], SPARSE_INPUTS))
    packed, places = sparse_semi_structured_from_dense_cutlass(whole.contiguous())  # type: ignore[no-untyped-call]
    return packed, places


def has_capability(description: Description, least: int, below: int | None = None) -> bool:
    """Whether a device is a GPU of at least so high a compute capability, 80 for 8.0, and below another one."""
    found = description.get("capability")
    return isinstance(found, int) and found >= least and (below is None or found < below)


def _register_2_4(half: str) -> None:
    dtype = FLOATS[half]

    def core(spec: LayerSpec, weights: LayerWeights, grid: Grid | None) -> nn.Module:
        entrance = Entrance(spec, weights, grid, dtype)
        weight = (decoded(spec, weights) * entrance.scale).to(dtype)
        return nn.Sequential(entrance, SparseProduct(spec, weight, torch.from_numpy(bias_of(weights)).to(dtype)))

    torch_lowering(
        f"torch_2_4_{half}",
        lambda spec: computes_in_floats(spec) and as_shipped(spec.sparsity) == "2:4" and spec.groups == 1,
        lambda spec: replace(spec, precision="fp32"),
        runs_on=lambda description: description.get("half") == half and has_capability(description, *SPARSE_CAPABILITIES),
        rounds=True,
    )(core)


for _half in ("bf16", "fp16"):
    _register_2_4(_half)
