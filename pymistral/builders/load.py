"""From a builder to a running model: all that knows the whole chain."""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..errors import ModelLoadError
from ..quantization.isq import IsqType
from ..tool_rounds import Toolbox
from .device import Device, ModelDType

if TYPE_CHECKING:
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
    from .common import Builder, ModelOptions

_log = logging.getLogger("pymistral")


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

    try:
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
    except BaseException as error:
        engine.close()
        if not isinstance(error, ModelLoadError):
            raise
        raise ModelLoadError(f"{model_id}: {error}") from error  # its chat template, or what its author recommends


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
    from ..nn.memory import give_back
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
    tokenizer_json = None if builder.tokenizer_json is None else Path(builder.tokenizer_json).expanduser()
    if tokenizer_json and not tokenizer_json.is_file():
        raise ModelLoadError(f"tokenizer_json: there is no file {tokenizer_json}")
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
        chosen = apply_isq(weights, isq, builder.topology)
        try:
            return record(build_model(config, chosen))
        except ModelLoadError as error:
            raise ModelLoadError(f"{path}: {error}") from error

    graph = graph_of(weights, None if builder.isq is None else IsqType.of(builder.isq))
    try:
        with counting_bar("compiling kernels for this CPU (once)") as progress:
            runner = make_runner(builder, graph, device, int(config["max_position_embeddings"]), threads, progress)
    except (MemoryError, OverflowError, OSError) as error:  # a size beyond all addresses overflows
        if isinstance(error, OSError) and error.errno != errno.ENOMEM:
            raise
        raise ModelLoadError(
            f"{model_id}: the system has not so much memory as the weights, the KV cache and {builder.max_num_seqs} sequences take; "
            "take a smaller model",
            ". with_paged_attn sets the size of the cache, with_max_num_seqs how many sequences run at once",
        ) from error
    packing = runner.packing if isinstance(runner, CpuRunner) else None
    try:
        checkpoint = loader.checkpoint(config, weights, tokenizer_json)  # while the weights are packed
        give_back()
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
    assert isinstance(template, str)  # a path has become one
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


def _log_to_stderr() -> None:
    """Show the package's log, unless the application has set up logging itself."""
    _log.setLevel(logging.INFO)
    if not _log.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        _log.addHandler(handler)
