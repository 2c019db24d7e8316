"""Agents: a model, its tools, and a conversation that goes on by itself until the model has answered."""

from __future__ import annotations

import copy
import weakref
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import PymistralError, RequestValidationError, counted
from ..model import Model
from ..requests import RequestBuilder, Tool, ToolChoice
from ..requests.enums import PlainEnum
from ..requests.messages import checked_flag
from ..requests.tools import NamedToolChoice, checked_tool_choice
from ..responses import CalledFunction, ChatCompletionResponse, ToolCallResponse
from ..tool_rounds import DEFAULT_TOOL_TIMEOUT, ToolCallback, ToolResult, add_round, call_tools, is_async, offer_tools, result_fitter
from .tool import FunctionTool, tool_callback

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self


class AgentStopReason(PlainEnum):
    """Why an agent stopped."""

    TEXT_RESPONSE = "text_response"
    """The model answered in text."""
    MAX_ITERATIONS = "max_iterations"
    """The model still called tools after `max_iterations` turns."""
    NO_ACTION = "no_action"
    """The model neither said anything nor called a tool."""
    ERROR = "error"
    """A turn failed; the response's `error` says why."""


@dataclass(frozen=True)
class AgentStep:
    """One turn of the model, and what came of the calls in it."""

    response: ChatCompletionResponse
    tool_calls: list[ToolCallResponse] = field(default_factory=list)
    tool_results: list[ToolResult] = field(default_factory=list)
    """In the order of the calls."""


@dataclass(frozen=True)
class AgentResponse:
    """What came of a run."""

    final_text: str | None
    """The model's answer, if it gave one."""
    stop_reason: AgentStopReason
    steps: list[AgentStep]
    iterations: int
    """How many turns the model had."""
    error: PymistralError | None = None
    """What went wrong, if the stop reason is ERROR."""


class AgentEvent:
    """Something that happens during a run: one of the classes below."""


@dataclass(frozen=True)
class AgentTextDelta(AgentEvent):
    """The model said something."""

    text: str


@dataclass(frozen=True)
class AgentToolCalls(AgentEvent):
    """The model called tools, which are at work now."""

    tool_calls: list[ToolCallResponse]


@dataclass(frozen=True)
class AgentToolResult(AgentEvent):
    """A tool has ended. Tools that work side by side end in any order."""

    result: ToolResult


@dataclass(frozen=True)
class AgentComplete(AgentEvent):
    """The run has ended; always the last event."""

    response: AgentResponse


