"""Quantizers: the grids of weights and activations, the same arithmetic for torch and for every runtime."""

from spaces.quantizers import integer, nonuniform, ternary_binary  # importing them registers them
from spaces.quantizers.activations import (
    ACTIVATION_LEVELS,
    activation_grid,
    quantize_activation,
    quantize_by_sample,
    quantize_to_own_range,
)
from spaces.quantizers.weights import (
    WEIGHT_QUANTIZERS,
    EncodedWeight,
    QuantizerSettings,
    WeightQuantizer,
    quantizer_of,
)

__all__ = [
    "ACTIVATION_LEVELS",
    "WEIGHT_QUANTIZERS",
    "EncodedWeight",
    "QuantizerSettings",
    "WeightQuantizer",
    "activation_grid",
    "integer",
    "nonuniform",
    "quantize_activation",
    "quantize_by_sample",
    "quantize_to_own_range",
    "quantizer_of",
    "ternary_binary",
]
