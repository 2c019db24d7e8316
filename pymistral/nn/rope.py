"""Rotary position embedding: which frequencies a checkpoint's configuration asks for, and the table of rotations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelLoadError
from .memory import zeros

_STEP = 1024  # positions computed at once


class Rope:
    """The rotations of up to ``max_positions`` positions, computed as far as they are needed.

    Attributes
    ----------
    table
        float32 ``[position, 2, pairs]``: cosines, then sines, times the attention factor of the scaling.
    ready
        How many positions are computed.
    """

    def __init__(self, inverse_frequencies: NDArray[np.float64], max_positions: int, factor: float = 1.0) -> None:
        self.inverse_frequencies = inverse_frequencies
        self.pairs = len(inverse_frequencies)
        self.factor = factor
        try:
            self.table: NDArray[Any] = zeros((max_positions, 2, self.pairs), np.float32)
        except (MemoryError, OSError) as error:
            raise ModelLoadError(
                f"max_position_embeddings={max_positions}: the system has no memory for the rotations of so many positions ({error}). "
                "Set a smaller number where the model says it (GGUF's context_length), or take another model"
            ) from error
        self.ready = 0

    def prepare(self, positions: int) -> None:
        """Make sure that positions ``0`` to ``positions - 1`` are in the table. Raises ValueError if it is too short."""
        if positions > len(self.table):
            raise ValueError(f"position {positions - 1} is beyond the {len(self.table)} that the rotations are made for")
        while self.ready < positions:
            stop = min(self.ready + _STEP, len(self.table))
            angles = np.arange(self.ready, stop, dtype=np.float64)[:, None] * self.inverse_frequencies
            self.table[self.ready : stop, 0] = np.cos(angles) * self.factor
            self.table[self.ready : stop, 1] = np.sin(angles) * self.factor
            self.ready = stop

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        head_dim: int,
        *,
        theta: float | None = None,
        scaling: Mapping[str, Any] | None = None,
        factors: NDArray[np.float64] | None = None,
    ) -> Rope:
        """From Hugging Face's ``rope_theta``, ``rope_scaling`` and ``partial_rotary_factor``.

        Parameters
        ----------
        theta, scaling
            Override the configuration's, for models with two kinds of layers.
        factors
            Divisors of the inverse frequencies that a checkpoint brings along (GGUF's ``rope_freqs``).

        Raises
        ------
        ModelLoadError
            If a value cannot be, or the scaling's type is unknown or lacks a parameter.
        """
        inverse, factor = frequencies(config, head_dim, theta=theta, scaling=scaling, factors=factors)
        return cls(inverse, int(config["max_position_embeddings"]), factor)


def frequencies(
    config: Mapping[str, Any],
    head_dim: int,
    *,
    theta: float | None = None,
    scaling: Mapping[str, Any] | None = None,
    factors: NDArray[np.float64] | None = None,
) -> tuple[NDArray[np.float64], float]:
    """Inverse frequencies and attention factor of a rotation, given and checked as in `Rope.from_config`."""
    partial = float(config.get("partial_rotary_factor", 1.0))
    if not 0 < partial <= 1:
        raise ModelLoadError(f"partial_rotary_factor={partial}: expected a number above 0, and 1 at most")
    dims = int(head_dim * partial)
    base = float(theta if theta is not None else config.get("rope_theta", 10000.0))
    if not 0 < base < math.inf:
        raise ModelLoadError(f"rope_theta={base}: expected a finite number above 0")
    inverse = base ** -(np.arange(0, dims, 2, dtype=np.float64) / dims)
    max_positions = int(config["max_position_embeddings"])
    factor = 1.0
    scaling = config.get("rope_scaling") if scaling is None else scaling
    if factors is not None:
        if factors.shape != inverse.shape or not (np.isfinite(factors) & (factors > 0)).all():
            raise ModelLoadError(f"the divisors of the rotary frequencies must be {len(inverse)} numbers above 0")
        inverse = inverse / factors
    elif scaling:
        with np.errstate(all="ignore"):
            inverse, factor = _scale(inverse, scaling, base, dims, max_positions)
        if not ((np.isfinite(inverse) & (inverse > 0)).all() and math.isfinite(factor)):
            raise ModelLoadError(f"rope_scaling gives frequencies that are not finite and above 0: {str(dict(scaling))[:200]}")
    return inverse, factor


def _scale(
    inverse: NDArray[np.float64], scaling: Mapping[str, Any], base: float, dims: int, max_positions: int
) -> tuple[NDArray[np.float64], float]:
    """Inverse frequencies and attention factor for one of Hugging Face's rope types."""
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    try:
        if kind == "default":
            return inverse, 1.0
        if kind == "linear":
            return inverse / float(scaling["factor"]), 1.0
        if kind == "llama3":
            return _llama3(inverse, scaling), 1.0
        if kind in ("longrope", "su") or "long_factor" in scaling:  # early Phi-3 files call it su or yarn
            return _longrope(inverse, scaling, max_positions)
        if kind == "yarn":
            return _yarn(inverse, scaling, base, dims, max_positions)
        if kind == "dynamic":
            return _dynamic(scaling, base, dims, max_positions), 1.0
    except KeyError as error:
        raise ModelLoadError(f"rope_scaling of type {kind!r} lacks {error.args[0]!r}: {dict(scaling)}") from None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ModelLoadError(f"rope_scaling of type {kind!r} has a value that cannot be ({error}): {str(dict(scaling))[:200]}") from None
    raise ModelLoadError(f"rope_scaling: type {kind!r} is not supported (default, linear, dynamic, llama3, yarn, longrope are)")


def _dynamic(scaling: Mapping[str, Any], base: float, dims: int, max_positions: int) -> NDArray[np.float64]:
    """Dynamic NTK: the base grows with the length. One base serves all of a model's positions: that of the longest text.

    Within the trained length, where a configuration does not stretch ``max_position_embeddings`` beyond it, nothing changes.
    """
    factor = float(scaling["factor"])
    trained = float(scaling.get("original_max_position_embeddings") or max_positions)
    stretch = factor * max(max_positions, trained) / trained - (factor - 1)
    stretched: NDArray[np.float64] = (base * stretch ** (dims / (dims - 2))) ** -(np.arange(0, dims, 2, dtype=np.float64) / dims)
    return stretched


def _longrope(inverse: NDArray[np.float64], scaling: Mapping[str, Any], max_positions: int) -> tuple[NDArray[np.float64], float]:
    """LongRoPE (arXiv:2402.13753): a divisor for each frequency; there is a list for longer texts than the model was first trained on.

    transformers chooses by the text at hand. Keys that are cached cannot be rotated again, so here the model's longest text decides.
    """
    trained = float(scaling.get("original_max_position_embeddings") or max_positions)
    name = "long_factor" if max_positions > trained else "short_factor"
    divisors = np.asarray(scaling[name], np.float64)
    if divisors.shape != inverse.shape or not (np.isfinite(divisors) & (divisors > 0)).all():
        raise ValueError(f"{name} must hold {len(inverse)} numbers above 0")
    factor = scaling.get("attention_factor")
    if factor is None:
        stretch = float(scaling.get("factor") or max_positions / trained)
        factor = math.sqrt(1 + math.log(stretch) / math.log(trained)) if stretch > 1 else 1.0
    return inverse / divisors, float(factor)


def _llama3(inverse: NDArray[np.float64], scaling: Mapping[str, Any]) -> NDArray[np.float64]:
    """Llama 3.1: slow rotations are stretched, fast ones kept, those between blended (arXiv:2407.21783)."""
    original = float(scaling["original_max_position_embeddings"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = original * inverse / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return inverse * (kept + (1.0 - kept) / float(scaling["factor"]))


def _yarn(
    inverse: NDArray[np.float64], scaling: Mapping[str, Any], base: float, dims: int, max_positions: int
) -> tuple[NDArray[np.float64], float]:
    """YaRN (arXiv:2309.00071): as llama3, blended by dimension, with a factor on the attention's temperature."""
    stretch = float(scaling["factor"])
    original = float(scaling.get("original_max_position_embeddings") or max_positions)

    def dimension(turns: float) -> float:
        return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = dimension(float(scaling.get("beta_fast") or 32)), dimension(float(scaling.get("beta_slow") or 1))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    low, high = max(first, 0), min(last, dims - 1)
    stretched = np.clip((np.arange(dims // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    factor = scaling.get("attention_factor")

    def temperature(scale: float, weight: float = 1.0) -> float:
        return 0.1 * weight * math.log(scale) + 1.0 if scale > 1 else 1.0

    if factor is None:
        if scaling.get("mscale") and scaling.get("mscale_all_dim"):
            factor = temperature(stretch, scaling["mscale"]) / temperature(stretch, scaling["mscale_all_dim"])
        else:
            factor = temperature(stretch)
    return inverse / stretch * stretched + inverse * (1.0 - stretched), float(factor)
