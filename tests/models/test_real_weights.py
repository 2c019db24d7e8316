"""SmolLM2 dequantised to safetensors: it loads as a folder, and gives what transformers gives for the same numbers."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from pymistral import ModelBuilder
from pymistral.engine.runner import CpuRunner
from pymistral.engine.types import Segment
from pymistral.loading.checkpoint import Checkpoint, load_gguf
from pymistral.loading.huggingface import load_folder
from pymistral.models.registry import build_model
from pymistral.nn import record

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from gguf_to_safetensors import convert

GOLDEN = Path(__file__).parents[1] / "goldens" / "smollm2-135m-instruct-q4_1.npz"
TOKENS = 128


@pytest.fixture(scope="module")
def folder(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(smollm2_path, tmp_path_factory.mktemp("smollm2"))


def mean_kl(checkpoint: Checkpoint) -> float:
    """Of the golden's 128 best tokens and one bucket for the rest, over its first positions."""
    runner = CpuRunner(record(build_model(checkpoint.config, checkpoint.weights)), max_position_embeddings=256, threads=2, cache_tokens=256)
    with np.load(GOLDEN) as golden:
        tokens, ids, expected = golden["tokens"][:TOKENS].tolist(), golden["top_ids"][:TOKENS], golden["top_logprobs"][:TOKENS]
    logits = [runner.forward([Segment(tokens[start : start + 64], start, list(range(8)), 64)]).copy() for start in range(0, TOKENS, 64)]
    found = np.concatenate(logits).astype(np.float64)
    found -= found.max(axis=1, keepdims=True)
    found -= np.log(np.exp(found).sum(axis=1, keepdims=True))
    found = np.take_along_axis(found, ids.astype(np.int64), axis=1)

    def with_rest(logprobs: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        rest = np.log(np.maximum(1 - np.exp(logprobs.astype(np.float64)).sum(axis=1, keepdims=True), 1e-12))
        return np.concatenate([logprobs, rest], axis=1)

    p, q = with_rest(expected), with_rest(found)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def test_logits(folder: Path) -> None:
    kl = mean_kl(load_folder(folder))
    print(f"mean KL {kl:.2e}")
    assert kl < 1e-4


def test_tokenizers_agree(folder: Path, smollm2_path: Path) -> None:
    ours, packages = load_gguf(smollm2_path).tokenizer, load_folder(folder).tokenizer
    for text in ("Hello, world!  12345", "Ünïcödé 漢字 🦀🐍\n\n\tx = {'a': 1}", "<|im_start|>user\nHi<|im_end|>\n", ""):
        ids = ours.encode(text)
        assert packages.encode(text) == ids
        assert packages.decode(ids) == ours.decode(ids)
    assert packages.end_token_ids == ours.end_token_ids
    assert (packages.bos_token_id, packages.eos_token_id, packages.vocab_size) == (ours.bos_token_id, ours.eos_token_id, ours.vocab_size)


async def test_chat(folder: Path) -> None:
    async with await ModelBuilder(folder, threads=2).build() as model:
        assert "Paris" in await model.chat("What is the capital of France?")
