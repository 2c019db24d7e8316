"""The real model under load: many requests through a cache that holds few of them give the answers that each gives alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import numpy as np
import pytest_asyncio

from pymistral import ContextSize, Model, ModelBuilder, PagedAttentionMetaBuilder, RequestBuilder
from pymistral.errors import EngineClosedError, ModelError

REQUESTS = 30


def build(path: Path, cache_tokens: int, **options: object) -> ModelBuilder:
    cache = PagedAttentionMetaBuilder().with_gpu_memory(ContextSize(cache_tokens)).build()
    return ModelBuilder(path, paged_attn=cache, **options)  # type: ignore[arg-type]


@pytest_asyncio.fixture
async def small(smollm2_path: Path) -> AsyncIterator[Model]:
    """Eight blocks of 32: four requests of two blocks."""
    async with await build(smollm2_path, 256).build() as model:
        yield model


def requests() -> list[RequestBuilder]:
    """Most of them between 35 and 90 tokens long, some with a common beginning."""
    random = Random(1)
    words = ["one", "two", "three", "red", "green", "blue", "apple", "river", "stone", "cloud"]
    prompts = [" ".join(random.choices(words, k=random.randint(1, 25))) for _ in range(REQUESTS)]
    return [RequestBuilder().add_message("user", prompt).set_sampler_max_len(random.randint(1, 80)) for prompt in prompts]


async def text_of(model: Model, request: RequestBuilder) -> str | None:
    return (await model.send_chat_request(request)).choices[0].message.content


async def test_many_requests_through_a_cache_that_holds_four(smollm2_path: Path, small: Model) -> None:
    async with await build(smollm2_path, 512, max_num_seqs=1, prefix_cache_n=None).build() as alone:
        expected = [await text_of(alone, request) for request in requests()]
    assert await asyncio.gather(*(text_of(small, request) for request in requests())) == expected
    stats = small._engine.stats()
    assert stats.finished == REQUESTS
    assert stats.preemptions > 0
    assert (stats.waiting, stats.running, stats.free_blocks) == (0, 0, stats.num_blocks)


async def test_a_processor_that_raises_ends_its_own_request_alone(small: Model) -> None:
    def breaks(logits: np.ndarray, tokens: list[int]) -> None:
        if len(tokens) > 45:
            raise ValueError("no more")

    good = requests()[:3]
    expected = [await text_of(small, request) for request in good]
    bad = RequestBuilder().add_message("user", "Count from one to twenty.").set_sampler_max_len(60).add_logits_processor(breaks)
    *answers, failure = await asyncio.gather(*(text_of(small, request) for request in good), text_of(small, bad), return_exceptions=True)
    assert answers == expected
    assert isinstance(failure, ModelError)
    assert "breaks raised ValueError: no more" in str(failure)
    assert failure.partial_response is not None
    assert failure.partial_response.choices[0].message.content
    assert small._engine.stats().free_blocks == small._engine.stats().num_blocks


async def test_closing_ends_each_request_with_an_error_and_its_thread(smollm2_path: Path) -> None:
    model = await build(smollm2_path, 256).build()
    tasks = [asyncio.create_task(text_of(model, request.set_sampler_max_len(100))) for request in requests()[:12]]
    async for _ in model.stream_chat_request("Hello"):
        break
    await model.close()
    assert all(isinstance(answer, EngineClosedError) for answer in await asyncio.gather(*tasks, return_exceptions=True))
    assert not model._engine._thread.is_alive()
