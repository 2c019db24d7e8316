"""A cross-section of the kernels, for a process with ``PYMISTRAL_ISA`` set: what `test_isa` runs for each instruction set.

It uses the kernels that the two real models use, so that each is compiled once. The name of an instruction set as an argument has that
one emulated.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))
if sys.argv[1:]:
    from emulated import emulate

    emulate(sys.argv[1])

import numpy_reference as ref
from pymistral.kernels.cpu.geometry import usual_cache_type
from pymistral.kernels.cpu.isa import current_isa

from pymistral.nn import Rope
from pymistral.nn import functional as F
from pymistral.nn.eager import evaluate
from pymistral.nn.graph import Array, OutputRows

KINDS = {"Q4_1": 64, "Q5_0": 64, "Q8_0": 64, "IQ4_NL": 64, "MXFP4": 64, "Q2_K": 256, "Q4_K": 256, "Q5_K": 256, "Q6_K": 256}


def check_products() -> None:
    rng = np.random.default_rng(0)
    tensors = {kind: ref.random_tensor(kind, 50, columns, rng, edges=True) for kind, columns in KINDS.items()}
    identity = ref.identity(64)

    def everything(x: Array) -> Array:  # compiles side by side
        for tensor, _ in tensors.values():
            if tensor.shape[1] == 64:
                F.linear(x, tensor)
            else:
                F.linear(F.linear(x, ref.matrix(np.zeros((256, 64)))), tensor)
        gate = tensors["Q4_1"][0]
        x = F.linear(F.linear(F.gated_linear(x, gate, gate, "silu"), ref.matrix(np.zeros((64, 50)))), identity)
        return F.linear(F.rms_norm(x, ref.vector(np.ones(64)), 1e-5)[OutputRows()], identity)

    evaluate(everything, np.zeros((1, 64), np.float32))
    for tensor, weights in tensors.values():
        x = (rng.standard_normal((30, tensor.shape[1])) * 10.0 ** rng.uniform(-4, 4, (30, 1))).astype(np.float32)
        together = F.linear(x, tensor)
        used = ref.quantized(x, ref.largest_activation(tensor.type.name)).astype(np.float64)
        assert np.all(np.abs(together - used @ weights.T) <= ref.product_bound(weights, used, tensor.type.name)), tensor.name
        for tokens in (1, 2, 3, 4, 5, 11, 13):
            assert F.linear(x[:tokens], tensor).tobytes() == together[:tokens].tobytes(), (tensor.name, tokens)
        # every weight at every activation's limit
        limits = np.where(rng.random((4, tensor.shape[1])) < 0.5, -1, 1).astype(np.float32)
        bound = ref.product_bound(weights, limits, tensor.type.name)
        assert np.all(np.abs(F.linear(limits, tensor) - limits @ weights.T) <= bound), tensor.name
        found = F.embedding(np.arange(50), tensor)
        assert np.allclose(found, weights, rtol=1e-5, atol=1e-6 * np.abs(weights).max()), tensor.name
    x = rng.standard_normal((9, 64)).astype(np.float32)
    found = evaluate(lambda x: F.linear(x[OutputRows()], identity), x)
    assert np.abs(found - x).max() <= np.abs(x).max() / (2 * 32767) * 1.01


def check_gated() -> None:
    rng = np.random.default_rng(1)
    gate, gate_weights = ref.random_tensor("Q4_1", 64, 64, rng)
    up, up_weights = ref.random_tensor("Q4_1", 64, 64, rng)
    identity = ref.identity(64)
    x = rng.standard_normal((14, 64)).astype(np.float32) * 3
    used = ref.quantized(x, ref.largest_activation("Q4_1")).astype(np.float64)
    activated, linear = ref.silu(used @ gate_weights.T), used @ up_weights.T
    found = evaluate(lambda x: F.linear(F.gated_linear(x, gate, up, "silu"), identity), x)
    a_bound, b_bound = (ref.product_bound(weights, used, "Q4_1") for weights in (gate_weights, up_weights))
    before = 1.13 * a_bound * np.abs(linear) + (np.abs(activated) + a_bound) * b_bound
    steps = np.repeat((np.abs(activated * linear) + before).reshape(14, 2, 32).max(axis=2), 32, axis=1) / 127
    assert np.all(np.abs(found - activated * linear) <= 0.501 * steps + before)


def check_attention() -> None:
    rng = np.random.default_rng(2)
    floor = 2.0**-9 if usual_cache_type() == "int16" else 0.0
    for group, head_dim, window in ((3, 64, None), (4, 256, 100)):
        q, k, v = (rng.standard_normal((300, n * head_dim)).astype(np.float32) for n in (group, 1, 1))
        inverse = 10000.0 ** -(np.arange(head_dim // 2) / (head_dim // 2))
        scale = head_dim**-0.5
        found = F.attention(q, k, v, head_dim=head_dim, scale=scale, rope=Rope(inverse, 512), window=window)
        positions = np.arange(300)
        turned = [ref.rotated(x.reshape(300, -1, head_dim), positions, inverse) for x in (q, k)]
        wanted, bound = ref.attention(
            *turned, v.reshape(300, 1, head_dim).astype(np.float64), positions, scale=scale, window=window, floor=floor
        )
        assert np.all(np.abs(found.reshape(wanted.shape) - wanted) <= bound), (group, head_dim)


def check_norm() -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((5, 576)).astype(np.float32)
    weight = rng.uniform(0.1, 2, 576).astype(np.float32)
    assert np.allclose(F.rms_norm(x, ref.vector(weight), 1e-5), ref.rms_norm(x, weight.astype(np.float64), 1e-5), rtol=1e-5)


def check_vectors() -> None:
    """Conversions and exp, whose code differs by instruction set, on every half float there is."""
    import llvmlite.binding as llvm
    from numba import config, njit, types
    from pymistral.kernels.cpu import simd, small_floats

    isa = current_isa()
    if isa.cpu != llvm.get_host_cpu_name():
        config.CPU_NAME, config.CPU_FEATURES = isa.cpu, isa.features

    def compiled(operation: object, load: object, store: object, item_in: int, item_out: int) -> object:
        def kernel(source, target, count):  # type: ignore[no-untyped-def]
            for at in range(0, count, 16):
                store(target + at * item_out, operation(load(source + at * item_in)))

        return njit(types.void(types.intp, types.intp, types.intp), error_model="numpy", boundscheck=False)(kernel)

    @njit
    def same(x):  # type: ignore[no-untyped-def]
        return x

    def run(kernel, source: NDArray[np.generic], target: NDArray[np.generic]) -> None:  # type: ignore[no-untyped-def]
        kernel(source.__array_interface__["data"][0], target.__array_interface__["data"][0], source.size)

    halves = np.arange(1 << 16, dtype=np.uint16)
    floats = np.zeros(1 << 16, np.float32)
    run(compiled(same, small_floats.load_f16x16, simd.store_f32x16, 2, 4), halves, floats)
    wanted = halves.view(np.float16).astype(np.float32)
    assert np.array_equal(floats, wanted, equal_nan=True)
    assert np.array_equal(np.signbit(floats[wanted == 0]), np.signbit(wanted[wanted == 0]))

    rng = np.random.default_rng(4)
    numbers = np.concatenate([wanted[np.isfinite(wanted)], rng.standard_normal(4096) * 10.0 ** rng.uniform(-9, 6, 4096)]).astype(np.float32)
    between = (wanted[:31744] + np.append(wanted[1:31744], 65536.0)) / 2  # ties go to even
    ties = np.concatenate([between, -between, np.nextafter(between, np.float32(0)), np.nextafter(between, np.float32(np.inf))])
    numbers = np.concatenate([numbers, ties.astype(np.float32), [np.inf, -np.inf, 0.0, -0.0, 65519.99, 65520.0, 1e-45, -1e-45]])
    numbers = np.append(numbers, np.zeros(-len(numbers) % 16)).astype(np.float32)
    found = np.zeros(len(numbers), np.uint16)
    run(compiled(same, simd.load_f32x16, small_floats.store_f16x16, 4, 2), numbers, found)
    with np.errstate(over="ignore"):
        assert np.array_equal(found, numbers.astype(np.float16).view(np.uint16))

    bits = np.append(
        rng.integers(0, 1 << 32, 1 << 16, dtype=np.uint64).astype(np.uint32), np.uint32([0x3F808000, 0x3F818000, 0x7F7FFFFF] * 16)
    )
    numbers = bits.view(np.float32).copy()
    numbers[~np.isfinite(numbers)] = 0
    found = np.zeros(len(numbers), np.uint16)
    run(compiled(same, simd.load_f32x16, small_floats.store_bf16x16, 4, 2), numbers, found)
    bits = numbers.view(np.uint32).astype(np.uint64)
    assert np.array_equal(found, ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16))

    codes = np.delete(np.arange(256, dtype=np.uint8), (127, 255)).repeat(8)  # 254 of them: all but NaN
    found_f = np.zeros(len(codes), np.float32)
    run(compiled(same, small_floats.load_f8x16, simd.store_f32x16, 1, 4), codes, found_f)
    values = np.unique(found_f)
    assert np.array_equal(ref.float8(values.astype(np.float64)), values)
    assert (len(values), values.max(), values[values > 0].min()) == (253, 448.0, 2.0**-9)
    between = (values[1:] + values[:-1]) / 2
    numbers = np.concatenate([values, between, *(np.nextafter(between, np.float32(sign * np.inf)) for sign in (1, -1)), [-0.0, 1e-45]])
    numbers = np.append(numbers, np.zeros(-len(numbers) % 16)).astype(np.float32)
    found_b, back = np.zeros(len(numbers), np.uint8), np.zeros(len(numbers), np.float32)
    run(compiled(same, simd.load_f32x16, small_floats.store_f8x16, 4, 1), numbers, found_b)
    run(compiled(same, small_floats.load_f8x16, simd.store_f32x16, 1, 4), found_b, back)
    assert np.array_equal(back, ref.float8(numbers.astype(np.float64)))

    x = np.linspace(-87, 88, 1 << 16).astype(np.float32)
    found_f = np.zeros(len(x), np.float32)
    run(compiled(simd.exp, simd.load_f32x16, simd.store_f32x16, 4, 4), x, found_f)
    wanted_f = np.exp(x.astype(np.float64))
    assert np.abs(found_f / wanted_f - 1).max() < 3e-7
    x[:16] = [-np.inf, -1e30, -88, np.inf, 1e30, 89, 0.0, -0.0, np.nan, *[0] * 7]
    run(compiled(simd.exp, simd.load_f32x16, simd.store_f32x16, 4, 4), x, found_f)
    assert (found_f[:3] < 2e-38).all()
    assert (found_f[3:6] > 1e38).all()
    assert (found_f[6:8] == 1).all()
    assert np.isnan(found_f[8])


if __name__ == "__main__":
    check_products()
    check_gated()
    check_attention()
    check_norm()
    check_vectors()  # last: it loads Numba, and kernels are then compiled in this process
    print(current_isa().name)
