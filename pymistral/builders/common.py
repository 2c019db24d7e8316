"""What all builders share: the options, and the way from a model id to a running model."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ModelLoadError
from .device import Device, ModelDType
from .paged_attn import PagedAttentionConfig
from .token_source import TokenSource

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..engine.cuda_runner import CudaRunner
    from ..engine.runner import CpuRunner
    from ..kernels.cpu.compiler import Progress
    from ..loading.checkpoint import Checkpoint
    from ..model import Model
    from ..nn.cuda_devices import CudaDevice
    from ..nn.graph import Graph

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
    device: Device | str | None = None
    dtype: ModelDType | str = ModelDType.AUTO
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
        if self.device is not None:
            self.device = Device.parse(self.device)
        self.dtype = ModelDType.parse(self.dtype)
        self.token_source = TokenSource(self.token_source)

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


@dataclass(kw_only=True, eq=False)
class Builder(ModelOptions):
    """A builder of one model from one model id."""

    def _source(self) -> tuple[str, list[str] | None]:
        """The model id, and the files wanted of it (None: whatever it is made of)."""
        raise TypeError(f"{type(self).__name__} names no model")

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


def load_model(builder: Builder) -> Model:
    """Model id -> files -> checkpoint -> runner -> engine -> model. The one place that knows the whole chain."""
    from ..engine import Engine
    from ..kernels.cpu.isa import current_isa
    from ..loading.hub import resolve
    from ..loading.progress import counting_bar
    from ..model import Model
    from ..models.registry import build_model
    from ..nn import record
    from ..nn.pool import available_threads
    from ..quantization.floats import matrices_as
    from ..quantization.types import GgmlType

    if builder.logging or builder.throughput_logging:
        _log_to_stderr()
    try:
        current_isa()
        threads = builder.threads or available_threads()
    except ValueError as error:  # of PYMISTRAL_ISA or PYMISTRAL_THREADS
        raise ModelLoadError(str(error)) from error
    device, dtype = choose_device(builder), ModelDType.parse(builder.dtype)
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
    chat_template = chat_template_source(builder, checkpoint)
    weights = matrices_as(checkpoint.weights, GgmlType[dtype.name]) if dtype != ModelDType.AUTO else checkpoint.weights
    graph = record(build_model(checkpoint.config, weights))
    max_positions = int(checkpoint.config["max_position_embeddings"])
    with counting_bar("compiling kernels for this CPU (once)") as progress:
        runner = make_runner(builder, graph, device, max_positions, threads, progress)
    engine = Engine(
        runner,
        checkpoint.tokenizer,
        eos_token_ids=checkpoint.eos_token_ids,
        max_num_seqs=builder.max_num_seqs,
        prefix_cache_n=builder.prefix_cache_n or 0,
        name=model_id,
        throughput_logging=builder.throughput_logging,
    )
    return Model(
        engine,
        checkpoint.tokenizer,
        model_id=model_id,
        config=checkpoint.config,
        chat_template=chat_template,
        generation_config=checkpoint.generation_config,
    )


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

    block_size = options.paged_attn.block_size if options.paged_attn else None
    if device is None:
        return CpuRunner(
            graph,
            max_position_embeddings=max_positions,
            threads=threads,
            max_num_seqs=options.max_num_seqs,
            block_size=block_size,
            cache_tokens=options.paged_attn.tokens(cache_token_bytes(graph)) if options.paged_attn else None,
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
        cache_tokens=options.paged_attn.tokens(cache_token_bytes(graph), free) if options.paged_attn else None,
        progress=progress,
    )


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


def _load_into(loading: concurrent.futures.Future[Model], builder: Builder) -> None:
    try:
        loading.set_result(load_model(builder))
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
