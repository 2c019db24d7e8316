"""Grammars: which tokens may come next, computed by llguidance beside the forward pass."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import InferenceError, RequestValidationError
from ..requests.json_schema import map_subschemas
from .lark import endless
from .types import ConstraintState

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

I32 = NDArray[np.int32]
WINDOW = 1024
"""Bytes of the latest text in which a trigger is looked for; also the longest text that a trigger at the start may have."""


class GrammarTokenizer(Protocol):
    """What a tokenizer tells a grammar."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def special_token_ids(self) -> frozenset[int]: ...
    def id_to_bytes(self, token: int) -> bytes: ...
    def encode_continuation(self, text: str) -> list[int]: ...


class GrammarSource(Protocol):
    """What `pymistral.requests.Constraint` says."""

    @property
    def kind(self) -> str: ...
    @property
    def grammar(self) -> str: ...
    @property
    def of(self) -> str: ...


class GrammarCompiler:
    """Compiles grammars for one vocabulary. From any thread; the vocabulary is indexed when the first grammar comes.

    Parameters
    ----------
    tokenizer
        The tokenizer.
    vocab_size
        How many logits the model gives: at least as many as the tokenizer has tokens, as a rule.
    eos_token_ids
        The tokens that end a text.
    """

    def __init__(self, tokenizer: GrammarTokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self.tokenizer, self.vocab_size, self.eos_token_ids = tokenizer, vocab_size, sorted(eos_token_ids)
        self._lock = threading.Lock()
        self._compiled = lru_cache(maxsize=64)(self._compile)

    def compile(self, source: GrammarSource) -> Grammar:
        """The grammar, ready to start; the same one for the same source.

        Raises
        ------
        RequestValidationError
            The grammar has an error, or uses a feature that cannot be enforced; the message is llguidance's own.
        """
        try:
            return self._compiled(source.kind, source.grammar)
        except RequestValidationError as error:
            if source.of:
                raise RequestValidationError(f"{source.of}: {error}") from error
            raise

    def _compile(self, kind: str, text: str) -> Grammar:
        from llguidance import LLMatcher

        with self._lock:
            tokenizer = self._tokenizer
        try:
            # In this form a schema's own layout is heard, and text is never mistaken for another kind of grammar.
            grammar = text if kind == "llguidance" else getattr(LLMatcher, f"grammar_from_{kind}")(text)
            matcher = LLMatcher(tokenizer, grammar, log_level=0)
        except ValueError as error:
            raise RequestValidationError(f"the {kind} constraint cannot be used: {error}") from error
        if matcher.is_error() and kind == "json_schema":
            raise RequestValidationError(f"the {kind} constraint cannot be used: {self._faulty_part(text) or fault(matcher)}")
        if not matcher.is_error():
            if problem := endless(kind, text):
                raise RequestValidationError(f"the {kind} constraint cannot be used: {problem}")
            matcher = self._tried(matcher)
        if matcher.is_error():
            raise RequestValidationError(f"the {kind} constraint cannot be used: {fault(matcher)}")
        return Grammar(self, matcher)

    def _faulty_part(self, text: str) -> str | None:
        """What is wrong with the innermost part of a JSON schema that cannot be used by itself either, and where it is."""
        from llguidance import LLMatcher

        root = json.loads(text)
        around = {key: root[key] for key in ("$defs", "definitions", "x-guidance") if key in root} if isinstance(root, dict) else {}

        def inmost(part: Any, place: str) -> str | None:
            if not isinstance(part, dict):
                return None
            matcher = LLMatcher(self._tokenizer, LLMatcher.grammar_from_json_schema(json.dumps({**around, **part})), log_level=0)
            if not matcher.is_error():
                return None
            within: dict[str, Any] = {}
            map_subschemas(part, place, lambda sub, at: within.setdefault(at, sub))
            # Definitions come before what refers to them, then what is required: an optional property that nothing satisfies is left out.
            ordered = sorted(within, key=lambda at: (not at.startswith("#/$defs/"), at.rpartition("/")[2] not in part.get("required", ())))
            return next(filter(None, (inmost(within[at], at) for at in ordered)), None) or f"at {place}: {fault(matcher)}"

        return inmost(root, "#")

    def _tried(self, matcher: LLMatcher) -> LLMatcher:
        """The matcher, or a copy in which the first steps failed: some errors show only then, such as a rule that no text satisfies.

        The mask comes first, since it is computed without the GIL, so that a regex that is too large holds up nobody until it has failed.
        """
        first = matcher.deep_copy()
        bits = np.empty(-(-self.vocab_size // 32), np.int32)
        first.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if not first.is_error() and (forced := first.compute_ff_tokens()) and first.consume_tokens(forced):
            first.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        return first if first.is_error() else matcher

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper

        return LLTokenizer(TokenizerWrapper(_Vocabulary(self)), n_vocab=self.vocab_size, eos_token=self.eos_token_ids, slices=None)


class _Vocabulary:
    """A tokenizer in the form that llguidance reads."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        tokenizer = compiler.tokenizer
        known = min(tokenizer.vocab_size, compiler.vocab_size)
        self.eos_token_id = compiler.eos_token_ids[0] if compiler.eos_token_ids else 0
        self.bos_token_id = tokenizer.bos_token_id
        self.tokens = [tokenizer.id_to_bytes(token) for token in range(known)] + [b""] * (compiler.vocab_size - known)
        self.special_token_ids = sorted(token for token in tokenizer.special_token_ids if token < known)
        self._encode = tokenizer.encode_continuation

    def __call__(self, text: str) -> list[int]:
        if isinstance(text, bytes):
            raise TypeError("text, please")  # this is how llguidance asks whether bytes will do
        return self._encode(text)


class Grammar:
    """A compiled grammar."""

    def __init__(self, compiler: GrammarCompiler, matcher: LLMatcher) -> None:
        self.compiler = compiler
        self._matcher = matcher

    def start(self) -> GrammarState:
        """The state before the first token."""
        return GrammarState(self._matcher.deep_copy(), self.compiler.vocab_size)

    def after(self, text: bytes) -> GrammarState | None:
        """The state after some text; None if the grammar does not allow it."""
        matcher = self._matcher.deep_copy()
        tokens = self.compiler._tokenizer.tokenize_bytes(text) if text else []
        if tokens and not matcher.consume_tokens(tokens):
            return None
        return GrammarState(matcher, self.compiler.vocab_size)


_masks = ThreadPoolExecutor(max_workers=2, thread_name_prefix="pymistral-mask")


class GrammarState:
    """How far one choice has come in a grammar.

    A mask is begun as soon as the token before it is known, on another thread and without the GIL, and asked for after the forward pass.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._bits = np.empty(-(-vocab_size // 32), np.int32)
        self._pending: Future[None] | None = None
        self._forced: list[int] = []
        self.complete = self.accepting = False
        self._follow()

    def allowed(self) -> I32:
        if self._forced:
            return bitmask(self._forced[:1], self._vocab_size)
        self._wait()
        self._check(not self._matcher.is_error())
        return self._bits

    def accept(self, token: int) -> Sequence[int]:
        if self._forced:
            return self.take_forced()[1:]
        self._wait()
        self._check(self._matcher.consume_token(token))
        self._follow()
        return self.take_forced()

    def take_forced(self) -> list[int]:
        """The tokens that must come next. Their mask is begun already for what follows them."""
        forced, self._forced = self._forced, []
        return forced

    def _follow(self) -> None:
        matcher = self._matcher
        self._forced = matcher.compute_ff_tokens()
        self._check(not self._forced or matcher.consume_tokens(self._forced))
        self.complete, self.accepting = matcher.is_stopped(), matcher.is_accepting()
        self._pending = _masks.submit(self._compute)  # from here on the matcher is not to be touched until it is done

    def _compute(self) -> None:
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _check(self, fine: bool) -> None:
        if not fine:
            raise InferenceError(f"the constraint failed: {fault(self._matcher)}")


class Trigger:
    """Text after which a grammar holds.

    Parameters
    ----------
    pattern
        What to look for in the bytes of the text so far. The match must end where the grammar begins.
    grammar
        What must follow.
    at_start
        Look for it at the start only: of the answer, and after each text that a grammar has ended.
    """

    def __init__(self, pattern: str, grammar: Grammar, *, at_start: bool = False) -> None:
        self.pattern = re.compile(pattern.encode(), re.DOTALL)
        self.grammar = grammar
        self.at_start = at_start


class Triggered:
    """Free text, until a trigger brings a grammar into force; free again after its end.

    Parameters
    ----------
    compiler
        What the grammars were compiled by.
    triggers
        The triggers; the first that matches counts.
    required
        Whether a grammar must come, and ends the text when it ends.
    """

    def __init__(self, compiler: GrammarCompiler, triggers: Sequence[Trigger], *, required: bool = False) -> None:
        self.compiler, self.triggers, self.required = compiler, triggers, required
        everything = set(range(compiler.vocab_size))
        self.unfinished = bitmask(everything - set(compiler.eos_token_ids), compiler.vocab_size) if required else None
        """What may come while a grammar has yet to come."""

    def start(self) -> ConstraintState:
        return TriggeredState(self)


class TriggeredState:
    """How far one choice has come: in free text, or in one of the grammars."""

    def __init__(self, rules: Triggered) -> None:
        self._rules = rules
        self._bytes_of = rules.compiler.tokenizer.id_to_bytes
        self._known = rules.compiler.tokenizer.vocab_size
        self._grammar: GrammarState | None = None
        self._text = b""
        self._from_start = True
        self.complete = False

    @property
    def accepting(self) -> bool:
        if self._grammar is None:
            return self.complete or not self._rules.required
        return self._grammar.accepting

    def allowed(self) -> I32 | None:
        return self._rules.unfinished if self._grammar is None else self._grammar.allowed()

    def accept(self, token: int) -> Sequence[int]:
        if self._grammar is None:
            self._read(self._bytes_of(token) if token < self._known else b"")
            return self._enter() if self._grammar is not None else ()
        forced = self._grammar.accept(token)
        self._leave_if_complete()
        return forced

    def _read(self, piece: bytes) -> None:
        self._text += piece
        if len(self._text) > WINDOW:
            self._text, self._from_start = self._text[-WINDOW:], False
        for trigger in self._rules.triggers:
            if trigger.at_start and not self._from_start:
                continue
            match = trigger.pattern.match(self._text) if trigger.at_start else trigger.pattern.search(self._text)
            if not match:
                continue
            # What the token says beyond the trigger belongs to the grammar. If it is not allowed there, this was no trigger.
            self._grammar = trigger.grammar.after(self._text[match.end() :])
            if self._grammar is not None:
                return
            if not trigger.at_start:
                self._text, self._from_start = self._text[match.end() :], False

    def _enter(self) -> Sequence[int]:
        """The tokens that a grammar demands at its beginning."""
        assert self._grammar is not None
        forced = self._grammar.take_forced()
        self._leave_if_complete()
        return forced

    def _leave_if_complete(self) -> None:
        if self._grammar is not None and self._grammar.complete:
            self._grammar, self._text, self._from_start = None, b"", True
            self.complete = self._rules.required


def fault(matcher: LLMatcher) -> str:
    """What llguidance has to say, without the dump of its state or its stack."""
    message = re.split("\n<(?:state|backtrace)>|\n *while processing json-schema:", str(matcher.get_error()))[0].strip()
    if message.startswith("min/maxProperties"):
        message += '; list them in "required", or leave "minProperties" and "maxProperties" out'
    return "no text can satisfy it" if message == "NoExtensionBias" else message


def bitmask(allowed: Iterable[int], vocab_size: int) -> I32:
    """A bit for each token of the vocabulary, set for those that are allowed."""
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[list(allowed)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)
