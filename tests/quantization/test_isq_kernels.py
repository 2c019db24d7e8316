"""Quantising: errors beside llama.cpp's and against what formats can hold, values that are odd, and products of what comes out."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pymistral.kernels.cpu.compiler import load_kernels

from pymistral.errors import ModelLoadError
from pymistral.nn import functional as F
from pymistral.nn.eager import evaluate
from pymistral.nn.graph import Tokens
from pymistral.nn.quantize import kernels_for, quantize
from pymistral.quantization.isq import LAYOUTS
from pymistral.quantization.types import BLOCK_SIZES, GgmlType, SafetensorsType, Tensor

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy_reference as ref
from isq_tensors import TENSORS, TYPES

GOLDEN = Path(__file__).with_name("isq_errors.npz")
KINDS = tuple(LAYOUTS.values())
Matrix = NDArray[np.float32]


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    """All at once, so that they are compiled side by side."""
    load_kernels([kernel for kind in KINDS for kernel in kernels_for(marked(np.zeros((1, 256), np.float32), kind))])


def stored(values: Matrix, type: GgmlType = GgmlType.F32) -> Tensor:
    data = np.ascontiguousarray(gguf.quants.quantize(values, gguf.GGMLQuantizationType[type.name])).view(np.uint8).reshape(-1)
    return Tensor("the weight", type, values.shape, data)


def marked(values: Matrix, kind: str) -> Tensor:
    tensor = stored(values)
    return Tensor(tensor.name, tensor.type, tensor.shape, tensor.data, kind)


def fp8_values() -> NDArray[np.float64]:
    """All E4M3 numbers by their bytes, from the text of arXiv:2209.05433: 4 bits of exponent (bias 7), 3 of mantissa, S.1111.111 is NaN."""
    values = []
    for byte in range(256):
        exponent, mantissa = byte >> 3 & 15, byte & 7
        size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
        values.append(float("nan") if byte & 127 == 127 else -size if byte & 128 else size)
    return np.array(values)


FP8 = fp8_values()


def dequantized(blocks: NDArray[np.uint8], kind: str, rows: int) -> NDArray[np.float64]:
    """By the `gguf` package; FP8 by its own table."""
    table = blocks.reshape(rows, -1)
    if kind == "f8e4m3":
        return table[:, :4].copy().view(np.float32).astype(np.float64) * FP8[table[:, 4:]]
    return gguf.quants.dequantize(table, gguf.GGMLQuantizationType[kind.upper()]).astype(np.float64)


def multiplied(blocks: NDArray[np.uint8], kind: str, rows: int) -> NDArray[np.float64]:
    """What kernels make of it."""
    if ref.is_paired(kind.upper()):
        size, nbytes = BLOCK_SIZES[GgmlType[kind.upper()]]
        return ref.multiplied_values(kind.upper(), blocks, rows, blocks.size // rows // nbytes * size)
    return dequantized(blocks, kind, rows)


def error(values: Matrix, kind: str) -> float:
    found = dequantized(quantize(stored(values), kind), kind, len(values))
    return float(np.sqrt(((found - values) ** 2).mean()))


@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("kind", TYPES)
def test_errors_beside_llama_cpp(kind: str, tensor: str) -> None:
    with np.load(GOLDEN) as golden:
        expected = dict(zip(golden["names"].tolist(), golden["errors"].tolist(), strict=True))[f"{tensor} {kind}"]
    assert error(TENSORS[tensor](), kind.lower()) <= 1.02 * expected


def test_fp8_is_the_nearest() -> None:
    values = TENSORS["heavy tails"]()[:32]
    values[3] *= np.float32(1e-6)  # subnormals
    values[3, 0] = 0.5
    table = quantize(stored(values), "f8e4m3").reshape(32, -1)
    scales = table[:, :4].copy().view(np.float32)
    assert np.allclose(scales[:, 0], np.abs(values).max(axis=1) / 448, rtol=1e-6)
    numbers = FP8[~np.isnan(FP8)]
    scaled = values.astype(np.float64) / scales
    nearest = np.abs(scaled[:, :, None] - numbers).min(axis=2)
    assert not np.isnan(FP8[table[:, 4:]]).any()
    assert np.all(np.abs(FP8[table[:, 4:]] - scaled) <= nearest * (1 + 1e-4) + 1e-6)


@pytest.mark.parametrize("kind", ["q4_0", "f8e4m3"])
@pytest.mark.parametrize("type", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_from_every_source(type: str, kind: str) -> None:
    """What is read from another type gives the same blocks as its float32 values."""
    tensor = stored(TENSORS["normal"]()[:21, :512], GgmlType[type])
    values = gguf.quants.dequantize(tensor.data.reshape(21, -1), gguf.GGMLQuantizationType[type]).astype(np.float32)
    assert np.array_equal(quantize(tensor, kind), quantize(stored(values), kind))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_depend_on_their_place(kind: str) -> None:
    values = TENSORS["outliers"]()[:, :256]
    whole = quantize(stored(values), kind).reshape(128, -1)
    assert np.array_equal(whole[5:24], quantize(stored(values[5:24]), kind, threads=1).reshape(19, -1))


ODD = ("zeros", "negative zeros", "one", "negative one", "constant", "negative", "denormal", "huge", "tiny", "outlier", "mixed")


def odd(what: str, random: np.random.Generator) -> Matrix:
    values = random.standard_normal((2, 256)).astype(np.float32)
    fixed = {"zeros": 0.0, "negative zeros": -0.0, "one": 0.0, "negative one": 0.0, "constant": 0.37, "negative": -1.5}
    if what in fixed:
        values[:] = fixed[what]
    if what in ("one", "negative one"):
        values[0, random.integers(256)] = 1.0 if what == "one" else -1.0
    if what in ("denormal", "huge", "tiny"):
        values *= np.float32({"denormal": 1e-40, "huge": 60_000 / np.abs(values).max(), "tiny": 1e-12}[what])
    if what == "outlier":
        values[:, random.integers(256)] = 1e4
    if what == "mixed":
        values[:, ::3] = 0
        values[:, 1::3] *= np.float32(1e-30)
    return values


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(what=st.sampled_from(ODD), seed=st.integers(0, 2**32 - 1))
def test_odd_values(kind: str, what: str, seed: int) -> None:
    values = odd(what, np.random.default_rng(seed))
    found = dequantized(quantize(stored(values), kind), kind, 2)
    assert np.isfinite(found).all()
    # a quarter of the range is what two bits leave; scales that are halves cannot hold what is below 2**-24
    bound = {"q2_k": 0.55, "q3_k": 0.4}.get(kind, 0.3) * np.abs(values).max(axis=1, keepdims=True) + 130 * 2.0**-24
    assert np.all(np.abs(found - values) <= bound)
    if what in ("zeros", "negative zeros"):
        assert not found.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(kind: str, value: float) -> None:
    values = TENSORS["normal"]()[:40, :256].copy()
    values[33, 77] = value
    with pytest.raises(ModelLoadError, match=r"tensor 'the weight.*' cannot be quantised: .*not finite"):
        quantize(stored(values), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_what_scales_cannot_hold_is_refused(kind: str) -> None:
    values = TENSORS["normal"]()[:20, :256].copy()
    values[18, 200] = 1e20
    if kind in ("mxfp4", "f8e4m3"):
        assert np.isfinite(dequantized(quantize(stored(values), kind), kind, 20)).all()
        return
    with pytest.raises(ModelLoadError, match="beyond 65504"):
        quantize(stored(values), kind)


def test_blocks_must_be_whole() -> None:
    with pytest.raises(ValueError, match="no matrix of whole blocks"):
        quantize(stored(np.zeros((4, 288), np.float32)), "q4_k")


@pytest.mark.parametrize("tokens", [1, 3, 5, 17])
@pytest.mark.parametrize("rows", [16, 37])
def test_products_with_fp8(rows: int, tokens: int) -> None:
    values = TENSORS["outliers"]()[:rows, :272]
    weights = dequantized(quantize(stored(values), "f8e4m3"), "f8e4m3", rows)
    x = np.random.default_rng(tokens).standard_normal((tokens, 272)).astype(np.float32)
    bound = (weights.shape[1] + 4) * ref.EPSILON * (np.abs(x).astype(np.float64) @ np.abs(weights).T)
    assert np.all(np.abs(F.linear(x, marked(values, "f8e4m3")) - x.astype(np.float64) @ weights.T) <= bound)
    residual = np.ones((tokens, rows), np.float32)
    summed = evaluate(lambda r, x: r + F.linear(x, marked(values, "f8e4m3")), residual, x)
    assert np.all(np.abs(summed - 1 - x.astype(np.float64) @ weights.T) <= bound + 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_products_with_what_was_quantised_while_packing(kind: str) -> None:
    values = TENSORS["heavy tails"]()[:50, :512]
    weights = multiplied(quantize(stored(values), kind), kind, 50)
    x = np.random.default_rng(1).standard_normal((7, 512)).astype(np.float32)
    used = x.astype(np.float64) if kind == "f8e4m3" else ref.quantized(x, ref.largest_activation(kind.upper())).astype(np.float64)
    bound = 516 * ref.EPSILON * (np.abs(used) @ np.abs(weights).T) if kind == "f8e4m3" else ref.product_bound(weights, used, kind.upper())
    assert np.all(np.abs(F.linear(x, marked(values, kind)) - used @ weights.T) <= bound)


@pytest.mark.parametrize("kind", KINDS)
def test_embedding_rows(kind: str) -> None:
    values = TENSORS["normal"]()[:40, :256]
    weights = multiplied(quantize(stored(values), kind), kind, 40)
    rows = np.array([0, 39, 7, 7, 16])
    found = evaluate(lambda: F.embedding(Tokens(), marked(values, kind)), tokens=rows)
    assert np.allclose(found, weights[rows], rtol=1e-6, atol=2e-8)


def fp8_of_a_file(rows: int, columns: int, shares: int) -> tuple[Tensor, NDArray[np.float64]]:
    """A matrix as FP8 checkpoints have it, with so many scales in a row; and its values."""
    random = np.random.default_rng(shares)
    quants = random.choice(np.flatnonzero(~np.isnan(FP8)).astype(np.uint8), (rows, columns))
    scales = random.uniform(1e-3, 1e-2, (rows, shares)).astype(np.float32)
    values = FP8[quants] * np.repeat(scales.astype(np.float64), columns // shares, axis=1)
    return Tensor("the weight", SafetensorsType.F8E4M3, (rows, columns), quants.reshape(-1), scales=scales), values


@pytest.mark.parametrize(("rows", "tokens"), [(16, 1), (37, 3), (50, 9)])
@pytest.mark.parametrize("shares", [1, 2, 17])
def test_products_with_fp8_of_a_file(rows: int, tokens: int, shares: int) -> None:
    tensor, weights = fp8_of_a_file(rows, 272, shares)
    x = np.random.default_rng(tokens).standard_normal((tokens, 272)).astype(np.float32)
    bound = (272 + 4) * ref.EPSILON * (np.abs(x).astype(np.float64) @ np.abs(weights).T)
    assert np.all(np.abs(F.linear(x, tensor) - x.astype(np.float64) @ weights.T) <= bound)
    chosen = np.array([0, rows - 1, 7, 7])
    assert np.allclose(evaluate(lambda: F.embedding(Tokens(), tensor), tokens=chosen), weights[chosen], rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["q4_k", "q8_0"])
def test_fp8_of_a_file_is_quantised_from_its_values(kind: str) -> None:
    tensor, values = fp8_of_a_file(37, 512, 4)
    assert np.array_equal(quantize(tensor, kind), quantize(stored(values.astype(np.float32)), kind))


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_fp8_of_a_file_that_is_no_number(byte: int) -> None:
    tensor, _ = fp8_of_a_file(20, 256, 1)
    tensor.data[19 * 256 + 3] = byte
    for use in (lambda: F.linear(np.ones((1, 256), np.float32), tensor), lambda: quantize(tensor, "q8_0")):
        with pytest.raises(ModelLoadError, match=r"tensor 'the weight.*' has weights that are not numbers"):
            use()
