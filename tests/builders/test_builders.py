from __future__ import annotations

import asyncio
import errno
import inspect
import json
import logging
import sys
import threading
import types
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from pymistral import (
    ContextSize,
    Function,
    GgufModelBuilder,
    MbAmount,
    McpClientConfig,
    ModelBuilder,
    PagedAttentionMetaBuilder,
    PagedCacheType,
    TextModelBuilder,
    TokenSource,
    Tool,
    Topology,
    Utilization,
    tool,
)
from pymistral.builders import common, load
from pymistral.errors import ModelLoadError, RequestValidationError

sys.path.insert(0, str(Path(__file__).parents[1]))
from fake_model import ALPHABET, EOS, TEMPLATE, AlphabetRunner, ByteTokenizer, make_model

BUILDERS = [lambda **o: ModelBuilder("m", **o), lambda **o: TextModelBuilder("m", **o), lambda **o: GgufModelBuilder("m", ["f.gguf"], **o)]
VALUES = {
    "chat_template": "{{ messages }}",
    "jinja_explicit": "x.jinja",
    "device": "cpu",
    "dtype": "bf16",
    "force_cpu": True,
    "hf_cache_path": Path("cache"),
    "hf_revision": "main",
    "isq": "q4k",
    "logging": True,
    "max_num_seqs": 8,
    "mcp_client": McpClientConfig(servers=[{"name": "files", "source": {"type": "Process", "command": "serve"}}]),
    "paged_attn": PagedAttentionMetaBuilder().with_block_size(32).build(),
    "prefix_cache_n": None,
    "search": True,
    "search_private": True,
    "threads": 2,
    "throughput_logging": True,
    "token_source": "none",
    "tokenizer_json": "tokenizer.json",
    "topology": Topology(),
}
SHORTHANDS = {"with_auto_isq", "with_topology_from_path"}  # other ways to set the same


def method_name(option: str) -> str:
    return "from_hf_cache_path" if option == "hf_cache_path" else f"with_{option}"


def test_each_option_is_a_keyword_and_a_method_of_the_same_type() -> None:
    options = {field.name: field for field in fields(common.ModelOptions) if "callback" not in field.name}
    methods = {name for name in vars(common.ModelOptions) if name.startswith(("with_", "from_")) and "callback" not in name} - SHORTHANDS
    assert methods == {method_name(option) for option in options}
    assert options.keys() == VALUES.keys()
    for option, field in options.items():
        method = getattr(common.ModelOptions, method_name(option))
        assert method.__annotations__[option].removesuffix(" | None") == str(field.type).removesuffix(" | None")
        assert method.__annotations__["return"] == "Self"
        assert method.__doc__
        assert f"\n{option}\n" in (inspect.getdoc(common.ModelOptions) or "")


@pytest.mark.parametrize("make", BUILDERS)
def test_keyword_and_method_do_the_same(make: Any) -> None:
    by_keyword, by_method = make(**VALUES), make()
    for option, value in VALUES.items():
        assert getattr(by_method, method_name(option))(value) is by_method
    assert vars(by_keyword) == vars(by_method)


def test_flags_need_no_argument() -> None:
    builder = ModelBuilder("m").with_logging().with_force_cpu().with_throughput_logging()
    assert (builder.logging, builder.force_cpu, builder.throughput_logging) == (True, True, True)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_num_seqs", 0),
        ("max_num_seqs", "8"),
        ("max_num_seqs", True),
        ("threads", 0),
        ("threads", 1.5),
        ("threads", 1025),
        ("chat_template", 5),
        ("jinja_explicit", 5),
        ("tokenizer_json", b"x"),
        ("hf_cache_path", 5),
        ("prefix_cache_n", -1),
        ("paged_attn", 32),
        ("token_source", "secret"),
        ("token_source", None),
        ("mcp_client", "server"),
        ("mcp_client", {5: []}),
        ("search_callback", "no function"),
        ("force_cpu", "no"),
        ("logging", "debug"),
        ("search", 1),
        ("search_private", None),
        ("throughput_logging", "off"),
        ("hf_revision", 5),
    ],
)
def test_a_bad_option_is_named_and_changes_nothing(option: str, value: object) -> None:
    with pytest.raises(ModelLoadError, match=option):
        ModelBuilder("m", **{option: value})  # type: ignore[arg-type]
    builder = ModelBuilder("m")
    before = dict(vars(builder))
    with pytest.raises(ModelLoadError, match=option):
        getattr(builder, method_name(option))(value)
    assert vars(builder) == before


