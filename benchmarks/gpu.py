"""An NVIDIA GPU: its limits, the kernels as per cent of them, and whole models, beside transformers where torch is installed.

Each part is saved when it is done, and what fails is noted and left out. The 8B models have Llama 3's shapes and random values.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pymistral.kernels.cuda import linear
from pymistral.kernels.cuda.launch import Launch
from pymistral.kernels.cuda.operands import Rows, Weights
from pymistral.kernels.cuda.planes import LAYOUTS

from pymistral.engine.cuda_runner import CudaRunner, weight_bytes
from pymistral.engine.runner import cache_token_bytes
from pymistral.engine.sampler import Sampler, sample_rows
from pymistral.engine.types import Segment
from pymistral.models.registry import build_model
from pymistral.nn import record
from pymistral.nn.cuda_gpu import Gpu, GpuLike
from pymistral.nn.graph import OUTPUTS, TOKENS, Graph
from pymistral.quantization.types import GgmlType
from pymistral.requests.sampling import SamplingParams

from .random_llama import LLAMA_8B, multiplied, random_llama
from .report import Report, arguments, median

COLUMNS = {
    "part": "part",
    "name": "what",
    "type": "type",
    "tokens": "tokens",
    "microseconds": "µs",
    "gb_per_sec": "GB/s",
    "tflops": "TFLOP/s",
    "percent": "% of limit",
    "tokens_per_sec": "tok/s",
}
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
COLD_BYTES = 512 << 20  # of weights that are read before the same are read again: more than the L2 cache holds
PREFILL = 2048


class Limits:
    """What the card can do, in GB/s (read plus written) and TFLOP/s; 0: not known."""

    def __init__(self) -> None:
        self.copy = 0.0
        self.bf16 = 0.0


def seconds_of(gpu: GpuLike, run: Callable[[], None], passes: int) -> float:
    """The median of several calls, each waited for."""
    run()
    gpu.synchronize()
    samples = []
    for _ in range(passes):
        start = time.perf_counter()
        run()
        gpu.synchronize()
        samples.append(time.perf_counter() - start)
    return median(samples)


# ---- limits ---------------------------------------------------------------------------------------------------------


def copy_bandwidth(limits: Limits, report: Report) -> None:
    """A copy of 1 GiB within the card's memory, read and written."""
    import cupy

    size = 1 << 30
    source, target = cupy.zeros(size, cupy.uint8), cupy.empty(size, cupy.uint8)
    stream = cupy.cuda.get_current_stream()
    times = []
    for _ in range(12):
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record()
        cupy.cuda.runtime.memcpyAsync(target.data.ptr, source.data.ptr, size, cupy.cuda.runtime.memcpyDeviceToDevice, stream.ptr)
        end.record()
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(begin, end) / 1e3)
    limits.copy = 2 * size / min(times) / 1e9
    report.add(part="limits", name="copy of 1 GiB", gb_per_sec=limits.copy, microseconds=min(times) * 1e6)


def cublas_peak(limits: Limits, report: Report) -> None:
    """A product of bfloat16 matrices 8192 x 8192 by cuBLAS, through torch or, without it, CuPy (which finds the wheel nvidia-cublas)."""
    size = 8192
    try:
        import torch
    except ImportError:
        seconds = _cublas_seconds(size)
    else:
        a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        times = []
        for _ in range(12):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            a @ b
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        seconds = min(times)
        del a, b
        torch.cuda.empty_cache()
    limits.bf16 = 2 * size**3 / seconds / 1e12
    report.add(part="limits", name="cuBLAS 8192 x 8192 x 8192", type="BF16", tflops=limits.bf16, microseconds=seconds * 1e6)


