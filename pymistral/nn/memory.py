"""Arrays that kernels may be given: aligned, zeroed, and alive as long as somebody holds them."""

from __future__ import annotations

import ctypes
import functools
import mmap
from math import prod

import numpy as np
from numpy.typing import DTypeLike, NDArray

_ALIGNMENT = 64


def zeros(shape: int | tuple[int, ...], dtype: DTypeLike = np.float32, *, huge_pages: bool = False) -> NDArray[np.generic]:
    """A zeroed array that starts on a cache line. Large ones take memory only where they are written, by the page, or by the huge page."""
    shape = (shape,) if isinstance(shape, int) else shape
    nbytes = prod(shape) * np.dtype(dtype).itemsize
    if nbytes >= 1 << 20:
        # straight from the system: page-aligned, given back to it at once when dropped; private, or a forked child would write into it
        region = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE) if hasattr(mmap, "MAP_PRIVATE") else mmap.mmap(-1, nbytes)
        if huge_pages and hasattr(mmap, "MADV_HUGEPAGE"):
            region.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(region, np.uint8)[:nbytes].view(dtype).reshape(shape)
    memory = np.zeros(nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def address(array: NDArray[np.generic]) -> int:
    """Where the array's first byte is; the caller keeps the array alive."""
    return array.ctypes.data  # half the time of __array_interface__


def address_in_step(array: NDArray[np.generic]) -> int:
    """`address` of a contiguous array that may be written, for what runs once a step: NumPy's way runs Python of its own, which the weights
    have pushed out of all caches since the step before.
    """
    return ctypes.addressof(ctypes.c_char.from_buffer(array.data))


def mapping_of(array: NDArray[np.generic]) -> mmap.mmap | None:
    """The mapped file that the array is a view of, if it is one and the system may be told to forget parts of it."""
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    return base if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED") else None


def forget(array: NDArray[np.generic]) -> None:
    """Let the system take back the memory of an array that is a view of a mapped file; it is read again if need be. Other arrays
    stay as they are.
    """
    mapping = mapping_of(array)
    if mapping is None:
        return
    start = address(array) - address(np.frombuffer(mapping, np.uint8))
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages only: neighbours may still be wanted
    length = start + array.nbytes - first
    if length >= mmap.PAGESIZE:
        mapping.madvise(mmap.MADV_DONTNEED, first, length)


def give_back() -> None:
    """Have the C library give the system what has been freed: glibc may keep many megabytes of it, others have no such call."""
    if hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


@functools.cache
def madvise_address() -> int:
    """Where the C library's ``madvise`` is, for kernels that call it."""
    return ctypes.cast(ctypes.CDLL(None).madvise, ctypes.c_void_p).value or 0
