"""What a caller gets: the shapes of OpenAI's chat API, with the timings that mistral.rs adds."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

SYSTEM_FINGERPRINT = "local"

FinishReason = Literal["stop", "length", "canceled", "tool_calls"]


class _Response(BaseModel):
    model_config = ConfigDict(protected_namespaces=(), defer_build=True)


class CalledFunction(_Response):
    """The function a model asked to call."""

    name: str
    arguments: str
    """JSON text, as the model wrote it."""


class ToolCallResponse(_Response):
    """One tool call in a model's answer."""

    index: int = 0
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class FunctionDelta(_Response):
    """What a chunk adds to the function of a call."""

    name: str | None = None
    """Only in the first chunk of a call."""
    arguments: str = ""
    """More of the JSON text of the arguments."""


class ToolCallDelta(_Response):
    """What a chunk adds to a tool call."""

    index: int
    """Which of the calls in the message it is."""
    id: str | None = None
    """Only in the first chunk of a call."""
    type: Literal["function"] | None = None
    function: FunctionDelta


class TopLogprob(_Response):
    """One of the most likely tokens at a position."""

    token: str
    token_id: int
    logprob: float
    bytes: list[int] | None = None


class ResponseLogprob(_Response):
    """A chosen token with its log-probability."""

    token: str
    token_id: int
    logprob: float
    bytes: list[int] | None = None
    top_logprobs: list[TopLogprob] = []


class Logprobs(_Response):
    """The log-probabilities of an answer or a chunk of it."""

    content: list[ResponseLogprob] | None = None


class ResponseMessage(_Response):
    """The model's message."""

    content: str | None = None
    role: str = "assistant"
    tool_calls: list[ToolCallResponse] | None = None
    reasoning_content: str | None = None


class Delta(_Response):
    """What a chunk adds to the model's message."""

    content: str | None = None
    role: str = "assistant"
    tool_calls: list[ToolCallDelta] | None = None
    reasoning_content: str | None = None


class Choice(_Response):
    """One of the answers to a request."""

    finish_reason: FinishReason
    """``"stop"``: the model ended or a stop string was met; ``"length"``: `max_len` or the context; ``"tool_calls"``: the model waits for
    the results of calls; ``"canceled"``."""
    index: int
    message: ResponseMessage
    logprobs: Logprobs | None = None


class ChunkChoice(_Response):
    """What a chunk adds to one of the answers."""

    finish_reason: FinishReason | None = None
    """Set in the last chunk of each answer."""
    index: int
    delta: Delta
    logprobs: Logprobs | None = None


class PromptTokensDetails(_Response):
    """Where the prompt's tokens came from."""

    cached_tokens: int = 0
    """How many were found in the prefix cache and cost nothing."""


class CompletionTokensDetails(_Response):
    """What speculative decoding contributed."""

    drafted_tokens: int = 0
    """How many tokens were guessed ahead."""
    accepted_tokens: int = 0
    """How many of the guesses were what the model itself says; these are among the completion tokens."""


class Usage(_Response):
    """What a request took: tokens, seconds, tokens per second."""

    completion_tokens: int
    prompt_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails = PromptTokensDetails()
    completion_tokens_details: CompletionTokensDetails = CompletionTokensDetails()
    avg_tok_per_sec: float
    avg_prompt_tok_per_sec: float
    avg_compl_tok_per_sec: float
    total_time_sec: float
    total_prompt_time_sec: float
    total_completion_time_sec: float


class AgenticToolCallRecord(_Response):
    """A tool call that was answered while the request ran."""

    round: int
    """Which turn of the model asked for it; the first is 0."""
    name: str
    arguments: str
    """JSON text, as the model wrote it."""
    result_content: str
    """What the model was told."""


class ChatCompletionResponse(_Response):
    """A whole answer."""

    id: str
    choices: list[Choice]
    created: int
    model: str
    system_fingerprint: str = SYSTEM_FINGERPRINT
    object: Literal["chat.completion"] = "chat.completion"
    usage: Usage
    """Of all turns, if tools were called in between."""
    agentic_tool_calls: list[AgenticToolCallRecord] | None = None
    """The calls that were answered while the request ran."""


class ChatCompletionChunkResponse(_Response):
    """A piece of an answer. Each has exactly one choice; the last one of all has `usage`."""

    id: str
    choices: list[ChunkChoice]
    created: int
    model: str
    system_fingerprint: str = SYSTEM_FINGERPRINT
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    usage: Usage | None = None
