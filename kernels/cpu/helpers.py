"""`inline`: a function that kernels call, compiled into each of them."""

from __future__ import annotations

from numba import njit

from .compiler import JIT_OPTIONS

inline = njit(forceinline=True, **JIT_OPTIONS)
