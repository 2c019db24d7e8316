"""Tools that are called while a request runs, so that the caller gets the answer that the model gives in the end.

What the model may call comes from a `Toolbox`: callbacks of the builder, and `sources`, which are asked for each request. `ToolRounds` goes
with one request and says after each turn of the model whether its calls are answered here. `call_tools` makes the calls of one turn; agents
use it, too.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import RequestValidationError, ToolArgumentsError
from .public_http import send
from .requests import RequestBuilder, Tool, ToolChoice
from .responses import (
    AgenticToolCallRecord,
    CalledFunction,
    ChatCompletionChunkResponse,
    ChatCompletionResponse,
    CompletionTokensDetails,
    Usage,
)
from .threads import in_thread

if TYPE_CHECKING:
    from .loading.tokenizer import Tokenizer
    from .responses import ResponseMessage, ToolCallResponse

T = TypeVar("T")

DEFAULT_MAX_TOOL_ROUNDS = 256  # that of mistral.rs
DEFAULT_TOOL_TIMEOUT = 60.0
_LEAST_ROOM = 128  # tokens, for one result (half of them at most, see `result_fitter`), the words around it, and the next turn
_MAX_ERROR_CHARACTERS = 2000
_QUICK_CHARACTERS = 20_000  # tokenizing more than this would hold up an event loop noticeably
_log = logging.getLogger("pymistral")


@dataclass(frozen=True, kw_only=True)
class ToolCallback:
    """What is called when the model calls a tool.

    Parameters
    ----------
    function
        Takes the `CalledFunction` (name, and arguments as JSON text); returns text, or anything that has a JSON form. It may be async;
        one that is not runs in a thread. What it raises goes to the model as a message.
    tool
        How the model is told of it, in every request. None: requests that want it list it among their tools.
    timeout
        Seconds after which the model is told that it took too long; None for no limit. A thread cannot be stopped: it goes on unheard.
    """

    function: Callable[[CalledFunction], Any]
    tool: Tool | None = None
    timeout: float | None = DEFAULT_TOOL_TIMEOUT

    def __post_init__(self) -> None:
        refuse_generator(self.function)

    @property
    def is_async(self) -> bool:
        return is_async(self.function)


@dataclass(frozen=True)
class ToolResult:
    """What came of a tool call."""

    tool_call_id: str
    """The call that it answers."""
    tool_name: str
    """The tool that was called."""
    content: str
    """What the tool returned; if `is_error`, what went wrong."""
    is_error: bool = False
    """Whether the call failed."""

    @property
    def message(self) -> str:
        """The result as the model reads it."""
        return f"Error: {self.content}" if self.is_error else self.content


class ToolFailure(Exception):
    """Raised by a callback whose message is written for the model, and goes to it as it is."""


ToolSource = Callable[[RequestBuilder], Mapping[str, ToolCallback]]
"""Gives the tools that one request comes with, by their names."""


class Toolbox:
    """The tools that a model has for all requests.

    Parameters
    ----------
    callbacks
        Callbacks by the names of their tools.

    Attributes
    ----------
    sources
        Asked with every request for further tools; built-in tools that options of a request switch on register here. They must not refer to
        the model: it is closed when nobody refers to it any longer.
    closing
        Closed with the model: connections, processes.
    searches
        Whether web search is among the sources.
    """

    def __init__(self, callbacks: Mapping[str, ToolCallback] | None = None) -> None:
        self.callbacks = dict(callbacks or {})
        self.sources: list[ToolSource] = []
        self.closing = ExitStack()
        self.searches = False

    def for_request(self, request: RequestBuilder) -> dict[str, ToolCallback]:
        """The callbacks that a request may use. Later sources go before earlier ones, and all before the callbacks."""
        callbacks = dict(self.callbacks)
        for source in self.sources:
            callbacks.update(source(request))
        return callbacks

    def close(self) -> None:
        """Close what the tools hold."""
        self.closing.close()


class ToolRounds:
    """The rounds of one request: a turn of the model, the results of its calls, the next turn.

    Parameters
    ----------
    request
        The request; it must be the caller's own copy, for it grows.
    toolbox
        The model's tools.
    fit
        Cuts a result to a number of tokens.
    context
        The model's context, in tokens.
    """

    def __init__(self, request: RequestBuilder, toolbox: Toolbox, fit: Callable[[str, int], str], context: int) -> None:
        self.request = request
        self._fit, self._context = fit, context
        self._left = DEFAULT_MAX_TOOL_ROUNDS if request.max_tool_rounds is None else request.max_tool_rounds
        self._rounds = 0
        self._usages: list[Usage] = []
        self._records: list[AgenticToolCallRecord] = []
        self._held: list[ChatCompletionChunkResponse] = []
        self._for_the_caller = False
        self._callbacks: dict[str, ToolCallback] = {}
        # Tools and a constraint exclude each other, and what several answers call could not go into one conversation.
        if request.tool_choice is not ToolChoice.NONE and request.constraint is None and request.sampling.n_choices == 1:
            self._callbacks = toolbox.for_request(request)
            if request.web_search_options is not None and not toolbox.searches:
                raise RequestValidationError("the request has web search options, but the model's builder has no with_search()")
            offer_tools(request, self._callbacks)
            if url := request.tool_dispatch_url:
                dispatched = dispatch_callback(url, request.tool_dispatch_private)
                names = (tool.function.name for tool in request.tools)
                self._callbacks.update({name: dispatched for name in names if name not in self._callbacks})

    @cached_property
    def deadline(self) -> float | None:
        """The value of `time.monotonic` at which to give up. Time runs from when it is first asked for: the first turn."""
        return None if self.request.timeout is None else monotonic() + self.request.timeout

    def goes_on(self, response: ChatCompletionResponse) -> bool:
        """Whether the calls of a turn are answered here, by `run`; else the response is for the caller.

        So it is if there are no rounds left, or no room in the context for the results and another turn: a model that calls for ever ends
        with what it had.
        """
        choice = response.choices[0]
        calls = choice.message.tool_calls or []
        has_room = self._context - response.usage.total_tokens >= _LEAST_ROOM * len(calls)
        are_known = all(call.function.name in self._callbacks for call in calls)
        return self._left > 0 and has_room and choice.finish_reason == "tool_calls" and are_known

    async def run(self, response: ChatCompletionResponse) -> None:
        """Make the calls of a turn, side by side, and put them with their results into the request."""
        message = response.choices[0].message
        calls = message.tool_calls or []
        fit = result_fitter(response.usage, self._context, len(calls), self._fit)
        results = await all_results(call_tools(self._callbacks, calls, fit))
        add_round(self.request, message, results)
        self.request.set_tool_choice(ToolChoice.AUTO)  # what was demanded has been called
        for call, result in zip(calls, results, strict=True):
            self._records.append(
                AgenticToolCallRecord(
                    round=self._rounds, name=call.function.name, arguments=call.function.arguments, result_content=result.message
                )
            )
        self._usages.append(response.usage)
        self._left -= 1
        self._rounds += 1
        self._held.clear()

    def whole(self, response: ChatCompletionResponse) -> ChatCompletionResponse:
        """The last turn's response, with the calls and the usage of all rounds."""
        if self._rounds:
            response.usage = _sum(*self._usages, response.usage)
            response.agentic_tool_calls = self._records
        return response

    def shown(self, chunk: ChatCompletionChunkResponse) -> list[ChatCompletionChunkResponse]:
        """What of a turn the caller sees at once. Calls that may be answered here are held back until the turn has ended."""
        (choice,) = chunk.choices
        calls = choice.delta.tool_calls
        if not calls or self._for_the_caller or not self._callbacks or not self._left:
            return [chunk]
        if any(call.function.name is not None and call.function.name not in self._callbacks for call in calls):
            self._for_the_caller = True  # one call for the caller: then all are
            held, self._held = self._held, []
            return [*held, chunk]
        self._held.append(_with_delta(chunk, content=None, reasoning_content=None))
        has_text = choice.delta.content or choice.delta.reasoning_content
        return [_with_delta(chunk, tool_calls=None)] if has_text else []

    def last_shown(self, chunk: ChatCompletionChunkResponse) -> list[ChatCompletionChunkResponse]:
        """What was held back of the last turn, and its last chunk with the usage of all rounds."""
        if chunk.usage is not None:
            chunk.usage = _sum(*self._usages, chunk.usage)
        held, self._held = self._held, []
        return [*held, chunk]


