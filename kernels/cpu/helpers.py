"""`inline`: a function that kernels call, compiled into each of them."""

from __future__ import annotations

from numba import njit

from .pipeline import OPTIONS

inline = njit(forceinline=True, **OPTIONS)
