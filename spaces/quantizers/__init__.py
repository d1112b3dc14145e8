"""Quantizers of activations and of weights. What is learned and how, is chosen for a supernet; the format, per layer.

activations          8-bit grids with a fixed range or the input's own
weights              the interface, the registry and the encoded form
scales               which weights share a scale, and its rules
integer, ternary_binary, nonuniform    the formats
"""

from spaces.quantizers import nonuniform, ternary_binary  # noqa: F401  they register their formats
from spaces.quantizers.activations import (
    ACTIVATION_LEVELS,
    SMALLEST_SCALE,
    activation_grid,
    quantize_activation,
    quantize_to_own_range,
)
from spaces.quantizers.integer import WEIGHT_LIMIT, quantize_weight, weight_levels, weight_scales
from spaces.quantizers.weights import (
    WEIGHT_QUANTIZERS,
    EncodedWeight,
    QuantizerSettings,
    WeightQuantizer,
    quantizer_of,
    stored_bytes,
    weight_quantizer,
)

__all__ = [
    "ACTIVATION_LEVELS",
    "SMALLEST_SCALE",
    "WEIGHT_LIMIT",
    "WEIGHT_QUANTIZERS",
    "EncodedWeight",
    "QuantizerSettings",
    "WeightQuantizer",
    "activation_grid",
    "quantize_activation",
    "quantize_to_own_range",
    "quantize_weight",
    "quantizer_of",
    "stored_bytes",
    "weight_levels",
    "weight_quantizer",
    "weight_scales",
]
