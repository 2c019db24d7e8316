"""Several models in one: which answers, and what happens to the rest when one is unloaded, reloaded or removed."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from pathlib import Path

import pytest
from fake_model import ALPHABET, make_model

from pymistral import Model, ModelBuilder, MultiModelBuilder, RequestBuilder, SpeculativeConfig, TextSpeculativeBuilder
from pymistral.blocking import BlockingModel
from pymistral.builders.common import Buildable
from pymistral.errors import EngineClosedError, ModelLoadError, ModelManagementError


class FakeBuilder(Buildable):
    def __init__(self, name: str, *, endless: bool = False, delay: float = 0.0, fails: bool = False) -> None:
        self.name, self.endless, self.delay, self.fails = name, endless, delay, fails
        self.loads = 0
        self.gate = threading.Event()
        self.gate.set()

    def _name(self) -> str:
        return self.name

    def _load(self) -> Model:
        self.loads += 1
        self.gate.wait(10)
        if self.fails:
            raise ModelLoadError("it does not load")
        return make_model(endless=self.endless, delay=self.delay, model_id=self.name)


async def group(**options: bool) -> Model:
    return await MultiModelBuilder().add_model(FakeBuilder("one", **options)).add_model_with_alias("two", FakeBuilder("other")).build()


async def test_calls_go_to_the_model_that_they_name() -> None:
    async with await group() as model:
        assert model.list_models() == ["one", "two"]
        assert model.get_default_model_id() == "one"
        assert (await model.send_chat_request("Hi")).model == "one"
        assert (await model.send_chat_request("Hi", model_id="two")).model == "two"
        assert [chunk.model async for chunk in model.stream_chat_request("Hi", model_id="two")][-1] == "two"
        assert await model.chat("Hi", model_id="two") == ALPHABET
        assert await model.tokenize("ab", model_id="two") == await model.tokenize("ab")
        assert await model.detokenize([97], model_id="two") == "a"
        assert (await model.logits([97], model_id="two")).argmax() == 98
        assert model.config(model_id="two") == model.config()
        assert model.max_sequence_length(model_id="two") == 1024
        model.set_default_model_id("two")
        assert (await model.send_chat_request("Hi")).model == "two"


async def test_unknown_and_taken_ids_are_named() -> None:
    async with await group() as model:
        for call in (model.send_chat_request("Hi", model_id="three"), model.unload_model("three"), model.remove_model("three")):
            with pytest.raises(ModelManagementError, match=r"no model 'three'; there are 'one', 'two'"):
                await call
        with pytest.raises(ModelManagementError, match="no model 'three'"):
            model.set_default_model_id("three")
        with pytest.raises(ModelManagementError, match="a model 'two' already"):
            await model.add_model("two", FakeBuilder("x"))
        for model_id in (None, "", 5):
            with pytest.raises(ModelManagementError, match="id is a non-empty string"):
                await model.add_model(model_id, FakeBuilder("x"))  # type: ignore[arg-type]
            with pytest.raises(ModelManagementError, match="id is a non-empty string"):
                MultiModelBuilder().add_model_with_alias(model_id, FakeBuilder("x"))  # type: ignore[arg-type]
        for wrong in ([], {}, 5):
            with pytest.raises(ModelManagementError, match="id is a non-empty string, got"):
                await model.chat("Hi", model_id=wrong)  # type: ignore[arg-type]
            with pytest.raises(ModelManagementError, match="id is a non-empty string, got"):
                model.is_model_loaded(wrong)  # type: ignore[arg-type]
        with pytest.raises(ModelManagementError, match="takes a builder"):
            await model.add_model("three", "model.gguf")  # type: ignore[arg-type]
        assert model.list_models() == ["one", "two"]
        with pytest.raises(ModelManagementError, match="is the default model"):
            await model.remove_model("one")
    with pytest.raises(ModelManagementError, match="a model 'one' already"):
        MultiModelBuilder().add_model(FakeBuilder("one")).add_model(FakeBuilder("one"))
    with pytest.raises(ModelManagementError, match="takes a builder"):
        MultiModelBuilder().add_model("model.gguf")  # type: ignore[arg-type]
    with pytest.raises(ModelManagementError, match=r"no model 'x' to be the default; there are 'one'"):
        await MultiModelBuilder().add_model(FakeBuilder("one")).with_default_model("x").build()
    with pytest.raises(ModelManagementError, match="call add_model first"):
        await MultiModelBuilder().build()


@pytest.mark.parametrize("name", ["one", "two"])
async def test_unload_and_reload(name: str) -> None:
    async with await group() as model:
        member = model._member(name)
        engine = weakref.ref(member._engine)
        thread = member._engine._thread
        del member
        await model.unload_model(name)
        await model.unload_model(name)
        gc.collect()
        assert engine() is None, "the engine is still in memory"
        assert not thread.is_alive()
        assert not model.is_model_loaded(name)
        assert (name, "unloaded") in model.list_models_with_status()
        with pytest.raises(ModelManagementError, match=rf"'{name}' is not loaded; call reload_model\('{name}'\) first"):
            await model.chat("Hi", model_id=name)
        other = {"one": "two", "two": "one"}[name]
        assert (await model.send_chat_request("Hi", model_id=other)).model == other
        await model.reload_model(name)
        await model.reload_model(name)
        assert model.is_model_loaded(name)
        assert (await model.send_chat_request("Hi", model_id=name)).model == name


@pytest.mark.parametrize("name", ["one", "two"])
async def test_requests_that_run_end_when_their_model_is_unloaded(name: str) -> None:
    model = await MultiModelBuilder().add_model(FakeBuilder("one", endless=True, delay=0.001)).build()
    async with model:
        await model.add_model("two", FakeBuilder("two", endless=True, delay=0.001))
        stream = model.stream_chat_request("Hi", model_id=name)
        await stream.__anext__()
        waiting = asyncio.create_task(model.send_chat_request("Hi", model_id=name))
        await asyncio.sleep(0.02)
        await model.unload_model(name)
        with pytest.raises(EngineClosedError):
            await waiting
        with pytest.raises(EngineClosedError):
            async for _ in stream:
                pass


async def test_many_reload_at_once_and_it_is_loaded_once() -> None:
    async with await MultiModelBuilder().add_model(first := FakeBuilder("one")).build() as model:
        await model.add_model("two", builder := FakeBuilder("two"))
        for name, source in (("one", first), ("two", builder)):
            await model.unload_model(name)
            source.gate.clear()
            reloads = [asyncio.create_task(model.reload_model(name)) for _ in range(4)]
            while (name, "reloading") not in model.list_models_with_status():  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            with pytest.raises(ModelManagementError, match="is not loaded"):
                await model.chat("Hi", model_id=name)
            source.gate.set()
            await asyncio.gather(*reloads)
            assert source.loads == 2
            assert await model.chat("Hi", model_id=name) == ALPHABET


async def test_requests_meet_a_model_that_comes_and_goes_with_an_answer_or_a_clear_error() -> None:
    async with await group() as model:
        outcomes = set()

        async def ask(name: str) -> None:
            for _ in range(60):
                try:
                    assert await model.chat("Hi", model_id=name) == ALPHABET
                    outcomes.add("answer")
                except (ModelManagementError, EngineClosedError) as error:  # noqa: PERF203
                    outcomes.add(type(error).__name__)
                    await asyncio.sleep(0.001)

        async def flip(name: str) -> None:
            for _ in range(8):
                await model.unload_model(name)
                await model.reload_model(name)
                await asyncio.sleep(0.005)

        await asyncio.gather(*(work(name) for name in ("one", "two") for work in (ask, ask, flip)))
        assert "answer" in outcomes
        assert outcomes <= {"answer", "ModelManagementError", "EngineClosedError"}


async def test_add_remove_and_fail() -> None:
    async with await group() as model:
        with pytest.raises(ModelLoadError, match="does not load"):
            await model.add_model("three", FakeBuilder("x", fails=True))
        assert model.list_models() == ["one", "two"]
        await model.add_model("three", FakeBuilder("x"))
        thread = model._member("three")._engine._thread
        await model.remove_model("three")
        assert not thread.is_alive()
        assert model.list_models() == ["one", "two"]
        model.set_default_model_id("two")
        await model.remove_model("one")  # the one that it was built as
        assert model.list_models() == ["two"]
        assert await model.chat("Hi") == ALPHABET
        await model.add_model("one", FakeBuilder("one"))
        assert (await model.send_chat_request("Hi", model_id="one")).model == "one"


async def test_a_failed_reload_can_be_tried_again() -> None:
    builder = FakeBuilder("two")
    async with await MultiModelBuilder().add_model(FakeBuilder("one")).add_model(builder).build() as model:
        await model.unload_model("two")
        builder.fails = True
        with pytest.raises(ModelLoadError):
            await model.reload_model("two")
        assert not model.is_model_loaded("two")
        builder.fails = False
        await model.reload_model("two")
        assert await model.chat("Hi", model_id="two") == ALPHABET


async def test_closing_closes_all() -> None:
    model = await group()
    threads = [model._member(name)._engine._thread for name in ("one", "two")]
    await model.unload_model("one")
    await model.close()
    assert not any(thread.is_alive() for thread in threads)
    with pytest.raises(EngineClosedError):
        await model.chat("Hi", model_id="two")
    assert model.list_models_with_status() == [("one", "unloaded"), ("two", "unloaded")]
    assert not model.is_model_loaded("two")
    for call in (model.reload_model("one"), model.reload_model("two"), model.add_model("three", FakeBuilder("x"))):
        with pytest.raises(EngineClosedError):
            await call


async def test_a_failed_build_leaves_nothing() -> None:
    before = threading.active_count()
    with pytest.raises(ModelLoadError):
        await MultiModelBuilder().add_model(FakeBuilder("one")).add_model(FakeBuilder("two", fails=True)).build()
    await asyncio.sleep(0.01)
    assert threading.active_count() <= before


async def test_a_single_model_manages_itself() -> None:
    async with await FakeBuilder("one").build() as model:
        assert model.list_models_with_status() == [("one", "loaded")]
        assert (await model.send_chat_request("Hi", model_id="one")).model == "one"
        await model.unload_model("one")
        await model.reload_model("one")
        assert await model.chat("Hi") == ALPHABET
    with BlockingModel(make_model()) as bare, pytest.raises(ModelManagementError, match="not made by a builder"):
        bare.unload_model("alphabet")


def test_blocking_has_the_same() -> None:
    builder = MultiModelBuilder().add_model(FakeBuilder("one")).add_model(FakeBuilder("two")).with_default_model("two")
    with BlockingModel.from_builder(builder) as model:
        assert model.get_default_model_id() == "two"
        assert model.send_chat_request("Hi").model == "two"
        assert [chunk.model for chunk in model.stream_chat_request("Hi", model_id="one")][-1] == "one"
        model.add_model("three", FakeBuilder("x"))
        model.unload_model("three")
        assert not model.is_model_loaded("three")
        assert model.list_models_with_status()[-1] == ("three", "unloaded")
        model.reload_model("three")
        assert model.chat("Hi", model_id="three") == ALPHABET
        model.remove_model("three")
        assert model.list_models() == ["one", "two"]
        model.set_default_model_id("one")
        assert model.tokenize("ab") == model.tokenize("ab", model_id="two")


GEMMA = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message.role }}\n{{ message.content }}<end_of_turn>\n{% endfor %}"
    "<start_of_turn>model\n"
)


def test_real_models(smollm2_path: Path, gemma3_path: Path) -> None:
    small = ModelBuilder(smollm2_path)
    request = RequestBuilder().add_message("user", "What is the capital of France?").set_sampler_max_len(12)
    builder = (
        MultiModelBuilder()
        .add_model_with_alias("smol", small)
        .add_model_with_alias("twin", TextSpeculativeBuilder(small, config=SpeculativeConfig.prompt_lookup(3)))
        .add_model_with_alias("gemma", ModelBuilder(gemma3_path).with_chat_template(GEMMA))
    )
    with BlockingModel.from_builder(builder) as model:
        text = model.send_chat_request(request).choices[0].message.content
        assert model.send_chat_request(request, model_id="twin").choices[0].message.content == text
        other = model.send_chat_request(request, model_id="gemma").choices[0].message.content
        assert other not in (None, "", text)
        streams = [model.stream_chat_request(request, model_id=name) for name in ("smol", "gemma", "twin")]
        texts = ["".join(chunk.choices[0].delta.content or "" for chunk in stream) for stream in streams]
        assert texts == [text, other, text]
        program = weakref.ref(model.inner._member("gemma")._engine._core.runner)
        memory = resident()
        model.unload_model("gemma")
        gc.collect()
        assert program() is None
        assert resident() < memory - 150 * 2**20, "the weights are still in memory"
        model.reload_model("gemma")
        assert model.send_chat_request(request, model_id="gemma").choices[0].message.content == other


def resident() -> int:
    """Bytes of this process's memory that are in use, without the pages of mapped files."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024
