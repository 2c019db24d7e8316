"""The model, for code that runs in an event loop."""

from __future__ import annotations

import asyncio
import copy
import json
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from .answer import Answer, Completion
from .chat_stream import Alarm, ChatStream, Inbox
from .engine.constraint import Grammar, GrammarCompiler, Trigger, Triggered
from .engine.types import Constraint as EngineConstraint
from .engine.types import EngineRequest
from .errors import ModelLoadError, RequestValidationError
from .loading.chat_template import ChatTemplate
from .model_group import ModelGroup
from .quantization.isq import IsqBits, IsqType
from .requests import ChatRequest, Constraint, Function, RequestBuilder, SamplingParams, Tool
from .requests.messages import checked_text, checked_tokens
from .requests.sampling import generation_defaults
from .requests.structured import StructuredOutput
from .responses import ChatCompletionResponse
from .tool_calls import Dialect, MessageReader, dialect_for, plain_reader
from .tool_rounds import Toolbox, ToolRounds, cut_to_tokens

if TYPE_CHECKING:
    from types import TracebackType

    import numpy as np
    from numpy.typing import NDArray
    from pydantic import TypeAdapter
    from typing_extensions import Self

    from .engine import Engine, RequestHandle
    from .loading.tokenizer import Tokenizer

T = TypeVar("T")
ANY_OBJECT: dict[str, Any] = {"type": "object"}
_QUICK_CHARACTERS = 20_000  # tokenizing more than this would hold up an event loop noticeably