def _with_delta(chunk: ChatCompletionChunkResponse, **changes: None) -> ChatCompletionChunkResponse:
    (choice,) = chunk.choices
    return chunk.model_copy(update={"choices": [choice.model_copy(update={"delta": choice.delta.model_copy(update=changes)})]})


def is_async(function: object) -> bool:
    """Whether calling it gives something to await."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def refuse_generator(function: object) -> None:
    """Raises RequestValidationError if calling it gives what yields: a model reads one result, when all of it is there."""
    for called in (function, getattr(function, "__call__", None)):  # noqa: B004
        if inspect.isgeneratorfunction(called) or inspect.isasyncgenfunction(called):
            name = getattr(function, "__name__", type(function).__name__)
            raise RequestValidationError(f"the tool {name!r} yields, but a tool returns its result; return a list or a text instead")


def offer_tools(request: RequestBuilder, callbacks: Mapping[str, ToolCallback]) -> None:
    """Add the tools of callbacks to a request, unless it describes them itself."""
    own = {tool.function.name for tool in request.tools}
    request.tools = [*request.tools, *(c.tool for c in callbacks.values() if c.tool is not None and c.tool.function.name not in own)]


def add_round(request: RequestBuilder, message: ResponseMessage, results: Sequence[ToolResult]) -> None:
    """Put a turn with calls, and their results, into the conversation."""
    request.add_message_with_tool_call("assistant", message.content or "", message.tool_calls or [])
    if message.reasoning_content:
        request.messages[-1]["reasoning_content"] = message.reasoning_content
    for result in results:
        request.add_tool_message(result.message, result.tool_call_id)


async def call_tools(
    callbacks: Mapping[str, ToolCallback], calls: Sequence[ToolCallResponse], fit: Callable[[str], str], *, parallel: bool = True
) -> AsyncIterator[tuple[int, ToolResult]]:
    """Make the calls of a turn; give each call's index and result as they come. Nothing that a tool does is raised here."""
    if not parallel:
        for index, call in enumerate(calls):
            yield index, await _call_tool(callbacks.get(call.function.name), call, fit)
        return
    index_of = {asyncio.ensure_future(_call_tool(callbacks.get(call.function.name), call, fit)): i for i, call in enumerate(calls)}
    pending = set(index_of)
    try:
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=index_of.__getitem__):
                yield index_of[task], task.result()
    finally:
        for task in pending:
            task.cancel()


