"""From the engine's events to responses. Async and blocking code share this; they differ in how they wait."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from . import responses
from .engine.types import ChoiceFinished, Delta, Event, RequestFailed, RequestFinished, TokenLogprob, Usage
from .errors import EngineClosedError, ModelError, PymistralError, RequestValidationError
from .responses import ChatCompletionChunkResponse, ChatCompletionResponse, FinishReason
from .tool_calls import CallArguments, CallStart, Content, MessageReader, Piece

if TYPE_CHECKING:
    from .loading.tokenizer import Tokenizer


class Completion:
    """Collects the events of a request on the engine's thread, and wakes whoever waits only at the end."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.done: Future[None] = Future()
        self.done.set_running_or_notify_cancel()  # a waiter that is cancelled must not cancel this future under the engine's hands

    def on_event(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, RequestFinished | RequestFailed):
            self.done.set_result(None)


class Message:
    """One of the answers, piece by piece."""

    def __init__(self) -> None:
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self.calls: list[responses.ToolCallResponse] = []
        self._arguments: list[str] = []

    def add(self, pieces: Iterable[Piece]) -> responses.Delta | None:
        """Take pieces; return what they add to the message, if anything."""
        content, reasoning, calls = "", "", []
        for piece in pieces:
            if isinstance(piece, CallStart):
                self._close_call()
                function = responses.CalledFunction(name=piece.name, arguments="")
                self.calls.append(responses.ToolCallResponse(index=len(self.calls), id=piece.id, function=function))
                start = responses.FunctionDelta(name=piece.name)
                calls.append(responses.ToolCallDelta(index=len(self.calls) - 1, id=piece.id, type="function", function=start))
            elif isinstance(piece, CallArguments):
                self._arguments.append(piece.text)
                if calls:
                    calls[-1].function.arguments += piece.text
                else:
                    more = responses.FunctionDelta(arguments=piece.text)
                    calls.append(responses.ToolCallDelta(index=len(self.calls) - 1, function=more))
            elif isinstance(piece, Content):
                content += piece.text
            else:
                reasoning += piece.text
        self.content.append(content)
        self.reasoning.append(reasoning)
        if not (content or reasoning or calls):
            return None
        return responses.Delta(content=content or None, reasoning_content=reasoning or None, tool_calls=calls or None)

    def whole(self) -> responses.ResponseMessage:
        """The message so far."""
        self._close_call()
        content, reasoning = "".join(self.content), "".join(self.reasoning)
        return responses.ResponseMessage(
            content=content if content or not self.calls else None,
            reasoning_content=reasoning or None,
            tool_calls=self.calls or None,
        )

    def reason(self, reason: FinishReason) -> FinishReason:
        """Why it ended, given why the engine ended it."""
        return "tool_calls" if self.calls and reason == "stop" else reason

    def _close_call(self) -> None:
        if self._arguments:
            self.calls[-1].function.arguments = "".join(self._arguments)
            self._arguments = []