def _cublas_seconds(size: int) -> float:
    import cupy
    from cupy_backends.cuda.libs import cublas

    bf16, compute = 14, 68  # CUDA_R_16BF, CUBLAS_COMPUTE_32F
    bits = (np.random.default_rng(0).standard_normal((2, size, size)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    a, b, c = cupy.asarray(bits[0]), cupy.asarray(bits[1]), cupy.empty((size, size), cupy.uint16)
    alpha, beta = np.ones(1, np.float32), np.zeros(1, np.float32)
    handle = cupy.cuda.get_cublas_handle()
    times = []
    for _ in range(12):
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record()
        cublas.gemmEx(
            handle, 1, 0, size, size, size, alpha.ctypes.data, a.data.ptr, bf16, size, b.data.ptr, bf16, size,
            beta.ctypes.data, c.data.ptr, bf16, size, compute, -1,
        )  # fmt: skip
        end.record()
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(begin, end) / 1e3)
    return min(times)


# ---- kernels --------------------------------------------------------------------------------------------------------


def random_bytes(gpu: GpuLike, nbytes: int) -> int:
    """Memory with random contents: speed does not depend on the values, and power does on whether all are the same."""
    start = gpu.allocate(nbytes)
    piece = np.random.default_rng(0).integers(0, 256, min(nbytes, 16 << 20), np.uint8)
    for at in range(0, nbytes, piece.nbytes):
        gpu.copy_in(start + at, piece[: nbytes - at])
    gpu.synchronize()
    return start


def products(gpu: GpuLike, limits: Limits, report: Report, names: list[str], shapes: Any, cold: int, token_counts: Any) -> None:
    """Matrix times few rows and many, on weights that are not in the L2 cache."""
    memory = 0
    for name in names:
        for rows, columns in shapes:
            layout = LAYOUTS[name]
            size = layout.nbytes(rows, columns)
            copies = max(1, cold // size)
            memory = memory or random_bytes(gpu, max(LAYOUTS[n].nbytes(*shape) for n in names for shape in shapes) + cold)
            weights = [Weights(layout, memory + index * size, rows, columns) for index in range(copies)]
            for tokens in token_counts:
                row = product_row(gpu, limits, weights, tokens)
                report.add(part="kernels", type=name.upper(), **row)


def product_row(gpu: GpuLike, limits: Limits, weights: list[Weights], tokens: int) -> dict[str, Any]:
    first = weights[0]
    stride = -(-first.columns // 32) * 32
    sizes = (4 * tokens * stride, tokens * stride, tokens * stride // 4, 2 * tokens * stride)
    x = Rows(stride, *(gpu.allocate(size) for size in sizes))
    out, count = gpu.allocate(4 * tokens * first.rows), gpu.allocate(8)
    gpu.copy_in(count, np.array([tokens], np.int64))
    counted: dict[str, Any] = {"accumulate": False, "count": count, "max_rows": tokens}
    cores = gpu.arch >= 80 and first.layout.name != "f32"
    few = cores and 1 < tokens <= linear.FEW_ROWS
    by_memory = few or tokens <= linear.MATVEC_ROWS
    unpacked = gpu.allocate(2 * first.rows * stride) if cores and tokens >= linear.UNPACKED_ROWS else 0
    matmul = linear.matmul_hopper if gpu.arch == 90 else linear.matmul_bf16

    def launches(w: Weights) -> list[Launch]:
        if by_memory:
            return [(linear.matmul_few if few else linear.matvec)([linear.Product(w, out, first.rows)], x, **counted)]
        if not unpacked:
            return [linear.matmul(w, x, out, first.rows, tensor_cores=cores, **counted)]
        if w.layout.name == "bf16":
            return [matmul(w.address, w, x, out, first.rows, **counted)]
        return [linear.dequantize(w, unpacked), matmul(unpacked, w, x, out, first.rows, **counted)]

    seconds = seconds_of(gpu, gpu.capture([launch for w in weights for launch in launches(w)]), 5) / len(weights)
    nbytes, flops = first.layout.nbytes(first.rows, first.columns), 2 * first.rows * first.columns * tokens
    needed = (
        nbytes / limits.copy / 1e9 if by_memory and limits.copy else flops / limits.bf16 / 1e12 if not by_memory and limits.bf16 else 0.0
    )
    return {
        "name": f"{'matmul_few' if few else 'matvec' if by_memory else 'matmul'} {first.rows}x{first.columns}",
        "tokens": tokens,
        "microseconds": seconds * 1e6,
        "gb_per_sec": nbytes / seconds / 1e9,
        "tflops": flops / seconds / 1e12,
        "percent": 100 * needed / seconds if needed else None,
    }


# ---- whole models ---------------------------------------------------------------------------------------------------


def model_rows(
    gpu: GpuLike,
    limits: Limits,
    report: Report,
    name: str,
    type: str,
    graph: Graph,
    context: int,
    batches: Any,
    prefill: int,
    passes: int = 20,
) -> None:
    """Prefill of a text, and decoding of several sequences after a short one and a long one, with greedy sampling."""
    most = max(batches)
    runner = CudaRunner(
        graph, gpu, max_position_embeddings=context, max_num_seqs=most, cache_tokens=most * context, max_tokens=max(prefill, most)
    )
    vocabulary, blocks = runner.vocab_size, -(-context // runner.block_size)
    tables = [list(range(i * blocks, (i + 1) * blocks)) for i in range(most)]
    tokens = np.random.default_rng(0).integers(0, vocabulary, context).tolist()
    samplers = [Sampler(SamplingParams(temperature=0.0), list(tokens[:1]), vocabulary, seed=0) for _ in range(most)]

    def step(segments: list[Segment]) -> None:
        logits = runner.forward(segments)
        for result in sample_rows(runner, logits, samplers[: len(segments)]):
            if isinstance(result, Exception):
                raise result

    macs = sum(int(np.prod(tensor.shape)) for tensor in multiplied(graph, {TOKENS}).matrices)  # for a token of a prompt
    count = min(prefill, context)
    seconds = seconds_of(gpu, lambda: step([Segment(tokens[:count], 0, tables[0], 1)]), -(-passes // 4))
    tflops = 2 * macs * count / seconds / 1e12
    percent = 100 * tflops / limits.bf16 if limits.bf16 else None
    report.add(
        part="models", name=f"{name}, prefill", type=type, tokens=count, microseconds=seconds * 1e6, tflops=tflops, percent=percent,
        tokens_per_sec=count / seconds,
    )  # fmt: skip
    weights, per_token = weight_bytes(multiplied(graph, {TOKENS, OUTPUTS})), cache_token_bytes(graph)
    for length in (64, context - 1):
        for batch in batches:
            segments = [Segment([tokens[0]], length, tables[i], 1) for i in range(batch)]
            seconds = seconds_of(gpu, lambda segments=segments: step(segments), passes)  # type: ignore[misc]
            nbytes = weights + batch * length * per_token
            report.add(
                part="models",
                name=f"{name}, decode of {batch} at {length}",
                type=type,
                tokens=batch,
                microseconds=seconds * 1e6,
                gb_per_sec=nbytes / seconds / 1e9,
                percent=100 * nbytes / seconds / 1e9 / limits.copy if limits.copy else None,
                tokens_per_sec=batch / seconds,
            )


def transformers_rows(limits: Limits, report: Report, config: dict[str, Any], prefill: int) -> None:
    """The same shapes in transformers, bfloat16: what a person would otherwise run."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    options = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device(torch.cuda.current_device()):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(LlamaConfig(**options)).eval()
        torch.set_default_dtype(torch.float32)
    ids = torch.randint(0, config["vocab_size"], (1, prefill), device=model.device)
    vocabulary = config["vocab_size"] * config["hidden_size"]
    parameters = sum(p.numel() for p in model.parameters()) - vocabulary  # that a step reads

    def timed(run: Callable[[], Any], passes: int) -> float:
        run()
        samples = []
        for _ in range(passes):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            torch.cuda.synchronize()
            samples.append(time.perf_counter() - start)
        return median(samples)

    with torch.inference_mode():
        seconds = timed(lambda: model(ids, logits_to_keep=1), 5)
        tflops = 2 * (parameters - vocabulary) * prefill / seconds / 1e12
        percent = 100 * tflops / limits.bf16 if limits.bf16 else None
        name = "8B in transformers"
        report.add(part="models", name=f"{name}, prefill", type="BF16", tokens=prefill, microseconds=seconds * 1e6, tflops=tflops,
                   percent=percent, tokens_per_sec=prefill / seconds)  # fmt: skip
        cache = model(ids[:, :64]).past_key_values

        def step() -> None:
            model(ids[:, :1], past_key_values=cache).logits.argmax(-1).item()

        seconds = timed(step, 20)
        rate = 2 * parameters / seconds / 1e9
        report.add(part="models", name=f"{name}, decode of 1 at 64", type="BF16", tokens=1, microseconds=seconds * 1e6, gb_per_sec=rate,
                   percent=100 * rate / limits.copy if limits.copy else None, tokens_per_sec=1 / seconds)  # fmt: skip


# ---- the command ----------------------------------------------------------------------------------------------------


def parts(args: argparse.Namespace, limits: Limits, report: Report) -> Iterator[tuple[str, Callable[[], None]]]:
    """What to measure, in order, with names for messages. Each gets a device object of its own, so that its memory is given back."""
    yield "copy bandwidth", lambda: copy_bandwidth(limits, report)
    yield "cuBLAS", lambda: cublas_peak(limits, report)
    names = ["q4_k", "q8_0", "bf16"] if args.quick else ["q4_k", "q8_0", "bf16", "q6_k", "q4_0", "f16"]
    shapes, counts = (SHAPES[:1], (1, 64)) if args.quick else (SHAPES, (1, 8, 32, 128, 512, PREFILL))
    yield "kernels", lambda: products(Gpu(args.device), limits, report, names, shapes, COLD_BYTES, counts)
    batches = (1,) if args.quick else (1, 8, 32)
    for path in args.model:
        yield path.name, lambda path=path: file_model(args, limits, report, path, batches)  # type: ignore[misc]
    layers = {"num_hidden_layers": 2} if args.quick else {}
    for type in (GgmlType.Q4_K, GgmlType.Q8_0, GgmlType.BF16):
        yield (
            f"8B in {type.name}",
            lambda type=type: model_rows(  # type: ignore[misc]
                Gpu(args.device), limits, report, "8B", type.name, random_llama(LLAMA_8B | layers, type), 4096, batches, PREFILL
            ),
        )
    yield "transformers", lambda: transformers_rows(limits, report, LLAMA_8B | layers, PREFILL)


def file_model(args: argparse.Namespace, limits: Limits, report: Report, path: Path, batches: Any) -> None:
    """A GGUF file."""
    from pymistral.loading.checkpoint import load_gguf

    checkpoint = load_gguf(path)
    graph = record(build_model(checkpoint.config, checkpoint.weights))
    context = min(2048, int(checkpoint.config["max_position_embeddings"]))
    model_rows(Gpu(args.device), limits, report, path.stem, "GGUF", graph, context, batches, PREFILL)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("-m", "--model", type=Path, action="append", default=[], metavar="FILE", help="a GGUF file; may be repeated")
    parser.add_argument("--device", type=int, default=0, metavar="N", help="number of the GPU")
    args = parser.parse_args()
    from pymistral.errors import PymistralError
    from pymistral.nn.cuda_devices import cuda_device, cuda_driver

    try:
        device, driver = cuda_device(args.device), cuda_driver()
    except PymistralError as error:
        raise SystemExit(str(error)) from None
    report = Report("gpu", COLUMNS)
    report.machine |= {"gpu": device.name, "gpu_details": str(dataclasses.asdict(device)), "cuda": ".".join(map(str, driver.version))}
    limits = Limits()
    with on_device(args.device):
        for name, measure in parts(args, limits, report):
            begin = time.perf_counter()
            try:
                measure()
            except Exception as error:  # the rest is worth having
                traceback.print_exc()
                report.notes.append(f"{name}: not measured, {type(error).__name__}: {str(error)[:300]}")
            gc.collect()  # and with it the memory of the part's device
            print(f"{name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
            if args.output is not None:
                report.save(args.output)
    report.finish(args)


@contextlib.contextmanager
def on_device(index: int) -> Iterator[None]:
    """For what CuPy and torch are told without a device."""
    import cupy

    with contextlib.ExitStack() as stack:
        stack.enter_context(cupy.cuda.Device(index))
        with contextlib.suppress(ImportError):
            import torch

            stack.enter_context(torch.cuda.device(index))
        yield


if __name__ == "__main__":
    main()