async def all_results(results: AsyncIterator[tuple[int, ToolResult]]) -> list[ToolResult]:
    """The results of a turn, in the order of its calls."""
    return [result for _, result in sorted([pair async for pair in results], key=lambda pair: pair[0])]


async def _call_tool(callback: ToolCallback | None, call: ToolCallResponse, fit: Callable[[str], str]) -> ToolResult:
    name = call.function.name
    if callback is None:
        return ToolResult(call.id, name, f"there is no tool {name!r}", is_error=True)
    work = asyncio.ensure_future(_outcome(callback, call.function))
    try:
        await asyncio.wait({work}, timeout=callback.timeout)  # unlike wait_for, it does not wait for a tool that does not want to end
        if not work.done():
            text, failed = f"{name} did not answer within {callback.timeout:g} s", True
        elif work.cancelled():
            text, failed = f"{name} was cancelled", True
        else:
            text, failed = work.result()
    finally:
        work.cancel()
    if failed:
        _log.warning("a tool call failed: %s", text[:_MAX_ERROR_CHARACTERS])
    return ToolResult(call.id, name, await in_thread(fit, text) if len(text) > _QUICK_CHARACTERS else fit(text), failed)


async def _outcome(callback: ToolCallback, function: CalledFunction) -> tuple[str, bool]:
    """The text of what a callback returns or raises, and whether it raised."""
    try:
        if callback.is_async:
            return result_text(await callback.function(function)), False
        result = await in_thread(callback.function, function)
        return result_text(await result if inspect.isawaitable(result) else result), False
    except (ToolArgumentsError, ToolFailure) as error:
        return _encodable(str(error)), True
    except (Exception, SystemExit) as error:
        return f"{function.name} failed: {_encodable(_described(error))}"[:_MAX_ERROR_CHARACTERS], True


def result_text(result: Any) -> str:
    """A tool's result as the model reads it: text as it is, anything else as JSON."""
    if isinstance(result, str):
        return _encodable(result)
    from pydantic_core import PydanticSerializationError, to_json

    try:
        return to_json(result, fallback=str, inf_nan_mode="constants").decode()
    except (PydanticSerializationError, UnicodeEncodeError):  # for halves of surrogate pairs, which json writes as they are
        return _encodable(json.dumps(_jsonable(result), ensure_ascii=False, separators=(",", ":")))


