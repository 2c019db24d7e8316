"""Every type of KV cache under a real model, through the builder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_goldens import GOLDENS, MODELS, compare

from pymistral import ContextSize, MbAmount, Model, ModelBuilder, PagedAttentionMetaBuilder, RequestBuilder

# mean KL from float32, in units of llama.cpp's with its cache in 16 bits; in 8 it has 1.1 of that itself
LIMITS = {"f32": 1.0, "f16": 1.0, "bf16": 1.0, "int16": 1.0, "int8": 1.1, "f8e4m3": 3.5}


async def divergence(model: Model, name: str) -> float:
    with np.load(GOLDENS / f"{MODELS[name]}.npz") as golden:
        found, _ = compare(await model.logits([int(token) for token in golden["tokens"]]), golden)
        return found / float(golden["llama_cpp_mean_kl"])


@pytest.mark.parametrize("cache_type", LIMITS)
async def test_a_real_model(cache_type: str, smollm2_path: Path) -> None:
    """Its distributions stay near float32's, it answers, and a prompt that is cached, whole or in part, gives the same answer."""
    cache = PagedAttentionMetaBuilder(gpu_memory=ContextSize(1024), paged_cache_type=cache_type).build()
    request = RequestBuilder().add_message("user", "What is the capital of France?" * 8).set_sampler_max_len(8).set_sampler_temperature(0)
    async with await ModelBuilder(smollm2_path, paged_attn=cache).build() as model:
        assert await divergence(model, "smollm2") <= LIMITS[cache_type]
        cold = await model.send_chat_request(request)
        warm = await model.send_chat_request(request)
        assert "Paris" in str(cold.choices[0].message.content)
        assert warm.choices[0].message.content == cold.choices[0].message.content
        assert warm.usage.prompt_tokens_details.cached_tokens > 0


async def test_heads_of_256_dimensions_in_8_bits(gemma3_path: Path) -> None:
    cache = PagedAttentionMetaBuilder(gpu_memory=ContextSize(1024), paged_cache_type="int8").build()
    async with await ModelBuilder(gemma3_path, paged_attn=cache).build() as model:
        assert await divergence(model, "gemma3") <= 1.2


async def test_megabytes_hold_more_tokens(smollm2_path: Path) -> None:
    """30 layers, 3 heads of 64 dimensions, keys and values: 23,040 bytes a token in bfloat16, 12,240 in 8 bits, with scales."""
    contexts = []
    for cache_type in ("bf16", "int8"):
        cache = PagedAttentionMetaBuilder(gpu_memory=MbAmount(16), paged_cache_type=cache_type).build()
        async with await ModelBuilder(smollm2_path, paged_attn=cache).build() as model:
            contexts.append(model.max_sequence_length())
    assert contexts == [736, 1376]
