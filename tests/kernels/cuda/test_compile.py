"""Every source compiles for the GPUs that we name, with nothing spilled from registers: no GPU is needed for that."""

from __future__ import annotations

import itertools
from pathlib import Path

import cuda_compiler
import pytest
from pymistral.kernels.cuda import attention, launch, linear, moe, rowwise, sampling
from pymistral.kernels.cuda.attention import Heads, Places
from pymistral.kernels.cuda.launch import Kernel, source_text
from pymistral.kernels.cuda.operands import Rows, Weights
from pymistral.kernels.cuda.planes import LAYOUTS

ARCHITECTURES = (70, 80, 90)
ROWS = Rows(4096, 1, 1, 1, 1)
PLACES = Places(1, 1, 1, 1, 1, 8)


def kernels() -> list[Kernel]:
    """One or more of each source, in the shapes that take most registers."""
    found = []
    for name, tokens, rows in itertools.product(("q4_k", "q5_k", "iq2_xs", "bf16"), (8, 32), (4096, 16384)):
        many = Weights(LAYOUTS[name], 1, rows, 4096)
        found.append(linear.matmul_few([linear.Product(many, 1, 1)], ROWS, accumulate=True, count=1, max_rows=tokens).kernel)
        found.append(linear.gated_matmul_few(many, many, ROWS, "silu", ROWS, count=1, max_rows=tokens).kernel)
    for name in ("q4_k", "q6_k", "q8_0", "iq2_xs", "bf16"):
        w = Weights(LAYOUTS[name], 1, 4096, 4096)
        found.append(linear.matvec([linear.Product(w, 1, 1)], ROWS, accumulate=True, count=1, max_rows=1).kernel)
        found.append(linear.matmul(w, ROWS, 1, 1, accumulate=True, count=1, max_rows=512, tensor_cores=True).kernel)
    w = Weights(LAYOUTS["q5_k"], 1, 4096, 4096)
    found += [
        linear.matvec([linear.Product(w, 1, 1)], ROWS, accumulate=True, count=1, max_rows=8).kernel,
        linear.gated_matvec(w, w, ROWS, "silu", ROWS, count=1, max_rows=8).kernel,
        moe.expert_matvec(w, ROWS, 1, 1, chosen=1, top_k=2, shared_x=True, count=1, max_rows=8).kernel,
        linear.matmul(w, ROWS, 1, 1, accumulate=True, count=1, max_rows=512, tensor_cores=False).kernel,
        linear.embedding(w, 1, ROWS, 1.0, count=1, max_rows=8).kernel,
        linear.dequantize(w, 1).kernel,
        linear.matmul_bf16(1, w, ROWS, 1, 1, accumulate=True, count=1, max_rows=512).kernel,
        linear.matmul_hopper(1, w, ROWS, 1, 1, accumulate=True, count=1, max_rows=512).kernel,
        linear.matmul_hopper(1, w, ROWS, 1, 1, accumulate=True, count=1, max_rows=2048).kernel,
        linear.gated_matmul_hopper((1, 1), w, ROWS, "gelu", ROWS, count=1, max_rows=2048).kernel,
        *(rowwise.norm(ROWS, columns, 1e-5, count=1, max_rows=512).kernel for columns in (4096, 16384)),
        rowwise.add(ROWS, ROWS, 4096, ROWS, count=1, max_rows=8).kernel,
        moe.route(ROWS, 8, 2, normalize=True, chosen=1, weights=1, count=1, max_rows=8).kernel,
        sampling.sample(1, 32000, 1, count=1, max_rows=8).kernel,
    ]
    common = {"window": 0, "soft_cap": 0.0, "count": 1}
    for dim in (64, 128, 256):
        heads = Heads(32, 8, dim, 1, 1, 32)
        for cores in {False, attention.decode_tensor_cores(heads, 80)}:
            shared = {"partials": 1, "arrived": 1, "splits": 2, "max_rows": 8, "tensor_cores": cores}
            launches = attention.attention_decode(ROWS, heads, PLACES, ROWS, **shared, **common)  # type: ignore[arg-type]
            found += [launch.kernel for launch in launches]
        found.append(attention.attention_prefill(ROWS, heads, PLACES, ROWS, max_items=8, **common).kernel)  # type: ignore[arg-type]
        found.append(attention.attention_prefill(ROWS, heads, PLACES, ROWS, max_items=8, window=0, soft_cap=30.0, count=1).kernel)
    norms = {"q_norm": 0, "k_norm": 0, "epsilon": 0.0, "rotations": 0, "pairs": 0, "scale": 1.0, "count": 1, "max_rows": 8}
    found.append(attention.rope_and_cache(ROWS, ROWS, ROWS, heads, PLACES, **norms).kernel)  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kernel", kernels(), ids=lambda kernel: "-".join([kernel.name, *(value for _, value in kernel.macros)]))
def test_compiles(kernel: Kernel, arch: int) -> None:
    if not cuda_compiler.architectures():
        pytest.skip("neither NVRTC (the wheel nvidia-cuda-nvrtc-cu12) nor nvcc is installed")
    if arch not in cuda_compiler.architectures():
        pytest.skip(f"this version of CUDA does not compile for sm_{arch}")
    if not kernel.runs_on(arch):
        pytest.skip(f"{kernel.name} is for sm_{kernel.min_arch}" + (" alone" if kernel.only_there else " and later"))
    target = f"{arch}a" if kernel.only_there else str(arch)
    report = cuda_compiler.compile_kernel(source_text(kernel.source), kernel.name, target, kernel.options)
    assert 0 < report.registers <= 255
    assert report.spilled == 0, report


@pytest.mark.parametrize("path", sorted(Path(launch.__file__).parent.glob("*.cu")), ids=lambda path: path.name)
def test_every_kernel_waits_for_the_one_in_front_of_it(path: Path) -> None:
    """It may have been started before that one has ended."""
    for body in path.read_text().split("__global__")[1:]:
        assert body.count("let_next_start()") == 1
        assert "wait_for_previous()" in body or "dot_rows" in body


def test_a_source_that_does_not_compile_is_an_error() -> None:
    if not cuda_compiler.architectures():
        pytest.skip("neither NVRTC (the wheel nvidia-cuda-nvrtc-cu12) nor nvcc is installed")
    with pytest.raises(RuntimeError, match="undefined"):
        cuda_compiler.compile_kernel('extern "C" __global__ void broken() { nothing(); }', "broken", "90", ())