class Model(ModelGroup):
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
    requantize
        Quantises the weights anew, from their file, and returns when the engine uses them.
    toolbox
        The tools that are called for it while requests run. The model owns it, and closes it.
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
        requantize: Callable[[IsqType], None] | None = None,
        toolbox: Toolbox | None = None,
    ) -> None:
        self._engine = engine
        self._requantize = requantize
        self._requantizing = threading.Lock()
        self._toolbox = toolbox or Toolbox()
        self._tokenizer = tokenizer
        self._model_id = model_id
        self._config = dict(config)
        self._chat_template = None if chat_template is None else _chat_template(chat_template, tokenizer)
        self._dialect = None if chat_template is None else _dialect(chat_template, tokenizer)
        self._generation_defaults = generation_defaults(generation_config or {})
        self._alarms: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Alarm] = weakref.WeakKeyDictionary()
        self._close_engine = weakref.finalize(self, _close, engine, self._toolbox)
        self._start_group()

    async def chat(self, message: str, *, model_id: str | None = None) -> str:
        """Send one user message and return the text of the answer. `send_chat_request` gives more control.

        Parameters
        ----------
        message
            What the user says.
        model_id
            Which of several models answers; None: the default one (see `add_model`).
        """
        response = await self.send_chat_request(message, model_id=model_id)
        return response.choices[0].message.content or ""

    async def send_chat_request(self, request: ChatRequest, *, model_id: str | None = None) -> ChatCompletionResponse:
        """Send a request and wait for the whole answer. Cancelling the task that waits cancels the request at once.

        Calls of tools that have a callback are made, and the model goes on with their results, up to `max_tool_rounds` times; the response
        lists them under `agentic_tool_calls`. A turn with any other call ends the request: its calls are the caller's.

        Parameters
        ----------
        request
            A string, `TextMessages`, a `RequestBuilder`, or a list of ``{"role": ..., "content": ...}`` dicts.
        model_id
            Which of several models answers; None: the default one (see `add_model`).

        Raises
        ------
        RequestValidationError
            The request is malformed, or the model cannot serve it.
        ModelError
            Generation failed midway; `partial_response` holds what there was.
        ModelManagementError
            There is no model ``model_id``, or it is not loaded.
        EngineClosedError
            The model was closed, or unloaded while it worked on the request.
        """
        if (model := self._member(model_id)) is not self:
            return await model.send_chat_request(request)
        rounds = self._tool_rounds(RequestBuilder.of(request))
        while rounds.goes_on(response := await self._turn(rounds)):
            await rounds.run(response)
        return rounds.whole(response)

    async def _turn(self, rounds: ToolRounds) -> ChatCompletionResponse:
        prepared = await self._prepare_async(rounds)
        completion = Completion()
        handle = self._engine.submit(prepared.request, completion.on_event)
        try:
            await asyncio.wrap_future(completion.done)
        except asyncio.CancelledError:
            handle.cancel()
            raise
        return prepared.answer.response(completion.events)

    async def generate_structured(self, type: type[T] | TypeAdapter[T], request: ChatRequest, *, model_id: str | None = None) -> T:
        """Send a request whose answer is an object: the model is constrained to JSON that the type allows, which is then validated.

        Parameters
        ----------
        type
            A pydantic model, dataclass, TypedDict, or anything else that pydantic's `TypeAdapter` takes.
        request
            A string, `TextMessages`, a `RequestBuilder`, or a list of ``{"role": ..., "content": ...}`` dicts.
        model_id
            Which of several models answers; None: the default one (see `add_model`).

        Raises
        ------
        RequestValidationError
            The type's schema cannot be enforced while generating; the message names the feature.
        ModelError
            The answer was cut by `max_len`, or a validator of the type did not accept it; `partial_response` holds it.
        """
        output = StructuredOutput[T](type)
        builder = output.constrain(request)
        return output.read(builder, await self.send_chat_request(builder, model_id=model_id))

    def stream_chat_request(self, request: ChatRequest, *, model_id: str | None = None) -> ChatStream:
        """Send a request and get the answer in pieces, as they are generated.

        Use it as ``async for chunk in model.stream_chat_request(...)``. Leaving the loop cancels the request. If the stream is kept in a
        variable, ``async with model.stream_chat_request(...) as stream:`` or `ChatStream.aclose` does so.

        Parameters
        ----------
        request
            A string, `TextMessages`, a `RequestBuilder`, or a list of ``{"role": ..., "content": ...}`` dicts.
        model_id
            Which of several models answers; None: the default one (see `add_model`).

        Raises
        ------
        RequestValidationError
            The request is malformed. What only the model can tell, and the other errors of `send_chat_request`, come from the stream.
        """
        model = self._member(model_id)
        return ChatStream(model._submit, model._tool_rounds(RequestBuilder.of(request)))

    async def tokenize(
        self,
        text_or_messages: ChatRequest,
        *,
        tools: Sequence[Tool | Mapping[str, Any]] | None = None,
        add_special_tokens: bool = True,
        add_generation_prompt: bool = True,
        enable_thinking: bool | None = None,
        model_id: str | None = None,
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
        model_id
            Which of several models answers; None: the default one (see `add_model`).
        """
        model = self._member(model_id)

        def encode() -> list[int]:
            return model._tokens_of(text_or_messages, tools, add_special_tokens, add_generation_prompt, enable_thinking)

        if isinstance(text_or_messages, str) and len(text_or_messages) <= _QUICK_CHARACTERS:
            return encode()
        return await asyncio.to_thread(encode)

    async def detokenize(self, tokens: Sequence[int], *, skip_special_tokens: bool = True, model_id: str | None = None) -> str:
        """The text of tokens.

        Parameters
        ----------
        tokens
            Token ids.
        skip_special_tokens
            Leave special tokens out of the text.
        model_id
            Which of several models answers; None: the default one (see `add_model`).
        """
        return self._member(model_id)._text_of(tokens, skip_special_tokens)

    async def logits(self, tokens: Sequence[int], *, model_id: str | None = None) -> NDArray[np.float32]:
        """The model's logits at each position of a text: for perplexity, and for comparing models.

        Parameters
        ----------
        tokens
            At least one token id, at most `max_sequence_length`.
        model_id
            Which of several models answers; None: the default one (see `add_model`).

        Returns
        -------
        float32 array ``[len(tokens), vocab_size]``
            Row ``i`` predicts ``tokens[i + 1]``.
        """
        return await asyncio.wrap_future(self._member(model_id)._engine.logits(checked_tokens(tokens)))

    async def send_raw_chat_request(self, request: ChatRequest, *, model_id: str | None = None) -> tuple[NDArray[np.float32], list[int]]:
        """The logits over a prompt, as the chat template renders it, with nothing sampled from them.

        Parameters
        ----------
        request
            A string, `TextMessages`, a `RequestBuilder`, or a list of ``{"role": ..., "content": ...}`` dicts. Its sampling is not used.
        model_id
            Which of several models; None: the default one (see `add_model`).

        Returns
        -------
        float32 array ``[len(tokens), vocab_size]``, and the tokens of the prompt
            Row ``i`` predicts ``tokens[i + 1]``; the last row predicts the first token of the answer.
        """
        model = self._member(model_id)
        tokens = await model.tokenize(RequestBuilder.of(request))
        return await model.logits(tokens), tokens

    async def re_isq_model(self, isq: IsqType | IsqBits | str | int, *, model_id: str | None = None) -> None:
        """Quantise the weights to another type, from the model's file.

        The model keeps serving with the old weights until the new ones are complete, and then goes on with those: answers that are being
        generated keep the text that they have. Both weights are in memory for that time, and the prefix cache starts anew.

        Parameters
        ----------
        isq
            An `IsqType`, its plain value, or a number of bits.
        model_id
            Which of several models; None: the default one (see `add_model`).

        Raises
        ------
        ModelLoadError
            There is no such type, it is not supported, or the file cannot be read any more.
        EngineClosedError
            The model has been closed.
        """
        await asyncio.to_thread(self._member(model_id)._re_isq, isq)

    def _re_isq(self, isq: IsqType | IsqBits | str | int) -> None:
        type = IsqType.of(isq)
        if self._requantize is None:
            raise ModelLoadError(f"{self._model_id} was not loaded from a file: its weights cannot be quantised again")
        with self._requantizing:  # one after the other: each takes as much memory as the model
            self._requantize(type)

    def config(self, *, model_id: str | None = None) -> dict[str, Any]:
        """The model's configuration, in the terms of Hugging Face's ``config.json``."""
        return copy.deepcopy(self._member(model_id)._config)

    def max_sequence_length(self, *, model_id: str | None = None) -> int:
        """The most tokens that a prompt and its answer have together."""
        return self._member(model_id)._engine.max_sequence_length

    @property
    def generation_defaults(self) -> SamplingParams:
        """The sampling that the model's author recommends, for `RequestBuilder.with_sampling`; greedy if nothing is recommended."""
        return self._member(None)._generation_defaults

    async def close(self) -> None:
        """End the engine, of all models if there are several; running requests end with `EngineClosedError`. Closing again does nothing."""
        await asyncio.to_thread(self._close_all)

    def close_now(self) -> None:
        """`close` for code without an event loop: blocks until the engine's thread has ended."""
        self._close_all()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._model_id!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self!r} can be neither pickled nor copied: its engine is this process's; build the model in each process")

    def _prepare(self, rounds: ToolRounds) -> Prepared:
        """The next turn, ready for the engine."""
        request, deadline = rounds.request, rounds.deadline
        prompt = self._prompt(request)
        dialect = self._dialect
        tools = request.offered_tools()
        reasons = dialect is not None and dialect.open_reasoning(prompt)
        engine_request = EngineRequest(
            prompt_tokens=self._tokenizer.encode(prompt, add_special_tokens=False),
            sampling=request.sampling,
            logits_processors=request.logits_processors,
            return_logprobs=request.logprobs,
            deadline=deadline,
            truncate=request.truncate_sequence,
            constraint=self._constraint(request, tools, reasons),
            keep=dialect.keep(bool(tools)) if dialect else (),
        )
        schemas = {tool.function.name: tool.function.parameters or {} for tool in tools}

        def new_reader() -> MessageReader:
            return MessageReader(plain_reader) if dialect is None else dialect.reader(schemas, reasons=reasons)

        return Prepared(engine_request, Answer(self._model_id, self._tokenizer, request.sampling.n_choices, new_reader))

    async def _prepare_async(self, rounds: ToolRounds) -> Prepared:
        request = rounds.request
        quick = not request.tools and request.constraint is None  # grammars take their time to compile
        if quick and sum(len(message["content"]) for message in request.messages) <= _QUICK_CHARACTERS:
            return self._prepare(rounds)
        return await asyncio.to_thread(self._prepare, rounds)

    async def _submit(self, rounds: ToolRounds) -> tuple[Inbox, Answer, RequestHandle]:
        """Send a turn, whose events this event loop will take from the inbox."""
        prepared = await self._prepare_async(rounds)
        loop = asyncio.get_running_loop()
        alarm = self._alarms.setdefault(loop, Alarm(loop))
        inbox = Inbox(alarm)
        return inbox, prepared.answer, self._engine.submit(prepared.request, inbox.put, alarm.ring)

    def _tool_rounds(self, request: RequestBuilder) -> ToolRounds:
        return ToolRounds(request, self._toolbox, self._cut, self.max_sequence_length())

    def _stream_turn(self, request: RequestBuilder) -> ChatStream:
        """One turn, whatever it calls."""
        return ChatStream(self._submit, ToolRounds(request, Toolbox(), self._cut, self.max_sequence_length()))

    def _cut(self, text: str, tokens: int) -> str:
        return cut_to_tokens(self._tokenizer, text, tokens)

    def _constraint(self, request: RequestBuilder, tools: Sequence[Tool], reasons: bool) -> EngineConstraint | None:
        """What the answer must follow: the request's constraint, a call that it demands, or the grammar of any call that begins."""
        grammars, dialect = self._engine.grammars, self._dialect
        if request.constraint is not None:
            begins = dialect.content_begins(reasons) if dialect else None
            return after(begins, grammars, grammars.compile(request.constraint))
        if not tools or dialect is None:
            return None
        if demanded := request.demanded_tools():
            required = Constraint.lark(dialect.required(self._argument_schemas(demanded)))
            return after(dialect.calls_begin(reasons), grammars, grammars.compile(required))
        triggers = dialect.triggers(self._argument_schemas(tools))
        compiled = [Trigger(begin, grammars.compile(Constraint.lark(lark)), at_start=at_start) for begin, lark, at_start in triggers]
        return Triggered(grammars, compiled)

    def _argument_schemas(self, tools: Sequence[Tool]) -> dict[str, Any]:
        return {tool.function.name: self._argument_schema(tool.function) for tool in tools}

    def _argument_schema(self, function: Function) -> Any:
        """The schema that a function's arguments are held to: its own, or that of any object if it cannot be enforced and need not be."""
        if function.strict is False:
            return ANY_OBJECT
        parameters = {"type": "object", "properties": {}, **(function.parameters or {})}
        try:
            constraint = Constraint.json_schema(parameters)
            self._engine.grammars.compile(constraint)
        except RequestValidationError as error:
            if function.strict:
                raise RequestValidationError(f"the parameters of {function.name!r}, which is strict: {error}") from error
            return ANY_OBJECT
        return json.loads(constraint.grammar)

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
        prompt = self._prompt(builder, add_generation_prompt=add_generation_prompt)
        return self._tokenizer.encode(prompt, add_special_tokens=False)

    def _text_of(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
        return self._tokenizer.decode(checked_tokens(tokens), skip_special_tokens=skip_special_tokens)

    def _prompt(self, request: RequestBuilder, *, add_generation_prompt: bool = True) -> str:
        if self._chat_template is None or self._dialect is None:
            problem = f"{self._model_id} has no chat template, which makes a prompt of messages; take a model that was made for chats"
            raise RequestValidationError(problem, ", or give its builder a template with with_chat_template(...)")
        messages, tools = self._dialect.adapt(request.template_messages(), request.template_tools())
        return self._chat_template.render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, enable_thinking=request.thinking
        )


@dataclass
class Prepared:
    """A request ready for the engine, and what will make its answer."""

    request: EngineRequest
    answer: Answer


def _close(engine: Engine, toolbox: Toolbox) -> None:
    try:
        engine.close()
    finally:
        toolbox.close()


def after(begins: str | None, grammars: GrammarCompiler, grammar: Grammar) -> EngineConstraint:
    """A grammar that holds from the start, or from behind some text that the model says first."""
    return grammar if begins is None else Triggered(grammars, [Trigger(begins, grammar)], required=True)


def _dialect(source: str, tokenizer: Tokenizer) -> Dialect:
    def special_token(name: str) -> int | None:
        token = tokenizer.token_to_id(name)
        return token if token in tokenizer.special_token_ids else None

    return dialect_for(source, special_token)


def _chat_template(source: str, tokenizer: Tokenizer) -> ChatTemplate:
    def text(token: int | None) -> str:
        return "" if token is None else tokenizer.decode([token], skip_special_tokens=False)

    return ChatTemplate(source, bos_token=text(tokenizer.bos_token_id), eos_token=text(tokenizer.eos_token_id))
