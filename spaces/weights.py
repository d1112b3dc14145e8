"""The pipeline of a weight that all networks share: slice, sparsify, quantize.

    stored values -> slice (width, kernel) -> sparsify (mask) -> quantize -> what the operator multiplies with

Each step is skipped when it changes nothing; at full size, dense and float the parameter itself is used. Low rank comes before
it: a layer with a rank has two such weights (see `spaces.elastic`). How masks and grids are trained is chosen once for a whole
supernet, in `Estimators`, and never by a layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from spaces.layers import LayerSpec
from spaces.mask_training import MaskTraining
from spaces.precision import parse_precision
from spaces.quantizers import EncodedWeight, QuantizerSettings, WeightQuantizer, quantizer_of
from spaces.saliency import saliency_of
from spaces.sparsity import mask, parse


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


class ElasticWeight(nn.Module):
    """One stored weight and every smaller, sparser and coarser form of it.

    Args:
        values: the largest form, `(out, in, ...)`.
        precisions: those in which it is going to be used; what their quantizers learn is allocated here.
        estimators: how it is trained.
    """

    def __init__(self, values: torch.Tensor, precisions: Iterable[str] = (), estimators: Estimators | None = None) -> None:
        super().__init__()
        self.values = nn.Parameter(values)
        self.estimators = estimators or Estimators()
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
        return self.with_mask(sliced(self.values, shape), sparsity)

    def with_mask(self, weight: torch.Tensor, sparsity: str) -> torch.Tensor:
        """A sliced weight with its mask."""
        return weight if sparsity == "dense" else self.estimators.masks.apply(weight, self._mask(weight, sparsity))

    def on_grid(self, weight: torch.Tensor, precision: str) -> torch.Tensor:
        """A sliced and masked weight, quantized."""
        quantizer = self._quantizer(precision)
        return weight if quantizer is None else quantizer(weight)

    def final(self, shape: tuple[int, ...], sparsity: str, precision: str) -> tuple[torch.Tensor, EncodedWeight | None]:
        """A copy of the weight as it ships, and its codes when it is quantized; what a mask removes is 0 here."""
        with torch.no_grad():
            weight = sliced(self.values, shape)
            keep = mask(weight, sparsity, self._saliency(weight))
            weight = weight.clone() if keep is None else weight * keep
            quantizer = self._quantizer(precision)
            if quantizer is None:
                return weight, None
            return quantizer(weight).clone(), quantizer.encode(weight)

    def backward_weight(self, shape: tuple[int, ...], sparsity: str) -> torch.Tensor | None:
        """The weight that carries the gradient to the input, where that is another than the forward's."""
        if sparsity == "dense":
            return None
        return self.estimators.masks.backward_weight(sliced(self.values, shape), partial(self._mask, sparsity=sparsity))

    def before_step(self, shape: tuple[int, ...], sparsity: str) -> None:
        """What the mask training does to gradients before an optimizer step; to those of a layer at full size only."""
        if sparsity != "dense" and shape == self.values.shape:
            self.estimators.masks.before_step(self.values)

    def after_step(self, shape: tuple[int, ...], sparsity: str) -> None:
        """What the mask training does to stored weights after an optimizer step; to those of a layer at full size only."""
        if sparsity != "dense" and shape == self.values.shape:
            self.estimators.masks.after_step(self.values, partial(self._mask, sparsity=sparsity))

    def _mask(self, weight: torch.Tensor, sparsity: str) -> torch.Tensor:
        """The mask at the share that is in use now, all ones when that is everything."""
        wanted = parse(sparsity)
        now = self.estimators.masks.share(wanted.kept)
        keep = mask(weight, wanted if now == wanted.kept else wanted.with_share(now), self._saliency(weight))
        return torch.ones_like(weight) if keep is None else keep

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
    """First outputs and inputs, centre of the kernel."""
    out_channels, in_channels, *kernel = shape
    if weight.shape[:2] != (out_channels, in_channels):
        weight = weight[:out_channels, :in_channels]
    if kernel and kernel[0] != weight.shape[-1]:
        border = (weight.shape[-1] - kernel[0]) // 2
        weight = weight[:, :, border : border + kernel[0], border : border + kernel[0]]
    return weight


def effective_weight(values: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
    """The weight that a layer without a rank computes with, from stored values, with the default estimators; differentiable."""
    weight = sliced(values, spec.weight_shape)
    keep = mask(weight, spec.sparsity)
    weight = weight if keep is None else weight * keep
    quantizer = quantizer_of(spec.arithmetic, tuple(weight.shape), QuantizerSettings())
    return weight if quantizer is None else quantizer(weight)
