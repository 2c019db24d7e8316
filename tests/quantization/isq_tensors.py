"""Tensors whose quantisation errors are compared with llama.cpp's. NumPy alone, so that the script that asks llama.cpp can read it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "MXFP4")


def _random(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def normal() -> NDArray[np.float32]:
    return (_random(0).standard_normal((128, 1024)) * 0.05).astype(np.float32)


def heavy_tails() -> NDArray[np.float32]:
    return (_random(1).standard_t(4, (128, 1024)) * 0.03).astype(np.float32)


def outliers() -> NDArray[np.float32]:
    """As in trained weights: a few columns are much larger, and rows differ in size."""
    random = _random(2)
    values = random.standard_normal((128, 1024)) * np.exp(0.5 * random.standard_normal((128, 1)))
    values[:, random.choice(1024, 20, replace=False)] *= 8
    return (values * 0.02).astype(np.float32)


def off_centre() -> NDArray[np.float32]:
    return (_random(3).gamma(2.0, 0.05, (128, 1024)) - 0.04).astype(np.float32)


TENSORS: dict[str, Callable[[], NDArray[np.float32]]] = {
    "normal": normal,
    "heavy tails": heavy_tails,
    "outliers": outliers,
    "off centre": off_centre,
}
