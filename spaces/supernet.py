"""The supernet: shared weights of every network of a space.

It has no layers of its own making: the space's walk says which layers an architecture has and how they are joined, and each
layer's name finds its elastic weights. So any space that walks is trainable, and what is trained is what is priced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn

from spaces.choice import Architecture
from spaces.elastic import OPERATORS, ElasticLayer, LayerOptions
from spaces.errors import UserError
from spaces.layers import Network, Node
from spaces.low_rank import rank_of
from spaces.mask_training import MASK_TRAININGS
from spaces.plain import PlainNetwork, module_key, run_network
from spaces.quantizers import WeightQuantizer
from spaces.space import Space
from spaces.sparsity import parse
from spaces.weights import ElasticWeight, Estimators

REMEMBERED_NETWORKS = 64


class Outputs(NamedTuple):
    """What a network computes of images.

    Args:
        logits: `(n, classes)`.
        maps: by scale, the last activations `(n, channels, height, width)` at the input's size halved that many times; of sizes
            above one position.
    """

    logits: torch.Tensor
    maps: dict[int, torch.Tensor]


class Supernet(nn.Module):
    """Shared weights, one elastic layer for each layer of the largest architecture.

    Call `activate` to choose the architecture that `forward` computes; the largest is active at first. `forward` normalises
    with batch statistics and quantizes with batch ranges, so use it to train; to evaluate, `extract` and recalibrate.

    Attributes:
        macs_done: multiply-accumulates that `outputs` computed, a training pass counted as three (forward, and backward to
            activations and weights), and with the removed weights left out. What a training cost, whatever it ran on.

    Args:
        space: what can be built. Choices whose last name part is `precision` or `rank` say what layers have to provide.
        estimators: how sparse and quantized weights are trained.
    """

    def __init__(self, space: Space, estimators: Estimators | None = None) -> None:
        super().__init__()
        self.space, self.estimators = space, estimators or Estimators()
        check_estimators(self.estimators, space)
        self.macs_done = 0
        self._walk = lru_cache(REMEMBERED_NETWORKS)(space.network)
        self._network = space.network(space.largest())
        self.layers = nn.ModuleDict({module_key(node.name): self._layer(node) for node in space.stored_network().nodes})

    def __getstate__(self) -> dict[str, Any]:
        """What another process gets: all but the walks that are remembered here."""
        return {name: value for name, value in self.__dict__.items() if name != "_walk"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._walk = lru_cache(REMEMBERED_NETWORKS)(self.space.network)

    def _layer(self, node: Node) -> ElasticLayer:
        options = {kind: self._options(node.name, kind) for kind in ("precision", "rank")}
        ranks = [rank_of(text, node.spec.full_rank) for text in options["rank"]]
        selective = self.space.selective and bool(self._options(node.name, "sparsity"))
        return OPERATORS[node.spec.operator](
            node.spec, LayerOptions(options["precision"], max(ranks, default=0), selective, self.estimators)
        )

    def _options(self, layer: str, kind: str) -> tuple[str, ...]:
        return tuple(str(option) for c in self.space.choices if c.name == f"{layer}.{kind}" for option in c.options)

    def activate(self, architecture: Architecture) -> Network:
        """Make `forward` compute this architecture; returns its network."""
        self._network = self._walk(architecture)
        return self._network

    def start_step(self, step: int, steps: int) -> None:
        """Say that `step` of `steps` optimizer steps are done; all of them at the end of a training."""
        self.estimators.masks.start_step(step, steps)
        for module in self.modules():
            if isinstance(module, WeightQuantizer):
                module.progress = step / steps

    @contextmanager
    def remember_masks(self) -> Iterator[None]:
        """A context in which networks that sparsify the same part of a weight in the same way share one mask.

        For the forward and backward passes of one step, whose networks all see the same weights; a weight that does change gets
        new masks (`ElasticWeight.remember_masks`). Masks are forgotten at the end.
        """
        weights = [module for module in self.modules() if isinstance(module, ElasticWeight)]
        for weight in weights:
            weight.remember_masks(True)
        try:
            yield
        finally:
            for weight in weights:
                weight.remember_masks(False)

    def before_step(self) -> None:
        """To be called after the backward passes of a step, before the optimizer's step."""
        self._each_sparse_weight(lambda weight, shape, sparsity: weight.before_step(shape, sparsity))

    def after_step(self) -> None:
        """To be called after the optimizer's step, while gradients are still those of the step."""
        self._each_sparse_weight(lambda weight, shape, sparsity: weight.after_step(shape, sparsity))

    def _each_sparse_weight(self, action: Callable[[ElasticWeight, tuple[int, ...], str], None]) -> None:
        if not self.estimators.masks.one_sparsity:
            return  # such a training leaves stored weights alone
        for node in self._walk(self.space.largest()).nodes:
            for weight, shape in self.layer(node.name).weights_of(node.spec):
                action(weight, shape, node.spec.sparsity)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(n, channels, any height, any width)` to logits `(n, classes)` by the active architecture."""
        return run_network(self._network, images, lambda node, x, skip: self.layer(node.name)(node.spec, x, skip))

    def outputs(self, images: torch.Tensor) -> Outputs:
        """As `forward`, with the activations at every scale."""
        self.macs_done += (3 if torch.is_grad_enabled() else 1) * len(images) * self._network.macs
        maps: dict[int, torch.Tensor] = {}
        height = self._network.input_shape[1]

        def call(node: Node, x: torch.Tensor, skip: torch.Tensor | None) -> torch.Tensor:
            y: torch.Tensor = self.layer(node.name)(node.spec, x, skip)
            if y.dim() == 4 and y.shape[2] * y.shape[3] > 1:
                maps[round(math.log2(height / y.shape[2]))] = y
            return y

        return Outputs(run_network(self._network, images, call), maps)

    def layer(self, name: str) -> ElasticLayer:
        """The elastic layer of a node."""
        layer = self.layers[module_key(name)]
        if not isinstance(layer, ElasticLayer):
            raise TypeError(f"{name} is not an elastic layer")
        return layer

    def extract(self, architecture: Architecture) -> PlainNetwork:
        """A plain network with copies of the weights that this architecture uses; in training mode equal to `forward`."""
        network = self._walk(architecture)
        return PlainNetwork(network, {node.name: self.layer(node.name).extract(node.spec) for node in network.nodes})


def check_estimators(estimators: Estimators, space: Space) -> None:
    """Make sure that a space can be trained so.

    Raises:
        UserError: the mask training changes stored weights for one sparsity, and a layer has several; or it works on single
            weights, and a pattern keeps or removes several together.
    """
    masks = estimators.masks
    name = next((name for name, kind in MASK_TRAININGS.items() if type(masks) is kind), type(masks).__name__)
    for choice in space.choices:
        if choice.kind != "sparsity":
            continue
        if masks.one_sparsity and len(choice.options) > 1:
            raise UserError(
                f"mask training {name} trains one sparsity per layer; {choice.name} has {', '.join(map(str, choice.options))}; "
                "give one: space.sparsities=[...]"
            )
        together = [str(o) for o in choice.options if parse(str(o)).pattern not in ("dense", "unstructured", "n:m")]
        if masks.single_weights and together:
            raise UserError(f"mask training {name} prunes single weights; {choice.name} has {together[0]}; allowed is e.g. 2:4")
    if masks.one_sparsity:
        pairs = zip(space.network(space.largest()).nodes, space.stored_network().nodes, strict=True)
        if any(node.spec.weight_shape != stored.spec.weight_shape for node, stored in pairs):
            raise UserError(
                f"mask training {name} trains weights as a whole, and some networks of the space are wider than the largest; "
                "give one inner width: space.hidden=[plain]"
            )