def test_a_token_is_not_shown() -> None:
    assert "hf_123" not in repr(ModelBuilder("m", token_source="literal:hf_123"))
    assert "hf_123" not in repr(ModelBuilder("m").with_token_source(TokenSource.literal("hf_123")))
    with pytest.raises(ModelLoadError) as caught:
        ModelBuilder("m", token_source="hf_123")
    assert "hf_123" not in str(caught.value)
    assert [TokenSource.cache_token(), TokenSource.none(), TokenSource.env_var("A"), TokenSource.path("f")] == [
        "cache",
        "none",
        "env:A",
        "path:f",
    ]


def test_paged_attention() -> None:
    assert PagedAttentionMetaBuilder().build().memory == ContextSize(4096)
    built = PagedAttentionMetaBuilder(block_size=64, gpu_memory=MbAmount(64)).with_gpu_memory(Utilization(0.5)).build()
    assert (built.block_size, built.memory) == (64, Utilization(0.5))
    for bad in (0, 7, "32", 32.0):
        with pytest.raises(ModelLoadError, match="block_size"):
            PagedAttentionMetaBuilder().with_block_size(bad).build()  # type: ignore[arg-type]
    with pytest.raises(ModelLoadError, match="ContextSize"):
        PagedAttentionMetaBuilder().with_gpu_memory(4096).build()  # type: ignore[arg-type]
    for make, value in (
        (ContextSize, 0),
        (MbAmount, -1),
        (Utilization, 0.0),
        (Utilization, float("nan")),
        (Utilization, 2),
        (MbAmount, "1"),
        (ContextSize, True),
        (MbAmount, True),
        (Utilization, True),
    ):
        with pytest.raises(ModelLoadError, match=make.__name__):
            make(value)  # type: ignore[arg-type]


def test_types_of_the_cache() -> None:
    assert PagedAttentionMetaBuilder().build().cache_type is PagedCacheType.AUTO
    for value in ("int8", "INT8", PagedCacheType.INT8):
        by_keyword = PagedAttentionMetaBuilder(paged_cache_type=value).build()
        assert by_keyword == PagedAttentionMetaBuilder().with_paged_cache_type(value).build()
        assert by_keyword.cache_type is PagedCacheType.INT8
    for bad in ("q4_0", "", 8, None):
        with pytest.raises(ModelLoadError, match=r"type must be one of 'auto', 'f32', 'f16', 'bf16', 'int16', 'f8e4m3', 'int8', got"):
            PagedAttentionMetaBuilder().with_paged_cache_type(bad).build()  # type: ignore[arg-type]
    assert PagedAttentionMetaBuilder(gpu_memory=None).build().tokens(100) is None
    assert PagedAttentionMetaBuilder(gpu_memory=MbAmount(1)).build().tokens(100) == 2**20 // 100


@pytest.mark.parametrize("files", [[], "f.gguf", [""], [1]])
def test_gguf_files_are_checked(files: Any) -> None:
    with pytest.raises(ModelLoadError, match="files"):
        GgufModelBuilder("m", files)


