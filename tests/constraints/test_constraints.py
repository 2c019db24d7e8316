"""Constraints as callers make them, and grammars as the engine follows them."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import make_model
from llguidance import LLMatcher, LLTokenizer

from pymistral import Constraint, RequestBuilder
from pymistral.engine.constraint import GrammarCompiler, Trigger, Triggered, bitmask
from pymistral.engine.core import EngineCore
from pymistral.engine.lark import endless
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
        (Constraint.regex(r"a[^\s\S]"), "no text can satisfy it"),
        (Constraint.regex("(a{1000}){1000}"), "the regex constraint cannot be used: lexer error: too many expressions"),
        (Constraint.lark('start: "a"{100000}'), "Too many items"),
    ],
    ids=str,
)
def test_grammars_with_errors(noise: tuple[EngineCore, GrammarCompiler], constraint: Constraint, message: str) -> None:
    with pytest.raises(RequestValidationError, match=message):
        noise[1].compile(constraint)


ENDLESS = [
    ("start: start", "start"),
    ("start: /a+/ x\nx: x", "x"),
    ('start: "a" x | "b"\n?x: y "c"\n\n!y: x', "x"),
    ('start: x?\nx: "a" (x | y)\ny: x // "b"', "x"),
    ('start: x\nx: "a" x ~ 2..3 -> alias\n  | x{2} "b" /[|]"/', "x"),
    ('start[capture="start:"]: /[a]+/ y\ny: %json {"$ref": "#", "title": "}"}\n%ignore / /', "y"),
    ('start: /a+/ %lark {\nstart: "b" z\nz: [z] z\n}', "z"),
    ('start: x::0\nx::_: "b" x::incr(_) %if lt(_, 7)\n  | /a/ x::_ %if ge(_, 7)', "x"),
]
ENDING = [
    "start: x\nx: start?",
    r"start: /[^\s\S]/? /([^\s\S]|a)[b&&b]/ A" "\n" r"A: /[^\\]|[^\s\S]/",
    'start: x\nx: "a" x\n  | "b"  # x: x',
    'start: x*\nx: [x] "a" ~ 2 x~0..3 x{,2}',
    'start: x::0\nx::_: "b" x::incr(_) %if lt(_, 7)\n  | /a/ %if ge(_, 7)',
    'start: A y\nA: "x"\n  | A_B & ~/c/\nA_B: "b"\nunused: unused\ny[stop="x: y"]: /(.|\\n)*/',
    '%import common.INT\nstart: "a".."z" INT %json {"anyOf": [{"type": "null"}, {"$ref": "#"}]} <|eos|> %regex {"substring_chars": "ab|"}',
]


@pytest.mark.parametrize(("grammar", "rule"), ENDLESS)
def test_a_rule_that_never_ends_is_named(noise: tuple[EngineCore, GrammarCompiler], grammar: str, rule: str) -> None:
    for constraint in (Constraint.lark(grammar), Constraint.llguidance({"grammars": [{"lark_grammar": grammar}]})):
        with pytest.raises(RequestValidationError, match=f"cannot be used: no text can satisfy the rule '{rule}', which never ends"):
            noise[1].compile(constraint)


def test_a_terminal_without_a_text_is_named(noise: tuple[EngineCore, GrammarCompiler]) -> None:
    grammar = 'start: WORD NONE\nNONE: LONG\n  | "a" & ~"a"\n%import common.WORD\nLONG: /b{3}/ & /b{2}/ & %regex {"substring_chars": "bbb"}'
    with pytest.raises(RequestValidationError, match=r"no text can satisfy the terminal 'NONE': change it"):
        noise[1].compile(Constraint.lark(grammar))


@pytest.mark.parametrize("regex", [r"[^\s\S]", "b?[x&&y]", r"(c|\P{any})[^\w\W]"])
def test_a_regex_without_a_text_is_named(noise: tuple[EngineCore, GrammarCompiler], regex: str) -> None:
    """After /a+/ llguidance would look for it for ever."""
    inline, named = f"start: /a+/ x\nx: /{regex}/", f"start: /a+/ NONE\nNONE: /{regex}/"
    for grammar, name in ((inline, f"/{regex}/"), (named, "'NONE'")):
        with pytest.raises(RequestValidationError, match=f"no text can satisfy the terminal {re.escape(name)}: change it"):
            noise[1].compile(Constraint.lark(grammar))


def test_grammars_that_lead_to_each_other_without_end(noise: tuple[EngineCore, GrammarCompiler]) -> None:
    first = {"name": "first", "lark_grammar": "start: /a+/ @second"}
    for second in ({"lark_grammar": "start: @first"}, {"json_schema": {"$ref": "#"}}):
        with pytest.raises(RequestValidationError, match="no text can satisfy the rule 'start'"):
            noise[1].compile(Constraint.llguidance({"grammars": [first, {"name": "second", **second}]}))


@pytest.mark.parametrize("grammar", ENDING)
def test_rules_that_end(grammar: str) -> None:
    """llguidance accepts the grammar, too: what is tested is its language."""
    tokenizer = LLTokenizer("byte")
    assert LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(grammar.replace("<|eos|>", '"e"')), tokenizer) == ""
    assert endless("lark", grammar) is None


def test_a_grammar_without_end_does_not_hang() -> None:
    """llguidance would take "a" for ever, with the interpreter's lock held; so this is tried in another process."""
    code = (
        "from fake_model import make_model\nfrom pymistral import Constraint, RequestBuilder\n"
        "from pymistral.blocking import BlockingModel\n"
        "request = RequestBuilder().add_message('user', 'Hi').set_constraint(Constraint.lark('start: /a+/ x\\nx: x'))\n"
        "try: BlockingModel(make_model()).send_chat_request(request)\nexcept ValueError as error: print(error)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert "the rule 'x', which never ends" in done.stdout, done.stderr


async def test_a_request_with_such_a_grammar_is_refused() -> None:
    async with make_model() as model:
        other = asyncio.ensure_future(model.chat("Hello"))
        for constraint in (Constraint.lark("start: start"), Constraint.regex("(a{1000}){1000}")):
            with pytest.raises(RequestValidationError, match="constraint cannot be used"):
                await model.send_chat_request(RequestBuilder().add_message("user", "Hi").set_constraint(constraint))
        assert await other == "abcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize(
    ("limits", "remedy"),
    [
        ({"maxProperties": 1, "required": ["a"]}, 'list them in "required", or leave "minProperties" and "maxProperties" out$'),
        ({"minProperties": 3, "additionalProperties": True}, "leave it out, or name the keys in 'properties' and 'required'$"),
    ],
)
def test_limits_of_properties_come_with_a_remedy(noise: tuple[EngineCore, GrammarCompiler], limits: dict[str, Any], remedy: str) -> None:
    with pytest.raises(RequestValidationError, match=remedy):
        noise[1].compile(Constraint.json_schema({"type": "object", "properties": {"a": {}, "b": {}}, **limits}))


@pytest.mark.parametrize("limits", [{"minimum": 0}, {"maximum": 9}, {"multipleOf": 0.5}, {"exclusiveMinimum": -1}])
def test_a_number_with_one_limit_is_finite(noise: tuple[EngineCore, GrammarCompiler], limits: dict[str, Any]) -> None:
    grammar = noise[1].compile(Constraint.json_schema({"type": ["number", "null"], **limits}))
    sign = b"-" if "maximum" in limits else b""
    assert grammar.after(sign + b"9" * 18) is not None
    assert grammar.after(sign + b"9" * 20) is None


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
