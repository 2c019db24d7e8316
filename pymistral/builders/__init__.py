"""Builders: from a model id and options to a running model."""

from .gguf import GgufModelBuilder
from .model import ModelBuilder
from .paged_attn import ContextSize, MbAmount, MemoryGpuConfig, PagedAttentionConfig, PagedAttentionMetaBuilder, PagedCacheType, Utilization
from .text import TextModelBuilder
from .token_source import TokenSource

__all__ = [
    "ContextSize",
    "GgufModelBuilder",
    "MbAmount",
    "MemoryGpuConfig",
    "ModelBuilder",
    "PagedAttentionConfig",
    "PagedAttentionMetaBuilder",
    "PagedCacheType",
    "TextModelBuilder",
    "TokenSource",
    "Utilization",
]