def _jsonable(result: Any) -> Any:
    from pydantic_core import to_jsonable_python

    try:
        return to_jsonable_python(result, fallback=str, inf_nan_mode="constants")
    except UnicodeEncodeError:  # it lets halves of surrogate pairs through in texts, but not in keys
        return to_jsonable_python(_with_encodable_keys(result), fallback=str, inf_nan_mode="constants")


def _with_encodable_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {_encodable(key) if isinstance(key, str) else key: _with_encodable_keys(item) for key, item in value.items()}
    return [_with_encodable_keys(item) for item in value] if isinstance(value, list | tuple) else value


def _encodable(text: str) -> str:
    """Text without halves of surrogate pairs, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _described(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # its __str__ is broken, too
        return type(error).__name__


def result_fitter(usage: Usage, context: int, calls: int, fit: Callable[[str, int], str]) -> Callable[[str], str]:
    """What cuts the results of a turn so that they take at most half of what is left of the context."""
    room = max((context - usage.total_tokens) // (2 * calls), 16)
    return lambda text: fit(text, room)


def cut_to_tokens(tokenizer: Tokenizer, text: str, tokens: int) -> str:
    """The start of a text, at most so many tokens, and a note of how much is missing."""
    start = text[: 8 * tokens]  # more characters than so many tokens have, as a rule
    encoded = tokenizer.encode(start, add_special_tokens=False)
    fits = len(encoded) <= tokens
    kept = start if fits else tokenizer.decode(encoded[:tokens], skip_special_tokens=False).rstrip("\ufffd")
    return text if len(kept) >= len(text) else f"{kept}\n[cut: the first {len(kept)} of {len(text)} characters]"


def dispatch_callback(url: str, allow_private: bool) -> ToolCallback:
    """What posts calls to a URL, as mistral.rs does: ``{"name": ..., "arguments": {...}}`` there, ``{"content": ...}`` or text back."""

    def post(function: CalledFunction) -> str:
        try:
            arguments = json.loads(function.arguments)
        except ValueError:
            arguments = function.arguments
        body = json.dumps({"name": function.name, "arguments": arguments}).encode()
        headers = {"Content-Type": "application/json"}
        reply = send("POST", url, body, headers, allow_private=allow_private, timeout=DEFAULT_TOOL_TIMEOUT)
        if reply.status != 200:
            raise OSError(f"the tool server answered with HTTP status {reply.status}")
        text = reply.body.decode(errors="replace")
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            return text
        if isinstance(content, dict) and isinstance(content.get("content"), str):
            return str(content["content"])
        return content if isinstance(content, str) else text

    return ToolCallback(function=post)


def _sum(*usages: Usage) -> Usage:
    """The usage of several turns."""
    if len(usages) == 1:
        return usages[0]

    def total(name: str) -> Any:
        return sum(getattr(usage, name) for usage in usages)

    def rate(name: str, *times: str) -> float:
        seconds = [sum(getattr(usage, time) for time in times) for usage in usages]
        tokens = sum(getattr(usage, name) * s for usage, s in zip(usages, seconds, strict=True))
        return float(tokens / sum(seconds)) if sum(seconds) > 0 else 0.0

    prompt, completion = "total_prompt_time_sec", "total_completion_time_sec"
    cached = sum(usage.prompt_tokens_details.cached_tokens for usage in usages)
    guesses = [usage.completion_tokens_details for usage in usages]
    drafted, accepted = sum(guess.drafted_tokens for guess in guesses), sum(guess.accepted_tokens for guess in guesses)
    return Usage(
        **{name: total(name) for name in ("completion_tokens", "prompt_tokens", "total_tokens", "total_time_sec", prompt, completion)},
        prompt_tokens_details=usages[0].prompt_tokens_details.model_copy(update={"cached_tokens": cached}),
        completion_tokens_details=CompletionTokensDetails(drafted_tokens=drafted, accepted_tokens=accepted),
        avg_tok_per_sec=rate("avg_tok_per_sec", prompt, completion),
        avg_prompt_tok_per_sec=rate("avg_prompt_tok_per_sec", prompt),
        avg_compl_tok_per_sec=rate("avg_compl_tok_per_sec", completion),
    )


def checked_timeout(timeout: object) -> float | None:
    """A tool's timeout, checked."""
    if timeout is None or (isinstance(timeout, int | float) and not isinstance(timeout, bool) and timeout > 0):
        return timeout
    raise RequestValidationError(f"a tool's timeout is a number of seconds above 0, or None for no limit, got {timeout!r}")
