"""What the kernels compute, in float64 NumPy: the oracle of the tests in `kernels` and `nn`."""

from __future__ import annotations

from collections.abc import Sequence

import gguf
import numpy as np
from numpy.typing import NDArray
from pymistral.kernels.cpu.isa import current_isa

from pymistral.quantization.types import BLOCK_SIZES, GgmlType, Tensor, tensor_nbytes

Floats = NDArray[np.float64]

EPSILON = 2.0**-24  # the relative error of one float32 operation

QUANTIZED = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS", "MXFP4", "TQ1_0", "TQ2_0"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"),
)
FLOATS = ("F32", "F16", "BF16")

# Where a block keeps its half floats (ggml-common.h); all other bytes may be anything.
_HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "MXFP4": (),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
    "IQ1_S": (0,),
    "IQ1_M": (),
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ2_S": (0,),
    "IQ3_XXS": (0,),
    "IQ3_S": (0,),
}
# Zeros of both signs, the smallest subnormal, the smallest normal, the largest: every sixth scale or so is one of them.
_EDGES = np.array([0.0, -0.0, 6e-8, 6.1e-5, 65504.0], np.float16)


def random_tensor(kind: str, rows: int, columns: int, rng: np.random.Generator, *, edges: bool = False) -> tuple[Tensor, Floats]:
    """A tensor of random bits, and its values as they are multiplied. ``edges`` mixes in extreme scales."""
    type = GgmlType[kind]
    if kind in FLOATS:
        values = rng.standard_normal((rows, columns)).astype(np.float32)
        if edges:
            values *= rng.choice([0.0, 1e-6, 1.0, 1e3], size=values.shape).astype(np.float32)
        stored = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
        data = np.ascontiguousarray(stored).view(np.uint8).reshape(-1)
    else:
        size = BLOCK_SIZES[type][1]
        data = rng.integers(0, 256, tensor_nbytes(type, (rows, columns)), dtype=np.uint8)
        blocks = data.reshape(-1, size)
        for at in _HALVES[kind]:
            blocks[:, at : at + 2] = _random_halves(len(blocks), rng, edges).view(np.uint8).reshape(-1, 2)
        if kind == "IQ1_M":  # a nibble of the scale at the top of each of the last four words
            words = blocks[:, 48:].copy().view(np.uint16) & 0x0FFF
            nibbles = _random_halves(len(blocks), rng, edges).view(np.uint16)[:, None] >> np.array([0, 4, 8, 12], np.uint16) & 15
            blocks[:, 48:] = (words | nibbles << 12).astype(np.uint16).view(np.uint8)
        if kind == "MXFP4":  # powers of two around 2**-7
            blocks[:, 0] = rng.integers(112, 128, len(blocks))
            if edges:
                extreme = rng.random(len(blocks)) < 0.15
                blocks[extreme, 0] = rng.choice([0, 1, 2, 150], extreme.sum())
    return Tensor(f"{kind} {rows}x{columns}", type, (rows, columns), data), multiplied_values(kind, data, rows, columns)


def _random_halves(count: int, rng: np.random.Generator, edges: bool) -> NDArray[np.float16]:
    scales = (rng.standard_normal(count) * 0.01).astype(np.float16)
    if edges:
        extreme = rng.random(count) < 0.15
        scales[extreme] = rng.choice(_EDGES, extreme.sum())
    return scales


def values_of(kind: str, data: NDArray[np.uint8], rows: int, columns: int) -> Floats:
    if kind == "F32":
        return data.view(np.float32).reshape(rows, columns).astype(np.float64)
    if kind == "F16":
        return data.view(np.float16).reshape(rows, columns).astype(np.float64)
    values = gguf.quants.dequantize(data.reshape(rows, -1), gguf.GGMLQuantizationType[kind])
    return values.reshape(rows, columns).astype(np.float64)


def is_paired(kind: str) -> bool:
    """Whether its scales and minimums are rounded to pairs of 16 bits (kernels/cpu/tiles.py)."""
    return kind in ("Q4_1", "Q4_K") and current_isa().pairs_scales


