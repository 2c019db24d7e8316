"""The model for code without an event loop, or beside one: notebooks, scripts, threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from queue import SimpleQueue
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

from .answer import Answer, Completion
from .builders.common import Buildable
from .engine.types import Event
from .errors import ModelLoadError
from .model import Model
from .model_group import ModelSource, ModelStatus
from .quantization.isq import IsqBits, IsqType
from .requests import ChatRequest, RequestBuilder, SamplingParams, Tool
from .requests.messages import checked_tokens
from .requests.structured import StructuredOutput
from .responses import ChatCompletionChunkResponse, ChatCompletionResponse
from .threads import Pumped, run_to_end
from .tool_rounds import ToolRounds

if TYPE_CHECKING:
    from types import TracebackType

    import numpy as np
    from numpy.typing import NDArray
    from pydantic import TypeAdapter
    from typing_extensions import Self

    from .agents.agent import Agent, AgentBuilder, AgentEvent, AgentResponse, AgentStream
    from .engine import RequestHandle

T = TypeVar("T")


class BlockingModel:
    """A model whose methods wait for their results: `Model` without ``await``.

    It needs no event loop and starts none, so it works in a notebook, inside a running loop (which it holds up, as anything that blocks
    does) and in any number of threads at once. Ctrl-C cancels the request that is being waited for.

    Parameters
    ----------
    model
        The model to use; closing the one closes the other.
    """

    def __init__(self, model: Model) -> None:
        self._model = model

    @classmethod
    def from_builder(cls, builder: Buildable) -> Self:
        """Load the model that a builder describes.

        Raises
        ------
        ModelLoadError
            The model cannot be found, fetched, parsed or built.
        """
        if not isinstance(builder, Buildable):
            raise ModelLoadError(f"from_builder takes a builder, such as ModelBuilder(...), got {builder!r}")
        return cls(builder.load())

    @property
    def inner(self) -> Model:
        """The asynchronous model behind it."""
        return self._model

    def chat(self, message: str, *, model_id: str | None = None) -> str:
        """As `Model.chat`."""
        return self.send_chat_request(message, model_id=model_id).choices[0].message.content or ""

    def send_chat_request(self, request: ChatRequest, *, model_id: str | None = None) -> ChatCompletionResponse:
        """As `Model.send_chat_request`."""
        model = self._model._member(model_id)
        rounds = model._tool_rounds(RequestBuilder.of(request))
        while rounds.goes_on(response := self._turn(model, rounds)):
            run_to_end(rounds.run(response))
        return rounds.whole(response)

    def _turn(self, model: Model, rounds: ToolRounds) -> ChatCompletionResponse:
        prepared = model._prepare(rounds)
        completion = Completion()
        handle = model._engine.submit(prepared.request, completion.on_event)
        try:
            completion.done.result()
        except BaseException:
            handle.cancel()
            raise
        return prepared.answer.response(completion.events)

    def generate_structured(self, type: type[T] | TypeAdapter[T], request: ChatRequest, *, model_id: str | None = None) -> T:
        """As `Model.generate_structured`."""
        output = StructuredOutput[T](type)
        builder = output.constrain(request)
        return output.read(builder, self.send_chat_request(builder, model_id=model_id))

    def stream_chat_request(self, request: ChatRequest, *, model_id: str | None = None) -> BlockingChatStream:
        """As `Model.stream_chat_request`, with a plain ``for`` and ``with``."""
        model = self._model._member(model_id)
        return BlockingChatStream(model, model._tool_rounds(RequestBuilder.of(request)))

    def tokenize(
        self,
        text_or_messages: ChatRequest,
        *,
        tools: Sequence[Tool | Mapping[str, Any]] | None = None,
        add_special_tokens: bool = True,
        add_generation_prompt: bool = True,
        enable_thinking: bool | None = None,
        model_id: str | None = None,
    ) -> list[int]:
        """As `Model.tokenize`."""
        model = self._model._member(model_id)
        return model._tokens_of(text_or_messages, tools, add_special_tokens, add_generation_prompt, enable_thinking)

    def detokenize(self, tokens: Sequence[int], *, skip_special_tokens: bool = True, model_id: str | None = None) -> str:
        """As `Model.detokenize`."""
        return self._model._member(model_id)._text_of(tokens, skip_special_tokens)

    def logits(self, tokens: Sequence[int], *, model_id: str | None = None) -> NDArray[np.float32]:
        """As `Model.logits`."""
        return self._model._member(model_id)._engine.logits(checked_tokens(tokens)).result()

    def send_raw_chat_request(self, request: ChatRequest, *, model_id: str | None = None) -> tuple[NDArray[np.float32], list[int]]:
        """As `Model.send_raw_chat_request`."""
        tokens = self.tokenize(RequestBuilder.of(request), model_id=model_id)
        return self.logits(tokens, model_id=model_id), tokens

    def re_isq_model(self, isq: IsqType | IsqBits | str | int, *, model_id: str | None = None) -> None:
        """As `Model.re_isq_model`."""
        self._model._member(model_id)._re_isq(isq)

    def config(self, *, model_id: str | None = None) -> dict[str, Any]:
        """As `Model.config`."""
        return self._model.config(model_id=model_id)

    def max_sequence_length(self, *, model_id: str | None = None) -> int:
        """As `Model.max_sequence_length`."""
        return self._model.max_sequence_length(model_id=model_id)

    @property
    def generation_defaults(self) -> SamplingParams:
        """As `Model.generation_defaults`."""
        return self._model.generation_defaults

    def list_models(self) -> list[str]:
        """As `Model.list_models`."""
        return self._model.list_models()

    def list_models_with_status(self) -> list[tuple[str, ModelStatus]]:
        """As `Model.list_models_with_status`."""
        return self._model.list_models_with_status()

    def is_model_loaded(self, model_id: str) -> bool:
        """As `Model.is_model_loaded`."""
        return self._model.is_model_loaded(model_id)

    def get_default_model_id(self) -> str:
        """As `Model.get_default_model_id`."""
        return self._model.get_default_model_id()

    def set_default_model_id(self, model_id: str) -> None:
        """As `Model.set_default_model_id`."""
        self._model.set_default_model_id(model_id)

    def add_model(self, model_id: str, builder: ModelSource) -> None:
        """As `Model.add_model`."""
        self._model._add_model(model_id, builder)

    def remove_model(self, model_id: str) -> None:
        """As `Model.remove_model`."""
        self._model._remove_model(model_id)

    def unload_model(self, model_id: str) -> None:
        """As `Model.unload_model`."""
        self._model._unload_model(model_id)

    def reload_model(self, model_id: str) -> None:
        """As `Model.reload_model`."""
        self._model._reload_model(model_id)

    def close(self) -> None:
        """As `Model.close`."""
        self._model.close_now()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._model!r})"


class BlockingChatStream:
    """An answer as it is generated: an iterator of chunks, and a context manager that cancels what is left.

    The request is sent when the first chunk is asked for.
    """

    def __init__(self, model: Model, rounds: ToolRounds) -> None:
        self._model = model
        self._rounds = rounds
        self._answer: Answer | None = None
        self._inbox: SimpleQueue[Event] | None = None
        self._handle: RequestHandle | None = None
        self._chunks: deque[ChatCompletionChunkResponse] = deque()
        self._reading = Lock()
        self._closed = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> ChatCompletionChunkResponse:
        if not self._reading.acquire(blocking=False):
            raise RuntimeError("two threads read the same stream; give each its own")
        try:
            while not self._chunks:
                if self._closed:
                    raise StopIteration
                self._next_event()
            return self._chunks.popleft()
        except BaseException:
            self.close()
            raise
        finally:
            self._reading.release()

    def _next_event(self) -> None:
        if self._inbox is None or self._answer is None:
            self._inbox, self._answer = self._start()
        if self._handle is not None:
            self._handle.check_process()
        chunk = self._answer.chunk(self._inbox.get())
        if chunk is None:
            return
        if not self._answer.complete:
            self._chunks.extend(self._rounds.shown(chunk))
        elif self._rounds.goes_on(response := self._answer.whole()):
            run_to_end(self._rounds.run(response))
            self._inbox = None  # the next turn has one of its own
        else:
            self._chunks.extend(self._rounds.last_shown(chunk))
            self._closed = True

    def _start(self) -> tuple[SimpleQueue[Event], Answer]:
        prepared = self._model._prepare(self._rounds)
        inbox: SimpleQueue[Event] = SimpleQueue()
        self._handle = self._model._engine.submit(prepared.request, inbox.put)
        return inbox, prepared.answer.continuing(self._answer)

    def close(self) -> None:
        """Stop: cancel the request if it still runs."""
        self._closed = True
        self._chunks.clear()
        if self._handle is not None:
            self._handle.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class BlockingAgent:
    """An agent whose methods wait for their results: `Agent` without ``await``.

    Parameters
    ----------
    agent
        The agent to use.

    Examples
    --------
    >>> agent = BlockingAgent.from_builder(AgentBuilder(model).with_tool(get_weather))
    >>> print(agent.run("What's the weather in NYC?").final_text)
    """

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    @classmethod
    def from_builder(cls, builder: AgentBuilder) -> Self:
        """The agent that a builder describes; its model may be a `BlockingModel`."""
        return cls(builder.build())

    @property
    def inner(self) -> Agent:
        """The asynchronous agent behind it."""
        return self._agent

    @property
    def model(self) -> Model:
        """As `Agent.model`."""
        return self._agent.model

    @property
    def messages(self) -> list[dict[str, Any]]:
        """As `Agent.messages`."""
        return self._agent.messages

    def reset(self) -> None:
        """As `Agent.reset`."""
        self._agent.reset()

    def run(self, prompt: str) -> AgentResponse:
        """As `Agent.run`."""
        return run_to_end(self._agent.run(prompt))

    def run_stream(self, prompt: str) -> BlockingAgentStream:
        """As `Agent.run_stream`, with a plain ``for`` and ``with``."""
        return BlockingAgentStream(self._agent.run_stream(prompt))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._agent!r})"


class BlockingAgentStream:
    """A run as it happens: an iterator of events, and a context manager that ends what is left of it."""

    def __init__(self, stream: AgentStream) -> None:
        self._events: Pumped[AgentEvent] = Pumped(lambda: stream)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> AgentEvent:
        return next(self._events)

    def close(self) -> None:
        """End the run."""
        self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
