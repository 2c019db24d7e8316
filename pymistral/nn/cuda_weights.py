"""Weights in a GPU's memory: quantised matrices go by way of the CPU's tiles, which know every storage type."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelLoadError
from ..kernels.cpu.compiler import Progress, load_kernels
from ..kernels.cpu.tiles import FloatFormat
from ..kernels.cuda.operands import Weights
from ..kernels.cuda.planes import LAYOUTS, Layout
from ..quantization.floats import as_floats
from ..quantization.types import GgmlType, Tensor
from .cpu_weights import TiledWeights
from .cuda_gpu import GpuLike
from .lowering import Buffer, vector_values
from .memory import forget
from .pool import available_threads, thread_pool
from .quantize import tile_format


def gpu_layout(tensor: Tensor) -> Layout:
    """The planes that a tensor becomes, BF16's for FP8 of a file. Raises ModelLoadError if there are none."""
    name = "bf16" if _is_fp8(tensor) else tile_format(tensor).name
    if name not in LAYOUTS:
        known = ", ".join(sorted(layout.upper() for layout in LAYOUTS))
        raise ModelLoadError(f"tensor {tensor.name!r}: {name.upper()} is not supported on a GPU; these are: {known}")
    return LAYOUTS[name]


class GpuWeights:
    """The matrices, stacks of matrices and vectors of a model, uploaded when they are first asked for."""

    def __init__(self, gpu: GpuLike, progress: Progress | None = None) -> None:
        self.gpu = gpu
        self.progress = progress
        self.nbytes = 0
        self._matrices: dict[int, Weights] = {}
        self._vectors: dict[tuple[int, float], Buffer] = {}
        self._keep: list[Any] = []  # ids are of objects that live

    def matrix(self, tensor: Tensor) -> Weights:
        return self.stack((tensor,))

    def stack(self, tensors: Sequence[Tensor]) -> Weights:
        """The first of matrices of one shape and type, the others behind it."""
        first = tensors[0]
        known = self._matrices.get(id(first))
        if known is None:
            layout = gpu_layout(first)
            rows, columns = first.shape
            size = layout.nbytes(rows, columns)
            start = self.gpu.allocate(size * len(tensors))
            for index, tensor in enumerate(tensors):
                if tensor.shape != first.shape or tensor.layout != first.layout:
                    raise ModelLoadError(f"tensor {tensor.name!r} is not of the shape and type of {first.name!r}, which stands beside it")
                self._upload(tensor, start + index * size)
            known = self._matrices[id(first)] = Weights(layout, start, rows, columns)
            self._keep += tensors
            self.nbytes += size * len(tensors)
        return known

    def _upload(self, tensor: Tensor, target: int) -> None:
        if _is_fp8(tensor):
            tensor = as_floats(tensor, GgmlType.BF16)
        format = tile_format(tensor)
        if isinstance(format, FloatFormat) and tensor.isq is None:
            planes = _float_planes(tensor, format)
        else:
            tiled = TiledWeights([tensor], tile_format)
            tiles = tiled[tensor].tiles
            load_kernels(tiled.packers, self.progress)
            tiled.pack(lambda: thread_pool(available_threads()))
            with ThreadPoolExecutor(available_threads()) as threads:
                rows, columns = tensor.shape
                planes = gpu_layout(tensor).pack(tiles, rows, columns, threads.map)
        self.gpu.copy_in(target, planes)
        self.gpu.synchronize()  # the planes are dropped
        forget(tensor.data)

    def vector(self, tensor: Tensor, offset: float) -> Buffer:
        known = self._vectors.get((id(tensor), offset))
        if known is None:
            values = np.ascontiguousarray(vector_values(tensor, offset))
            address = self.gpu.allocate(values.nbytes)
            self.gpu.copy_in(address, values)
            self.gpu.synchronize()
            known = self._vectors[id(tensor), offset] = Buffer(values, address)
            self._keep.append(tensor)
        return known


def _is_fp8(tensor: Tensor) -> bool:
    return tensor.scales is not None and tensor.isq is None


def _float_planes(tensor: Tensor, format: FloatFormat) -> NDArray[np.uint8]:
    """Rows as they are stored, filled up with zeros to whole blocks of 32 columns."""
    rows, columns = tensor.shape
    tensor = tensor.in_order()
    if columns % 32 == 0:
        return tensor.data
    planes = np.zeros((rows, -(-columns // 32) * 32 * format.item_bytes), np.uint8)
    planes[:, : columns * format.item_bytes] = tensor.data.reshape(rows, -1)
    return planes
