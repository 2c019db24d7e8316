"""The engine without its thread: requests in, steps, events out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as Tokens
from contextlib import suppress
from math import inf
from time import monotonic, perf_counter

import numpy as np
from numpy.typing import NDArray

from ..errors import InferenceError, PymistralError, RequestValidationError, as_inference_error, counted
from .kv_cache import BlockPool, PagedCache
from .sampler import SampledToken, Sampler, fresh_seed, sample_rows
from .scheduler import Scheduler
from .sequence import Job, Sequence
from .speculative import Speculation
from .text import TextStream
from .types import (
    ChoiceFinished,
    EngineRequest,
    EngineStats,
    Event,
    FinishReason,
    OnEvent,
    RequestFailed,
    RequestFinished,
    Runner,
    Sampling,
    Segment,
    Tokenizer,
)

logger = logging.getLogger("pymistral.engine")

_MOST_FORGOTTEN = 2
"""After so many steps of prompts that were given up on their way, the next one is computed at once: they shall get ahead."""


class EngineCore:
    """Continuous batching over one runner. One thread at a time; `prepare` alone may be called from any thread.

    Parameters
    ----------
    runner, tokenizer
        The model, and what turns its tokens into text.
    eos_token_ids
        The tokens that end a text.
    max_num_seqs
        How many sequences may run at once; the runner's own limits hold as well.
    prefix_cache_n
        0 turns the prefix cache off. Otherwise every block that no sequence uses keeps its contents until the memory is needed.
    prefill_chunk
        How many prompt tokens may join a step while streams run; ``None`` adapts it to their pace.
    speculation
        Guesses tokens ahead.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        *,
        eos_token_ids: Tokens[int],
        max_num_seqs: int = 32,
        prefix_cache_n: int = 16,
        prefill_chunk: int | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        self.runner, self.tokenizer, self.speculation = runner, tokenizer, speculation
        self.eos_token_ids = frozenset(eos_token_ids)
        self.pool = BlockPool(runner.num_blocks)
        self.cache = PagedCache(self.pool, runner.block_size, runner.windows, runner.max_batch_tokens)
        self.max_length = self.cache.capacity(runner.max_sequence_length)
        self.scheduler = Scheduler(
            self.cache,
            max_num_seqs=max(1, min(max_num_seqs, runner.max_num_seqs, runner.max_batch_tokens, runner.max_output_rows)),
            max_batch_tokens=runner.max_batch_tokens,
            prefix_cache=prefix_cache_n > 0,
            prompts_apart=runner.prompts_apart,
            prefill_chunk=prefill_chunk,
            panel_tokens=runner.panel_tokens,
        )
        self.stats = EngineStats(0, 0, runner.num_blocks, runner.num_blocks, 0)
        self.jobs: dict[Job, None] = {}
        self._unread: list[Sequence] = []
        self._to_wake: dict[Callable[[], object], None] = {}
        self._arrivals = 0
        self._next_deadline = inf

    @property
    def busy(self) -> bool:
        return bool(self.jobs)

    def prepare(self, request: EngineRequest, on_event: OnEvent, wake: Callable[[], object] | None = None) -> Job:
        """Check a request and make all that it needs, so that the steps of others need not wait for it."""
        sampling = request.sampling
        prompt = self._fit(request)
        check_tokens(prompt, "the prompt", self.runner.vocab_size)
        check_tokens(list(sampling.logits_bias or ()), "logits_bias", self.runner.vocab_size)
        if sampling.n_choices < 1:
            raise RequestValidationError(f"n_choices is {sampling.n_choices}; ask for at least 1")
        if sampling.max_len is not None and sampling.max_len < 1:
            raise RequestValidationError(f"max_len is {sampling.max_len}; ask for at least 1 token")
        job = Job(request, on_event, wake)
        job.usage.prompt_tokens = len(prompt)
        # One token more than the cache holds: the last one is never looked at again.
        max_tokens = min(self.max_length + 1, len(prompt) + (sampling.max_len or self.max_length))
        seed = fresh_seed() if sampling.seed is None else sampling.seed
        breakers = self._breakers(sampling)
        stops = [stop for stop in sampling.stop_toks or () if isinstance(stop, str) and stop]
        stop_tokens = self._stop_tokens(sampling)
        for choice in range(sampling.n_choices):
            tokens = list(prompt)
            sampler = Sampler(
                sampling,
                tokens,
                self.runner.vocab_size,
                seed=seed,
                choice=choice,
                breakers=breakers,
                processors=request.logits_processors,
                constraint=request.constraint.start() if request.constraint is not None else None,
                return_logprobs=request.return_logprobs,
            )
            decoder = self.tokenizer.decode_stream(skip_special_tokens=request.skip_special_tokens, keep=request.keep)
            text = TextStream(decoder, stops)
            job.sequences.append(Sequence(job, choice, tokens, max_tokens, stop_tokens, sampler, text, self.cache.new_tables()))
        if self.scheduler.prefix_cache:
            job.sequences[0].extend_keys((len(prompt) - 1) // self.runner.block_size, self.runner.block_size)
        return job

    def _fit(self, request: EngineRequest) -> list[int]:
        prompt, limit = request.prompt_tokens, self.max_length
        if not prompt:
            raise RequestValidationError("the prompt is empty; send at least one token")
        if len(prompt) <= limit:
            return prompt
        if request.truncate:
            return prompt[-max(1, limit - min(request.sampling.max_len or 1, limit)) :]
        room, in_python = f"the model's context holds {limit}", ", or let it be cut with truncate_sequence"
        if limit < self.runner.max_sequence_length:
            room = f"the KV cache holds {limit} ({self.runner.num_blocks} blocks of {self.runner.block_size})"
            in_python += ", or give the cache more memory with with_paged_attn"
        raise RequestValidationError(f"the prompt has {len(prompt)} tokens, but {room}; shorten it", in_python)

    def _breakers(self, sampling: Sampling) -> frozenset[int]:
        if sampling.dry_params is None:
            return frozenset()
        # After a letter, since a breaker at the start of a text may be tokenized in another way.
        encoded = (self.tokenizer.encode("a" + breaker, add_special_tokens=False) for breaker in sampling.dry_params.sequence_breakers)
        return frozenset(tokens[-1] for tokens in encoded if tokens)

    def _stop_tokens(self, sampling: Sampling) -> dict[int, str | int | None]:
        """What ends a choice, and what it then reports. A stop string that is a token of its own may never show up in the text."""
        stops: dict[int, str | int | None] = {} if getattr(sampling, "ignore_eos", False) else dict.fromkeys(self.eos_token_ids)
        for stop in sampling.stop_toks or ():
            if isinstance(stop, int):
                stops[stop] = stop
                continue
            token = self.tokenizer.token_to_id(stop)
            if token is not None and self.tokenizer.decode([token], skip_special_tokens=False) == stop:
                stops[token] = stop
        return stops

    def add(self, job: Job) -> None:
        """Queue a request."""
        for sequence in job.sequences:
            sequence.order = (self._arrivals, sequence.choice)
        self._arrivals += 1
        self.jobs[job] = None
        if job.request.deadline is not None:
            self._next_deadline = min(self._next_deadline, job.request.deadline)
        self.scheduler.add(job.sequences[0])

    def cancel(self, job: Job) -> None:
        """End a request now; its choices report what they have."""
        if job.done:
            return
        for sequence in job.sequences:
            if not sequence.finished:
                self._finish(sequence, "canceled")

    def fail(self, job: Job, error: PymistralError) -> None:
        """End a request with an error and the text so far."""
        if job.done:
            return
        self._retire(job)
        self.stats.failed += 1
        for sequence in job.sequences:
            with suppress(Exception):  # what cannot be read is left out
                sequence.read()
            if sequence.unsent_text:
                self._send(sequence)
        self._emit(job, RequestFailed(error, [sequence.text.text for sequence in job.sequences], job.final_usage()))
        job.sequences = []

    def step(self) -> None:
        """Compute one step, and pass on what came of it."""
        if self._next_deadline < inf:
            self._check_deadlines()
        if self.speculation is not None and self.speculation.drafter.computes:
            self.deliver()  # text must not wait for guesses, and what ends here is in no batch yet
        batch = self.scheduler.schedule()
        if not batch and not self.scheduler.under_way:
            self.deliver()
            return
        begin = perf_counter()
        for sequence in batch if self.scheduler.prompt_tokens else ():
            if not sequence.job.first_step:
                self._start(sequence, begin)
        drafted = self._draft(batch) if self.speculation is not None else 0
        begin = perf_counter()  # what guesses take is known of their drafter
        try:
            batch, logits = self._compute(batch)
        except Exception as error:
            self._fail_batch(list(dict.fromkeys([*batch, *self.scheduler.under_way])), error)
            return
        now = perf_counter()
        if not drafted and not (self.scheduler.prompts_apart and self.scheduler.prompt_tokens):
            self.scheduler.pacer.observe(self.scheduler.streams, self.scheduler.prompt_tokens, now - begin)
        self.scheduler.advance(batch)
        self.stats.steps += 1
        self._sample(batch, logits, now)
        if self.speculation is not None:
            self._conclude(self.speculation, batch, now - begin)

    def _compute(self, batch: list[Sequence]) -> tuple[list[Sequence], NDArray[np.float32]]:
        """Run a step; returns its sequences and their logits. Prompts that are computed part by part are of the step that ends them.

        What the last step made is passed on while this one is computed, in which Python has little to do.
        """
        runner, scheduler = self.runner, self.scheduler
        prompt_pass = runner.prompt_pass
        prompts = [sequence for sequence in batch[scheduler.streams :] if not sequence.segment.generated]
        if prompt_pass is None or not (scheduler.under_way or (scheduler.streams and prompts)):
            return batch, runner.forward([sequence.segment for sequence in batch], self.deliver)
        streams = batch[: scheduler.streams] + [sequence for sequence in batch[scheduler.streams :] if sequence.segment.generated]
        if prompts:
            prompt_pass.begin([sequence.segment for sequence in prompts])
            scheduler.under_way = prompts
        logits, seconds = np.empty((0, runner.vocab_size), np.float32), inf
        if streams:
            begin = perf_counter()
            logits = runner.forward([sequence.segment for sequence in streams], self.deliver)
            if scheduler.forgotten < _MOST_FORGOTTEN:
                seconds = scheduler.pacer.room(len(streams), perf_counter() - begin)
        else:
            self.deliver()
        found = prompt_pass.proceed(seconds) if scheduler.under_way else None  # one of them may have left
        if found is None:
            return streams, logits
        return streams + scheduler.end_pass(), np.concatenate([logits, found]) if len(found) else logits

    def _sample(self, batch: list[Sequence], logits: NDArray[np.float32], now: float) -> None:
        """Sample the row of each sequence, and the rows of its guesses for as long as the guesses are what was sampled."""
        rows: list[tuple[int, Sequence]] = []
        row = 0
        for sequence in batch:
            if sequence.segment.outputs and not sequence.finished:
                rows.append((row, sequence))
            row += sequence.segment.outputs
        while rows:
            sampled_tokens = sample_rows(self.runner, logits, [sequence.sampler for _, sequence in rows], [row for row, _ in rows])
            confirmed = []
            for (row, sequence), sampled in zip(rows, sampled_tokens, strict=True):
                job = sequence.job
                if job.done:
                    continue
                if job.unforked:
                    job.unforked = False
                    job.first_token = now
                    if len(job.sequences) > 1:
                        self._fork(sequence, logits, row)
                    if job.done:  # what went wrong with a choice ends all
                        continue
                if count := self._verify(sequence, sampled):
                    confirmed.append((row + count, sequence))
            rows = confirmed

    def _draft(self, batch: list[Sequence]) -> int:
        """Have tokens guessed for the streams of a step that works on no prompt; returns how many."""
        speculation, scheduler = self.speculation, self.scheduler
        if speculation is None or scheduler.prompt_tokens:
            return 0
        streams = [sequence for sequence in batch if sequence.segment.outputs]
        tokens = sum(sequence.scheduled for sequence in batch)
        room = min(self.runner.max_batch_tokens - tokens, self.runner.max_output_rows - len(streams))
        try:
            drafts = speculation.draft(streams, tokens, room)
        except Exception:  # what fails here costs speed, and no answer
            logger.exception("Guessing tokens ahead failed, and is given up")
            self.speculation = None
            return 0
        for sequence, draft in drafts:
            scheduler.extend(sequence, draft)
            sequence.job.usage.drafted_tokens += len(sequence.draft)
        drafted = sum(len(sequence.draft) for sequence in streams)
        self.stats.drafted_tokens += drafted
        return drafted

    def _verify(self, sequence: Sequence, sampled: SampledToken | Exception) -> int:
        """Accept a token. If it and those that it forces are the next guesses: how many they are, else 0."""
        length = len(sequence.tokens)
        if not isinstance(sampled, Exception):
            self._confirm(sequence, length, sampled.id)  # before the token ends the sequence, and its blocks are passed on
        self._accept(sequence, sampled)
        if sequence.finished:
            return 0
        for position in range(length + 1, len(sequence.tokens)):
            self._confirm(sequence, position, sequence.tokens[position])
        return len(sequence.tokens) - length if sequence.computed == len(sequence.tokens) else 0

    def _confirm(self, sequence: Sequence, position: int, token: int) -> None:
        """If the position is the first behind those in the cache, and its token was guessed, it is in the cache already."""
        if position != sequence.computed:  # a token before it was not guessed: this one, if it was, is elsewhere
            return
        if sequence.accepted < len(sequence.draft) and sequence.draft[sequence.accepted] == token:
            sequence.accepted += 1
            sequence.computed += 1
            sequence.job.usage.accepted_tokens += 1
            self.stats.accepted_tokens += 1

    def _conclude(self, speculation: Speculation, batch: list[Sequence], seconds: float) -> None:
        """After a step: free what the wrong guesses took, and learn from them."""
        if not self.scheduler.prompt_tokens:
            speculation.cost.observe(sum(len(sequence.segment.tokens) for sequence in batch), seconds)
        for sequence in batch:
            if not sequence.finished:
                speculation.observe(sequence, len(sequence.draft), sequence.accepted)
                if sequence.draft:
                    self.scheduler.trim(sequence)

    def _remove(self, sequence: Sequence) -> None:
        """Take a sequence that has ended out of everything."""
        self.scheduler.remove(sequence)
        if self.speculation is not None:
            self.speculation.release(sequence)

    def _start(self, sequence: Sequence, now: float) -> None:
        job = sequence.job
        job.first_step = now
        job.usage.cached_prompt_tokens = sequence.computed
        self.stats.prompt_tokens += job.usage.prompt_tokens
        self.stats.cached_prompt_tokens += sequence.computed

    def _fork(self, parent: Sequence, logits: NDArray[np.float32], row: int) -> None:
        """Start the other choices: each draws its own first token from the logits of the prompt, a row of the step's."""
        children = parent.job.sequences[1:]
        for child in children:
            self.scheduler.fork(parent, child)
        tokens = sample_rows(self.runner, logits, [child.sampler for child in children], [row] * len(children))
        for child, sampled in zip(children, tokens, strict=True):
            if not parent.job.done:
                self._accept(child, sampled)

    def _accept(self, sequence: Sequence, sampled: SampledToken | Exception) -> None:
        """Append a token to its sequence, and those that it forces; end the sequence if it must end. Its text can wait for `deliver`."""
        try:
            if isinstance(sampled, Exception):
                raise sampled
            forced = sequence.sampler.accept(sampled.id)
            sure = None if sampled.logprob is None else 0.0
            last = len(forced)
            for index, token in enumerate((sampled, *(SampledToken(token, sure) for token in forced))):
                sequence.tokens.append(token.id)
                self.stats.completion_tokens += 1
                if token.id in sequence.stops:
                    self._finish(sequence, "stop", sequence.stops[token.id])
                    return
                sequence.unread.append(token)
                if sequence.text.stops:
                    sequence.read()
                    if sequence.text.matched is not None:
                        self._finish(sequence, "stop", sequence.text.matched)
                        return
                if index < last and len(sequence.tokens) >= sequence.max_tokens:
                    break
        except Exception as error:
            self.fail(sequence.job, as_inference_error(error))
            return
        constraint = sequence.sampler.constraint
        if constraint is not None and constraint.complete and index == last:
            self._finish(sequence, "stop", None)
        elif len(sequence.tokens) < sequence.max_tokens:
            self._unread.append(sequence)
        elif constraint is not None and not (constraint.accepting and index == last):
            self._fail_unfinished(sequence)
        else:
            self._finish(sequence, "length", None)

    def _fail_unfinished(self, sequence: Sequence) -> None:
        """A constraint promises a shape: a text that was cut short does not have it, and is no answer."""
        made = counted(len(sequence.tokens) - sequence.prompt_length, "token")
        error = InferenceError(f"the answer was cut after {made}, before its constraint was satisfied; allow more with max_len")
        self.fail(sequence.job, error)

    def _finish(self, sequence: Sequence, reason: FinishReason, stop: str | int | None = None) -> None:
        job, text = sequence.job, sequence.text
        self._remove(sequence)
        try:
            sequence.read()
            sequence.unsent_text += text.finish()
        except Exception as error:
            self.fail(job, as_inference_error(error))
            return
        if text.matched is not None and reason == "length":
            reason, stop = "stop", text.matched
        if sequence.unsent_text or sequence.unsent:
            self._send(sequence)
        self._emit(job, ChoiceFinished(sequence.choice, reason, text.text, stop))
        if not job.done and all(other.finished for other in job.sequences):
            self._retire(job)
            if reason == "canceled":
                self.stats.canceled += 1
            else:
                self.stats.finished += 1
            self._emit(job, RequestFinished(job.final_usage()))
            job.sequences = []

    def _send(self, sequence: Sequence) -> None:
        self._emit(sequence.job, sequence.take_delta())

    def _retire(self, job: Job) -> None:
        job.done = True
        for sequence in job.sequences:
            if not sequence.finished:
                self._remove(sequence)
        self.jobs.pop(job, None)

    def _emit(self, job: Job, event: Event) -> None:
        try:
            job.on_event(event)
        except Exception:
            logger.exception("The receiver of a request's events raised an exception; the request is canceled")
            job.on_event = lambda event: None
            self.cancel(job)
        if job.wake is not None:
            self._to_wake[job.wake] = None

    def deliver(self) -> None:
        """Pass on the text of the tokens that were accepted since the last time, and wake those who have got something."""
        for sequence in self._unread:
            if sequence.finished:  # and has passed on all that it had
                continue
            try:
                sequence.read()
            except Exception as error:
                self.fail(sequence.job, as_inference_error(error))
            if sequence.unsent_text:
                self._send(sequence)
        self._unread.clear()
        for wake in self._to_wake:
            wake()
        self._to_wake.clear()

    def _fail_batch(self, batch: list[Sequence], error: Exception) -> None:
        """The step failed: nothing that it wrote to the cache counts."""
        logger.error("A step of %d sequences failed", len(batch), exc_info=error)
        for sequence in batch:
            self.fail(sequence.job, as_inference_error(error))

    def _check_deadlines(self) -> None:
        now = monotonic()
        if now < self._next_deadline:
            return
        for job in [job for job in self.jobs if job.request.deadline is not None and job.request.deadline <= now]:
            made = sum(len(sequence.tokens) - sequence.prompt_length for sequence in job.sequences)
            passed = perf_counter() - job.submitted
            text = f"the time for the request was over after {passed:.3f} s; {counted(made, 'token')} had been generated"
            self.fail(job, InferenceError(text))
        deadlines = (job.request.deadline for job in self.jobs)
        self._next_deadline = min((deadline for deadline in deadlines if deadline is not None), default=inf)

    def fail_all(self, make_error: Callable[[], PymistralError]) -> None:
        for job in list(self.jobs):
            self.fail(job, make_error())

    def release(self) -> None:
        """Let go of the model, once all is over: whoever still holds a request must not hold its weights."""
        del self.runner
        self.speculation = None

    def clear_cache(self) -> None:
        """Forget all keys and values; running sequences compute theirs again. Other weights may be computed in another way."""
        self.scheduler.prompts_apart = self.runner.prompts_apart
        for sequence in list(reversed(self.scheduler.running)):
            self.scheduler.preempt(sequence)
        self.pool.clear_cache()

    def logits(self, tokens: Tokens[int]) -> NDArray[np.float32]:
        """The logits after each of the tokens, ``[len(tokens), vocab_size]``. Running sequences make room if they must."""
        runner, cache = self.runner, self.cache
        if not 0 < len(tokens) <= self.max_length:
            raise RequestValidationError(f"logits of {len(tokens)} tokens were asked for; between 1 and {self.max_length} are possible")
        check_tokens(tokens, "the text", runner.vocab_size)
        self.scheduler.forget_pass()
        blocks = cache.new_tables()
        table, *further = blocks.tables
        result = np.empty((len(tokens), runner.vocab_size), np.float32)
        chunk = min(runner.max_batch_tokens, runner.max_output_rows)
        try:
            for start in range(0, len(tokens), chunk):
                part = tokens[start : start + chunk]
                end = start + len(part)
                while not cache.grow(blocks, end):
                    self.scheduler.preempt(self.scheduler.running[-1])
                segment = Segment(part, start, table, len(part), further_tables=further)
                result[start:end] = runner.read_logits(runner.forward([segment]))
                cache.slide(blocks, end)
        finally:
            self.pool.release(blocks.held())
        return result

    def snapshot(self) -> EngineStats:
        """The counters at this moment. Any thread may ask."""
        s, pool = self.stats, self.pool
        s.waiting, s.running = len(self.scheduler.waiting), len(self.scheduler.running)
        s.free_blocks, s.cached_blocks, s.preemptions = pool.num_free, len(pool.idle), self.scheduler.preemptions
        return s


def check_tokens(tokens: Tokens[int], where: str, vocab_size: int) -> None:
    """A token that the model does not have must not reach a kernel."""
    if tokens and not (min(tokens) >= 0 and max(tokens) < vocab_size):
        wrong = next(token for token in tokens if not 0 <= token < vocab_size)
        raise RequestValidationError(f"{where} holds the token {wrong}; the vocabulary has the tokens 0 to {vocab_size - 1}")
