"""Packing: which tensors share a program changes no tile."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pymistral.kernels.cpu.compiler import entry_point, load_kernels

from pymistral.errors import ModelLoadError
from pymistral.loading.gguf import map_file
from pymistral.nn import cpu_weights
from pymistral.nn.cpu_weights import TiledWeights
from pymistral.nn.memory import address, zeros
from pymistral.nn.pool import thread_pool
from pymistral.nn.quantize import multiplied_format, repacker
from pymistral.quantization.types import GgmlType, Tensor, tensor_nbytes

sys.path.insert(0, str(Path(__file__).parents[1]))
from resident import resident

COLUMNS = 256
ROWS = (16, 1, 100, 31, 48, 400)


def random_tensor(seed: int, rows: int, *, shuffled: bool = False) -> Tensor:
    random = np.random.default_rng(seed)
    type = (GgmlType.Q4_1, GgmlType.Q8_0, GgmlType.Q4_K)[seed % 3]
    data = random.integers(0, 256, tensor_nbytes(type, (rows, COLUMNS)), np.uint8)
    return Tensor(f"t{seed}", type, (rows, COLUMNS), data, order=random.permutation(rows) if shuffled else None)


def alone(tensor: Tensor) -> NDArray[Any]:
    """A tensor's tiles, made by one call of the kernel."""
    format = multiplied_format(tensor)
    tiles: NDArray[Any] = zeros(format.nbytes(*tensor.shape), np.uint8)
    blocks = tensor.in_order().data
    slots = np.array([address(blocks), address(tiles), *tensor.shape, format.tile_bytes(COLUMNS), 0, 0], np.int64)
    kernel = repacker(tensor, format)
    entry_point(load_kernels([kernel])[kernel], 4)(address(slots), 0, -(-tensor.shape[0] // 16), 0)
    return tiles


def mapped(tensors: list[Tensor], path: Path) -> list[Tensor]:
    """The same tensors as views of a mapped file, one after the other."""
    path.write_bytes(b"".join(tensor.data.tobytes() for tensor in tensors))
    data = np.frombuffer(map_file(path), np.uint8)
    starts = [0, *accumulate(tensor.data.nbytes for tensor in tensors)]
    return [replace(tensor, data=data[start : start + tensor.data.nbytes]) for tensor, start in zip(tensors, starts, strict=False)]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads what Linux says of memory")
def test_a_mapped_file_is_forgotten_on_the_way(monkeypatch, tmp_path):
    """Whatever chunks the threads claim. A page that is wanted again is read again."""
    monkeypatch.setattr(cpu_weights, "_CHUNK_BYTES", 40_000)
    path = tmp_path / "weights"
    tensors = mapped([random_tensor(seed, rows, shuffled=seed % 2 == 1) for seed, rows in enumerate((3000, 5, 7001, 4999, 16))], path)
    weights = TiledWeights(tensors)
    assert sum(int(tensor.data[::4096].sum()) for tensor in tensors)  # as if all of it had been read before
    assert resident(path) > 2000
    weights.begin(2).wait()
    assert resident(path) <= 64
    for tensor in tensors:
        np.testing.assert_array_equal(weights[tensor].tiles, alone(replace(tensor, data=tensor.data.copy())), err_msg=tensor.name)


def test_what_cannot_be_packed_is_told_to_who_waits():
    weight = np.ones((16, COLUMNS), np.float32)
    weight[3, 3] = np.inf
    weights = TiledWeights([Tensor("blk.0.w", GgmlType.F32, weight.shape, weight.view(np.uint8).reshape(-1), isq="q8_0")])
    with pytest.raises(ModelLoadError, match=r"'blk\.0\.w.*not finite"):
        weights.begin(2).wait()
    assert weights.begin(2) is weights.begin(2)  # it is not tried again


def test_packing_that_nobody_wants_ends(monkeypatch):
    monkeypatch.setattr(cpu_weights, "BATCH_BYTES", 1)
    weights = TiledWeights([random_tensor(seed, 3000) for seed in range(6)])
    batches, ended, go_on = [], threading.Event(), threading.Event()

    def run(pool, launches):
        batches.append(launches)
        ended.set()
        go_on.wait(10)

    monkeypatch.setattr(cpu_weights, "launch_all", run)
    packing = weights.begin(2)
    ended.wait(10)
    packing.stop()
    go_on.set()
    with pytest.raises(ModelLoadError, match="given up"):
        packing.wait()
    assert len(batches) == 1


def test_all_threads_pack_once_somebody_waits(monkeypatch):
    """Until then one less does: a core is left to Python."""
    monkeypatch.setattr(cpu_weights, "BATCH_BYTES", 1)
    threads, begun, go_on = [], threading.Event(), threading.Event()

    def run(pool, launches):
        threads.append(pool.threads)
        begun.set()
        go_on.wait(10)

    monkeypatch.setattr(cpu_weights, "launch_all", run)
    packing = TiledWeights([random_tensor(seed, 3000) for seed in range(6)]).begin(3)
    begun.wait(10)
    threading.Timer(0.1, go_on.set).start()
    packing.wait()
    assert threads[0] == 2
    assert set(threads[1:]) == {3}


@pytest.mark.parametrize("order", [[0, 1, 3], [0, 1, 4, 3], [-1, 1, 2, 3]])
def test_orders_are_checked(order):
    """Kernels read the rows that an order names."""
    with pytest.raises(ValueError, match="order"):
        Tensor("t", GgmlType.F32, (4, 8), np.zeros(128, np.uint8), order=np.array(order))


@pytest.mark.parametrize("part_bytes", [1, 8 << 10, 40 << 10, 4 << 20])
def test_tiles_are_those_of_each_tensor_alone(monkeypatch, part_bytes):
    monkeypatch.setattr(cpu_weights, "BATCH_BYTES", part_bytes)
    tensors = [random_tensor(seed, rows, shuffled=seed % 2 == 1) for seed, rows in enumerate(ROWS)]
    weights = TiledWeights(tensors)
    matrices = [weights[tensor] for tensor in tensors]
    weights.pack(lambda: thread_pool(2))
    for matrix in matrices:
        np.testing.assert_array_equal(matrix.tiles, alone(matrix.tensor), err_msg=matrix.tensor.name)
