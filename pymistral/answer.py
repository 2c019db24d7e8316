"""From the engine's events to responses. Async and blocking code share this; they differ in how they wait."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from . import responses
from .engine.types import ChoiceFinished, Delta, Event, RequestFailed, RequestFinished, TokenLogprob, Usage
from .errors import EngineClosedError, ModelError, PymistralError, RequestValidationError
from .responses import ChatCompletionChunkResponse, ChatCompletionResponse, FinishReason

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


class Answer:
    """What is known of an answer, event by event."""

    def __init__(self, model_id: str, tokenizer: Tokenizer, n_choices: int) -> None:
        self.id = f"chatcmpl-{uuid.uuid4()}"
        self.created = int(time.time())
        self.model_id = model_id
        self.tokenizer = tokenizer
        self.logprobs: list[list[responses.ResponseLogprob]] = [[] for _ in range(n_choices)]
        self.finished: dict[int, ChoiceFinished] = {}
        self.complete = False

    def chunk(self, event: Event) -> ChatCompletionChunkResponse | None:
        """The chunk to show for an event, if any: the end of the last choice waits for the usage, so that no chunk is without a choice.

        Raises
        ------
        PymistralError
            The event says that the request failed.
        """
        if isinstance(event, Delta):
            logprobs = self._add_logprobs(event)
            if not event.text and logprobs is None:
                return None
            return self._chunk(event.choice, content=event.text, logprobs=logprobs)
        if isinstance(event, ChoiceFinished):
            self.finished[event.choice] = event
            if len(self.finished) == len(self.logprobs):
                return None
            return self._chunk(event.choice, finish_reason=event.reason)
        if isinstance(event, RequestFailed):
            raise self._failure(event)
        self.complete = True
        *_, last = self.finished.values()
        return self._chunk(last.choice, finish_reason=last.reason, usage=_usage(event.usage))

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
        choices = [(choice.text, choice.reason) for _, choice in sorted(self.finished.items())]
        return self._response(choices, usage)

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
        return ChatCompletionResponse(
            id=self.id,
            choices=[
                responses.Choice(
                    index=index,
                    finish_reason=reason,
                    message=responses.ResponseMessage(content=text),
                    logprobs=responses.Logprobs(content=self.logprobs[index]) if self.logprobs[index] else None,
                )
                for index, (text, reason) in enumerate(choices)
            ],
            created=self.created,
            model=self.model_id,
            usage=_usage(usage),
        )

    def _chunk(
        self,
        choice: int,
        *,
        content: str | None = None,
        logprobs: responses.Logprobs | None = None,
        finish_reason: FinishReason | None = None,
        usage: responses.Usage | None = None,
    ) -> ChatCompletionChunkResponse:
        delta = responses.Delta(content=content)
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
        avg_tok_per_sec=_rate(total, usage.prompt_seconds + usage.completion_seconds),
        avg_prompt_tok_per_sec=_rate(computed, usage.prompt_seconds),
        avg_compl_tok_per_sec=_rate(decoded, usage.completion_seconds),
        total_time_sec=usage.total_seconds,
        total_prompt_time_sec=usage.prompt_seconds,
        total_completion_time_sec=usage.completion_seconds,
    )


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds > 0 else 0.0
