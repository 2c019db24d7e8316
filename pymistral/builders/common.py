"""What all builders share: the options."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..agents.mcp_config import McpClientConfig, checked_mcp_config
from ..errors import ModelLoadError, RequestValidationError
from ..garbage import rare_collections
from ..quantization.isq import IsqBits, IsqType
from ..quantization.topology import Topology
from ..requests import Tool
from ..requests.web_search import SearchCallback
from ..tool_rounds import DEFAULT_TOOL_TIMEOUT
from .device import Device, ModelDType
from .load import load_model
from .paged_attn import PagedAttentionConfig
from .token_source import TokenSource

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..model import Model
    from ..responses import CalledFunction


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
        None or 0 turns the prefix cache off. With any other number it keeps what memory nobody else needs, which is no count of sequences.
    search
        Let requests that have web search options search the web.
    search_callback
        What searches, instead of DuckDuckGo: see `with_search_callback`.
    search_private
        Let web search read pages on this machine and the local network.
    threads
        Threads that compute. None: one for each core that the process may use, or ``PYMISTRAL_THREADS``.
    throughput_logging
        Log tokens per second while the engine works.
    tokenizer_json
        The path of a ``tokenizer.json``; used instead of the model's own tokenizer.
    token_source
        Where the token for Hugging Face comes from: a `TokenSource` or its plain string.
    topology
        Types of quantisation for some layers; they go before ``isq``.
    tool_callbacks
        What is called when the model calls a tool, by the tool's name: see `with_tool_callback`.
    """

    chat_template: str | os.PathLike[str] | None = None
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
    tokenizer_json: str | os.PathLike[str] | None = None
    token_source: str = "cache"
    topology: Topology | None = None
    tool_callbacks: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_count("max_num_seqs", self.max_num_seqs, at_least=1)
        if self.prefix_cache_n is not None:
            _check_count("prefix_cache_n", self.prefix_cache_n, at_least=0)
        if self.threads is not None:
            _check_count("threads", self.threads, at_least=1, at_most=1024)  # as PYMISTRAL_THREADS
        for option in ("force_cpu", "logging", "search", "search_private", "throughput_logging"):
            if not isinstance(flag := getattr(self, option), bool):  # "no" would count as true
                raise ModelLoadError(f"{option} must be True or False, got {flag!r}")
        if self.hf_revision is not None and not isinstance(self.hf_revision, str):
            raise ModelLoadError(f"hf_revision must be the name of a branch, a tag or a commit, got {self.hf_revision!r}")
        if isinstance(self.chat_template, os.PathLike):
            self.chat_template = os.fspath(self.chat_template)
        if self.chat_template is not None and not isinstance(self.chat_template, str):
            raise ModelLoadError(f"chat_template must be a Jinja template or the path of one, got {self.chat_template!r}")
        for option in ("jinja_explicit", "tokenizer_json", "hf_cache_path"):
            if (path := getattr(self, option)) is not None and not isinstance(path, str | os.PathLike):
                raise ModelLoadError(f"{option} must be a path, got {path!r}")
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
        if not isinstance(self.tool_callbacks, Mapping) or not all(isinstance(name, str) and name for name in self.tool_callbacks):
            raise ModelLoadError(f"tool_callbacks must map the names of tools to functions, got {self.tool_callbacks!r}")
        if self.tool_callbacks:
            from ..agents.tool import tool_callback

            self.tool_callbacks = {name: tool_callback(callback) for name, callback in self.tool_callbacks.items()}

    def with_chat_template(self, chat_template: str | os.PathLike[str]) -> Self:
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
        """Turn the prefix cache off with None or 0, or on with any other number: it keeps what memory nobody else needs."""
        return self._set("prefix_cache_n", prefix_cache_n)

    def with_threads(self, threads: int | None) -> Self:
        """Compute on this many threads."""
        return self._set("threads", threads)

    def with_throughput_logging(self, throughput_logging: bool = True) -> Self:
        """Log tokens per second while the engine works."""
        return self._set("throughput_logging", throughput_logging)

    def with_tokenizer_json(self, tokenizer_json: str | os.PathLike[str]) -> Self:
        """Use the tokenizer in this file instead of the model's own; what a ``tokenizer_config.json`` beside it says counts, too."""
        return self._set("tokenizer_json", tokenizer_json)

    def with_token_source(self, token_source: str) -> Self:
        """Take the token for Hugging Face from here: a `TokenSource` or its plain string."""
        return self._set("token_source", token_source)

    def with_topology(self, topology: Topology | None) -> Self:
        """Quantise some layers as this says, whatever ``isq`` is."""
        return self._set("topology", topology)

    def with_topology_from_path(self, path: str | os.PathLike[str]) -> Self:
        """Quantise some layers as this file of YAML says: see `Topology`."""
        if not isinstance(path, str | os.PathLike):
            raise ModelLoadError(f"with_topology_from_path takes the path of a file of YAML, got {path!r}")
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


def model_name(model_id: str | os.PathLike[str]) -> str:
    """Raises ModelLoadError if it is neither a string nor a path."""
    if not isinstance(model_id, str | os.PathLike) or not isinstance(name := os.fspath(model_id), str):
        raise ModelLoadError(f"model_id must be a string or a path, got {model_id!r}")
    return name


def _check_count(option: str, value: object, *, at_least: int, at_most: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least or (at_most is not None and value > at_most):
        limits = f"of at least {at_least}" if at_most is None else f"from {at_least} to {at_most}"
        raise ModelLoadError(f"{option} must be a whole number {limits}, got {value!r}")


def _load_into(loading: concurrent.futures.Future[Model], builder: Buildable) -> None:
    try:
        loading.set_result(builder.load())
    except BaseException as error:
        loading.set_exception(error)


def _close_unwanted(loading: concurrent.futures.Future[Model]) -> None:
    if loading.exception() is None:
        loading.result().close_now()
