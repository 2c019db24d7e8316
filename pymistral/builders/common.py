"""What all builders share: the options, and the way from a model id to a running model."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import logging
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..agents.mcp_config import McpClientConfig, checked_mcp_config
from ..errors import ModelLoadError, RequestValidationError
from ..garbage import rare_collections
from ..quantization.isq import IsqBits, IsqType
from ..quantization.topology import Topology
from ..requests import Tool
from ..requests.web_search import SearchCallback
from ..tool_rounds import DEFAULT_TOOL_TIMEOUT, Toolbox
from .device import Device, ModelDType
from .paged_attn import PagedAttentionConfig
from .token_source import TokenSource

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..engine.cuda_runner import CudaRunner
    from ..engine.runner import CpuRunner
    from ..engine.speculative import Speculation
    from ..kernels.cpu.compiler import Progress
    from ..loading.checkpoint import Checkpoint, GgufLoader
    from ..loading.huggingface import FolderLoader
    from ..model import Model
    from ..nn.cuda_devices import CudaDevice
    from ..nn.graph import Graph
    from ..quantization.types import Tensor
    from ..responses import CalledFunction

_log = logging.getLogger("pymistral")


@dataclass(kw_only=True, eq=False)
class ModelOptions:
    """The options that all builders share: each is a keyword of the constructor and a method.

    Parameters
    ----------
    chat_template
        A Jinja template, or the path of a ``.json`` or ``.jinja`` file that holds one; used instead of the model's own.
    jinja_explicit
        The path of a ``.jinja`` file; goes before every other template.
    device
        Where to compute: `Device` or its string. None: the first GPU if there is one and the extra for it is installed, else the CPU.
    dtype
        The floats of weights that are not quantised: `ModelDType` or its string.
    force_cpu
        Stay on the CPU, even where a GPU is available.
    hf_cache_path
        Where files from Hugging Face are kept. None: its usual cache.
    hf_revision
        Branch, tag or commit of the Hugging Face repository.
    isq
        Quantise the weights when they are loaded: an `IsqType` or its plain value, or a number of bits, for which the type that is fast and
        accurate here is chosen.
    logging
        Log what happens to standard error.
    max_num_seqs
        How many sequences run at once; more wait.
    mcp_client
        MCP servers whose tools the model may call.
    paged_attn
        Block size, memory and type of the KV cache, from `PagedAttentionMetaBuilder`. None: what suits the machine.
    prefix_cache_n
        How many sequences the prefix cache may keep; None or 0 turns it off.
    search
        Let requests that have web search options search the web.
    search_callback
        What searches, instead of DuckDuckGo: see `with_search_callback`.
    search_private
        Let web search read pages on this machine and the local network.
    threads
        Threads that compute. None: one per physical core.
    throughput_logging
        Log tokens per second while the engine works.
    token_source
        Where the token for Hugging Face comes from: a `TokenSource` or its plain string.
    topology
        Types of quantisation for some layers; they go before ``isq``.
    tool_callbacks
        What is called when the model calls a tool, by the tool's name: see `with_tool_callback`.
    """

    chat_template: str | None = None
    jinja_explicit: str | os.PathLike[str] | None = None
    device: Device | str | None = None
    dtype: ModelDType | str = ModelDType.AUTO
    force_cpu: bool = False
    hf_cache_path: str | os.PathLike[str] | None = None
    hf_revision: str | None = None
    isq: IsqType | IsqBits | str | int | None = None
    logging: bool = False
    max_num_seqs: int = 32
    mcp_client: McpClientConfig | None = None
    paged_attn: PagedAttentionConfig | None = None
    prefix_cache_n: int | None = 16
    search: bool = False
    search_callback: SearchCallback | None = None
    search_private: bool = False
    threads: int | None = None
    throughput_logging: bool = False
    token_source: str = "cache"
    topology: Topology | None = None
    tool_callbacks: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_count("max_num_seqs", self.max_num_seqs, at_least=1)
        if self.prefix_cache_n is not None:
            _check_count("prefix_cache_n", self.prefix_cache_n, at_least=0)
        if self.threads is not None:
            _check_count("threads", self.threads, at_least=1)
        if self.paged_attn is not None and not isinstance(self.paged_attn, PagedAttentionConfig):
            raise ModelLoadError(f"paged_attn must be what PagedAttentionMetaBuilder().build() returns, got {self.paged_attn!r}")
        if self.device is not None:
            self.device = Device.parse(self.device)
        self.dtype = ModelDType(self.dtype)
        self.token_source = TokenSource(self.token_source)
        if self.isq is not None:
            self.isq = IsqType.of(self.isq)
        if self.topology is not None and not isinstance(self.topology, Topology):
            raise ModelLoadError(f"topology must be a Topology, got {self.topology!r:.80}; with_topology_from_path takes a file")
        if self.mcp_client is not None:
            self.mcp_client = checked_mcp_config(self.mcp_client)
        if self.search_callback is not None and not callable(self.search_callback):
            raise ModelLoadError(f"search_callback must be a function of SearchFunctionParameters, got {self.search_callback!r}")
        if self.tool_callbacks:
            from ..agents.tool import tool_callback

            self.tool_callbacks = {name: tool_callback(callback) for name, callback in self.tool_callbacks.items()}

    def with_chat_template(self, chat_template: str) -> Self:
        """Use this Jinja template, or the one in this ``.json`` or ``.jinja`` file, instead of the model's own."""
        return self._set("chat_template", chat_template)

    def with_jinja_explicit(self, jinja_explicit: str | os.PathLike[str]) -> Self:
        """Use the template in this ``.jinja`` file before every other."""
        return self._set("jinja_explicit", jinja_explicit)

    def with_device(self, device: Device | str | None) -> Self:
        """Compute here. Building the model fails, and says what is missing, if that cannot be."""
        return self._set("device", device)

    def with_dtype(self, dtype: ModelDType | str) -> Self:
        """Keep and multiply weights that are not quantised in these floats."""
        return self._set("dtype", dtype)

    def with_force_cpu(self, force_cpu: bool = True) -> Self:
        """Stay on the CPU, even where a GPU is available."""
        return self._set("force_cpu", force_cpu)

    def from_hf_cache_path(self, hf_cache_path: str | os.PathLike[str]) -> Self:
        """Keep files from Hugging Face here."""
        return self._set("hf_cache_path", hf_cache_path)

    def with_hf_revision(self, hf_revision: str) -> Self:
        """Take this branch, tag or commit of the Hugging Face repository."""
        return self._set("hf_revision", hf_revision)

    def with_isq(self, isq: IsqType | IsqBits | str | int | None) -> Self:
        """Quantise the weights to this type when they are loaded."""
        return self._set("isq", isq)

    def with_auto_isq(self, bits: IsqBits | int) -> Self:
        """Quantise the weights to 2, 3, 4, 5, 6 or 8 bits: the type of that width that is fast and accurate here is chosen."""
        return self._set("isq", IsqBits(bits))

    def with_logging(self, logging: bool = True) -> Self:
        """Log what happens to standard error."""
        return self._set("logging", logging)

    def with_max_num_seqs(self, max_num_seqs: int) -> Self:
        """Run this many sequences at once; more wait."""
        return self._set("max_num_seqs", max_num_seqs)

    def with_paged_attn(self, paged_attn: PagedAttentionConfig) -> Self:
        """Set the block size, the memory and the type of the KV cache."""
        return self._set("paged_attn", paged_attn)

    def with_prefix_cache_n(self, prefix_cache_n: int | None) -> Self:
        """Let the prefix cache keep this many sequences; None or 0 turns it off."""
        return self._set("prefix_cache_n", prefix_cache_n)

    def with_threads(self, threads: int | None) -> Self:
        """Compute on this many threads."""
        return self._set("threads", threads)

    def with_throughput_logging(self, throughput_logging: bool = True) -> Self:
        """Log tokens per second while the engine works."""
        return self._set("throughput_logging", throughput_logging)

    def with_token_source(self, token_source: str) -> Self:
        """Take the token for Hugging Face from here: a `TokenSource` or its plain string."""
        return self._set("token_source", token_source)

    def with_topology(self, topology: Topology | None) -> Self:
        """Quantise some layers as this says, whatever ``isq`` is."""
        return self._set("topology", topology)

    def with_topology_from_path(self, path: str | os.PathLike[str]) -> Self:
        """Quantise some layers as this file of YAML says: see `Topology`."""
        return self._set("topology", Topology.from_path(path))

    def with_mcp_client(self, mcp_client: McpClientConfig) -> Self:
        """Connect to MCP servers, and let the model call their tools. They are connected as long as the model lives."""
        return self._set("mcp_client", mcp_client)

    def with_tool_callback(
        self, name: str, callback: Callable[[CalledFunction], Any], *, timeout: float | None = DEFAULT_TOOL_TIMEOUT
    ) -> Self:
        """Call this function when the model calls a tool of this name, and let the model go on with the result.

        Requests that want the tool list it with `RequestBuilder.set_tools`.

        Parameters
        ----------
        name
            The tool's name.
        callback
            A function that takes the `CalledFunction` (name, and arguments as JSON text), or one with ``@tool``; async or not. It returns
            text, or what has a JSON form. What it raises goes to the model as a message.
        timeout
            Seconds after which the model is told that it took too long; None for no limit.
        """
        return self._add_callback(name, callback, None, timeout)

    def with_tool_callback_and_tool(
        self, name: str, callback: Callable[[CalledFunction], Any], tool: Tool, *, timeout: float | None = DEFAULT_TOOL_TIMEOUT
    ) -> Self:
        """As `with_tool_callback`; the model is told of the tool in every request."""
        if not isinstance(tool, Tool) or tool.function.name != name:
            raise RequestValidationError(f"with_tool_callback_and_tool({name!r}, ...) takes the Tool of that name, got {tool!r}")
        return self._add_callback(name, callback, tool, timeout)

    def with_search(self, search: bool = True) -> Self:
        """Let requests that have `RequestBuilder.with_web_search_options` search the web. Needs the extra ``search``.

        DuckDuckGo is asked, the pages that it finds are fetched, and what of their text answers the query best, by BM25, goes to the model.
        """
        return self._set("search", search)

    def with_search_callback(self, search_callback: SearchCallback) -> Self:
        """Search with this function instead of DuckDuckGo; `with_search` is then implied.

        Parameters
        ----------
        search_callback
            Takes `SearchFunctionParameters`, gives `SearchResult` objects with their contents, the best first; async or not.
        """
        return self._set("search_callback", search_callback)

    def with_search_private(self, search_private: bool = True) -> Self:
        """Let web search read pages on this machine and the local network: refused otherwise, for a model's URLs may come from anyone."""
        return self._set("search_private", search_private)

    def _add_callback(self, name: str, callback: Any, tool: Tool | None, timeout: float | None) -> Self:
        from ..agents.tool import tool_callback

        if not isinstance(name, str) or not name:
            raise RequestValidationError(f"a tool callback goes with the name of its tool, got {name!r} for a name")
        return self._set("tool_callbacks", {**self.tool_callbacks, name: tool_callback(callback, tool, timeout)})

    def _set(self, option: str, value: object) -> Self:
        before = getattr(self, option)
        setattr(self, option, value)
        try:
            self.__post_init__()
        except ModelLoadError:
            setattr(self, option, before)
            raise
        return self


