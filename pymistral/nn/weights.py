"""A checkpoint's tensors as a tree, by the dots in their names."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelLoadError
from ..quantization.types import Tensor


class Weights:
    """A view of the tensors below a prefix: ``weights.child("layers", 3, "mlp").tensor("up_proj")`` is ``layers.3.mlp.up_proj.weight``."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
        self._tensors = tensors
        self._prefix = prefix

    def child(self, *names: str | int) -> Weights:
        return Weights(self._tensors, self._prefix + "".join(f"{name}." for name in names))

    def tensor(self, name: str) -> Tensor:
        """The tensor of this name below the prefix. Raises ModelLoadError if the checkpoint lacks it."""
        full = f"{self._prefix}{name}.weight"
        try:
            return self._tensors[full]
        except KeyError:
            raise ModelLoadError(f"the checkpoint lacks the tensor {full!r}, which this architecture needs") from None

    def __contains__(self, name: str) -> bool:
        return f"{self._prefix}{name}.weight" in self._tensors

    def rope_factors(self) -> NDArray[np.float64] | None:
        """Divisors of the rotary frequencies, where a GGUF file brings them as a tensor."""
        tensor = self._tensors.get("rope_freqs.weight")
        return None if tensor is None else tensor.data.view(np.float32).astype(np.float64)
