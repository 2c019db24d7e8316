"""A checkpoint's tensors as a tree, by the dots in their names."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelLoadError
from ..quantization.types import GgmlType, Tensor


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

    def bias(self, name: str) -> Tensor | None:
        """The bias that goes with a matrix, if the checkpoint has one."""
        return self._tensors.get(f"{self._prefix}{name}.bias")

    def experts(self, name: str, count: int) -> list[Tensor]:
        """A matrix of each expert: ``experts.0.NAME``, ``experts.1.NAME`` ..., or slices of one tensor ``experts.NAME``."""
        stacked = self._tensors.get(f"{self._prefix}experts.{name}.weight")
        if stacked is not None:
            return [stacked[index] for index in range(count)]
        return [self.tensor(f"experts.{index}.{name}") for index in range(count)]

    def split(self, name: str, parts: Mapping[str, int]) -> Weights:
        """These weights, with the rows of one tensor (and its bias) dealt out to ``parts``: name to number of rows, in order."""
        fused, bias = self.tensor(name), self.bias(name)
        if fused.shape[0] != sum(parts.values()):
            raise ModelLoadError(f"tensor {fused.name!r} has {fused.shape[0]} rows, not {sum(parts.values())} for {', '.join(parts)}")
        tensors = dict(self._tensors)
        start = 0
        for part, rows in parts.items():
            tensors[f"{self._prefix}{part}.weight"] = fused.rows(start, start + rows)
            if bias is not None:
                tensors[f"{self._prefix}{part}.bias"] = bias.rows(start, start + rows)
            start += rows
        return Weights(tensors, self._prefix)

    def __contains__(self, name: str) -> bool:
        return f"{self._prefix}{name}.weight" in self._tensors

    def rope_factors(self) -> NDArray[np.float64] | None:
        """Divisors of the rotary frequencies, where a GGUF file brings them as a tensor."""
        tensor = self._tensors.get("rope_freqs.weight")
        if tensor is not None and tensor.type != GgmlType.F32:
            raise ModelLoadError(f"tensor {tensor.name!r} is stored as {tensor.type.name}; the divisors of rotary frequencies must be F32")
        return None if tensor is None else tensor.data.view(np.float32).astype(np.float64)