class Buildable(ABC):
    """What every builder can do."""

    @abstractmethod
    def _name(self) -> str:
        """The id of the model, unless it is given another."""

    @abstractmethod
    def _load(self) -> Model:
        """Load the model here and now."""

    def load(self) -> Model:
        """As `build`, for code without an event loop: blocks until the model is loaded."""
        with rare_collections():
            model = self._load()
        model._built_by(self)
        return model

    async def build(self) -> Model:
        """Find, fetch and load the model, in a thread of its own.

        If the task that awaits is cancelled, what was being loaded is closed as soon as it is complete.

        Raises
        ------
        ModelLoadError
            The model cannot be found, fetched, parsed or built.
        """
        loading: concurrent.futures.Future[Model] = concurrent.futures.Future()
        loading.set_running_or_notify_cancel()
        threading.Thread(target=_load_into, args=(loading, self), name="pymistral-load", daemon=True).start()
        try:
            return await asyncio.wrap_future(loading)
        except asyncio.CancelledError:
            loading.add_done_callback(_close_unwanted)
            raise


@dataclass(kw_only=True, eq=False)
class Builder(ModelOptions, Buildable):
    """A builder of one model from one model id."""

    def _source(self) -> tuple[str, list[str] | None]:
        """The model id, and the files wanted of it (None: whatever it is made of)."""
        raise TypeError(f"{type(self).__name__} names no model")

    def _name(self) -> str:
        return self._source()[0]

    def _load(self) -> Model:
        return load_model(self)


