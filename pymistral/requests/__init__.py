"""What a caller sends: messages, requests, sampling parameters, tools."""

from .messages import CustomRole, TextMessageRole, TextMessages
from .request import ChatRequest, RequestBuilder
from .sampling import DrySamplingParams, SamplingParams, StopTokens
from .tools import Function, Tool, ToolChoice, ToolType

__all__ = [
    "ChatRequest",
    "CustomRole",
    "DrySamplingParams",
    "Function",
    "RequestBuilder",
    "SamplingParams",
    "StopTokens",
    "TextMessageRole",
    "TextMessages",
    "Tool",
    "ToolChoice",
    "ToolType",
]
