"""From a plain network to a shipped model, and the proof that both are the same.

The model is built by the function that built what the table measured (`latency_lut.models.build_model`). It is then checked
in the runtime that will run it: outputs against torch, accuracy on the test set, and the optimized graph against what the
architecture says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch

from latency_lut.device import Device
from latency_lut.lowering import LOWERINGS, LayerWeights
from latency_lut.lowerings.base import ONNX, PROGRAM
from latency_lut.models import build_model
from latency_lut.outputs import outputs_of
from search.evaluation import Split, predict
from spaces.layers import INPUT, Network
from spaces.plain import ActivationQuantizer, Factors, PlainLayer, PlainNetwork, resize
from spaces.program import ProgramModule
from spaces.tokens import LayerNorm

INTEGER_KERNELS: dict[str, dict[tuple[str, ...], tuple[str, ...]]] = {  # by kind of model and operators
    ONNX: {
        ("conv2d",): ("QLinearConv", "ConvInteger"),
        ("linear",): ("QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"),
    },
    PROGRAM: {("conv2d", "linear"): ("aten._int_mm.default",)},
}


@dataclass(frozen=True)
class Tolerances:
    """What an export must keep.

    Args:
        float_max_abs_diff: largest difference of a logit between torch and the runtime, for networks in single precision.
        agreement: share of test images with the same top-1 class, for networks with integer layers or smaller floats.
        latency: share by which a measured latency may differ from the predicted one.
    """

    float_max_abs_diff: float = 1e-3
    agreement: float = 0.995
    latency: float = 0.1


@dataclass(frozen=True)
class Verification:
    """What was measured on an exported model.

    Args:
        accuracy_torch: share of correct test images, plain network in torch.
        accuracy_runtime: the same, model in the device's runtime.
        max_abs_diff: largest difference of a logit between both.
        agreement: share of test images on which both have the same top-1 class.
        integer_layers: layers that the architecture computes in integers.
        failures: what is not as it should be, one line each; empty when verified.
    """

    accuracy_torch: float
    accuracy_runtime: float
    max_abs_diff: float
    agreement: float
    integer_layers: int
    failures: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        return {**asdict(self), "verified": not self.failures}


def layer_weights(layer: PlainLayer) -> LayerWeights:
    """What fills a layer of a model: taken from a calibrated, folded plain layer.

    Raises:
        ValueError: batch norm is not folded.
    """
    if layer.norm is not None:
        raise ValueError("fold the network before exporting it")

    def range_of(module: torch.nn.Module) -> tuple[float, float] | None:
        return module.range() if isinstance(module, ActivationQuantizer) else None

    arithmetic, factor = layer.arithmetic, LayerWeights()
    if isinstance(arithmetic, Factors):
        first, middle = arithmetic.first.get_parameter("weight").detach().cpu().numpy(), range_of(arithmetic.quantize_middle)
        factor = LayerWeights(factor=first, factor_encoded=layer.codes[0], factor_range=middle)
        arithmetic = arithmetic.second
    weight = bias = None
    if isinstance(arithmetic, ProgramModule):
        return LayerWeights(traced=tuple(tensor.cpu().numpy() for tensor in arithmetic.weights))
    if isinstance(arithmetic, torch.nn.Conv2d | torch.nn.Linear | LayerNorm):
        weight = arithmetic.weight.detach().cpu().numpy()
        assumed = torch.zeros(layer.spec.out_channels) if arithmetic.bias is None else arithmetic.bias
        bias = assumed.detach().cpu().numpy()
    return replace(
        factor,
        weight=weight,
        bias=bias,
        output_range=range_of(layer.quantize_output),
        input_range=range_of(layer.quantize_input),
        sum_range=range_of(layer.quantize_sum),
        encoded=layer.codes[-1] if layer.codes else None,
    )


def export(network: PlainNetwork, lowerings: Sequence[str], device: Device, metadata: dict[str, str]) -> bytes:
    """A plain network as a serialized model for a device.

    Args:
        network: recalibrated and folded.
        lowerings: one per layer.
        device: its batch is the model's.
        metadata: string properties stored in the model.
    """
    weights = {node.name: layer_weights(network.layer(node.name)) for node in network.network.nodes}
    return build_model(network.network, lowerings, weights, device.batch, metadata)


def run_model(model: bytes, device: Device, network: Network, images: torch.Tensor) -> np.ndarray:
    """Logits `(n, classes)` of a model in the device's runtime, for images of any size `(n, channels, height, width)`."""
    loaded = device.load_runtime().load(model, device)
    resized = resize(images, network.input_shape[1], network.input_shape[2]).numpy()
    return outputs_of(lambda batch: loaded.run({INPUT: batch}), resized, device.batch)