def load_model(builder: Builder, speculation: Callable[[Checkpoint, CpuRunner | CudaRunner], Speculation] | None = None) -> Model:
    """The model that a builder describes, with its tools.

    ``speculation`` makes what guesses tokens ahead for the model, once that is loaded.
    """
    toolbox = Toolbox(builder.tool_callbacks)
    toolbox.searches = builder.search or builder.search_callback is not None
    try:
        if toolbox.searches:
            from ..agents.web_pages import require_search_extra

            require_search_extra()
        if builder.mcp_client is not None:
            from ..agents.mcp import connect

            connect(builder.mcp_client, toolbox)
        return _load_model(builder, toolbox, speculation)
    except BaseException:
        toolbox.close()
        raise


def _load_model(
    builder: Builder, toolbox: Toolbox, speculation: Callable[[Checkpoint, CpuRunner | CudaRunner], Speculation] | None = None
) -> Model:
    """Model id -> files -> checkpoint -> runner -> engine -> model: with `load_runner`, all that knows the whole chain."""
    from ..engine import Engine
    from ..model import Model

    template = given_chat_template(builder)  # a file that cannot be read is told before the work begins
    checkpoint, runner, requantized = load_runner(builder)
    model_id, _ = builder._source()
    engine = Engine(
        runner,
        checkpoint.tokenizer,
        eos_token_ids=checkpoint.eos_token_ids,
        max_num_seqs=builder.max_num_seqs,
        prefix_cache_n=builder.prefix_cache_n or 0,
        name=model_id,
        throughput_logging=builder.throughput_logging,
        speculation=speculation(checkpoint, runner) if speculation else None,
    )
    if toolbox.searches:
        from ..agents.web_search import WebSearch

        web_search = WebSearch(
            builder.search_callback,
            allow_private=builder.search_private,
            count_tokens=lambda text: len(checkpoint.tokenizer.encode(text, add_special_tokens=False)),
            context=engine.max_sequence_length,
        )
        toolbox.sources.append(web_search.tools)

    def requantize(isq: IsqType) -> None:
        use = requantized(isq)
        engine.call(lambda _: use(), clear_cache=True).result()

    return Model(
        engine,
        checkpoint.tokenizer,
        model_id=model_id,
        config=checkpoint.config,
        chat_template=checkpoint.chat_template if template is None else template,
        generation_config=checkpoint.generation_config,
        requantize=requantize,
        toolbox=toolbox,
    )


