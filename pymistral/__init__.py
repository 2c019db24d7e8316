"""pymistral: the mistral.rs SDK for Python people.

The names below are imported when they are first used, so that ``import pymistral`` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import blocking, errors, responses
    from .agents.tool import tool
    from .builders.gguf import GgufModelBuilder
    from .builders.model import ModelBuilder
    from .builders.multi import MultiModelBuilder
    from .builders.paged_attn import ContextSize, MbAmount, MemoryGpuConfig, PagedAttentionConfig, PagedAttentionMetaBuilder, Utilization
    from .builders.speculative import SpeculativeConfig, TextSpeculativeBuilder
    from .builders.text import TextModelBuilder
    from .builders.token_source import TokenSource
    from .model import ChatStream, Model
    from .requests.constraint import Constraint
    from .requests.messages import TextMessageRole, TextMessages
    from .requests.request import RequestBuilder
    from .requests.sampling import DrySamplingParams, SamplingParams, StopTokens
    from .requests.tools import Function, Tool, ToolChoice, ToolType
    from .responses import (
        ChatCompletionChunkResponse,
        ChatCompletionResponse,
        Choice,
        ChunkChoice,
        Delta,
        FunctionDelta,
        Logprobs,
        ResponseLogprob,
        ResponseMessage,
        ToolCallDelta,
        ToolCallResponse,
        TopLogprob,
        Usage,
    )

__all__ = [
    "ChatCompletionChunkResponse",
    "ChatCompletionResponse",
    "ChatStream",
    "Choice",
    "ChunkChoice",
    "Constraint",
    "ContextSize",
    "Delta",
    "DrySamplingParams",
    "Function",
    "FunctionDelta",
    "GgufModelBuilder",
    "Logprobs",
    "MbAmount",
    "MemoryGpuConfig",
    "Model",
    "ModelBuilder",
    "MultiModelBuilder",
    "PagedAttentionConfig",
    "PagedAttentionMetaBuilder",
    "RequestBuilder",
    "ResponseLogprob",
    "ResponseMessage",
    "SamplingParams",
    "SpeculativeConfig",
    "StopTokens",
    "TextMessageRole",
    "TextMessages",
    "TextModelBuilder",
    "TextSpeculativeBuilder",
    "TokenSource",
    "Tool",
    "ToolCallDelta",
    "ToolCallResponse",
    "ToolChoice",
    "ToolType",
    "TopLogprob",
    "Usage",
    "Utilization",
    "blocking",
    "errors",
    "responses",
    "tool",
]

_HOMES = {
    "agents.tool": ("tool",),
    "builders.gguf": ("GgufModelBuilder",),
    "builders.model": ("ModelBuilder",),
    "builders.multi": ("MultiModelBuilder",),
    "builders.paged_attn": (
        "ContextSize",
        "MbAmount",
        "MemoryGpuConfig",
        "PagedAttentionConfig",
        "PagedAttentionMetaBuilder",
        "Utilization",
    ),
    "builders.speculative": ("SpeculativeConfig", "TextSpeculativeBuilder"),
    "builders.text": ("TextModelBuilder",),
    "builders.token_source": ("TokenSource",),
    "model": ("ChatStream", "Model"),
    "requests.constraint": ("Constraint",),
    "requests.messages": ("TextMessageRole", "TextMessages"),
    "requests.request": ("RequestBuilder",),
    "requests.sampling": ("DrySamplingParams", "SamplingParams", "StopTokens"),
    "requests.tools": ("Function", "Tool", "ToolChoice", "ToolType"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_MODULES = ("blocking", "errors", "responses")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name == "__version__":
        from importlib.metadata import version

        return version("pymistral")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME_OF.get(name, 'responses')}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
