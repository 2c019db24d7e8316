"""pymistral: the mistral.rs SDK for Python people.

The names below are imported when they are first used, so that ``import pymistral`` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import blocking, errors, responses
    from .agents.agent import (
        Agent,
        AgentBuilder,
        AgentComplete,
        AgentEvent,
        AgentResponse,
        AgentStep,
        AgentStopReason,
        AgentStream,
        AgentTextDelta,
        AgentToolCalls,
        AgentToolResult,
    )
    from .agents.mcp_config import McpClientConfig, McpServerConfig, McpServerSource
    from .agents.tool import tool
    from .builders.device import Device, ModelDType
    from .builders.gguf import GgufModelBuilder
    from .builders.model import ModelBuilder
    from .builders.multi import MultiModelBuilder
    from .builders.paged_attn import (
        ContextSize,
        MbAmount,
        MemoryGpuConfig,
        PagedAttentionConfig,
        PagedAttentionMetaBuilder,
        PagedCacheType,
        Utilization,
    )
    from .builders.speculative import SpeculativeConfig, TextSpeculativeBuilder
    from .builders.text import TextModelBuilder
    from .builders.token_source import TokenSource
    from .chat_stream import ChatStream
    from .model import Model
    from .quantization.isq import IsqBits, IsqType
    from .quantization.topology import LayerTopology, Topology
    from .requests.constraint import Constraint
    from .requests.messages import TextMessageRole, TextMessages
    from .requests.request import RequestBuilder
    from .requests.sampling import DrySamplingParams, SamplingParams, StopTokens
    from .requests.tools import Function, Tool, ToolChoice, ToolType
    from .requests.web_search import (
        ApproximateUserLocation,
        SearchContextSize,
        SearchFunctionParameters,
        SearchResult,
        WebSearchOptions,
    )
    from .responses import (
        AgenticToolCallRecord,
        CalledFunction,
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
    from .tool_rounds import ToolResult

__all__ = [
    "Agent",
    "AgentBuilder",
    "AgentComplete",
    "AgentEvent",
    "AgentResponse",
    "AgentStep",
    "AgentStopReason",
    "AgentStream",
    "AgentTextDelta",
    "AgentToolCalls",
    "AgentToolResult",
    "AgenticToolCallRecord",
    "ApproximateUserLocation",
    "CalledFunction",
    "ChatCompletionChunkResponse",
    "ChatCompletionResponse",
    "ChatStream",
    "Choice",
    "ChunkChoice",
    "Constraint",
    "ContextSize",
    "Delta",
    "Device",
    "DrySamplingParams",
    "Function",
    "FunctionDelta",
    "GgufModelBuilder",
    "IsqBits",
    "IsqType",
    "LayerTopology",
    "Logprobs",
    "MbAmount",
    "McpClientConfig",
    "McpServerConfig",
    "McpServerSource",
    "MemoryGpuConfig",
    "Model",
    "ModelBuilder",
    "ModelDType",
    "MultiModelBuilder",
    "PagedAttentionConfig",
    "PagedAttentionMetaBuilder",
    "PagedCacheType",
    "RequestBuilder",
    "ResponseLogprob",
    "ResponseMessage",
    "SamplingParams",
    "SearchContextSize",
    "SearchFunctionParameters",
    "SearchResult",
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
    "ToolResult",
    "ToolType",
    "TopLogprob",
    "Topology",
    "Usage",
    "Utilization",
    "WebSearchOptions",
    "blocking",
    "errors",
    "responses",
    "tool",
]

_HOMES = {
    "agents.agent": (
        "Agent",
        "AgentBuilder",
        "AgentComplete",
        "AgentEvent",
        "AgentResponse",
        "AgentStep",
        "AgentStopReason",
        "AgentStream",
        "AgentTextDelta",
        "AgentToolCalls",
        "AgentToolResult",
    ),
    "agents.mcp_config": ("McpClientConfig", "McpServerConfig", "McpServerSource"),
    "agents.tool": ("tool",),
    "builders.device": ("Device", "ModelDType"),
    "builders.gguf": ("GgufModelBuilder",),
    "builders.model": ("ModelBuilder",),
    "builders.multi": ("MultiModelBuilder",),
    "builders.paged_attn": (
        "ContextSize",
        "MbAmount",
        "MemoryGpuConfig",
        "PagedAttentionConfig",
        "PagedAttentionMetaBuilder",
        "PagedCacheType",
        "Utilization",
    ),
    "builders.speculative": ("SpeculativeConfig", "TextSpeculativeBuilder"),
    "builders.text": ("TextModelBuilder",),
    "builders.token_source": ("TokenSource",),
    "chat_stream": ("ChatStream",),
    "model": ("Model",),
    "quantization.isq": ("IsqBits", "IsqType"),
    "quantization.topology": ("LayerTopology", "Topology"),
    "requests.constraint": ("Constraint",),
    "requests.messages": ("TextMessageRole", "TextMessages"),
    "requests.request": ("RequestBuilder",),
    "requests.sampling": ("DrySamplingParams", "SamplingParams", "StopTokens"),
    "requests.tools": ("Function", "Tool", "ToolChoice", "ToolType"),
    "requests.web_search": (
        "ApproximateUserLocation",
        "SearchContextSize",
        "SearchFunctionParameters",
        "SearchResult",
        "WebSearchOptions",
    ),
    "tool_rounds": ("ToolResult",),
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