class Answer:
    """What is known of an answer, event by event.

    Parameters
    ----------
    new_reader
        Makes what reads the text of one choice.
    """

    def __init__(self, model_id: str, tokenizer: Tokenizer, n_choices: int, new_reader: Callable[[], MessageReader]) -> None:
        self.id = f"chatcmpl-{uuid.uuid4()}"
        self.created = int(time.time())
        self.model_id = model_id
        self.tokenizer = tokenizer
        self.new_reader = new_reader
        self.readers = [new_reader() for _ in range(n_choices)]
        self.messages = [Message() for _ in range(n_choices)]
        self.logprobs: list[list[responses.ResponseLogprob]] = [[] for _ in range(n_choices)]
        self.finished: dict[int, ChoiceFinished] = {}
        self.usage = Usage()
        self.complete = False

    def continuing(self, before: Answer | None) -> Answer:
        """This answer under the id of the one before it in the same stream, if any."""
        if before is not None:
            self.id, self.created = before.id, before.created
        return self

    def chunk(self, event: Event) -> ChatCompletionChunkResponse | None:
        """The chunk to show for an event, if any: the end of the last choice waits for the usage, so that no chunk is without a choice.

        Raises
        ------
        PymistralError
            The event says that the request failed.
        """
        if isinstance(event, Delta):
            logprobs = self._add_logprobs(event)
            delta = self.messages[event.choice].add(self.readers[event.choice].push(event.text))
            return None if delta is None and logprobs is None else self._chunk(event.choice, delta, logprobs=logprobs)
        if isinstance(event, ChoiceFinished):
            self.finished[event.choice] = event
            message = self.messages[event.choice]
            rest = message.add(self.readers[event.choice].finish())
            if len(self.finished) == len(self.messages):
                return None if rest is None else self._chunk(event.choice, rest)
            return self._chunk(event.choice, rest, finish_reason=message.reason(event.reason))
        if isinstance(event, RequestFailed):
            raise self._failure(event)
        self.complete = True
        self.usage = event.usage
        *_, last = self.finished.values()
        reason = self.messages[last.choice].reason(last.reason)
        return self._chunk(last.choice, finish_reason=reason, usage=_usage(event.usage))

    def response(self, events: Iterable[Event]) -> ChatCompletionResponse:
        """The whole answer, from all events of a request."""
        usage = Usage()
        for event in events:
            if isinstance(event, Delta):
                self._add_logprobs(event)
            elif isinstance(event, ChoiceFinished):
                self.finished[event.choice] = event
            elif isinstance(event, RequestFailed):
                raise self._failure(event)
            else:
                usage = event.usage
        return self._response([(choice.text, choice.reason) for _, choice in sorted(self.finished.items())], usage)

    def whole(self) -> ChatCompletionResponse:
        """The whole answer, once it is complete, from the events that `chunk` saw."""
        choices = [self._choice_of(index, message, self.finished[index].reason) for index, message in enumerate(self.messages)]
        return self._response_of(choices, self.usage)

    def _failure(self, event: RequestFailed) -> PymistralError:
        """The exception to raise: what says all by itself goes on as it is, the rest gets what was generated so far."""
        if isinstance(event.error, RequestValidationError | EngineClosedError):
            return event.error
        partial = None
        if any(event.texts):
            reasons = [self.finished[i].reason if i in self.finished else "canceled" for i in range(len(event.texts))]
            partial = self._response(list(zip(event.texts, reasons, strict=True)), event.usage)
        error = ModelError(str(event.error), partial)
        error.__cause__ = event.error
        return error

    def _response(self, choices: Sequence[tuple[str, FinishReason]], usage: Usage) -> ChatCompletionResponse:
        return self._response_of([self._choice(index, text, reason) for index, (text, reason) in enumerate(choices)], usage)

    def _response_of(self, choices: list[responses.Choice], usage: Usage) -> ChatCompletionResponse:
        return ChatCompletionResponse(id=self.id, choices=choices, created=self.created, model=self.model_id, usage=_usage(usage))

    def _choice(self, index: int, text: str, reason: FinishReason) -> responses.Choice:
        reader, message = self.new_reader(), Message()
        message.add(reader.push(text))
        message.add(reader.finish())
        return self._choice_of(index, message, reason)

    def _choice_of(self, index: int, message: Message, reason: FinishReason) -> responses.Choice:
        return responses.Choice(
            index=index,
            finish_reason=message.reason(reason),
            message=message.whole(),
            logprobs=responses.Logprobs(content=self.logprobs[index]) if self.logprobs[index] else None,
        )

    def _chunk(
        self,
        choice: int,
        delta: responses.Delta | None = None,
        *,
        logprobs: responses.Logprobs | None = None,
        finish_reason: FinishReason | None = None,
        usage: responses.Usage | None = None,
    ) -> ChatCompletionChunkResponse:
        delta = delta or responses.Delta()
        return ChatCompletionChunkResponse(
            id=self.id,
            choices=[responses.ChunkChoice(index=choice, delta=delta, logprobs=logprobs, finish_reason=finish_reason)],
            created=self.created,
            model=self.model_id,
            usage=usage,
        )

    def _add_logprobs(self, delta: Delta) -> responses.Logprobs | None:
        if not delta.logprobs:
            return None
        entries = [self._logprob(entry) for entry in delta.logprobs]
        self.logprobs[delta.choice] += entries
        return responses.Logprobs(content=entries)

    def _logprob(self, entry: TokenLogprob) -> responses.ResponseLogprob:
        top = [responses.TopLogprob(**self._named(token), logprob=logprob) for token, logprob in entry.top]
        return responses.ResponseLogprob(**self._named(entry.token), logprob=entry.logprob, top_logprobs=top)

    def _named(self, token: int) -> dict[str, Any]:
        # A model may have a few tokens more than its tokenizer knows, to make its matrices even.
        data = self.tokenizer.id_to_bytes(token) if token < self.tokenizer.vocab_size else b""
        return {"token": data.decode(errors="replace"), "token_id": token, "bytes": list(data)}


def _usage(usage: Usage) -> responses.Usage:
    computed = usage.prompt_tokens - usage.cached_prompt_tokens
    decoded = max(usage.completion_tokens - 1, 0)  # the first token comes with the prompt's time
    total = usage.prompt_tokens + usage.completion_tokens
    return responses.Usage(
        completion_tokens=usage.completion_tokens,
        prompt_tokens=usage.prompt_tokens,
        total_tokens=total,
        prompt_tokens_details=responses.PromptTokensDetails(cached_tokens=usage.cached_prompt_tokens),
        completion_tokens_details=responses.CompletionTokensDetails(
            drafted_tokens=usage.drafted_tokens, accepted_tokens=usage.accepted_tokens
        ),
        avg_tok_per_sec=_rate(total, usage.prompt_seconds + usage.completion_seconds),
        avg_prompt_tok_per_sec=_rate(computed, usage.prompt_seconds),
        avg_compl_tok_per_sec=_rate(decoded, usage.completion_seconds),
        total_time_sec=usage.total_seconds,
        total_prompt_time_sec=usage.prompt_seconds,
        total_completion_time_sec=usage.completion_seconds,
    )


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds > 0 else 0.0
