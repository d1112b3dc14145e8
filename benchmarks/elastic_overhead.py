"""What an elastic layer costs beside a plain one: `python -m benchmarks.elastic_overhead [key=value ...]`; JSON last.

Forward and backward of single layers as they run inside of a network: the input needs a gradient too and is in channels-last
order where it is an image, and gradients are `None` before each pass.

* `dense_ratio`: the elastic layer at full size, dense, float, over `nn.Conv2d`, `nn.BatchNorm2d` (without running statistics,
  which an elastic layer does not keep) and `nn.ReLU`, or `nn.Linear` and `nn.ReLU`.
* `sampled_ratio`: a smaller form of a larger elastic layer, sparse, with weights and output in 8 bits, over the sum of what is
  timed one by one: the plain layer of the sampled size, dense and float (`plain_us`), the choice of a mask and the product with
  it (`mask_us`), the quantized weight and the quantized activation; each with its gradient.
* `sampled_ratio_one_graph`: the same over a layer that does all this to a weight of just the sampled size, in one autograd
  graph (`one_graph_us`). That is not the sum: what is timed alone finds its tensors in the cache, and stores other gradients.

A mask is computed in every pass, on both sides; in training, networks of one step share it (`Supernet.remember_masks`).

What ran before changes how long a side takes: what the cache holds, which memory is free. So a round runs all sides as often
as there are sides, each once in every place of the order, and a time is the mean over a round. A ratio is the median over
rounds of one time over the other in the same round. Memory that is freed is kept by the process (glibc's `mallopt`, nothing
elsewhere): giving it back and faulting it in again, on some passes and not on others, was most of the noise. The
three at the top of the JSON are the largest of any layer, `worst` says of which. The default is one thread, for the reason
given in `benchmarks.supernet_step`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from benchmarks.defaults import options
from search.heap import keep_freed_memory
from spaces.elastic import OPERATORS
from spaces.layers import LayerSpec
from spaces.precision import FLOAT
from spaces.quantizers import WeightQuantizer, quantize_to_own_range, quantizer_of
from spaces.sparsity import DENSE, mask


def quantized(operator: str, inputs: int, outputs: int, sparsity: str, kernel: int = 1, depthwise: bool = False) -> LayerSpec:
    side, groups = (1, 1) if operator == "linear" else (SIDE, inputs if depthwise else 1)
    spec = LayerSpec(operator, inputs, outputs, side, side, kernel, groups=groups, activation="relu", sparsity=sparsity)
    return replace(spec, precision="w8a8", input_bits=8, output_bits=8)


SIDE = 8
# The sampled form, with a sparsity pattern each, and the sizes of the largest. The dense comparison is at the sampled size.
CASES: dict[str, tuple[LayerSpec, dict[str, Any]]] = {
    "conv3x3": (quantized("conv2d", 64, 64, "2:4", kernel=3), {"in_channels": 96, "out_channels": 96, "kernel": 5}),
    "conv1x1": (quantized("conv2d", 64, 128, "group@1/2"), {"in_channels": 96, "out_channels": 192}),
    "depthwise3x3": (
        quantized("conv2d", 128, 128, "unstructured@1/2", kernel=3, depthwise=True),
        {"in_channels": 192, "out_channels": 192, "groups": 192, "kernel": 5},
    ),
    "linear": (quantized("linear", 512, 512, "block4x1@1/2"), {"in_channels": 768, "out_channels": 768}),
}

Pass = Callable[[], object]


@dataclass(frozen=True)
class Tensors:
    """The input of a layer and the gradient of its output."""

    x: torch.Tensor
    gradient: torch.Tensor


def tensors_of(spec: LayerSpec, batch: int) -> Tensors:
    if spec.operator == "linear":
        return Tensors(torch.randn(batch, spec.in_channels, requires_grad=True), torch.randn(batch, spec.out_channels))
    x = torch.randn(batch, spec.in_channels, spec.height, spec.width)
    gradient = torch.randn(batch, spec.out_channels, spec.out_height, spec.out_width)
    x, gradient = (t.contiguous(memory_format=torch.channels_last) for t in (x, gradient))
    return Tensors(x.requires_grad_(), gradient)


def plain(spec: LayerSpec) -> nn.Sequential:
    """The layer as torch has it, dense and float: the operator, for images a batch norm, ReLU."""
    if spec.operator == "linear":
        return nn.Sequential(nn.Linear(spec.in_channels, spec.out_channels), nn.ReLU())
    sizes = (spec.in_channels, spec.out_channels, spec.kernel, spec.stride, spec.kernel // 2)
    norm = nn.BatchNorm2d(spec.out_channels, track_running_stats=False)
    return nn.Sequential(nn.Conv2d(*sizes, groups=spec.groups, bias=False), norm, nn.ReLU())


class OneGraph(nn.Module):
    """The sampled layer from a weight of its own, as someone would write it who needs no other size."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.spec, self.layer = spec, plain(spec)
        self.weight = self.layer[0].get_parameter("weight")
        self.quantizer = weight_quantizer(spec)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spec, own = self.spec, self.layer[0]
        weight = self.quantizer(masked(self.weight, spec.sparsity))
        if isinstance(own, nn.Linear):
            y = F.linear(x, weight, own.bias)
        else:
            y = self.layer[1](F.conv2d(x, weight, None, spec.stride, spec.kernel // 2, groups=spec.groups))
        return quantize_to_own_range(self.layer[-1](y))[0]


def masked(weight: torch.Tensor, sparsity: str) -> torch.Tensor:
    keep = mask(weight, sparsity)
    return weight if keep is None else weight * keep


def weight_quantizer(spec: LayerSpec) -> WeightQuantizer:
    quantizer = quantizer_of(spec.arithmetic, spec.weight_shape)
    if quantizer is None:
        raise ValueError(f"{spec} has float weights")
    return quantizer


def training_pass(module: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor], tensors: Tensors) -> Pass:
    parameters = [*module.parameters(), tensors.x]

    def run() -> None:
        for parameter in parameters:
            parameter.grad = None
        forward(tensors.x).backward(tensors.gradient)  # type: ignore[no-untyped-call]

    return run


def part(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Pass:
    """A function and its gradient on their own; the gradient is handed over and not stored."""
    x = x.detach().clone().requires_grad_()
    gradient = torch.randn_like(x)
    return lambda: torch.autograd.grad(function(x), x, gradient)


def dense_sides(spec: LayerSpec, batch: int) -> dict[str, Pass]:
    spec = replace(spec, precision=FLOAT, sparsity=DENSE, input_bits=32, output_bits=32)
    tensors, layer, module = tensors_of(spec, batch), OPERATORS[spec.operator](spec), plain(spec)
    sides = {
        "elastic": training_pass(layer, lambda x: layer(spec, x), tensors),
        "plain": training_pass(module, module, tensors),
    }
    return {f"dense_{side}": run for side, run in sides.items()}


PARTS = ("plain", "mask", "quantized_weight", "quantized_activation")


def sampled_sides(largest: LayerSpec, spec: LayerSpec, batch: int) -> dict[str, Pass]:
    tensors, layer, whole, module = tensors_of(spec, batch), OPERATORS[spec.operator](largest), OneGraph(spec), plain(spec)
    quantizer, weight = weight_quantizer(spec), module[0].get_parameter("weight")
    return {
        "sampled": training_pass(layer, lambda x: layer(spec, x), tensors),
        "one_graph": training_pass(whole, whole, tensors),
        "plain": training_pass(module, module, tensors),
        "mask": part(lambda w: masked(w, spec.sparsity), weight),
        "quantized_weight": part(quantizer, weight),
        "quantized_activation": part(lambda y: quantize_to_own_range(y)[0], module(tensors.x)),
    }


def timed_us(sides: dict[str, Pass], passes: int) -> dict[str, NDArray[np.float64]]:
    """Means of each round, for about so many passes of each side; a round before them warms up."""
    names = list(sides)
    rounds = -(-passes // len(names))
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-len(names), rounds * len(names)):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            begin = time.perf_counter_ns()
            sides[name]()
            if turn >= 0:
                times[name].append((time.perf_counter_ns() - begin) / 1e3)
    return {name: np.array(values).reshape(rounds, -1).mean(axis=1) for name, values in times.items()}


def figures(name: str, batch: int, passes: int) -> tuple[dict[str, float], dict[str, float]]:
    """Ratios and times in microseconds of one layer, medians."""
    sampled, largest = CASES[name]
    us = timed_us(dense_sides(sampled, batch), passes)
    us |= timed_us(sampled_sides(replace(sampled, **largest), sampled, batch), passes)
    us["sum_of_parts"] = np.sum([us[side] for side in PARTS], axis=0)
    ratios = {
        "dense_ratio": us["dense_elastic"] / us["dense_plain"],
        "sampled_ratio": us["sampled"] / us["sum_of_parts"],
        "sampled_ratio_one_graph": us["sampled"] / us["one_graph"],
    }
    return (
        {key: round(float(np.median(values)), 4) for key, values in ratios.items()},
        {f"{key}_us": round(float(np.median(values)), 1) for key, values in us.items()},
    )


def main() -> None:
    values = options(sys.argv[1:], {"passes": 240, "batch": 128, "threads": 1, "seed": 0})
    torch.set_num_threads(values["threads"])
    torch.manual_seed(values["seed"])
    kept = keep_freed_memory()
    ratios: dict[str, dict[str, float]] = {}
    rows: list[dict[str, object]] = []
    for name, (sampled, _) in CASES.items():
        ratios[name], times_us = figures(name, values["batch"], values["passes"])
        rows.append({"layer": name, "sampled": str(sampled), **ratios[name], **times_us})
        print(*(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    worst = {key: max(ratios, key=lambda name: ratios[name][key]) for key in ratios["linear"]}
    result = {key: ratios[name][key] for key, name in worst.items()}
    print(json.dumps({**result, "worst": worst, "rows": rows, **values, "freed_memory_kept": kept}))


if __name__ == "__main__":
    main()
