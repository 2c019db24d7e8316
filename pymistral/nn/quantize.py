"""Quantising weights: the launches that turn a tensor's rows into blocks of another type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelLoadError
from ..kernels.cpu.compiler import Spec, load_kernels, spec
from ..kernels.cpu.isa import current_isa
from ..kernels.cpu.tiles import FLOAT_FORMATS, PAIRED_FORMATS, ROWS, STORED_FORMATS, FloatFormat, TileFormat
from ..kernels.cpu.weight_layout import NOT_FINITE, SCRATCH_BYTES, TOO_LARGE
from ..quantization.floats import FLOATS
from ..quantization.types import BLOCK_SIZES, Tensor, block_size, quantized_bytes
from .memory import address, zeros
from .pool import EXECUTOR_KERNELS, Launches, ThreadPool, available_threads, thread_pool

PART_BYTES = 4 << 20  # of a file's weights that are in memory at once while they are packed


def tile_format(tensor: Tensor) -> TileFormat | FloatFormat:
    """The tiles that a tensor's type becomes. Raises ModelLoadError if there are none."""
    name = tensor.layout
    format = STORED_FORMATS.get(name) or FLOAT_FORMATS.get(name)
    if format is None:
        known = ", ".join(sorted(name.upper() for name in (*STORED_FORMATS, *FLOAT_FORMATS)))
        raise ModelLoadError(f"tensor {tensor.name!r} is stored as {name.upper()}, which is not supported; these are: {known}")
    if isinstance(format, TileFormat) and tensor.shape[1] % format.columns:
        raise ModelLoadError(f"tensor {tensor.name!r}: {tensor.shape[1]} columns are not a multiple of {format.columns}")
    if isinstance(format, FloatFormat) and tensor.scales is not None and tensor.isq is None:
        return format._replace(scales=tensor.scales.shape[1])
    return format


def multiplied_format(tensor: Tensor) -> TileFormat | FloatFormat:
    """`tile_format`, or what this CPU multiplies faster."""
    format = tile_format(tensor)
    return PAIRED_FORMATS.get(format.name, format) if current_isa().pairs_scales else format


def parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor in pieces of whole tiles, each small enough to be worked on in memory."""
    rows, columns = tensor.shape
    row_bytes = tensor.data.size // rows if tensor.isq is None else 4 * columns
    step = rows_within(PART_BYTES, row_bytes)
    if rows <= step and tensor.order is None:
        yield tensor
        return
    for first in range(0, rows, step):
        yield tensor.rows(first, min(first + step, rows))


def rows_within(nbytes: int, row_bytes: int) -> int:
    """Rows of whole tiles, as many as so many bytes hold, but one tile's at least."""
    return max(1, nbytes // (row_bytes * ROWS)) * ROWS


def kernels_for(tensor: Tensor) -> list[Spec]:
    """What `blocks_of` needs for this tensor."""
    if tensor.isq is None:
        return []
    if _is_float(tensor):
        return [_quantizer(tensor)]
    stored = replace(tensor, isq=None)
    return [_quantizer(tensor), repacker(stored, tile_format(stored)), spec("embedding.embedding", layout=stored.layout)]


def stored_blocks(tensor: Tensor) -> NDArray[np.uint8]:
    """The tensor's rows as `repack` takes them: as the file has them; of FP8, each with its scales before it.

    Raises
    ------
    ModelLoadError
        There is an FP8 number among them that is none.
    """
    if tensor.scales is None:
        return tensor.data
    rows = tensor.data.reshape(tensor.shape)
    if rows.size and (np.max(rows) == 0xFF or np.max(rows.view(np.int8)) == 0x7F):
        raise ModelLoadError(f"tensor {tensor.name!r} has weights that are not numbers (FP8 0x7F or 0xFF)")
    return np.concatenate([np.ascontiguousarray(tensor.scales).view(np.uint8), rows], axis=1).reshape(-1)


def repacker(tensor: Tensor, format: TileFormat | FloatFormat) -> Spec:
    """The kernel from the tensor's blocks to tiles."""
    size = BLOCK_SIZES[tensor.type] if tensor.isq is None else block_size(tensor.isq)
    return spec("repack.repack", layout=format.name, block_bytes=size[1] if size else 1)


def blocks_of(tensor: Tensor, kernels: Mapping[Spec, int], pool: ThreadPool) -> NDArray[np.uint8]:
    """The tensor's rows as blocks of ``tensor.isq``, as GGUF has them; for FP8 each row is a float32 scale and its bytes.

    Raises
    ------
    ModelLoadError
        A weight is not finite, or beyond what the type's scales can hold.
    """
    rows, columns = tensor.shape
    assert tensor.isq is not None
    source = tensor.data if _is_float(tensor) else _floats(tensor, kernels, pool)
    blocks: NDArray[Any] = zeros(quantized_bytes(tensor.isq, tensor.shape), np.uint8)
    scratch, flags = zeros(SCRATCH_BYTES * pool.threads, np.uint8), zeros(2, np.int64)
    slots = (address(source), address(blocks), rows, columns, address(scratch), SCRATCH_BYTES, address(flags))
    launch(pool, kernels[_quantizer(tensor)], slots, -(-rows // ROWS))
    if row := int(flags[NOT_FINITE // 8]):
        raise ModelLoadError(f"tensor {tensor.name!r} cannot be quantised: in or near row {row - 1} are weights that are not finite")
    if row := int(flags[TOO_LARGE // 8]):
        raise ModelLoadError(
            f"tensor {tensor.name!r} cannot be quantised to {tensor.isq.upper()}: in or near row {row - 1} are weights beyond 65504, "
            "the largest number that its scales hold"
        )
    return blocks


def quantize(tensor: Tensor, isq: str, *, threads: int | None = None) -> NDArray[np.uint8]:
    """A matrix as blocks of the format ``isq`` (such as ``"q4_k"``), uint8; errors as `blocks_of`."""
    size = block_size(isq)
    if len(tensor.shape) != 2 or tensor.shape[1] % (size[0] if size else 16):
        raise ValueError(f"tensor {tensor.name!r} {tensor.shape} is no matrix of whole blocks of {isq.upper()}")
    tensor = replace(tensor, isq=isq)
    kernels = load_kernels([*EXECUTOR_KERNELS, *kernels_for(tensor)])
    pool = thread_pool(threads or available_threads())
    return np.concatenate([blocks_of(part, kernels, pool) for part in parts(tensor)])


class Launch(NamedTuple):
    kernel: int
    slots: Sequence[int]
    units: int
    chunk: int = 1  # of units that a thread claims at once, at least


def launch(pool: ThreadPool, kernel: int, slots: Sequence[int], units: int) -> None:
    """Run one kernel on all threads."""
    launch_all(pool, [Launch(kernel, slots, units)])


def launch_all(pool: ThreadPool, launches: Sequence[Launch]) -> None:
    """Run kernels that do not wait for each other on all threads."""
    one, arguments = np.ones(1, np.int64), [np.array(launch.slots, np.int64) for launch in launches]
    records = [
        (launch.kernel, address(slots), address(one), launch.units, max(launch.chunk, launch.units // 64), 0)
        for launch, slots in zip(launches, arguments, strict=True)
    ]
    pool.run(Launches(records, pool.threads))


def _floats(tensor: Tensor, kernels: Mapping[Spec, int], pool: ThreadPool) -> NDArray[np.uint8]:
    """The weights of a tensor that is stored quantised, as float32, read out of tiles."""
    rows, columns = tensor.shape
    stored = replace(tensor, isq=None)
    format = tile_format(stored)
    tiles, blocks = zeros(format.nbytes(rows, columns), np.uint8), stored_blocks(tensor)
    repack = kernels[repacker(stored, format)]
    launch(pool, repack, (address(blocks), address(tiles), rows, columns, format.tile_bytes(columns), 0, 0), -(-rows // ROWS))
    numbers, result = np.arange(rows, dtype=np.int32), zeros(4 * prod(tensor.shape), np.uint8)
    one = int(np.float32(1).view(np.int32))
    slots = (address(numbers), address(tiles), address(result), columns, format.tile_bytes(columns), 4 * columns, one)
    launch(pool, kernels[spec("embedding.embedding", layout=format.name)], slots, rows)
    return result  # type: ignore[return-value]


def _quantizer(tensor: Tensor) -> Spec:
    assert tensor.isq is not None
    columns, nbytes = block_size(tensor.isq) or (1, 1)
    source = _stored(tensor) if _is_float(tensor) else "f32"
    return spec("quantize_weights.quantize", layout=tensor.isq, source=source, block_columns=columns, block_bytes=nbytes)


def _stored(tensor: Tensor) -> str:
    return tensor.type.name.lower()


def _is_float(tensor: Tensor) -> bool:
    return tensor.type in FLOATS
