"""The NumPy-style array, its functions and layers; recording a model and running it as a program."""

from .functional import sigmoid_gate, soft_cap
from .graph import Array, Batch, record
from .layers import Attention, Embedding, GatedMLP, Linear, MixtureOfExperts, RMSNorm, layer_window
from .rope import Rope
from .weights import Weights

__all__ = [
    "Array",
    "Attention",
    "Batch",
    "Embedding",
    "GatedMLP",
    "Linear",
    "MixtureOfExperts",
    "RMSNorm",
    "Rope",
    "Weights",
    "layer_window",
    "record",
    "sigmoid_gate",
    "soft_cap",
]
