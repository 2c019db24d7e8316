"""Constraints as callers make them, and grammars as the engine follows them."""

from __future__ import annotations

import asyncio
import re

import numpy as np
import pytest
from fake_model import make_model

from pymistral import Constraint, RequestBuilder
from pymistral.engine.constraint import GrammarCompiler, Trigger, Triggered, bitmask
from pymistral.engine.core import EngineCore
from pymistral.engine.types import EngineRequest
from pymistral.errors import InferenceError, RequestValidationError
from pymistral.requests import SamplingParams
from tests.engine.fakes import Collector

NUMBERS = """start: sum
sum: NUMBER ("+" NUMBER){1,3}
NUMBER: /[0-9]{1,3}/
"""


def generate(noise: tuple[EngineCore, GrammarCompiler], constraint: Constraint, seed: int = 0, n_choices: int = 1) -> list[str]:
    core, compiler = noise
    collector = Collector()
    sampling = SamplingParams(max_len=200, seed=seed, n_choices=n_choices)
    core.add(core.prepare(EngineRequest([1], sampling, constraint=compiler.compile(constraint)), collector))
    while core.busy:
        core.step()
    assert all(finished.reason == "stop" for finished in collector.finished.values())
    return [collector.texts[choice] for choice in range(n_choices)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        (Constraint.regex(r"(yes|no), [a-f]{2,4}\."), r"(yes|no), [a-f]{2,4}\."),
        (Constraint.regex("one text"), "one text"),
        (Constraint.regex("[äöü日]{3}"), "[äöü日]{3}"),
        (Constraint.lark(NUMBERS), r"\d{1,3}(\+\d{1,3}){1,3}"),
        (Constraint.llguidance({"grammars": [{"lark_grammar": NUMBERS}]}), r"\d{1,3}(\+\d{1,3}){1,3}"),
        (Constraint.json_schema({"enum": ["a", {"b": [1, True]}]}), r'"a"|\{"b": \[1, true\]\}'),
        (Constraint.json_schema('{"type": "boolean"}'), "true|false"),
        (Constraint.json_schema({"type": "array", "items": {"const": 0}, "minItems": 2, "maxItems": 2}), r"\[0, 0\]"),
        (Constraint.json_schema({"const": [0, 1], "x-guidance": {"whitespace_flexible": False}}), r"\[0,1\]"),
    ],
    ids=lambda value: value.kind if isinstance(value, Constraint) else "",
)
def test_noise_follows_the_constraint(noise: tuple[EngineCore, GrammarCompiler], constraint: Constraint, pattern: str, seed: int) -> None:
    texts = generate(noise, constraint, seed, n_choices=2)
    assert all(re.fullmatch(pattern, text) for text in texts), texts


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constraint.regex(""), "Constraint.regex takes a non-empty string"),
        (lambda: Constraint.lark(7), "Constraint.lark takes a non-empty string, got 7"),  # type: ignore[arg-type]
        (lambda: Constraint.json_schema("{"), "the schema is no JSON"),
        (lambda: Constraint.json_schema([]), "takes a schema as a dict"),  # type: ignore[arg-type]
        (lambda: Constraint.json_schema(int), "generate_structured takes types"),  # type: ignore[arg-type]
        (lambda: Constraint.json_schema({"const": {1, 2}}), "cannot be written as JSON"),
        (lambda: Constraint.llguidance("{}"), "grammars"),
        (lambda: Constraint.llguidance("x"), "no JSON"),
        (lambda: RequestBuilder().set_constraint("a+"), "set_constraint takes a Constraint"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_constraint(make: object, message: str) -> None:
    with pytest.raises(RequestValidationError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (Constraint.regex("(a"), "unclosed group"),
        (Constraint.regex(r"(a)\1"), "backreferences"),
        (Constraint.lark("start: nothing"), 'unknown name: "nothing"'),
        (Constraint.llguidance({"grammars": [{"x": 1}]}), "lark_grammar or json_schema"),
        # What shows only in the first steps.
        (Constraint.lark("start: start"), "the lark constraint cannot be used: no text can satisfy it"),
        (Constraint.lark('start: "a" rest\nrest: rest'), "no text can satisfy it"),
        (Constraint.regex("(a{1000}){1000}"), "the regex constraint cannot be used: lexer error: too many expressions"),
        (Constraint.lark('start: "a"{100000}'), "Too many items"),
    ],
    ids=str,
)
def test_grammars_with_errors(noise: tuple[EngineCore, GrammarCompiler], constraint: Constraint, message: str) -> None:
    with pytest.raises(RequestValidationError, match=message):
        noise[1].compile(constraint)


async def test_a_request_with_such_a_grammar_is_refused() -> None:
    async with make_model() as model:
        other = asyncio.ensure_future(model.chat("Hello"))
        for constraint in (Constraint.lark("start: start"), Constraint.regex("(a{1000}){1000}")):
            with pytest.raises(RequestValidationError, match="constraint cannot be used"):
                await model.send_chat_request(RequestBuilder().add_message("user", "Hi").set_constraint(constraint))
        assert await other == "abcdefghijklmnopqrstuvwxyz"


def test_a_grammar_is_compiled_once(noise: tuple[EngineCore, GrammarCompiler]) -> None:
    assert noise[1].compile(Constraint.regex("a+")) is noise[1].compile(Constraint.regex("a+"))


def test_states_are_independent(noise: tuple[EngineCore, GrammarCompiler]) -> None:
    grammar = noise[1].compile(Constraint.regex("a{3}|b{3}"))
    encode = noise[1].tokenizer.encode_continuation
    first, second = grammar.start(), grammar.start()
    (a,), (b,) = encode("a"), encode("b")
    first.accept(a)
    second.accept(b)
    with pytest.raises(InferenceError, match="constraint"):
        first.accept(b)


def test_a_trigger_inside_a_token(noise: tuple[EngineCore, GrammarCompiler]) -> None:
    """What the token says beyond the trigger counts as said within the grammar, or there was no trigger."""
    compiler = noise[1]
    (token,) = compiler.tokenizer.encode_continuation("({")
    for pattern, expected in ((r"\{[0-9]+\}", True), (r"\[[0-9]+\]", False)):
        state = Triggered(compiler, [Trigger(r"\(", compiler.compile(Constraint.regex(pattern)))]).start()
        assert not state.accept(token)
        assert (state.allowed() is not None) is expected


def test_bitmask() -> None:
    bits = bitmask([0, 33, 69], 70)
    assert bits.dtype == np.int32
    assert np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist() == [0, 33, 69]
