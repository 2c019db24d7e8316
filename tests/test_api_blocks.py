"""The code that the documentation shows, on the real SmolLM2: what a person types first must work as written."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest_asyncio
from pydantic import BaseModel

from pymistral import (
    Constraint,
    ContextSize,
    GgufModelBuilder,
    Model,
    ModelBuilder,
    PagedAttentionMetaBuilder,
    RequestBuilder,
    SamplingParams,
    TextMessageRole,
    TextMessages,
    TextModelBuilder,
)
from pymistral.blocking import BlockingModel

SYSTEM = "You are a helpful assistant. Give short, correct answers."
QUESTION = "What is the capital of France?"


@pytest_asyncio.fixture
async def model(smollm2_path: Path) -> AsyncIterator[Model]:
    async with await ModelBuilder(smollm2_path).build() as model:
        yield model


async def test_build_and_chat(smollm2_path: Path) -> None:
    model = await ModelBuilder(str(smollm2_path), max_num_seqs=8).with_chat_template(CHATML).build()
    try:
        assert "Paris" in await model.chat(QUESTION)
    finally:
        await model.close()


# `chat` sends one message and no limit, so this template brings the instruction that makes SmolLM2 brief.
CHATML = (
    "{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)


async def test_text_builder_with_options(smollm2_path: Path) -> None:
    builder = (
        TextModelBuilder(smollm2_path)
        .with_logging()
        .with_paged_attn(PagedAttentionMetaBuilder().with_block_size(32).with_gpu_memory(ContextSize(256)).build())
    )
    async with await builder.build() as model:
        assert model.max_sequence_length() == 256
        assert model.config()["model_type"] == "llama"


async def test_gguf_builder(smollm2_path: Path) -> None:
    async with await GgufModelBuilder(smollm2_path.parent, [smollm2_path.name]).build() as model:
        request = RequestBuilder().add_message("user", "Hello!").set_sampler_max_len(4)
        response = await model.send_chat_request(request)
        assert response.usage.completion_tokens == 4
        assert response.choices[0].finish_reason == "length"


async def test_messages_and_requests(model: Model) -> None:
    messages = TextMessages().add_message(TextMessageRole.SYSTEM, SYSTEM).add_message(TextMessageRole.USER, QUESTION)
    response = await model.send_chat_request(messages)
    assert "Paris" in (response.choices[0].message.content or "")

    request = (
        RequestBuilder()
        .add_message("system", SYSTEM)
        .add_message("user", QUESTION)
        .with_sampling(SamplingParams(temperature=0.7, seed=1, max_len=16))
    )
    response = await model.send_chat_request(request)
    assert response.choices[0].message.content
    assert response.usage.avg_compl_tok_per_sec > 0
    again = await model.send_chat_request(request)
    assert again.choices[0].message.content == response.choices[0].message.content


async def test_dicts_are_messages(model: Model) -> None:
    response = await model.send_chat_request([{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}])
    assert "Paris" in (response.choices[0].message.content or "")


async def test_stream(model: Model) -> None:
    messages = TextMessages().add_message("system", SYSTEM).add_message("user", QUESTION)
    pieces = [chunk.choices[0].delta.content or "" async for chunk in model.stream_chat_request(messages)]
    assert len(pieces) > 1
    assert "Paris" in "".join(pieces)


async def test_leaving_a_stream_cancels_it(model: Model) -> None:
    request = RequestBuilder().add_message("user", "Tell me a long story.")
    async for _ in model.stream_chat_request(request):
        break
    response = await model.send_chat_request(RequestBuilder().add_message("user", "Hello!").set_sampler_max_len(2))
    assert response.usage.completion_tokens == 2


async def test_generation_defaults(model: Model) -> None:
    request = RequestBuilder().add_message("user", "Hello!").with_sampling(model.generation_defaults).set_sampler_max_len(4)
    assert (await model.send_chat_request(request)).choices[0].finish_reason in ("stop", "length")


async def test_logprobs(model: Model) -> None:
    request = RequestBuilder().add_message("user", "Hello!").return_logprobs(True).set_sampler_topn_logprobs(3).set_sampler_max_len(3)
    response = await model.send_chat_request(request)
    assert response.choices[0].logprobs is not None
    content = response.choices[0].logprobs.content
    assert content is not None
    assert [len(token.top_logprobs) for token in content] == [3, 3, 3]


async def test_tokens_and_logits(model: Model) -> None:
    tokens = await model.tokenize("The capital of France is")
    assert await model.detokenize(tokens) == "The capital of France is"
    logits = await model.logits(tokens)
    assert logits.shape == (len(tokens), model.config()["vocab_size"])
    assert logits.dtype == np.float32
    assert await model.detokenize([int(logits[-1].argmax())]) == " Paris"


def test_blocking(smollm2_path: Path) -> None:
    messages = TextMessages().add_message("system", SYSTEM).add_message("user", QUESTION)
    with BlockingModel.from_builder(ModelBuilder(smollm2_path)) as model:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in model.stream_chat_request(messages))
        assert "Paris" in text
        assert model.send_chat_request(messages).choices[0].message.content == text


async def test_blocking_inside_an_event_loop(smollm2_path: Path) -> None:
    with BlockingModel.from_builder(ModelBuilder(smollm2_path)) as model:
        assert model.detokenize(model.tokenize("in a notebook")) == "in a notebook"


class City(BaseModel):
    name: str
    country: str


async def test_structured(model: Model) -> None:
    messages = TextMessages().add_message("user", "Give me info about Paris.")
    assert isinstance(await model.generate_structured(City, messages), City)


async def test_constraint(model: Model) -> None:
    request = RequestBuilder().add_message("user", "Is the sky blue?").set_constraint(Constraint.regex("(yes|no)\\."))
    assert (await model.send_chat_request(request)).choices[0].message.content in ("yes.", "no.")
