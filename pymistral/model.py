"""The model, for code that runs in an event loop."""

from __future__ import annotations

import asyncio
import copy
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .answer import Answer, Completion
from .engine.types import EngineRequest, Event
from .errors import ModelLoadError, RequestValidationError
from .loading.chat_template import ChatTemplate
from .requests import ChatRequest, RequestBuilder, SamplingParams, Tool
from .requests.messages import checked_text
from .responses import ChatCompletionChunkResponse, ChatCompletionResponse

if TYPE_CHECKING:
    from types import TracebackType

    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Self

    from .engine import Engine, RequestHandle
    from .loading.tokenizer import Tokenizer

_QUICK_CHARACTERS = 20_000  # tokenizing more than this would hold up an event loop noticeably


class Model:
    """A loaded model. Builders make it; it can be used from any number of tasks, event loops and threads at once.

    Use it as ``async with await ModelBuilder(...).build() as model:``, or `close` it in the end.

    Parameters
    ----------
    engine
        The engine that runs it. The model owns it, and closes it.
    tokenizer
        Its tokenizer.
    model_id
        The name that responses and messages give.
    config
        Its configuration, in the terms of Hugging Face's ``config.json``.
    chat_template
        The Jinja source of its chat template.
    generation_config
        What its author recommends, in the terms of ``generation_config.json``.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        model_id: str,
        config: Mapping[str, Any],
        chat_template: str | None = None,
        generation_config: Mapping[str, Any] | None = None,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._model_id = model_id
        self._config = dict(config)
        self._chat_template = None if chat_template is None else _chat_template(chat_template, tokenizer)
        self._generation_defaults = _generation_defaults(generation_config or {})
        self._close_engine = weakref.finalize(self, engine.close)

    async def chat(self, message: str) -> str:
        """Send one user message and return the text of the answer. `send_chat_request` gives more control.

        Parameters
        ----------
        message
            What the user says.
        """
        response = await self.send_chat_request(message)
        return response.choices[0].message.content or ""

    async def send_chat_request(self, request: ChatRequest) -> ChatCompletionResponse:
        """Send a request and wait for the whole answer. Cancelling the task that waits cancels the request at once.

        Parameters
        ----------
        request
            A string, `TextMessages`, a `RequestBuilder`, or a list of ``{"role": ..., "content": ...}`` dicts.

        Raises
        ------
        RequestValidationError
            The request is malformed, or the model cannot serve it.
        ModelError
            Generation failed midway; `partial_response` holds what there was.
        EngineClosedError
            The model was closed.
        """
        prepared = await self._prepare_async(RequestBuilder.of(request))
        completion = Completion()
        handle = self._engine.submit(prepared, completion.on_event)
        try:
            await asyncio.wrap_future(completion.done)
        except asyncio.CancelledError:
            handle.cancel()
            raise
        return self._answer(prepared).response(completion.events)

    def stream_chat_request(self, request: ChatRequest) -> ChatStream:
        """Send a request and get the answer in pieces, as they are generated.

        Use it as ``async for chunk in model.stream_chat_request(...)``. Leaving the loop cancels the request. If the stream is kept in a
        variable, ``async with model.stream_chat_request(...) as stream:`` or `ChatStream.aclose` does so.

        Parameters
        ----------
        request
            A string, `TextMessages`, a `RequestBuilder`, or a list of ``{"role": ..., "content": ...}`` dicts.

        Raises
        ------
        RequestValidationError
            The request is malformed. What only the model can tell, and the other errors of `send_chat_request`, come from the stream.
        """
        return ChatStream(self, RequestBuilder.of(request))

    async def tokenize(
        self,
        text_or_messages: ChatRequest,
        *,
        tools: Sequence[Tool | Mapping[str, Any]] | None = None,
        add_special_tokens: bool = True,
        add_generation_prompt: bool = True,
        enable_thinking: bool | None = None,
    ) -> list[int]:
        """The tokens of a text, or of messages in the model's chat template.

        Parameters
        ----------
        text_or_messages
            A string is taken as it is; messages are rendered, as `send_chat_request` does.
        tools
            Tools that the chat template tells the model of.
        add_special_tokens
            Put the tokens around a plain text that the model expects (beginning of text ...). A chat template writes its own.
        add_generation_prompt
            End with the opening of the model's turn.
        enable_thinking
            Switch the model's thinking on or off, if its chat template knows such a switch.
        """

        def encode() -> list[int]:
            return self._tokens_of(text_or_messages, tools, add_special_tokens, add_generation_prompt, enable_thinking)

        if isinstance(text_or_messages, str) and len(text_or_messages) <= _QUICK_CHARACTERS:
            return encode()
        return await asyncio.to_thread(encode)

    async def detokenize(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of tokens.

        Parameters
        ----------
        tokens
            Token ids.
        skip_special_tokens
            Leave special tokens out of the text.
        """
        return self._text_of(tokens, skip_special_tokens)

    async def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """The model's logits at each position of a text: for perplexity, and for comparing models.

        Parameters
        ----------
        tokens
            At least one token id, at most `max_sequence_length`.

        Returns
        -------
        float32 array ``[len(tokens), vocab_size]``
            Row ``i`` predicts ``tokens[i + 1]``.
        """
        return await asyncio.wrap_future(self._engine.logits(list(map(int, tokens))))

    def config(self) -> dict[str, Any]:
        """The model's configuration, in the terms of Hugging Face's ``config.json``."""
        return copy.deepcopy(self._config)

    def max_sequence_length(self) -> int:
        """The most tokens that a prompt and its answer have together."""
        return self._engine.max_sequence_length

    @property
    def generation_defaults(self) -> SamplingParams:
        """The sampling that the model's author recommends, for `RequestBuilder.with_sampling`; greedy if nothing is recommended."""
        return self._generation_defaults

    async def close(self) -> None:
        """End the engine. Requests that still run end with `EngineClosedError`. Closing again does nothing."""
        await asyncio.to_thread(self._close_engine)

    def close_now(self) -> None:
        """`close` for code without an event loop: blocks until the engine's thread has ended."""
        self._close_engine()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._model_id!r})"

    def _prepare(self, request: RequestBuilder) -> EngineRequest:
        return EngineRequest(
            prompt_tokens=self._prompt_tokens(request),
            sampling=request.sampling,
            logits_processors=request.logits_processors,
            return_logprobs=request.logprobs,
            truncate=request.truncate_sequence,
        )

    async def _prepare_async(self, request: RequestBuilder) -> EngineRequest:
        if sum(len(message["content"]) for message in request.messages) <= _QUICK_CHARACTERS:
            return self._prepare(request)
        return await asyncio.to_thread(self._prepare, request)

    def _tokens_of(
        self,
        text_or_messages: ChatRequest,
        tools: Sequence[Tool | Mapping[str, Any]] | None,
        add_special_tokens: bool,
        add_generation_prompt: bool,
        enable_thinking: bool | None,
    ) -> list[int]:
        if isinstance(text_or_messages, str):
            return self._tokenizer.encode(checked_text(text_or_messages), add_special_tokens=add_special_tokens)
        builder = RequestBuilder.of(text_or_messages)
        if tools is not None:
            builder.set_tools(tools)
        if enable_thinking is not None:
            builder.enable_thinking(enable_thinking)
        return self._prompt_tokens(builder, add_generation_prompt=add_generation_prompt)

    def _text_of(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
        return self._tokenizer.decode(list(map(int, tokens)), skip_special_tokens=skip_special_tokens)

    def _prompt_tokens(self, request: RequestBuilder, *, add_generation_prompt: bool = True) -> list[int]:
        if self._chat_template is None:
            raise RequestValidationError(f"{self._model_id} has no chat template; give its builder one with with_chat_template(...)")
        prompt = self._chat_template.render(
            request.template_messages(),
            tools=request.template_tools(),
            add_generation_prompt=add_generation_prompt,
            enable_thinking=request.thinking,
        )
        return self._tokenizer.encode(prompt, add_special_tokens=False)

    def _answer(self, request: EngineRequest) -> Answer:
        return Answer(self._model_id, self._tokenizer, request.sampling.n_choices)


class ChatStream:
    """An answer as it is generated: an async iterator of chunks, and a context manager that cancels what is left.

    The request is sent when the first chunk is asked for.
    """

    def __init__(self, model: Model, request: RequestBuilder) -> None:
        self._model = model
        self._request = request
        self._inbox: _Inbox | None = None
        self._handle: RequestHandle | None = None
        self._closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ChatCompletionChunkResponse:
        if self._closed:
            raise StopAsyncIteration
        try:
            if self._inbox is None:
                await self._start()
            assert self._inbox is not None
            while True:
                chunk = self._answer.chunk(await self._inbox.get())
                if self._answer.complete:
                    self._closed = True
                if chunk is not None:
                    return chunk
        except BaseException:
            self._cancel()
            raise

    async def _start(self) -> None:
        prepared = await self._model._prepare_async(self._request)
        self._answer = self._model._answer(prepared)
        self._inbox = _Inbox(asyncio.get_running_loop())
        self._handle = self._model._engine.submit(prepared, self._inbox.put)

    async def aclose(self) -> None:
        """Stop: cancel the request if it still runs."""
        self._cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._cancel()

    def __del__(self) -> None:
        # ``break`` drops the last reference to a stream that only ``async for`` holds. The engine refers to the inbox alone.
        self._cancel()

    def _cancel(self) -> None:
        self._closed = True
        if self._handle is not None:
            self._handle.cancel()


class _Inbox:
    """Events on their way from the engine's thread to a task. The engine never waits; a wake-up is scheduled only if the task does."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._events: deque[Event] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._waiting = False

    def put(self, event: Event) -> None:
        """Called on the engine's thread."""
        self._events.append(event)
        if self._waiting:
            self._waiting = False
            with suppress(RuntimeError):  # the loop was closed under the stream, whose end cancels the request
                self._loop.call_soon_threadsafe(self._wake)

    async def get(self) -> Event:
        """The next event. Only one task may wait."""
        if self._waiter is not None:
            raise RuntimeError("two tasks wait for the same stream; give each its own")
        while not self._events:
            self._waiter = self._loop.create_future()
            self._waiting = True
            try:
                if not self._events:  # the engine may have put one before it could see that we wait
                    await self._waiter
            finally:
                self._waiter = None
        return self._events.popleft()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _chat_template(source: str, tokenizer: Tokenizer) -> ChatTemplate:
    def text(token: int | None) -> str:
        return "" if token is None else tokenizer.decode([token], skip_special_tokens=False)

    return ChatTemplate(source, bos_token=text(tokenizer.bos_token_id), eos_token=text(tokenizer.eos_token_id))


def _generation_defaults(config: Mapping[str, Any]) -> SamplingParams:
    """SamplingParams from ``generation_config.json``, where 0 and 1 stand for what is off, and nothing at all for greedy."""
    recommended = {name: config[name] for name in ("temperature", "top_k", "top_p", "min_p") if config.get(name) is not None}
    if config.get("do_sample") is False or not recommended:
        sampling = SamplingParams.deterministic()
    else:
        neutral = {"top_k": (0, -1), "top_p": (1,), "min_p": (0,)}
        recommended = {name: value for name, value in recommended.items() if value not in neutral.get(name, ())}
        sampling = _recommended(SamplingParams(), recommended)
    penalty = config.get("repetition_penalty")
    return sampling if penalty in (None, 1) else _recommended(sampling, {"repetition_penalty": penalty})


def _recommended(sampling: SamplingParams, values: dict[str, Any]) -> SamplingParams:
    try:
        return replace(sampling, **values)
    except RequestValidationError as error:
        raise ModelLoadError(f"the model's generation config recommends what cannot be: {error}") from error
