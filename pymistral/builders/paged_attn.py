"""How much memory the paged KV cache takes, and in what blocks."""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ModelLoadError
from .enums import OptionEnum

if TYPE_CHECKING:
    from typing_extensions import Self

_BLOCK_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class ContextSize:
    """Room for this many tokens, over all sequences together."""

    tokens: int

    def __post_init__(self) -> None:
        if not _is_count(self.tokens):
            raise ModelLoadError(f"ContextSize takes a whole number of tokens of at least 1, got {self.tokens!r}")


@dataclass(frozen=True)
class MbAmount:
    """This many megabytes (2**20 bytes)."""

    megabytes: int

    def __post_init__(self) -> None:
        if not _is_count(self.megabytes):
            raise ModelLoadError(f"MbAmount takes a whole number of megabytes of at least 1, got {self.megabytes!r}")


@dataclass(frozen=True)
class Utilization:
    """This share, above 0 and up to 1, of the memory that is free once the weights are loaded."""

    share: float

    def __post_init__(self) -> None:
        is_number = isinstance(self.share, float | int) and not isinstance(self.share, bool)
        if not is_number or not math.isfinite(self.share) or not 0 < self.share <= 1:
            raise ModelLoadError(f"Utilization takes a share above 0 and up to 1, got {self.share!r}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


MemoryGpuConfig = ContextSize | MbAmount | Utilization
"""The size of the KV cache, in one of three measures. The name is mistral.rs's: it holds for the CPU too."""


class PagedCacheType(OptionEnum):
    """How keys and values are kept. In the types of 8 bits, 32 dimensions share a scale, in INT16 each key or value has one.

    AUTO: F32 for a model all of whose matrices are float32; else INT16 on x86 CPUs that do not multiply bfloat16, and BF16 on all others.
    """

    AUTO = "auto"
    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    INT16 = "int16"
    F8E4M3 = "f8e4m3"
    INT8 = "int8"

    @classmethod
    def _called(cls) -> str:
        return "the KV cache's type"


@dataclass(frozen=True)
class PagedAttentionConfig:
    """What `PagedAttentionMetaBuilder` builds, for `with_paged_attn`."""

    block_size: int | None
    memory: MemoryGpuConfig | None
    cache_type: PagedCacheType = PagedCacheType.AUTO

    def tokens(self, token_bytes: int, free: int | None = None) -> int | None:
        """Room for how many tokens, if one takes ``token_bytes``; None: what suits the model and the machine. Raises ModelLoadError if
        that is none.

        ``free`` bytes are left on the device once the weights are there; None: ask the machine.
        """
        if self.memory is None:
            return None
        if isinstance(self.memory, ContextSize):
            return self.memory.tokens
        if isinstance(self.memory, MbAmount):
            tokens = self.memory.megabytes * 2**20 // token_bytes
        else:
            tokens = int(self.memory.share * (_free_memory() if free is None else free)) // token_bytes
        if tokens < 1:
            raise ModelLoadError(f"{self.memory} holds no token of this model: one takes {token_bytes} bytes of KV cache")
        return tokens


def _free_memory() -> int:
    """Bytes that may be taken without pushing others out."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


class PagedAttentionMetaBuilder:
    """Settings of the paged KV cache.

    Parameters
    ----------
    block_size
        Tokens in a block: 32, 64 or 128. None: what suits the device.
    gpu_memory
        The size of the cache. None: what suits the model and the machine.
    paged_cache_type
        How keys and values are kept: `PagedCacheType` or its plain value. ``"f8e4m3"`` and ``"int8"`` take half the memory.

    Examples
    --------
    >>> PagedAttentionMetaBuilder().with_block_size(32).with_paged_cache_type("int8").build()
    PagedAttentionConfig(block_size=32, memory=ContextSize(tokens=4096), cache_type=<PagedCacheType.INT8: 'int8'>)
    """

    def __init__(
        self,
        *,
        block_size: int | None = None,
        gpu_memory: MemoryGpuConfig | None = ContextSize(4096),
        paged_cache_type: PagedCacheType | str = PagedCacheType.AUTO,
    ) -> None:
        self.block_size = block_size
        self.gpu_memory = gpu_memory
        self.paged_cache_type = paged_cache_type

    def with_block_size(self, block_size: int) -> Self:
        """Set the tokens in a block."""
        self.block_size = block_size
        return self

    def with_gpu_memory(self, gpu_memory: MemoryGpuConfig | None) -> Self:
        """Set the size of the cache: `ContextSize`, `MbAmount`, `Utilization`, or None for what suits the model and the machine."""
        self.gpu_memory = gpu_memory
        return self

    def with_paged_cache_type(self, paged_cache_type: PagedCacheType | str) -> Self:
        """Keep keys and values in this type: a `PagedCacheType` or its plain value."""
        self.paged_cache_type = paged_cache_type
        return self

    def build(self) -> PagedAttentionConfig:
        """Check the settings.

        Raises
        ------
        ModelLoadError
            A setting is out of its range.
        """
        if self.block_size is not None and (not isinstance(self.block_size, int) or self.block_size not in _BLOCK_SIZES):
            sizes = ", ".join(map(str, _BLOCK_SIZES))
            raise ModelLoadError(
                f"the KV cache's block_size must be one of {sizes}, or None for what suits the device, got {self.block_size!r}"
            )
        if not isinstance(self.gpu_memory, ContextSize | MbAmount | Utilization | None):
            raise ModelLoadError(
                f"gpu_memory must be ContextSize(tokens), MbAmount(megabytes), Utilization(share) or None, got {self.gpu_memory!r}"
            )
        return PagedAttentionConfig(self.block_size, self.gpu_memory, PagedCacheType(self.paged_cache_type))
