"""The request builder, and what else can be sent as a request."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Union

from ..errors import RequestValidationError
from .constraint import Constraint
from .messages import (
    CustomRole,
    Message,
    TextMessageRole,
    TextMessages,
    checked_calls,
    checked_flag,
    checked_text,
    messages_from_dicts,
    role_name,
)
from .sampling import DrySamplingParams, SamplingParams, StopTokens
from .tools import NamedToolChoice, Tool, ToolChoice, checked_tool_choice
from .web_search import WebSearchOptions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Self

    from ..responses import ToolCallResponse

    CustomLogitsProcessor = Callable[[NDArray[np.float32], Sequence[int]], NDArray[np.float32] | None]

ChatRequest = Union[str, TextMessages, "RequestBuilder", Sequence[Mapping[str, Any]]]
"""What the chat methods take: one user message, messages, message dicts, or a request."""


class RequestBuilder(TextMessages):
    """A request with all that can be set about it. Fresh, it samples greedily.

    Each method changes the builder and returns it. Sending does not use it up: it can be extended and sent again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tools: list[Tool] = []
        self.tool_choice: ToolChoice | NamedToolChoice = ToolChoice.AUTO
        self.max_tool_rounds: int | None = None
        self.tool_dispatch_url: str | None = None
        self.tool_dispatch_private = False
        self.web_search_options: WebSearchOptions | None = None
        self.constraint: Constraint | None = None
        self.sampling = SamplingParams.deterministic()
        self.logits_processors: list[CustomLogitsProcessor] = []
        self.logprobs = False
        self.truncate_sequence = False
        self.timeout: float | None = None

    @classmethod
    def of(cls, request: ChatRequest) -> RequestBuilder:
        """A builder from anything the chat methods take; a copy if it is one already.

        Raises
        ------
        RequestValidationError
            It is nothing of the kind, or it holds no message.
        """
        builder = cls()
        if isinstance(request, RequestBuilder):
            builder = copy.copy(request)
            builder.messages, builder.logits_processors = list(request.messages), list(request.logits_processors)
        elif isinstance(request, TextMessages):
            builder.messages, builder.thinking = list(request.messages), request.thinking
        elif isinstance(request, str):
            builder.add_message(TextMessageRole.USER, request)
        elif isinstance(request, Iterable) and not isinstance(request, Mapping | bytes):
            builder.messages = messages_from_dicts(request)
        else:
            raise RequestValidationError(
                f"a request is a string, TextMessages, a RequestBuilder or a list of message dicts, got {type(request).__name__}"
            )
        if not builder.messages:
            raise RequestValidationError("the request holds no message; add one with add_message(role, text)")
        return builder

    def add_tool_message(self, tool_content: str, tool_id: str) -> Self:
        """Append the result of a tool call, by the call's id."""
        if not isinstance(tool_id, str):
            raise RequestValidationError(f"add_tool_message takes the id of the call that was answered, a string, got {tool_id!r}")
        self.messages.append({"role": "tool", "content": checked_text(tool_content), "tool_call_id": tool_id})
        return self

    def add_message_with_tool_call(
        self,
        role: TextMessageRole | CustomRole | str,
        text: str,
        tool_calls: Iterable[ToolCallResponse | Mapping[str, Any]],
    ) -> Self:
        """Append a message in which the model called tools."""
        if isinstance(tool_calls, Iterable):
            tool_calls = [call.model_dump() if hasattr(call, "model_dump") else call for call in tool_calls]
        self.messages.append({"role": role_name(role), "content": checked_text(text), "tool_calls": checked_calls(tool_calls)})
        return self

    def add_logits_processor(self, processor: CustomLogitsProcessor) -> Self:
        """Append a function ``(logits, tokens) -> logits`` that sees every row of logits before sampling.

        `logits` is float32 ``[vocab_size]``, `tokens` holds the prompt and what was generated so far and is not to be changed. A function
        that changes `logits` in place may return None. It runs on the engine's thread; if it raises, this request alone ends with
        `ModelError`.
        """
        if not callable(processor):
            raise RequestValidationError(f"a logits processor is a function (logits, tokens) -> logits, got {processor!r}")
        self.logits_processors.append(processor)
        return self

    def set_tools(self, tools: Iterable[Tool | Mapping[str, Any]]) -> Self:
        """Set the tools that the chat template tells the model of; OpenAI-style dicts work too."""
        if not isinstance(tools, Iterable) or isinstance(tools, Mapping | str):
            raise RequestValidationError(f"set_tools takes a list of tools, got {tools!r}")
        self.tools = [Tool.from_dict(tool) if isinstance(tool, Mapping) else _checked_tool(tool) for tool in tools]
        return self

    def set_tool_choice(self, tool_choice: ToolChoice | NamedToolChoice | Tool | Mapping[str, Any] | str) -> Self:
        """Set how the model chooses among the tools: ``"auto"``, ``"none"``, ``"required"``, or a tool that it must call."""
        self.tool_choice = checked_tool_choice(tool_choice)
        return self

    def set_max_tool_rounds(self, max_tool_rounds: int) -> Self:
        """Set how often at most the model may be answered with the results of its calls, where these are made for it.

        0 leaves all calls to the caller. Unset, it is 256, as in mistral.rs.
        """
        if isinstance(max_tool_rounds, bool) or not isinstance(max_tool_rounds, int) or max_tool_rounds < 0:
            raise RequestValidationError(f"max_tool_rounds must be a whole number of at least 0, got {max_tool_rounds!r}")
        self.max_tool_rounds = max_tool_rounds
        return self

    def set_tool_dispatch_url(self, url: str, *, allow_private: bool = False) -> Self:
        """Send the calls of this request's tools that have no callback to a URL, and go on with what it answers.

        It gets ``{"name": ..., "arguments": {...}}`` as a POST, and answers with ``{"content": "..."}`` or plain text. Redirects are not
        followed. What goes wrong is told to the model.

        Parameters
        ----------
        allow_private
            Whether the host may be this machine or one of the local network. Otherwise the name is looked up, and the connection goes to
            the address that was checked.

        Raises
        ------
        RequestValidationError
            It is not http or https, or its host is an address that is not public.
        """
        from ..public_http import checked_url

        checked_url(url, allow_private=allow_private)
        self.tool_dispatch_url, self.tool_dispatch_private = url, allow_private
        return self

    def with_web_search_options(self, web_search_options: WebSearchOptions | Mapping[str, Any]) -> Self:
        """Let the model search the web for this request, where its builder has `with_search`.

        The tools ``search_the_web`` and ``website_content_extractor`` are offered to it, and its calls of them are answered.
        """
        self.web_search_options = WebSearchOptions.of(web_search_options)
        return self

    def set_constraint(self, constraint: Constraint | None) -> Self:
        """Set the shape that the answer must have; None for any."""
        if constraint is not None and not isinstance(constraint, Constraint):
            raise RequestValidationError(f"set_constraint takes a Constraint, for instance Constraint.regex('yes|no'), got {constraint!r}")
        self.constraint = constraint
        return self

    def return_logprobs(self, return_logprobs: bool = True) -> Self:
        """Ask for the log-probability of each token; `set_sampler_topn_logprobs` adds the most likely others."""
        self.logprobs = checked_flag("return_logprobs", return_logprobs)
        return self

    def with_truncate_sequence(self, truncate_sequence: bool = True) -> Self:
        """Cut a prompt that is longer than the context, at its start, rather than refuse it."""
        self.truncate_sequence = checked_flag("truncate_sequence", truncate_sequence)
        return self

    def with_timeout(self, seconds: float | None) -> Self:
        """Give up this many seconds after sending, wherever the request then is; None: never.

        What was generated by then is the `partial_response` of the `ModelError` that is raised. With tools that are called for the model,
        all rounds together have this time; a tool that runs when it is over is not interrupted.
        """
        is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
        if seconds is not None and not (is_number and 0 < seconds <= sys.float_info.max):
            raise RequestValidationError(f"with_timeout takes a number of seconds above 0, or None for no limit, got {seconds!r}")
        self.timeout = seconds
        return self

    def with_sampling(self, params: SamplingParams) -> Self:
        """Set all sampling parameters at once."""
        if not isinstance(params, SamplingParams):
            raise RequestValidationError(f"with_sampling takes SamplingParams, got {params!r}")
        self.sampling = params
        return self

    def set_deterministic_sampler(self) -> Self:
        """Sample greedily, with no penalty, bias, stop or limit."""
        return self.with_sampling(SamplingParams.deterministic())

    def set_sampler_temperature(self, temperature: float) -> Self:
        """Set the temperature; 0 is greedy."""
        self.sampling = replace(self.sampling, temperature=temperature)
        return self

    def set_sampler_topk(self, topk: int) -> Self:
        """Draw from the `topk` most likely tokens. A fresh builder is greedy until a temperature is set."""
        self.sampling = replace(self.sampling, top_k=topk)
        return self

    def set_sampler_topp(self, topp: float) -> Self:
        """Draw from the most likely tokens that make up `topp` of the probability."""
        self.sampling = replace(self.sampling, top_p=topp)
        return self

    def set_sampler_minp(self, minp: float) -> Self:
        """Drop tokens less likely than `minp` times the most likely one."""
        self.sampling = replace(self.sampling, min_p=minp)
        return self

    def set_sampler_topn_logprobs(self, top_n_logprobs: int) -> Self:
        """Report this many of the most likely tokens at each position, with `return_logprobs`."""
        self.sampling = replace(self.sampling, top_n_logprobs=top_n_logprobs)
        return self

    def set_sampler_frequency_penalty(self, frequency_penalty: float) -> Self:
        """Penalise tokens by how often they were generated."""
        self.sampling = replace(self.sampling, frequency_penalty=frequency_penalty)
        return self

    def set_sampler_presence_penalty(self, presence_penalty: float) -> Self:
        """Penalise tokens that were generated at all."""
        self.sampling = replace(self.sampling, presence_penalty=presence_penalty)
        return self

    def set_sampler_stop_toks(self, stop_toks: StopTokens) -> Self:
        """Set the strings or token ids that end the answer."""
        self.sampling = replace(self.sampling, stop_toks=stop_toks)
        return self

    def set_sampler_max_len(self, max_len: int) -> Self:
        """Set the most tokens to generate."""
        self.sampling = replace(self.sampling, max_len=max_len)
        return self

    def set_sampler_logits_bias(self, logits_bias: Mapping[int, float]) -> Self:
        """Set what is added to the logits of single tokens."""
        self.sampling = replace(self.sampling, logits_bias=logits_bias)
        return self

    def set_sampler_n_choices(self, n_choices: int) -> Self:
        """Set how many answers to generate."""
        self.sampling = replace(self.sampling, n_choices=n_choices)
        return self

    def set_sampler_dry_params(self, dry_params: DrySamplingParams) -> Self:
        """Set the parameters of DRY sampling."""
        self.sampling = replace(self.sampling, dry_params=dry_params)
        return self

    def template_messages(self) -> list[Message]:
        """The messages as chat templates read them: arguments of tool calls as objects, not as JSON text."""
        return [_with_parsed_arguments(message) if message.get("tool_calls") else message for message in self.messages]

    def template_tools(self) -> list[dict[str, Any]] | None:
        """The tools as chat templates read them, or None."""
        return [tool.to_dict() for tool in self.offered_tools()] or None

    def offered_tools(self) -> list[Tool]:
        """The tools that the model is told of.

        Raises
        ------
        RequestValidationError
            Two have one name, or the choice demands what is not there.
        """
        tools = [] if self.tool_choice is ToolChoice.NONE else self.tools
        names = [tool.function.name for tool in tools]
        if len(set(names)) < len(names):
            raise RequestValidationError(
                f"two tools are named {next(name for name in names if names.count(name) > 1)!r}; give each its own name"
            )
        if isinstance(self.tool_choice, NamedToolChoice) and self.tool_choice.name not in names:
            raise RequestValidationError(f"the tool choice demands {self.tool_choice.name!r}, but the tools are {names}")
        if self.tool_choice is ToolChoice.REQUIRED and not tools:
            raise RequestValidationError("the tool choice is 'required', but there are no tools; add them with set_tools")
        if tools and self.constraint is not None:
            raise RequestValidationError(
                "an answer cannot follow a constraint and call tools as well; set the tool choice 'none', or drop one"
            )
        return tools

    def demanded_tools(self) -> list[Tool]:
        """The tools of which one must be called; empty if none must."""
        if isinstance(self.tool_choice, NamedToolChoice):
            return [tool for tool in self.offered_tools() if tool.function.name == self.tool_choice.name]
        return self.offered_tools() if self.tool_choice is ToolChoice.REQUIRED else []


def _checked_tool(tool: object) -> Tool:
    if not isinstance(tool, Tool):
        remedy = "; give its attribute 'tool'" if isinstance(getattr(tool, "tool", None), Tool) else ""
        raise RequestValidationError(f"set_tools takes Tool objects or dicts in OpenAI's form, got {tool!r}{remedy}")
    return tool


def _with_parsed_arguments(message: Message) -> Message:
    return {**message, "tool_calls": [_parsed_call(call) for call in message["tool_calls"]]}


def _parsed_call(call: Mapping[str, Any]) -> dict[str, Any]:
    import json

    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return dict(call)
    try:
        arguments = json.loads(function["arguments"].strip() or "{}")  # some clients write nothing where there are none
    except (ValueError, RecursionError):
        return dict(call)
    return {**call, "function": {**function, "arguments": arguments}}
