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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ModelLoadError
from .paged_attn import PagedAttentionConfig
from .token_source import TokenSource

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..engine.runner import CpuRunner
    from ..engine.speculative import Speculation
    from ..loading.checkpoint import Checkpoint
    from ..model import Model

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
    force_cpu
        Stay on the CPU, even where a GPU is available.
    hf_cache_path
        Where files from Hugging Face are kept. None: its usual cache.
    hf_revision
        Branch, tag or commit of the Hugging Face repository.
    logging
        Log what happens to standard error.
    max_num_seqs
        How many sequences run at once; more wait.
    paged_attn
        Block size and memory of the KV cache, from `PagedAttentionMetaBuilder`. None: what suits the machine.
    prefix_cache_n
        How many sequences the prefix cache may keep; None or 0 turns it off.
    threads
        Threads that compute. None: one per physical core.
    throughput_logging
        Log tokens per second while the engine works.
    token_source
        Where the token for Hugging Face comes from: a `TokenSource` or its plain string.
    """

    chat_template: str | None = None
    jinja_explicit: str | os.PathLike[str] | None = None
    force_cpu: bool = False
    hf_cache_path: str | os.PathLike[str] | None = None
    hf_revision: str | None = None
    logging: bool = False
    max_num_seqs: int = 32
    paged_attn: PagedAttentionConfig | None = None
    prefix_cache_n: int | None = 16
    threads: int | None = None
    throughput_logging: bool = False
    token_source: str = "cache"

    def __post_init__(self) -> None:
        _check_count("max_num_seqs", self.max_num_seqs, at_least=1)
        if self.prefix_cache_n is not None:
            _check_count("prefix_cache_n", self.prefix_cache_n, at_least=0)
        if self.threads is not None:
            _check_count("threads", self.threads, at_least=1)
        if self.paged_attn is not None and not isinstance(self.paged_attn, PagedAttentionConfig):
            raise ModelLoadError(f"paged_attn must be what PagedAttentionMetaBuilder().build() returns, got {self.paged_attn!r}")
        self.token_source = TokenSource(self.token_source)

    def with_chat_template(self, chat_template: str) -> Self:
        """Use this Jinja template, or the one in this ``.json`` or ``.jinja`` file, instead of the model's own."""
        return self._set("chat_template", chat_template)

    def with_jinja_explicit(self, jinja_explicit: str | os.PathLike[str]) -> Self:
        """Use the template in this ``.jinja`` file before every other."""
        return self._set("jinja_explicit", jinja_explicit)

    def with_force_cpu(self, force_cpu: bool = True) -> Self:
        """Stay on the CPU, even where a GPU is available."""
        return self._set("force_cpu", force_cpu)

    def from_hf_cache_path(self, hf_cache_path: str | os.PathLike[str]) -> Self:
        """Keep files from Hugging Face here."""
        return self._set("hf_cache_path", hf_cache_path)

    def with_hf_revision(self, hf_revision: str) -> Self:
        """Take this branch, tag or commit of the Hugging Face repository."""
        return self._set("hf_revision", hf_revision)

    def with_logging(self, logging: bool = True) -> Self:
        """Log what happens to standard error."""
        return self._set("logging", logging)

    def with_max_num_seqs(self, max_num_seqs: int) -> Self:
        """Run this many sequences at once; more wait."""
        return self._set("max_num_seqs", max_num_seqs)

    def with_paged_attn(self, paged_attn: PagedAttentionConfig) -> Self:
        """Set the block size and the memory of the KV cache."""
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


def load_model(builder: Builder, speculation: Callable[[Checkpoint, CpuRunner], Speculation] | None = None) -> Model:
    """Model id -> files -> checkpoint -> runner -> engine -> model: with `load_runner`, all that knows the whole chain.

    ``speculation`` makes what guesses tokens ahead for the model, once that is loaded.
    """
    from ..engine import Engine
    from ..model import Model

    checkpoint, runner = load_runner(builder)
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
    return Model(
        engine,
        checkpoint.tokenizer,
        model_id=model_id,
        config=checkpoint.config,
        chat_template=chat_template_source(builder, checkpoint),
        generation_config=checkpoint.generation_config,
    )


def load_runner(builder: Builder) -> tuple[Checkpoint, CpuRunner]:
    """Model id -> files -> checkpoint -> runner."""
    from ..engine.runner import CpuRunner, cache_token_bytes
    from ..kernels.cpu.isa import current_isa
    from ..loading.hub import resolve
    from ..loading.progress import counting_bar
    from ..models.registry import build_model
    from ..nn import record
    from ..nn.pool import available_threads

    if builder.logging or builder.throughput_logging:
        _log_to_stderr()
    try:
        current_isa()
        threads = builder.threads or available_threads()
    except ValueError as error:  # of PYMISTRAL_ISA or PYMISTRAL_THREADS
        raise ModelLoadError(str(error)) from error
    model_id, files = builder._source()
    path = resolve(
        model_id,
        files=files,
        revision=builder.hf_revision,
        token=builder.token_source,
        cache_dir=builder.hf_cache_path,
    )
    checkpoint = load_checkpoint(path, files)
    _log.info("%s: read %s", model_id, path)
    chat_template_source(builder, checkpoint)  # a file that cannot be read is told before the work begins
    graph = record(build_model(checkpoint.config, checkpoint.weights))
    with counting_bar("compiling kernels for this CPU (once)") as progress:
        runner = CpuRunner(
            graph,
            max_position_embeddings=int(checkpoint.config["max_position_embeddings"]),
            threads=threads,
            max_num_seqs=builder.max_num_seqs,
            block_size=builder.paged_attn.block_size if builder.paged_attn else None,
            cache_tokens=builder.paged_attn.tokens(cache_token_bytes(graph)) if builder.paged_attn else None,
            progress=progress,
        )
    return checkpoint, runner


def chat_template_source(builder: ModelOptions, checkpoint: Checkpoint) -> str | None:
    """The chat template to use: the builder's, else the model's own."""
    if builder.jinja_explicit is not None:
        return _read(Path(builder.jinja_explicit), "jinja_explicit")
    template = builder.chat_template
    if template is None:
        return checkpoint.chat_template
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


def load_checkpoint(path: Path, files: list[str] | None) -> Checkpoint:
    """What a file holds; or a folder, of which ``files`` may name the GGUF files wanted."""
    from ..loading.checkpoint import load_gguf
    from ..loading.hub import choose_gguf

    if not path.is_dir():
        return load_gguf(path)
    if names := files or choose_gguf(str(path), sorted(file.name for file in path.iterdir())):
        return load_gguf(path / names[0])
    from ..loading.huggingface import load_folder

    return load_folder(path)


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
