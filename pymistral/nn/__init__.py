"""The NumPy-style array, its functions and layers; recording a model and running it as a program."""

from .graph import Array, Batch, record
from .layers import Attention, Embedding, GatedMLP, Linear, RMSNorm
from .rope import Rope
from .weights import Weights

__all__ = ["Array", "Attention", "Batch", "Embedding", "GatedMLP", "Linear", "RMSNorm", "Rope", "Weights", "record"]
