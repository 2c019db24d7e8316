"""The grammars of calls: they allow what the families' templates render, and whatever they allow is read back as valid calls."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema
import numpy as np
import pytest

from pymistral.engine.constraint import Trigger, Triggered
from pymistral.engine.types import ConstraintState
from pymistral.requests import Constraint
from pymistral.tool_calls import Dialect

from .conftest import FAMILIES, GOLDENS, TOOLS, ByteVocabulary, dialect, golden_id, joined

SCHEMAS: dict[str, Any] = {"get_weather": TOOLS[0]["function"]["parameters"], "anything-2": {"type": "object"}}
STRICT: dict[str, Any] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"enum": ["Paris", "São Paulo", 'a "quoted" one']},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
            "unit": {"type": ["string", "null"], "maxLength": 9},
            "hours": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        },
        "required": ["city", "hours"],
        "additionalProperties": False,
    },
    "anything-2": {"type": "object", "properties": {}, "additionalProperties": False},
}
CALLS = [golden for golden in GOLDENS if golden["calls"]]


def triggered(family: Dialect, vocabulary: ByteVocabulary, schemas: dict[str, Any]) -> Triggered:
    compiler = vocabulary.compiler()
    triggers = family.triggers(schemas)
    return Triggered(compiler, [Trigger(begin, compiler.compile(Constraint.lark(lark)), at_start=start) for begin, lark, start in triggers])


def allowed_tokens(state: ConstraintState, vocabulary: ByteVocabulary) -> list[int] | None:
    bits = state.allowed()
    if bits is None:
        return None
    return np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little", count=vocabulary.vocab_size)).tolist()


def follow(state: ConstraintState, vocabulary: ByteVocabulary, tokens: list[int]) -> int:
    """Feed tokens that must be allowed, skipping those that come by themselves; how many tokens a grammar had a say in."""
    place = ruled = 0
    while place < len(tokens):
        allowed = allowed_tokens(state, vocabulary)
        assert allowed is None or tokens[place] in allowed, bytes(tokens[:place])[-80:]
        ruled += allowed is not None
        forced = list(state.accept(tokens[place]))
        assert tokens[place + 1 : place + 1 + len(forced)] == forced
        ruled += len(forced)
        place += 1 + len(forced)
    return ruled


@pytest.mark.parametrize("special", [True, False], ids=["tokens", "text"])
@pytest.mark.parametrize("golden", CALLS, ids=golden_id)
def test_calls_that_templates_render_are_allowed(golden: dict[str, Any], special: bool) -> None:
    family, vocabulary = dialect(golden["template"], special)
    answer = re.sub(r', "id": "\w+"', "", golden["answer"])  # in Mistral's history, but not said by the model
    if golden["template"] == "gemma4":
        answer = answer.replace(",None,", ",null,")  # as Jinja writes it
    state = triggered(family, vocabulary, SCHEMAS).start()
    ruled = follow(state, vocabulary, vocabulary.encode(answer))
    assert ruled >= 2
    assert state.accepting


@pytest.mark.parametrize("family_name", FAMILIES)
def test_a_call_that_is_cut_is_not_accepted(family_name: str) -> None:
    family, vocabulary = dialect(family_name)
    golden = next(golden for golden in CALLS if golden["template"] == family_name)
    answer = re.sub(r', "id": "\w+"', "", golden["answer"])
    state = triggered(family, vocabulary, SCHEMAS).start()
    follow(state, vocabulary, vocabulary.encode(answer[: answer.index("Zürich") + 3]))
    assert not state.accepting


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family_name", FAMILIES)
def test_required_calls_are_valid_whatever_is_drawn(family_name: str, seed: int) -> None:
    # Where text runs up to a mark that is no token of its own, drawing at random would not end it in years.
    runs_on = family_name in ("functiongemma", "gemma4", "gpt-oss")
    family, vocabulary = dialect(family_name, special=runs_on or seed % 2 == 0)
    draw = random.Random(seed)
    state = vocabulary.compiler().compile(Constraint.lark(family.required(STRICT))).start()
    tokens: list[int] = []
    while not state.complete:
        allowed = allowed_tokens(state, vocabulary)
        assert allowed
        if 256 in allowed:
            break
        token = draw.choice([token for token in allowed if token < 128 or token >= 256] or allowed)
        tokens += [token, *state.accept(token)]
        assert len(tokens) < 5000
    text = b"".join(map(vocabulary.id_to_bytes, tokens)).decode(errors="replace")
    reader = family.reader(STRICT)
    answer = joined([*reader.push(text), *reader.finish()])
    assert answer["content"] == ""
    assert answer["calls"]
    for name, arguments in answer["calls"]:
        schema = STRICT[name]
        if family_name in ("functiongemma", "gemma4"):  # its strings are bare text, of which no length is kept
            schema = json.loads(json.dumps(schema).replace('"maxLength": 9', '"maxLength": 10000'))
        jsonschema.validate(json.loads(arguments), schema)


@pytest.mark.parametrize("family_name", FAMILIES)
def test_free_text_costs_nothing(family_name: str) -> None:
    family, vocabulary = dialect(family_name)
    state = triggered(family, vocabulary, SCHEMAS).start()
    for token in vocabulary.encode('It rains. {"name": "Bob"} <b>[x]</b> ' * 50):
        assert state.allowed() is None
        assert not state.accept(token)
    assert state.accepting


def test_reasoning_comes_before_required_calls() -> None:
    family, vocabulary = dialect("qwen3")
    compiler = vocabulary.compiler()
    begins = family.calls_begin(True)
    assert begins is not None
    required = compiler.compile(Constraint.lark(family.required(STRICT)))
    state = Triggered(compiler, [Trigger(begins, required)], required=True).start()
    for token in vocabulary.encode("I think <tool_call> so.\n"):
        allowed = allowed_tokens(state, vocabulary)
        assert allowed is not None
        assert 256 not in allowed
        assert token in allowed
        state.accept(token)
    assert not state.accepting
    assert state.accept(vocabulary.token_to_id("</think>") or 0) == [vocabulary.token_to_id("<tool_call>")]
