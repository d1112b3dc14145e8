"""How weight and bias of a layer of integer arithmetic are stored: the numbers that every runtime computes with.

Both sides use it: lowerings write these levels, and a plain network that is folded takes their values, so that torch computes
with what ships.
"""

from __future__ import annotations

import numpy as np

from spaces.quantizers.weights import EncodedWeight

BIAS_LEVELS = 2.0**29
FINE_LEVELS = 64


def fine_levels(encoded: EncodedWeight) -> tuple[np.ndarray, np.ndarray]:
    """Levels (int8, shape of the weight) and scales `(out,)`, float32, of a weight with integer codes.

    Levels of few bits are multiplied up: the product of the scales of input and weight is the step of the bias, which would be
    as coarse as the weights are. Up to 64 in magnitude, two products with bytes fit into 16 bits, in which onnxruntime adds
    them by default on x86 CPUs without VNNI.
    """
    codes = encoded.codes.cpu().numpy().astype(np.int8)
    scales = np.broadcast_to(encoded.scales.cpu().numpy().astype(np.float32).reshape(-1), len(codes))
    finer = max(1, FINE_LEVELS // max(1, int(np.abs(codes).max())))
    return codes * np.int8(finer), np.ascontiguousarray(scales / np.float32(finer))


def with_bias(
    levels: np.ndarray, scales: np.ndarray, bias: np.ndarray, input_scale: np.float32
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Levels and scales of a weight and of the bias that goes with it.

    A bias is a 32-bit level of scale(input) * scale(weight). Where batch norm has all but switched a channel off, its bias
    would not fit: then the weight's grid is widened, which costs that channel's tiny weights nothing that matters. Levels stay
    multiples of what they all are multiples of, so that they take no more bits than before.

    Args:
        levels: int8 `(out, ...)`.
        scales: float32 `(out,)`.
        bias: float32 `(out,)`.
        input_scale: step of the input's grid.

    Returns:
        Levels of the weight, its scales, levels of the bias (int32), and its scales.
    """
    widened = np.maximum(scales, np.abs(bias) / (input_scale * BIAS_LEVELS)).astype(np.float32)
    if not np.array_equal(scales, widened):
        step = max(1, int(np.gcd.reduce(np.abs(levels.astype(np.int64)), axis=None)))
        shrunk = levels / step * (scales / widened).reshape(-1, *[1] * (levels.ndim - 1))
        levels = (np.rint(shrunk) * step).astype(np.int8)
    bias_scales = widened * input_scale
    return levels, widened, np.rint(bias / bias_scales.astype(np.float64)).astype(np.int32), bias_scales