def largest_activation(kind: str) -> int:
    """The largest quant of activations that are multiplied with such weights (kernels/cpu/winograd.py)."""
    return 120 if kind in ("Q4_0", "Q4_1", "Q4_K") and current_isa().adds_beside else 127


def pairs_of(kind: str, data: NDArray[np.uint8], rows: int, columns: int) -> tuple[Floats, Floats, Floats]:
    """Of each row and 32 columns ``a`` and ``b``, and what they count: a weight is ``unit * (a * (quant - 8) + 8 * b)``."""
    blocks = data.reshape(rows, -1, BLOCK_SIZES[GgmlType[kind]][1])
    halves = np.ascontiguousarray(blocks[:, :, :4]).view(np.float16).astype(np.float32)
    scale, minimum = halves[:, :, 0], halves[:, :, 1]
    if kind == "Q4_1":
        middle = scale + minimum / np.float32(8)
        unit = np.maximum(np.abs(scale), np.abs(middle)).max(axis=1, keepdims=True) / np.float32(32767)
        some = np.where(unit == 0, np.float32(1), unit)
        a, b = (np.floor(part / some + np.float32(0.5)) for part in (scale, middle))
        return a.astype(np.float64), b.astype(np.float64), np.broadcast_to(unit, a.shape).astype(np.float64)
    minimum = minimum / np.float32(8)
    of_minimum = np.abs(minimum) > np.abs(scale)
    larger, other = np.where(of_minimum, minimum, scale), np.where(of_minimum, scale, minimum)
    some = np.where(larger == 0, np.float32(1), larger)
    share = np.minimum(np.floor(np.float32(1 << 14) * (other / some) + np.float32(0.5)), 16383).astype(np.int64)[:, :, None]
    packed = blocks[:, :, 4:16].astype(np.int64)  # 6 bits of a scale, 6 of a minimum: ggml's get_scale_min_k4
    low = (packed[:, :, :4] & 63, packed[:, :, 4:8] & 63)
    high = (packed[:, :, 8:] & 15 | packed[:, :, :4] >> 6 << 4, packed[:, :, 8:] >> 4 | packed[:, :, 4:8] >> 6 << 4)
    scales, minimums = (np.concatenate(both, axis=2) for both in zip(low, high, strict=True))
    leads = of_minimum[:, :, None]
    a = np.where(leads, (scales * share + 32) >> 6, scales << 8)
    b = a - np.where(leads, minimums << 8, -((32 - minimums * share) >> 6))
    unit = np.broadcast_to(larger[:, :, None] / np.float32(256), a.shape)
    return tuple(part.reshape(rows, -1).astype(np.float64) for part in (a, b, unit))  # type: ignore[return-value]


def multiplied_values(kind: str, data: NDArray[np.uint8], rows: int, columns: int) -> Floats:
    """What kernels multiply: a file's weights, rounded where they are paired."""
    values = values_of(kind, data, rows, columns)
    if not is_paired(kind):
        return values
    a, b, unit = pairs_of(kind, data, rows, columns)
    blocks = data.reshape(rows, -1, BLOCK_SIZES[GgmlType[kind]][1])
    if kind == "Q4_1":
        low, high = (blocks[:, :, 4:] >> shift & 15 for shift in (0, 4))
        quants = np.concatenate([low, high], axis=2)
    else:  # 32 bytes hold 64 columns: the first 32 in their low halves
        packed = blocks[:, :, 16:].reshape(rows, -1, 4, 32)
        quants = np.stack([packed & 15, packed >> 4], axis=3)
    quants = quants.reshape(rows, -1, 32).astype(np.float64)
    return (unit[:, :, None] * (a[:, :, None] * (quants - 8) + 8 * b[:, :, None])).reshape(rows, columns)


def vector(values: Sequence[float] | Floats, name: str = "norm") -> Tensor:
    """A norm's weight."""
    stored = np.asarray(values, np.float32)
    return Tensor(name, GgmlType.F32, stored.shape, stored.view(np.uint8).reshape(-1))


