"""The pipeline of a weight that all networks share: slice, sparsify, quantize.

    stored values -> slice (width, kernel) -> sparsify (mask) -> quantize -> what the operator multiplies with

Each step is skipped when it changes nothing; at full size, dense and float the parameter itself is used. Low rank comes before
it: a layer with a rank has two such weights (see `spaces.elastic`). How masks and grids are trained is chosen once for a whole
supernet, in `Estimators`, and never by a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from spaces.layers import LayerSpec
from spaces.mask_training import MaskTraining
from spaces.precision import parse_precision
from spaces.quantizers import EncodedWeight, QuantizerSettings, WeightQuantizer, quantizer_of
from spaces.saliency import BY_WEIGHT_ALONE, saliency_of
from spaces.sparsity import Sparsity, as_shipped, mask, parse


@dataclass(frozen=True)
class Estimators:
    """How sparse and quantized weights are trained.

    Args:
        masks: how gradients pass a mask, and what happens to removed weights between steps.
        quantizers: how scales are found and gradients pass a grid.
        saliency: which weights a mask keeps, a name in `spaces.saliency`. `taylor` needs gradients; a supernet that is read
            from a file has none, and then goes by magnitude.
    """

    masks: MaskTraining = field(default_factory=MaskTraining)
    quantizers: QuantizerSettings = field(default_factory=QuantizerSettings)
    saliency: str = "magnitude"

    def __post_init__(self) -> None:
        saliency_of(self.saliency)


Made = TypeVar("Made")


@dataclass
class _Remembered:
    """What was made of a stored weight, by use, while it was at this version."""

    version: int
    made: dict[Hashable, Any] = field(default_factory=dict)


class ElasticWeight(nn.Module):
    """One stored weight and every smaller, sparser and coarser form of it.

    Args:
        values: the largest form, `(out, in, ...)`.
        precisions: those in which it is going to be used; what their quantizers learn is allocated here.
        estimators: how it is trained.
        selective: whether masks are chosen for the activations: then it remembers how it began.
    """

    start: torch.Tensor | None

    def __init__(
        self,
        values: torch.Tensor,
        precisions: Iterable[str] = (),
        estimators: Estimators | None = None,
        selective: bool = False,
    ) -> None:
        super().__init__()
        self.values = nn.Parameter(values)
        self.estimators = estimators or Estimators()
        self.register_buffer("start", values.detach().clone() if selective else None)
        self._remembered: _Remembered | None = None
        self.quantizers = nn.ModuleDict()
        for text in precisions:
            self._quantizer(text)

    def forward(self, shape: tuple[int, ...], sparsity: str, precision: str) -> torch.Tensor:
        """The weight that a layer computes with, differentiable.

        Args:
            shape: at most as large as the stored weight; kernels are cut around their centre.
            sparsity: see `spaces.sparsity`.
            precision: see `spaces.precision`.
        """
        return self.on_grid(self.masked(shape, sparsity), precision)

    def masked(self, shape: tuple[int, ...], sparsity: str) -> torch.Tensor:
        """The sliced weight with its mask, before it is quantized."""
        weight = sliced(self.values, shape)
        if sparsity == "dense":
            return weight
        keep = self._once(("mask", shape, sparsity), partial(self._mask, weight, sparsity), parse(sparsity).kept)
        return self.estimators.masks.apply(weight, keep)

    def with_mask(self, weight: torch.Tensor, sparsity: str) -> torch.Tensor:
        """A weight that was made of the sliced one, with its mask."""
        return weight if sparsity == "dense" else self.estimators.masks.apply(weight, self._mask(weight, sparsity))

    def on_grid(self, weight: torch.Tensor, precision: str) -> torch.Tensor:
        """A sliced and masked weight, quantized."""
        quantizer = self._quantizer(precision)
        return weight if quantizer is None else quantizer(weight)

    def final(self, shape: tuple[int, ...], sparsity: str, precision: str) -> tuple[torch.Tensor, EncodedWeight | None]:
        """A copy of the weight as it ships, and its codes when it is quantized; what a mask removes is 0 here."""
        with torch.no_grad():
            weight = sliced(self.values, shape)
            keep = mask(weight, sparsity, self._saliency(weight), self._start(weight, parse(sparsity)))
            weight = weight.clone() if keep is None else weight * keep
            quantizer = self._quantizer(precision)
            if quantizer is None:
                return weight, None
            return quantizer(weight).clone(), quantizer.encode(weight)

    def backward_weight(self, shape: tuple[int, ...], sparsity: str) -> torch.Tensor | None:
        """The weight that carries the gradient to the input, where that is another than the forward's."""
        if sparsity == "dense":
            return None
        along_outputs = partial(self._mask, sparsity=as_shipped(sparsity))  # whose activations: an output's, not an input's
        make = partial(self.estimators.masks.backward_weight, sliced(self.values, shape), along_outputs)
        return self._once(("backward", shape, sparsity), make, parse(sparsity).kept)

    def before_step(self, shape: tuple[int, ...], sparsity: str) -> None:
        """What the mask training does to gradients before an optimizer step; to those of a layer at full size only."""
        if sparsity != "dense" and shape == self.values.shape:
            self.estimators.masks.before_step(self.values)

    def after_step(self, shape: tuple[int, ...], sparsity: str) -> None:
        """What the mask training does to stored weights after an optimizer step; to those of a layer at full size only."""
        if sparsity != "dense" and shape == self.values.shape:
            self.estimators.masks.after_step(self.values, partial(self._mask, sparsity=sparsity))

    def remember_masks(self, remember: bool) -> None:
        """From here on compute a mask once for all networks that use it; or no longer.

        To be ended before an optimizer's step: a change of the stored weight that autograd counts gives new masks, but fused
        optimizers and `.data` go uncounted. A saliency that needs gradients gives each network a mask of its own.
        """
        shared = remember and self.estimators.saliency in BY_WEIGHT_ALONE
        self._remembered = _Remembered(self.values._version) if shared else None

    def _once(self, use: tuple[Hashable, ...], make: Callable[[], Made], kept: Fraction) -> Made:
        """What `make` gives, or gave for the same use and share of the same weight."""
        if self._remembered is None:
            return make()
        if self._remembered.version != self.values._version:
            self._remembered = _Remembered(self.values._version)
        made, key = self._remembered.made, (*use, self.estimators.masks.share(kept))
        if key not in made:
            made[key] = make()
        found: Made = made[key]
        return found

    def _mask(self, weight: torch.Tensor, sparsity: str) -> torch.Tensor:
        """The mask at the share that is in use now, all ones when that is everything."""
        wanted = parse(sparsity)
        now = self.estimators.masks.share(wanted.kept)
        wanted = wanted if now == wanted.kept else wanted.with_share(now)
        keep = mask(weight, wanted, self._saliency(weight), self._start(weight, wanted))
        return torch.ones_like(weight) if keep is None else keep

    def _start(self, weight: torch.Tensor, sparsity: Sparsity) -> torch.Tensor | None:
        return sliced(self.start, tuple(weight.shape)) if sparsity.selective and self.start is not None else None

    def _saliency(self, weight: torch.Tensor) -> torch.Tensor | None:
        if self.estimators.saliency == "magnitude":
            return None
        gradient = None if self.values.grad is None else sliced(self.values.grad, tuple(weight.shape))
        return saliency_of(self.estimators.saliency)(weight, gradient)

    def _quantizer(self, text: str) -> WeightQuantizer | None:
        precision = parse_precision(text)
        if precision.float_weights:
            return None
        if text not in self.quantizers:
            quantizer = quantizer_of(precision, tuple(self.values.shape), self.estimators.quantizers)
            if quantizer is None:
                return None
            quantizer.start(self.values.detach())
            self.quantizers[text] = quantizer
        found = self.quantizers[text]
        if not isinstance(found, WeightQuantizer):
            raise TypeError(f"{text} has no quantizer of weights")
        return found


def sliced(weight: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """First outputs and inputs, centre of the kernel; the tensor itself where that is all of it.

    One view, since each has a gradient of its own to fill with zeros.

    Args:
        weight: `(out, in, ...)` or, of a norm or bias, `(out,)`.
        shape: of as many dimensions, nowhere larger.
    """
    if weight.shape == shape:
        return weight
    strides = weight.stride()
    start = weight.storage_offset()
    for largest, size, stride in zip(weight.shape[2:], shape[2:], strides[2:], strict=True):
        start += (largest - size) // 2 * stride
    return weight.as_strided(shape, strides, start)


def effective_weight(values: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
    """The weight that a layer without a rank computes with, from stored values, with the default estimators; differentiable."""
    weight = sliced(values, spec.weight_shape)
    keep = mask(weight, spec.sparsity)
    weight = weight if keep is None else weight * keep
    quantizer = quantizer_of(spec.arithmetic, tuple(weight.shape), QuantizerSettings())
    return weight if quantizer is None else quantizer(weight)