def verify(
    network: PlainNetwork,
    lowerings: Sequence[str],
    model: bytes,
    device: Device,
    test: Split,
    tolerances: Tolerances,
) -> Verification:
    """Run the plain network in torch and the model in the runtime on the test images, and compare.

    Args:
        network: recalibrated and folded.
        lowerings: with which it was exported.
        model: exported from it.
        device: where it runs.
        test: images that the search has not seen.
        tolerances: what is allowed.
    """
    expected = predict(network, test.images).numpy()
    found = run_model(model, device, network.network, test.images)
    graph = unfused(network.network, lowerings, device.load_runtime().optimized_operators(model, device))
    return compare(network.network, lowerings, expected, found, test.labels.numpy(), tolerances, graph)


def compare(
    network: Network,
    lowerings: Sequence[str],
    expected: np.ndarray,
    found: np.ndarray,
    labels: np.ndarray,
    tolerances: Tolerances,
    graph: Sequence[str] = (),
) -> Verification:
    """Compare what a model answered with what torch did.

    Args:
        network: of the model.
        lowerings: with which it was exported.
        expected: logits of torch, `(n, classes)`.
        found: those of the runtime.
        labels: of the images, `(n,)`.
        tolerances: what is allowed.
        graph: what is wrong with the optimized graph, a line each.
    """
    agreement = float(np.mean(expected.argmax(1) == found.argmax(1)))
    max_abs_diff = float(np.abs(expected - found).max())
    rounded = any(spec.arithmetic.activations != "float" for spec in network.layers)
    rounded = rounded or any(LOWERINGS[name].rounds for name in lowerings)
    failures = []
    if not np.isfinite(found).all():
        failures.append("the runtime's outputs are not finite")
    if rounded and agreement < tolerances.agreement:
        failures.append(
            f"same top-1 class on {agreement:.2%} of the test images; at least {tolerances.agreement:.2%} is needed"
        )
    if not rounded and not max_abs_diff <= tolerances.float_max_abs_diff:
        failures.append(f"outputs differ by {max_abs_diff:.2e}; at most {tolerances.float_max_abs_diff:.0e} is allowed")
    failures += graph
    return Verification(
        float(np.mean(expected.argmax(1) == labels)),
        float(np.mean(found.argmax(1) == labels)),
        max_abs_diff,
        agreement,
        sum(spec.integer for spec in network.layers),
        failures,
    )


def unfused(network: Network, lowerings: Sequence[str], operators: Sequence[str]) -> list[str]:
    """Whether the runtime runs as many integer kernels as the lowerings say, no more and no fewer."""
    failures = []
    for of_operators, kernels in INTEGER_KERNELS[LOWERINGS[lowerings[0]].model_kind].items():
        layers = zip(network.layers, lowerings, strict=True)
        wanted = sum(LOWERINGS[name].integer_kernels for spec, name in layers if spec.operator in of_operators)
        found = sum(operators.count(kernel) for kernel in kernels)
        if found != wanted:
            named = " and ".join(of_operators)
            failures.append(f"the optimized graph has {found} integer kernels of {named}, the architecture {wanted}")
    return failures


def sha256(data: bytes) -> str:
    """Checksum of a model file."""
    return hashlib.sha256(data).hexdigest()