class Loaded(NamedTuple):
    """A model that an engine can run; and what quantises its weights anew, and returns what puts these to use between two steps."""

    checkpoint: Checkpoint
    runner: CpuRunner | CudaRunner
    requantized: Callable[[IsqType], Callable[[], None]]


def load_runner(builder: Builder) -> Loaded:
    """Model id -> files -> checkpoint -> runner."""
    from ..engine.runner import CpuRunner
    from ..kernels.cpu.compiler import prepare_kernels
    from ..kernels.cpu.isa import current_isa
    from ..loading.hub import resolve
    from ..loading.progress import counting_bar
    from ..models.registry import build_model
    from ..nn import record
    from ..nn.pool import EXECUTOR_KERNELS, available_threads
    from ..nn.sampling import SAMPLING_KERNEL
    from ..quantization.floats import matrices_as
    from ..quantization.plan import apply_isq
    from ..quantization.types import GgmlType

    if builder.logging or builder.throughput_logging:
        _log_to_stderr()
    try:
        current_isa()
        threads = builder.threads or available_threads()
    except ValueError as error:  # of PYMISTRAL_ISA or PYMISTRAL_THREADS
        raise ModelLoadError(str(error)) from error
    device, dtype = choose_device(builder), ModelDType(builder.dtype)
    if device is None:  # the first time children compile these while the file is fetched and read
        prepare_kernels([*EXECUTOR_KERNELS, SAMPLING_KERNEL])
    model_id, files = builder._source()
    path = resolve(
        model_id,
        files=files,
        revision=builder.hf_revision,
        token=builder.token_source,
        cache_dir=builder.hf_cache_path,
    )
    loader = open_checkpoint(path, files)
    config, weights = loader.config_and_weights()
    _log.info("%s: read %s", model_id, path)

    def graph_of(weights: dict[str, Tensor], isq: IsqType | None) -> Graph:
        if dtype != ModelDType.AUTO:
            weights = matrices_as(weights, GgmlType[dtype.name])
        return record(build_model(config, apply_isq(weights, isq, builder.topology)))

    graph = graph_of(weights, None if builder.isq is None else IsqType.of(builder.isq))
    with counting_bar("compiling kernels for this CPU (once)") as progress:
        runner = make_runner(builder, graph, device, int(config["max_position_embeddings"]), threads, progress)
    packing = runner.packing if isinstance(runner, CpuRunner) else None
    try:
        checkpoint = loader.checkpoint(config, weights)  # while the weights are packed
        if packing:
            packing.wait()
    except BaseException:
        if packing:
            packing.stop()
        raise

    def requantized(isq: IsqType) -> Callable[[], None]:
        """The weights come from the file again: what is in memory has been rounded once."""
        if not isinstance(runner, CpuRunner):
            raise ModelLoadError("weights are quantised anew on the CPU only; this model runs on a GPU")
        _, weights = open_checkpoint(path, files).config_and_weights()
        programs = runner.compile(graph_of(weights, isq))
        return lambda: runner.use(programs)

    return Loaded(checkpoint, runner, requantized)


