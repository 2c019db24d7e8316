"""Sizes that `quantize_weights` shares with whoever calls it. No Numba here, so that a warm start loads none."""

from __future__ import annotations

X_BYTES = 256 * 64  # float32 [256 columns][16 rows]
Q_BYTES = 256 * 16
SCALE_BYTES = 64 * 40  # vectors of scales, and room to round them in
SCRATCH_BYTES = X_BYTES + Q_BYTES + SCALE_BYTES

LARGEST_FINITE = 3.4028234663852886e38
LARGEST_HALF = 65504.0
NOT_FINITE, TOO_LARGE = 0, 8  # bytes into the flags
