"""Quantizers of activations and of weights. What is learned and how, is chosen for a supernet; the format, per layer.

activations          8-bit grids with a fixed range or the input's own
weights              the interface, the registry and the encoded form
scales               which weights share a scale, and its rules
integer, ternary_binary, nonuniform    the formats
integer_layer        levels of weight and bias in integer arithmetic
"""

from spaces.quantizers import integer, nonuniform, ternary_binary  # importing them registers them
from spaces.quantizers.activations import (
    ACTIVATION_LEVELS,
    LARGEST_FLOAT8,
    SMALLEST_SCALE,
    activation_grid,
    quantize_activation,
    quantize_by_sample,
    quantize_to_float8,
    quantize_to_own_range,
)
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
    "LARGEST_FLOAT8",
    "SMALLEST_SCALE",
    "WEIGHT_QUANTIZERS",
    "EncodedWeight",
    "QuantizerSettings",
    "WeightQuantizer",
    "activation_grid",
    "integer",
    "nonuniform",
    "quantize_activation",
    "quantize_by_sample",
    "quantize_to_float8",
    "quantize_to_own_range",
    "quantizer_of",
    "stored_bytes",
    "ternary_binary",
    "weight_quantizer",
]
