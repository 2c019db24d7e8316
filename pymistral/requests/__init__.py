"""What a caller sends: messages, requests, sampling parameters, tools."""

from .constraint import Constraint
from .messages import CustomRole, TextMessageRole, TextMessages
from .request import ChatRequest, RequestBuilder
from .sampling import DrySamplingParams, SamplingParams, StopTokens
from .tools import Function, NamedToolChoice, Tool, ToolChoice, ToolType

__all__ = [
    "ChatRequest",
    "Constraint",
    "CustomRole",
    "DrySamplingParams",
    "Function",
    "NamedToolChoice",
    "RequestBuilder",
    "SamplingParams",
    "StopTokens",
    "TextMessageRole",
    "TextMessages",
    "Tool",
    "ToolChoice",
    "ToolType",
]