class Agent:
    """A model that calls tools until it can answer; made by `AgentBuilder`.

    It remembers the conversation: each run goes on where the last one that was completed ended. A run that fails, is cancelled or left
    early leaves no trace. One run at a time: conversations side by side want an agent each.
    """

    def __init__(
        self,
        model: Model,
        callbacks: Mapping[str, ToolCallback],
        *,
        system_prompt: str | None,
        max_iterations: int,
        tool_choice: ToolChoice | NamedToolChoice,
        parallel_tool_execution: bool,
    ) -> None:
        self._model = model
        self._callbacks = dict(callbacks)
        self._system_prompt = system_prompt
        self._max_iterations = max_iterations
        self._tool_choice = tool_choice
        self._parallel = parallel_tool_execution
        self._conversation = RequestBuilder()
        self._at_work: Callable[[], AgentStream | None] = lambda: None
        self.reset()

    @property
    def model(self) -> Model:
        """The model that it runs on."""
        return self._model

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation so far, as chat templates read it."""
        return copy.deepcopy(self._conversation.messages)

    def reset(self) -> None:
        """Forget the conversation; the system prompt stays."""
        self._conversation = RequestBuilder()
        if self._system_prompt is not None:
            self._conversation.add_message("system", self._system_prompt)

    async def run(self, prompt: str) -> AgentResponse:
        """Give the model a message; run the tools that it calls; return what it says in the end.

        What goes wrong in a turn ends the run with `AgentStopReason.ERROR`. What goes wrong in a tool goes back to the model.

        Raises
        ------
        RequestValidationError
            The prompt is no text, or the agent is at work on another one.
        """
        async with self.run_stream(prompt) as stream:
            async for event in stream:
                if isinstance(event, AgentComplete):
                    return event.response
        raise AssertionError("a run ends with AgentComplete")

    def run_stream(self, prompt: str) -> AgentStream:
        """As `run`, event by event: ``async for event in agent.run_stream(...)``. Leaving the loop ends the run."""
        request = RequestBuilder()
        request.messages = list(self._conversation.messages)
        return AgentStream(self, request.add_message("user", prompt))

    async def _events(self, request: RequestBuilder) -> AsyncGenerator[AgentEvent, None]:
        steps: list[AgentStep] = []
        try:
            callbacks = {**self._model._toolbox.for_request(request), **self._callbacks}
            offer_tools(request, callbacks)
            request.set_tool_choice(self._tool_choice)
            while len(steps) < self._max_iterations:
                async with self._model._stream_turn(request) as turn:
                    async for chunk in turn:
                        if text := chunk.choices[0].delta.content:
                            yield AgentTextDelta(text)
                    response = turn.whole()
                message = response.choices[0].message
                calls = message.tool_calls or []
                if not calls:
                    steps.append(AgentStep(response))
                    yield self._complete(request, message.content or "", steps)
                    return
                yield AgentToolCalls(calls)
                fit = result_fitter(response.usage, self._model.max_sequence_length(), len(calls), self._model._cut)
                results: dict[int, ToolResult] = {}
                async for index, result in call_tools(callbacks, calls, fit, parallel=self._parallel):
                    results[index] = result
                    yield AgentToolResult(result)
                in_order = [results[index] for index in range(len(calls))]
                steps.append(AgentStep(response, calls, in_order))
                add_round(request, message, in_order)
                request.set_tool_choice(ToolChoice.AUTO)  # what was demanded has been called
        except PymistralError as error:
            yield AgentComplete(AgentResponse(None, AgentStopReason.ERROR, steps, len(steps) + 1, error))
            return
        # Templates want an answer before the user speaks again.
        request.add_message("assistant", f"(stopped after {counted(len(steps), 'round')} of tool calls)")
        self._conversation = request
        yield AgentComplete(AgentResponse(None, AgentStopReason.MAX_ITERATIONS, steps, len(steps)))

    def _complete(self, request: RequestBuilder, text: str, steps: list[AgentStep]) -> AgentComplete:
        self._conversation = request.add_message("assistant", text)
        reason = AgentStopReason.TEXT_RESPONSE if text.strip() else AgentStopReason.NO_ACTION
        return AgentComplete(AgentResponse(text if text.strip() else None, reason, steps, len(steps)))

    def _begin(self, stream: AgentStream) -> AsyncGenerator[AgentEvent, None]:
        other = self._at_work()
        if other is not None and other.running:
            raise RequestValidationError("the agent is at work on another prompt; wait for it, or build a second agent")
        self._at_work = weakref.ref(stream)
        return self._events(stream.request)


class AgentStream:
    """A run as it happens: an async iterator of events, and a context manager that ends what is left of it."""

    def __init__(self, agent: Agent, request: RequestBuilder) -> None:
        self.request = request
        self.running = False
        self._agent = agent
        self._events: AsyncGenerator[AgentEvent, None] | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> AgentEvent:
        if self._events is None:
            self._events = self._agent._begin(self)
            self.running = True
        try:
            event = await self._events.__anext__()
        except BaseException:
            self.running = False
            raise
        if isinstance(event, AgentComplete):
            self.running = False
        return event

    async def aclose(self) -> None:
        """End the run."""
        self.running = False
        if self._events is not None:
            await self._events.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()


class AgentBuilder:
    """Puts an agent together.

    Parameters
    ----------
    model
        The model to use, a `Model` or a `BlockingModel`. The agent does not close it. Tools that the model has of its own (callbacks of its
        builder, MCP servers) are the agent's, too.

    Examples
    --------
    >>> agent = AgentBuilder(model).with_system_prompt("You are helpful.").with_tool(get_weather).with_max_iterations(10).build()
    """

    def __init__(self, model: Any) -> None:
        inner = model if isinstance(model, Model) else getattr(model, "inner", None)
        if not isinstance(inner, Model):
            remedy = "; build it first" if hasattr(model, "build") else ""
            raise RequestValidationError(f"AgentBuilder takes a Model or a BlockingModel, got a {type(model).__name__}{remedy}")
        self._model = inner
        self._callbacks: dict[str, ToolCallback] = {}
        self._system_prompt: str | None = None
        self._max_iterations = 10
        self._tool_choice: ToolChoice | NamedToolChoice = ToolChoice.AUTO
        self._parallel = True

    def with_system_prompt(self, system_prompt: str) -> Self:
        """Set what the model is told before all else."""
        self._system_prompt = system_prompt
        return self

    def with_tool(self, tool: FunctionTool[..., Any], *, timeout: float | None = DEFAULT_TOOL_TIMEOUT) -> Self:
        """Add a function that `tool` decorates.

        Parameters
        ----------
        timeout
            Seconds after which the model is told that it took too long; None for no limit.
        """
        if not isinstance(tool, FunctionTool):
            raise RequestValidationError(f"with_tool takes a function with @tool, got {tool!r}; with_sync_tool takes a Tool and a callback")
        return self._add(tool.tool, tool, timeout)

    def with_sync_tool(
        self, tool: Tool, callback: Callable[[CalledFunction], Any], *, timeout: float | None = DEFAULT_TOOL_TIMEOUT
    ) -> Self:
        """Add a tool and the function behind it, which takes the `CalledFunction` and runs in a thread of its own."""
        if is_async(callback):
            raise RequestValidationError(f"with_sync_tool got the async function {callback!r}; with_async_tool takes it")
        return self._add(tool, callback, timeout)

    def with_async_tool(
        self, tool: Tool, callback: Callable[[CalledFunction], Any], *, timeout: float | None = DEFAULT_TOOL_TIMEOUT
    ) -> Self:
        """Add a tool and the async function behind it, which takes the `CalledFunction`."""
        if not is_async(callback):
            raise RequestValidationError(f"with_async_tool takes an async function, got {callback!r}; with_sync_tool takes others")
        return self._add(tool, callback, timeout)

    def with_max_iterations(self, max_iterations: int) -> Self:
        """Set how many turns at most the model has in a run."""
        if isinstance(max_iterations, bool) or not isinstance(max_iterations, int) or max_iterations < 1:
            raise RequestValidationError(f"max_iterations must be a whole number of at least 1, got {max_iterations!r}")
        self._max_iterations = max_iterations
        return self

    def with_parallel_tool_execution(self, parallel_tool_execution: bool = True) -> Self:
        """Set whether the calls of one turn are made side by side, as they are by default, or one after the other."""
        self._parallel = checked_flag("parallel_tool_execution", parallel_tool_execution)
        return self

    def with_tool_choice(self, tool_choice: ToolChoice | NamedToolChoice | Tool | Mapping[str, Any] | str) -> Self:
        """Set how the model chooses among the tools. What is demanded must be called in the first turn of a run; then the model decides."""
        self._tool_choice = checked_tool_choice(tool_choice)
        return self

    def build(self) -> Agent:
        """The agent. The builder can go on to make others."""
        return Agent(
            self._model,
            self._callbacks,
            system_prompt=self._system_prompt,
            max_iterations=self._max_iterations,
            tool_choice=self._tool_choice,
            parallel_tool_execution=self._parallel,
        )

    def _add(self, tool: Tool, callback: Callable[..., Any], timeout: float | None) -> Self:
        if not isinstance(tool, Tool):
            remedy = "; with_tool takes it" if isinstance(tool, FunctionTool) else ""
            raise RequestValidationError(f"a tool must be a Tool, got {tool!r}{remedy}")
        name = tool.function.name
        if name in self._callbacks:
            raise RequestValidationError(f"two tools are named {name!r}; give each its own name")
        self._callbacks[name] = tool_callback(callback, tool, timeout)
        return self
