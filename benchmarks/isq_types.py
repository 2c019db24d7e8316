"""The table of ``benchmarks.accuracy --isq``: what each type of in-situ quantisation costs in accuracy, and what it saves.

The float model is the golden's file, dequantised. What was quantised once lies on a grid, which the type of that grid finds again; so
channels are scaled first, each by its own factor, in one matrix up and in the next one down. That leaves the function as it was, and the
weights on no grid.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pymistral.engine.runner import CpuRunner
from pymistral.engine.types import Segment
from pymistral.loading.checkpoint import load_gguf
from pymistral.loading.hub import resolve
from pymistral.models.registry import build_model
from pymistral.nn import functional as F
from pymistral.nn import record
from pymistral.nn.eager import evaluate
from pymistral.nn.graph import Tokens
from pymistral.quantization.isq import LAYOUTS, IsqType
from pymistral.quantization.plan import apply_isq
from pymistral.quantization.types import GgmlType, Tensor

from .accuracy import GOLDENS, MODELS, score
from .report import Report

COLUMNS = {
    "model": "model",
    "type": "type",
    "bits": "bits per weight",
    "mb": "MB",
    "kl": "mean KL",
    "kl_error": "± s.e.",
    "perplexity": "perplexity",
    "top1": "top-1",
    "decode": "decode tok/s",
    "prefill": "prefill tok/s",
    "seconds": "load s",
}
Floats = dict[str, NDArray[np.float32]]


def float_weights(weights: Mapping[str, Tensor]) -> Floats:
    """All weights as float32."""
    result = {}
    for name, tensor in weights.items():
        if len(tensor.shape) == 1:
            kind: Any = {GgmlType.F32: np.float32, GgmlType.F16: np.float16}[tensor.type]
            result[name] = tensor.data.view(kind).astype(np.float32)
        else:
            rows = np.arange(tensor.shape[0])
            result[name] = evaluate(lambda tensor=tensor: F.embedding(Tokens(), tensor), tokens=rows)  # type: ignore[misc]
    return result


def off_the_grid(weights: Floats, config: Mapping[str, Any]) -> None:
    """Scale channels between matrices, in place: what a norm or a projection writes is multiplied, what reads it is divided."""
    random = np.random.default_rng(0)

    def factors(count: int) -> NDArray[np.float32]:
        return random.uniform(0.8, 1.25, count).astype(np.float32)

    head, kv_heads = config["head_dim"], config["num_key_value_heads"]
    group = config["num_attention_heads"] // kv_heads
    mlp_norm = "pre_feedforward_layernorm" if "layers.0.pre_feedforward_layernorm.weight" in weights else "post_attention_layernorm"
    for layer in range(config["num_hidden_layers"]):
        at = f"layers.{layer}."
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            (mlp_norm, ("mlp.gate_proj", "mlp.up_proj")),
        ):
            scale = factors(config["hidden_size"])
            weights[f"{at}{norm}.weight"] *= scale
            for reader in readers:
                weights[f"{at}{reader}.weight"] /= scale
        values = factors(kv_heads * head)
        weights[f"{at}self_attn.v_proj.weight"] *= values[:, None]
        weights[f"{at}self_attn.o_proj.weight"] /= np.repeat(values.reshape(kv_heads, head), group, axis=0).reshape(-1)
        hidden = factors(config["intermediate_size"])
        weights[f"{at}mlp.up_proj.weight"] *= hidden[:, None]
        weights[f"{at}mlp.down_proj.weight"] /= hidden


def run(runner: CpuRunner, tokens: list[int]) -> NDArray[np.float32]:
    """The logits after each token, in steps of 64."""
    blocks = list(range(runner.num_blocks))
    steps = [tokens[start : start + 64] for start in range(0, len(tokens), 64)]
    return np.concatenate([runner.forward([Segment(step, 64 * i, blocks, len(step))]).copy() for i, step in enumerate(steps)])


def speed(runner: CpuRunner, tokens: list[int]) -> tuple[float, float]:
    """Tokens per second, decoded one by one (median), and of a prompt."""
    blocks = list(range(runner.num_blocks))
    start = perf_counter()
    runner.forward([Segment(tokens, 0, blocks, 1)])
    prefill = len(tokens) / (perf_counter() - start)
    times = []
    for position, token in enumerate(tokens[:64]):
        start = perf_counter()
        runner.forward([Segment([token], position, blocks, 1)])
        times.append(perf_counter() - start)
    return 1 / float(np.median(times)), prefill


def perplexity(logits: NDArray[np.float32], tokens: list[int]) -> float:
    values = logits[:-1].astype(np.float64)
    values -= values.max(-1, keepdims=True)
    chosen = np.take_along_axis(values, np.array(tokens[1:])[:, None], 1)[:, 0] - np.log(np.exp(values).sum(-1))
    return float(np.exp(-chosen.mean()))


def table(args: argparse.Namespace, models: Mapping[str, str]) -> Report:
    """Fill the report: the float model first, then each type."""
    report = Report("isq", COLUMNS, plot=plot)
    positions = 64 if args.quick else 512
    types = [None, *(IsqType.of(name) for name in args.isq_types or LAYOUTS)]
    for name in args.goldens:
        golden = np.load(GOLDENS / f"{name}.npz")
        tokens = golden["tokens"][:positions].tolist()
        checkpoint = load_gguf(resolve(models.get(name, MODELS[name])))
        floats = float_weights(checkpoint.weights)
        off_the_grid(floats, checkpoint.config)
        weights = {key: Tensor(key, GgmlType.F32, values.shape, values.reshape(-1).view(np.uint8)) for key, values in floats.items()}
        count = sum(values.size for values in floats.values() if values.ndim == 2)
        for isq in types:
            start = perf_counter()
            graph = record(build_model(checkpoint.config, apply_isq(weights, isq)))
            runner = CpuRunner(graph, max_position_embeddings=512, threads=args.threads or None, cache_tokens=512)
            seconds = perf_counter() - start
            logits = run(runner, tokens)
            kl, error, top1 = score(logits, golden, positions)
            decode, prefill = speed(runner, tokens)
            report.add(
                model=name,
                type="float32" if isq is None else isq.value,
                bits=8 * runner.program.weight_bytes / count,
                mb=runner.program.weight_bytes / 1e6,
                kl=kl,
                kl_error=error,
                perplexity=perplexity(logits, tokens),
                top1=top1,
                decode=decode,
                prefill=prefill,
                seconds=seconds,
            )
    report.notes.append(
        "Rows that are no whole number of blocks take a type of smaller blocks, embedding and head a better one: docs/quantization.md."
    )
    report.notes.append("Load s: quantising and packing; in a first run compiling kernels, too.")
    if args.quick:
        report.notes.append(f"The first {positions} of 512 positions.")
    return report


def plot(report: Report, path: Path) -> None:
    """Distance from float32 by size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(str(row["model"]) for row in report.rows))
    figure, axes = pyplot.subplots(1, len(names), figsize=(7 * len(names), 5), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for row in report.rows:
            if row["model"] == name and row["type"] != "float32":
                axis.plot(row["bits"], row["kl"], "o", color="tab:blue")
                axis.annotate(str(row["type"]), (row["bits"], row["kl"]), textcoords="offset points", xytext=(5, 4), fontsize=8)
        axis.set(title=name, xlabel="bits per weight, over all matrices", ylabel="mean KL divergence from float32", yscale="log")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
