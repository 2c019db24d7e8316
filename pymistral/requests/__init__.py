"""What a caller sends: messages, requests, sampling parameters, tools."""

from .constraint import Constraint
from .messages import CustomRole, TextMessageRole, TextMessages
from .request import ChatRequest, RequestBuilder
from .sampling import DrySamplingParams, SamplingParams, StopTokens
from .tools import Function, NamedToolChoice, Tool, ToolChoice, ToolType
from .web_search import ApproximateUserLocation, SearchContextSize, WebSearchOptions

__all__ = [
    "ApproximateUserLocation",
    "ChatRequest",
    "Constraint",
    "CustomRole",
    "DrySamplingParams",
    "Function",
    "NamedToolChoice",
    "RequestBuilder",
    "SamplingParams",
    "SearchContextSize",
    "StopTokens",
    "TextMessageRole",
    "TextMessages",
    "Tool",
    "ToolChoice",
    "ToolType",
    "WebSearchOptions",
]