def test_type_checkers_see_the_options() -> None:
    for builder in (ModelBuilder, TextModelBuilder, GgufModelBuilder):
        parameters = inspect.signature(builder).parameters
        assert parameters.keys() >= VALUES.keys()
        assert parameters["max_num_seqs"].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters["model_id"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        assert builder.__doc__
    assert get_type_hints(common.ModelOptions)["threads"] == int | None


# ---- the chain ------------------------------------------------------------------------------------


@pytest.fixture
def chain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Everything below the builders, replaced by what records its arguments."""
    seen: dict[str, Any] = {}

    def resolve(model_id: str, **more: Any) -> Path:
        seen["resolve"] = {"model_id": model_id, **more}
        return tmp_path / "model.gguf"

    class Loader:
        def __init__(self, path: Path) -> None:
            seen[type(self).__name__] = path

        def config_and_weights(self) -> Any:
            return {"model_type": "fake", "max_position_embeddings": 64}, {}

        def checkpoint(self, config: Any, weights: Any, tokenizer_json: Path | None) -> Any:
            seen["tokenizer_json"] = tokenizer_json
            return types.SimpleNamespace(
                config=config,
                weights=weights,
                tokenizer=ByteTokenizer(),
                chat_template=TEMPLATE,
                generation_config={"temperature": 0.5},
                eos_token_ids=(EOS,),
            )

    class Runner(AlphabetRunner):
        def __init__(self, graph: Any, *, progress: Any, **more: Any) -> None:
            super().__init__()
            seen["runner"] = more

        @property
        def packing(self) -> Any:
            return types.SimpleNamespace(wait=lambda: seen.update(waited=True), stop=lambda: None)

    for name, functions in (
        ("loading.hub", {"resolve": resolve, "choose_gguf": lambda folder, names: [n for n in names if n.endswith(".gguf")]}),
        ("loading.checkpoint", {"GgufLoader": type("GgufLoader", (Loader,), {})}),
        ("loading.huggingface", {"FolderLoader": type("FolderLoader", (Loader,), {})}),
    ):
        module = types.ModuleType(f"pymistral.{name}")
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, f"pymistral.{name}", module)
    monkeypatch.setattr("pymistral.models.registry.build_model", lambda config, weights: None)
    monkeypatch.setattr("pymistral.nn.record", lambda model: None)
    monkeypatch.setattr("pymistral.engine.runner.CpuRunner", Runner)
    return seen


async def test_build(chain: dict[str, Any], tmp_path: Path) -> None:
    builder = GgufModelBuilder("owner/repo", ["f.gguf"], threads=2, hf_revision="v1", token_source="none", max_num_seqs=4)
    async with await builder.build() as model:
        assert await model.chat("Hi") == ALPHABET
        assert model.generation_defaults.temperature == 0.5
        assert (await model.send_chat_request("Hi")).model == "owner/repo"
    assert chain["resolve"] == {"model_id": "owner/repo", "files": ["f.gguf"], "revision": "v1", "token": "none", "cache_dir": None}
    assert chain["GgufLoader"] == tmp_path / "model.gguf"
    assert chain["waited"]
    assert chain["runner"] == {
        "max_position_embeddings": 64,
        "threads": 2,
        "max_num_seqs": 4,
        "block_size": None,
        "cache_tokens": None,
        "cache_type": "auto",
    }


async def test_a_tokenizer_of_ones_own(chain: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ModelLoadError, match=r"tokenizer_json: there is no file .*tokenizer\.json"):
        await ModelBuilder("m").with_tokenizer_json(path).build()
    assert "resolve" not in chain  # told before anything is fetched
    path.touch()
    await (await ModelBuilder("m").with_tokenizer_json(str(path)).build()).close()
    assert chain["tokenizer_json"] == path


@pytest.mark.parametrize("model_id", [5, None, b"model"])
async def test_what_is_no_model_id(model_id: Any) -> None:
    for make in (ModelBuilder, TextModelBuilder, lambda name: GgufModelBuilder(name, ["f.gguf"])):
        with pytest.raises(ModelLoadError, match="model_id must be a string or a path, got"):
            await make(model_id).build()


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOMEM, "Cannot allocate memory"), OverflowError("Python int too large to convert to C ssize_t")],
)
async def test_too_little_memory(chain: dict[str, Any], monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(load, "make_runner", refuse)
    with pytest.raises(ModelLoadError, match=r"has not so much memory as .* 10000 sequences take.*with_paged_attn"):
        await ModelBuilder("m").with_max_num_seqs(10_000).build()


async def test_a_path_is_a_model_id(chain: dict[str, Any], tmp_path: Path) -> None:
    await (await ModelBuilder(tmp_path / "model.gguf").build()).close()
    assert chain["resolve"]["model_id"] == str(tmp_path / "model.gguf")
    assert chain["resolve"]["files"] is None


async def test_folders(chain: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "model.gguf"  # what the hub's stand-in answers
    folder.mkdir()
    await (await GgufModelBuilder("m", ["b.gguf", "c.gguf"]).build()).close()
    assert chain["GgufLoader"] == folder / "b.gguf"
    await (await ModelBuilder("m").build()).close()
    assert chain["FolderLoader"] == folder
    (folder / "a.gguf").touch()
    await (await ModelBuilder("m").build()).close()
    assert chain["GgufLoader"] == folder / "a.gguf"


async def test_load_errors_come_out_of_build(chain: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ModelLoadError("no such model")

    monkeypatch.setattr(sys.modules["pymistral.loading.hub"], "resolve", fail)
    with pytest.raises(ModelLoadError, match="no such model"):
        await TextModelBuilder("m").build()


async def test_a_cancelled_build_closes_what_it_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    loading, go_on = threading.Event(), threading.Event()
    model = make_model()

    def load(builder: object) -> object:
        loading.set()
        go_on.wait(10)
        return model

    monkeypatch.setattr(common, "load_model", load)
    task = asyncio.create_task(ModelBuilder("m").build())
    await asyncio.to_thread(loading.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go_on.set()
    await asyncio.to_thread(model._engine._thread.join, 10)
    assert not model._engine._thread.is_alive()


async def test_the_loop_stays_free_while_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []

    def load(builder: object) -> object:
        threads.append(threading.current_thread())
        return make_model()

    monkeypatch.setattr(common, "load_model", load)
    await (await ModelBuilder("m").build()).close()
    assert threads[0] is not threading.current_thread()


def test_chat_template_sources(tmp_path: Path) -> None:
    jinja, config, bad = tmp_path / "t.jinja", tmp_path / "t.json", tmp_path / "bad.json"
    jinja.write_text("from jinja")
    config.write_text(json.dumps({"chat_template": "from json"}))
    bad.write_text("[]")

    def source(**options: Any) -> str | None:
        return load.given_chat_template(ModelBuilder("m", **options))

    assert source() is None
    assert source(chat_template="{{ literal }}") == "{{ literal }}"
    assert source(chat_template=str(jinja)) == source(chat_template=jinja) == "from jinja"
    assert source(chat_template=str(config)) == "from json"
    assert source(chat_template="{{ literal }}", jinja_explicit=jinja) == "from jinja"
    with pytest.raises(ModelLoadError, match=r"bad\.json"):
        source(chat_template=str(bad))
    with pytest.raises(ModelLoadError, match="jinja_explicit"):
        source(jinja_explicit=tmp_path / "missing.jinja")
    config.write_text('{"chat_template": 7}')
    with pytest.raises(ModelLoadError, match="string"):
        source(chat_template=str(config))


async def test_with_logging(chain: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("pymistral")
    monkeypatch.setattr(logger, "level", logging.WARNING)
    await (await ModelBuilder("m").with_logging().build()).close()
    assert logger.level == logging.INFO


def test_tool_callbacks_accumulate() -> None:
    @tool
    def add(a: int) -> int:
        """Add one."""
        return a + 1

    builder = ModelBuilder("m", tool_callbacks={"len": len}).with_tool_callback("add", add, timeout=5)
    builder.with_tool_callback_and_tool("other", len, Tool(function=Function(name="other")))
    callbacks = builder.tool_callbacks
    assert list(callbacks) == ["len", "add", "other"]
    assert (callbacks["add"].timeout, callbacks["add"].tool, callbacks["add"].is_async) == (5, None, True)
    assert callbacks["other"].tool is not None
    assert ModelBuilder("m").tool_callbacks == {}
    for wrong in (5, None, [len], {5: len}, {"": len}):
        with pytest.raises(ModelLoadError, match="tool_callbacks must map the names of tools to functions"):
            ModelBuilder("m", tool_callbacks=wrong)  # type: ignore[arg-type]
    with pytest.raises(ModelLoadError, match="takes the path of a file of YAML, got 5"):
        ModelBuilder("m").with_topology_from_path(5)  # type: ignore[arg-type]
    for wrong in (
        lambda: builder.with_tool_callback("x", "no function"),  # type: ignore[arg-type]
        lambda: builder.with_tool_callback("x", len, timeout=-1),
        lambda: builder.with_tool_callback(add, add),  # type: ignore[arg-type]
        lambda: builder.with_tool_callback_and_tool("x", len, add.tool),
    ):
        with pytest.raises(RequestValidationError):
            wrong()
    assert builder.tool_callbacks == callbacks


def test_what_a_model_refuses_names_it_and_leaves_no_engine(chain: dict[str, Any]) -> None:
    with pytest.raises(ModelLoadError, match=r"^owner/refused: the chat template has an error in line 1"):
        ModelBuilder("owner/refused", chat_template="{% if %}").load()
    assert not [thread for thread in threading.enumerate() if thread.name == "pymistral-engine-owner/refused"]