def choose_device(options: ModelOptions) -> CudaDevice | None:
    """The GPU to use; None: the CPU.

    Raises
    ------
    ModelLoadError
        A GPU was asked for, and something that it takes is missing.
    """
    from ..nn.cuda_devices import cuda_device, default_cuda_device

    if options.device is None:
        return None if options.force_cpu else default_cuda_device()
    device = Device.parse(options.device)
    if device.kind == "cpu":
        return None
    if options.force_cpu:
        raise ModelLoadError(f"with_force_cpu and with_device({device}) contradict each other: drop one of them")
    return cuda_device(device.index)


def make_runner(
    options: ModelOptions, graph: Graph, device: CudaDevice | None, max_positions: int, threads: int, progress: Progress | None
) -> CpuRunner | CudaRunner:
    """The recorded model on its device, with a KV cache of the size that was asked for."""
    from ..engine.runner import CpuRunner, cache_token_bytes
    from ..kernels.cpu.geometry import usual_cache_type

    paged_attn = options.paged_attn
    block_size = paged_attn.block_size if paged_attn else None
    cache_type = paged_attn.cache_type.value if paged_attn else "auto"
    token_bytes = cache_token_bytes(graph, cache_type, "bf16" if device else usual_cache_type()) if paged_attn else 0
    if device is None:
        return CpuRunner(
            graph,
            max_position_embeddings=max_positions,
            threads=threads,
            max_num_seqs=options.max_num_seqs,
            block_size=block_size,
            cache_tokens=paged_attn.tokens(token_bytes) if paged_attn else None,
            cache_type=cache_type,
            progress=progress,
        )
    from ..engine.cuda_runner import CudaRunner, free_after_weights
    from ..nn.cuda_gpu import Gpu

    _log.info("computing on CUDA device %d, %s", device.index, device.name)
    gpu = Gpu(device.index)
    free = free_after_weights(graph, gpu)
    return CudaRunner(
        graph,
        gpu,
        max_position_embeddings=max_positions,
        max_num_seqs=options.max_num_seqs,
        block_size=block_size,
        cache_tokens=paged_attn.tokens(token_bytes, free) if paged_attn else None,
        cache_type=cache_type,
        progress=progress,
    )


def given_chat_template(builder: ModelOptions) -> str | None:
    """The chat template that the builder gives in place of the model's own, if it does."""
    if builder.jinja_explicit is not None:
        return _read(Path(builder.jinja_explicit), "jinja_explicit")
    template = builder.chat_template
    if template is None:
        return None
    if template.endswith(".jinja"):
        return _read(Path(template), "chat_template")
    if not template.endswith(".json"):
        return template
    try:
        source = json.loads(_read(Path(template), "chat_template"))["chat_template"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelLoadError(f"chat_template: {template} is not a JSON object with a 'chat_template'") from error
    if not isinstance(source, str):
        raise ModelLoadError(f"chat_template: 'chat_template' in {template} must be a string, got {type(source).__name__}")
    return source


def open_checkpoint(path: Path, files: list[str] | None) -> GgufLoader | FolderLoader:
    """What reads a file; or a folder, of which ``files`` may name the GGUF files wanted."""
    from ..loading.checkpoint import GgufLoader
    from ..loading.hub import choose_gguf

    if not path.is_dir():
        return GgufLoader(path)
    if names := files or choose_gguf(str(path), sorted(file.name for file in path.iterdir())):
        return GgufLoader(path / names[0])
    from ..loading.huggingface import FolderLoader

    return FolderLoader(path)


def _read(path: Path, option: str) -> str:
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"{option}: cannot read {path}: {error}") from error


def _check_count(option: str, value: object, *, at_least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ModelLoadError(f"{option} must be a whole number of at least {at_least}, got {value!r}")


def _load_into(loading: concurrent.futures.Future[Model], builder: Buildable) -> None:
    try:
        loading.set_result(builder.load())
    except BaseException as error:
        loading.set_exception(error)


def _close_unwanted(loading: concurrent.futures.Future[Model]) -> None:
    if loading.exception() is None:
        loading.result().close_now()


def _log_to_stderr() -> None:
    """Show the package's log, unless the application has set up logging itself."""
    _log.setLevel(logging.INFO)
    if not _log.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        _log.addHandler(handler)
