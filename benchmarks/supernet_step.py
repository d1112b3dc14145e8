"""What training a supernet costs: `python -m benchmarks.supernet_step [key=value ...]`; JSON on the last line.

A sandwich step of the default space is compared with training its four networks (largest, smallest, two drawn ones) alone.

* Sandwich, as `search.training` does it: draw two architectures; forward and backward of the largest on the labels, then of
  the others on its predictions; one AdamW step over the shared weights. Lightning's own time per step is left out.
* Alone: each network as a plain module that owns just its weights (`nn.Conv2d`, `nn.BatchNorm2d`, `nn.Linear`): forward,
  backward on the labels, an AdamW step of its own; the four times are added. Weights are masked and quantized in every forward
  by the library's functions, activations where the architecture says int8, by the range of the batch as the supernet does,
  and images are resized to the architecture's resolution.

So both sides compute the same four functions on the same batch in the same precision: with equal weights their logits differ
by at most `max_abs_diff`, as a share of the largest logit.

`step_ratio` is the median over repeats of sandwich over alone, where networks alone use the same kernels, the library's own
depthwise gradient (`spaces.depthwise`) among them: the price of sharing weights, which is nothing at 1. `step_ratio_torch`
compares with networks alone whose depthwise convolutions are torch's own, as in a network that knows nothing of this library.

Each repeat draws two other architectures, warms all sides up on them, and changes which side comes first. The networks are
small, so with several threads on cores that others use too, threads waiting for each other are all that is measured; the
default is one.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.defaults import device_and_space, options
from spaces.choice import Architecture
from spaces.depthwise import depthwise_conv2d
from spaces.layers import LayerSpec, Network
from spaces.plain import finish_layer, module_key, run_network
from spaces.precision import FLOAT, FLOAT_BITS
from spaces.quantizers import quantize_to_own_range
from spaces.space import Space
from spaces.supernet import Supernet
from spaces.weights import effective_weight

IMAGE_SIDE = 8
CLASSES = 10
LEARNING_RATE = 0.001
WEIGHT_DECAY = 0.02


class LayerAlone(nn.Module):
    """One layer with trainable weights of its own; `own_kernels`: with the library's depthwise gradient."""

    def __init__(self, spec: LayerSpec, own_kernels: bool) -> None:
        super().__init__()
        self.spec, self.own_kernels = spec, own_kernels
        self.norm: nn.BatchNorm2d | None = None
        self.arithmetic: nn.Conv2d | nn.Linear | None = None
        if spec.operator == "conv2d":
            shape = (spec.in_channels, spec.out_channels, spec.kernel, spec.stride, spec.kernel // 2)
            self.arithmetic = nn.Conv2d(*shape, groups=spec.groups, bias=False)
            self.norm = nn.BatchNorm2d(spec.out_channels)
        elif spec.operator == "linear":
            self.arithmetic = nn.Linear(spec.in_channels, spec.out_channels)

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None) -> torch.Tensor:
        spec, own = self.spec, self.arithmetic
        if spec.integer and spec.input_bits == FLOAT_BITS:
            x = by_batch(x)
        if isinstance(own, nn.Conv2d) and self.norm is not None:
            weight = effective_weight(own.weight, spec)
            if spec.depthwise and self.own_kernels:
                y = self.norm(depthwise_conv2d(x, weight, spec.stride))
            else:
                y = self.norm(F.conv2d(x, weight, stride=spec.stride, padding=spec.kernel // 2, groups=spec.groups))
        elif isinstance(own, nn.Linear):
            y = F.linear(x.flatten(1), effective_weight(own.weight, spec), own.bias)
        else:
            y = x.mean(dim=(2, 3), keepdim=True)
        return finish_layer(spec, y, skip, by_batch, by_batch)

    def copy_from(self, shared: nn.Module) -> None:
        """Take over the part of the shared weights that this layer is."""
        if self.arithmetic is None:
            return
        stored = shared.get_parameter("weight.values").detach()
        whole = replace(self.spec, sparsity="dense", precision=FLOAT)
        out = self.spec.out_channels
        with torch.no_grad():
            self.arithmetic.weight.copy_(effective_weight(stored, whole))
            if self.norm is not None:
                self.norm.weight.copy_(shared.get_parameter("norm_weight")[:out])
                self.norm.bias.copy_(shared.get_parameter("norm_bias")[:out])
            elif self.arithmetic.bias is not None:
                self.arithmetic.bias.copy_(shared.get_parameter("bias")[:out])


class NetworkAlone(nn.Module):
    """A network as someone would write it who trains nothing else."""

    def __init__(self, network: Network, own_kernels: bool = True) -> None:
        super().__init__()
        self.network = network
        self.layers = nn.ModuleDict({module_key(node.name): LayerAlone(node.spec, own_kernels) for node in network.nodes})

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return run_network(self.network, images, lambda node, x, skip: self.layers[module_key(node.name)](x, skip))

    def copy_from(self, supernet: Supernet) -> None:
        for node in self.network.nodes:
            layer = self.layers[module_key(node.name)]
            if isinstance(layer, LayerAlone):
                layer.copy_from(supernet.layer(node.name))


def by_batch(x: torch.Tensor) -> torch.Tensor:
    return quantize_to_own_range(x)[0]


def adamw(module: Elastic | nn.Module) -> torch.optim.Optimizer:
    decayed = [p for p in module.parameters() if p.dim() > 1]
    other = [p for p in module.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": other, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE)


class Elastic(Protocol):
    """Shared weights, as a torch module."""

    def activate(self, architecture: Architecture) -> object: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def __call__(self, images: torch.Tensor) -> torch.Tensor: ...


class Sandwich:
    """The supernet's side."""

    def __init__(self, space: Space, supernet: Elastic) -> None:
        self.space, self.supernet = space, supernet
        self.optimizer = adamw(self.supernet)
        self.ends = (space.largest(), space.smallest())

    def drawn(self, seed: int) -> list[Architecture]:
        rng = np.random.default_rng(seed)
        return [self.space.sample(rng), self.space.sample(rng)]

    def step(self, images: torch.Tensor, labels: torch.Tensor, seed: int) -> None:
        others = [self.ends[1], *self.drawn(seed)]
        self.optimizer.zero_grad()
        self.supernet.activate(self.ends[0])
        logits = self.supernet(images)
        F.cross_entropy(logits, labels).backward()  # type: ignore[no-untyped-call]
        targets = logits.detach().softmax(dim=1)
        for architecture in others:
            self.supernet.activate(architecture)
            F.cross_entropy(self.supernet(images), targets).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


class Alone:
    """Training one network and nothing else."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.optimizer = adamw(self.module)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.module(images), labels).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


def milliseconds(action: Callable[[], None]) -> float:
    begin = time.perf_counter()
    action()
    return (time.perf_counter() - begin) * 1e3


def alone_with_weights(supernet: Supernet, architecture: Architecture) -> nn.Module:
    """A network by itself with the supernet's weights."""
    alone = NetworkAlone(supernet.activate(architecture))
    alone.copy_from(supernet)
    return alone


def largest_difference(
    shared: Elastic,
    extract: Callable[[Architecture], nn.Module],
    architectures: Sequence[Architecture],
    images: torch.Tensor,
) -> float:
    """Of the logits of both sides with the same weights, as a share of the largest logit."""
    differences: list[float] = []
    for architecture in architectures:
        alone = extract(architecture)
        shared.activate(architecture)
        with torch.no_grad():
            expected, found = shared(images), alone(images)
        differences.append(float((expected - found).abs().max() / expected.abs().max()))
    return max(differences)


Steps = Mapping[str, Sequence[Callable[[], None]]]


def interleaved(sides_of: Callable[[int], Steps], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every side in every repeat, its steps added up.

    Args:
        sides_of: of a repeat, the steps of each side; all are done once before they are timed.
        repeats: in every other one the sides come in the opposite order.
    """
    times_ms: dict[str, list[float]] = {}
    for repeat in range(repeats):
        sides = sides_of(repeat)
        for steps in sides.values():
            for step in steps:
                step()
        for side in sorted(sides, reverse=repeat % 2 == 1):
            times_ms.setdefault(side, []).append(sum(milliseconds(step) for step in sides[side]))
    return times_ms


def main() -> None:
    values = options(sys.argv[1:], {"repeats": 40, "batch": 32, "threads": 1, "seed": 0})
    torch.set_num_threads(values["threads"])
    torch.manual_seed(values["seed"])
    _, space = device_and_space()
    channels = space.network(space.largest()).input_shape[0]
    images, labels = torch.randn(values["batch"], channels, IMAGE_SIDE, IMAGE_SIDE), torch.randint(CLASSES, (values["batch"],))
    supernet = Supernet(space)
    sandwich = Sandwich(space, supernet)
    first = [*sandwich.ends, *sandwich.drawn(values["seed"])]
    difference = largest_difference(supernet, partial(alone_with_weights, supernet), first, images)

    def sides_of(repeat: int) -> Steps:
        seed = values["seed"] * 100_003 + repeat
        networks = [space.network(architecture) for architecture in (*sandwich.ends, *sandwich.drawn(seed))]
        sides = {"sandwich": [partial(sandwich.step, images, labels, seed)]}
        for side, own_kernels in (("standalone", True), ("standalone_torch", False)):
            sides[side] = [partial(Alone(NetworkAlone(network, own_kernels)).step, images, labels) for network in networks]
        return sides

    times_ms = interleaved(sides_of, values["repeats"])
    medians = {f"{side}_ms": round(float(np.median(values_ms)), 3) for side, values_ms in times_ms.items()}
    ratios, ratios_torch = (
        np.array(times_ms["sandwich"]) / np.array(times_ms[side]) for side in ("standalone", "standalone_torch")
    )
    result = {
        "step_ratio": round(float(np.median(ratios)), 4),
        "step_ratio_quartiles": [round(float(q), 4) for q in np.quantile(ratios, [0.25, 0.75])],
        "step_ratio_torch": round(float(np.median(ratios_torch)), 4),
        **medians,
        "max_abs_diff": difference,
        "repeats": values["repeats"],
        "threads": torch.get_num_threads(),
        "batch": values["batch"],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