def matrix(values: NDArray[np.float32], name: str = "matrix") -> Tensor:
    """A float32 matrix as it is."""
    stored = np.ascontiguousarray(values, np.float32)
    return Tensor(name, GgmlType.F32, stored.shape, stored.view(np.uint8).reshape(-1))


def identity(size: int, kind: str = "Q8_0") -> Tensor:
    """Its product is the activations, for Q8_0 as they were quantised."""
    if kind != "Q8_0":
        values = np.eye(size, dtype={"F32": np.float32, "F16": np.float16}[kind])
        return Tensor("identity", GgmlType[kind], (size, size), values.view(np.uint8).reshape(-1))
    blocks = np.zeros((size, size // 32, 34), np.uint8)
    blocks[:, :, :2] = np.array([1.0], np.float16).view(np.uint8)
    for row in range(size):
        blocks[row, row // 32, 2 + row % 32] = 1
    return Tensor("identity", GgmlType.Q8_0, (size, size), blocks.reshape(-1))


def quantized(x: NDArray[np.float32], largest: int = 127) -> NDArray[np.float32]:
    """Activations after integers of up to ``largest``: 32 at a time share a scale, in the kernels' own float32 operations."""
    blocks = np.asarray(x, np.float32).reshape(len(x), -1, 32)
    peak = np.abs(blocks).max(axis=2, keepdims=True)
    inverse = np.divide(np.float32(largest), peak, out=np.zeros_like(peak), where=peak > 1e-36)
    return (np.rint(blocks * inverse) * (peak / np.float32(largest))).astype(np.float32).reshape(x.shape)


def product_bound(weights: Floats, x: Floats, kind: str) -> Floats:
    """How far a quantised product may be from float64.

    The integer dot products are exact, but where scales are paired eight times the sum of a block's activations may be 1 too small. Each
    block of 32 adds one rounding of ``scale * scale``, one of the multiply-add, and with minimums as much again;
    the terms are at most three times the block's largest weight (a minimum may cancel what it is added to) times the activations.
    """
    rows, columns = weights.shape
    size = 256 if columns % 256 == 0 else 32
    peaks = np.abs(weights).reshape(rows, -1, size).max(axis=2)
    sums = np.abs(x).reshape(len(x), -1, size).sum(axis=2)
    bound: Floats = 3 * (columns // 32 + 4) * EPSILON * (sums @ peaks.T) + 1e-30
    if is_paired(kind):  # a quant in the middle, by an eighth of an activation's step; no block lacks weights of both sides of the middle
        steps = np.abs(x).reshape(len(x), -1, 32).max(axis=2) / largest_activation(kind)
        bound += steps / 8 @ np.abs(weights).reshape(rows, -1, 32).max(axis=2).T
    return bound


def silu(x: Floats) -> Floats:
    return x / (1 + np.exp(-x))


def gelu(x: Floats) -> Floats:
    """The tanh form."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def relu(x: Floats) -> Floats:
    return np.maximum(x, 0)


def rms_norm(x: Floats, weight: Floats, epsilon: float) -> Floats:
    x = x.astype(np.float64)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon) * weight


def rotated(x: Floats, positions: NDArray[np.int64], inverse_frequencies: Floats, factor: float = 1.0) -> Floats:
    """Half-split RoPE of ``x`` ``[tokens, heads, head_dim]``; dimensions beyond the rotated pairs stay."""
    pairs = len(inverse_frequencies)
    angles = positions[:, None, None] * inverse_frequencies
    cosines, sines = np.cos(angles) * factor, np.sin(angles) * factor
    out = x.astype(np.float64).copy()
    a, b = x[..., :pairs].astype(np.float64), x[..., pairs : 2 * pairs].astype(np.float64)
    out[..., :pairs] = a * cosines - b * sines
    out[..., pairs : 2 * pairs] = a * sines + b * cosines
    return out


def float8(x: Floats) -> Floats:
    """To the nearest E4M3 (arXiv:2209.05433): ties go to the even code, and what is larger than 448 becomes that."""
    codes = np.arange(127)
    exponents, mantissas = codes >> 3, codes & 7
    values = np.where(exponents > 0, (8 + mantissas) * 2.0 ** (exponents - 10), mantissas * 2.0**-9)
    middles = (values[1:] + values[:-1]) / 2
    below, above = np.searchsorted(middles, np.abs(x), "left"), np.searchsorted(middles, np.abs(x), "right")
    return np.copysign(values[np.where(below % 2 == 0, below, above)], x)


def cached(x: Floats, cache_type: str) -> Floats:
    """Keys or values ``[..., head_dim]`` as the KV cache gives them back."""
    x = x.astype(np.float32)
    if cache_type == "int16":
        peak = np.abs(x).max(axis=-1, keepdims=True)
        scale = cached(peak / np.float32(32600), "bf16").astype(np.float32)
        factor = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=peak > 1e-35)
        return np.rint(np.clip(x * factor, -32767, 32767)).astype(np.float64) * scale
    if cache_type in ("int8", "f8e4m3"):
        groups = x.reshape(*x.shape[:-1], -1, 32 if x.shape[-1] % 32 == 0 else 16)
        peak = np.abs(groups).max(axis=-1, keepdims=True)
        largest = np.float32(127 if cache_type == "int8" else 448)
        scale = cached(peak / largest, "bf16").astype(np.float32)
        factor = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=peak > 1e-35)
        steps = np.clip(groups * factor, -largest, largest)
        quants = np.rint(steps) if cache_type == "int8" else float8(steps)
        return (quants.astype(np.float64) * scale).reshape(x.shape)
    if cache_type in ("bf16", "bf16 pairs"):
        bits = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
        return (((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) << 16).astype(np.uint32).view(np.float32).astype(np.float64)
    if cache_type == "f16":
        return np.clip(x, -65504, 65504).astype(np.float16).astype(np.float64)
    return x.astype(np.float64)


def attention(
    q: Floats,
    k: Floats,
    v: Floats,
    positions: NDArray[np.int64],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    u: float = 2.0**-9,
    floor: float = 0.0,
) -> tuple[Floats, Floats]:
    """Softmax attention of queries ``[tokens, heads, d]`` at ``positions`` over keys and values ``[length, kv_heads, d]``; and how far
    rounding of queries, keys, values and probabilities by a relative error of ``u`` may move it: ``2**-9`` for bfloat16.

    A score moves by at most ``2.01 u`` times the sum of its terms' sizes, so its probability by a factor within ``exp(2 * that)`` (its own
    score and the normaliser's), and once more by ``2 u`` for its own rounding and the value's. Integers with a scale are off by a share
    ``floor`` of a row's largest instead, however small they are.
    """
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum("thd,shd->hts", q, k) * scale
    moved = np.einsum("thd,shd->hts", np.abs(q), np.abs(k)) * abs(scale) * 2.01 * u + 1e-6
    moved += q.shape[2] * floor * abs(scale) * np.abs(q).max(2).T[:, :, None] * np.abs(k).max(2).T[:, None, :]
    if soft_cap:
        scores = soft_cap * np.tanh(scores / soft_cap)
    keys = np.arange(len(k))
    visible = keys[None, :] <= positions[:, None]
    if window:
        visible &= keys[None, :] > positions[:, None] - window
    scores = np.where(visible[None], scores, -np.inf)
    p = np.exp(scores - scores.max(axis=2, keepdims=True))
    p /= p.sum(axis=2, keepdims=True)
    worst = np.where(visible[None], moved, 0).max(axis=2)
    factor = np.expm1(2 * worst) + 2.01 * u
    sizes = np.einsum("hts,shd->thd", p, np.abs(v))
    return np.einsum("hts,shd->thd", p, v), sizes * factor.T[:, :, None] + floor * np.abs(v).max() + 1e-6
