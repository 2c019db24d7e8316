"""Whatever a grammar lets through satisfies its schema, however little the model cares: its logits are noise here."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation, getcontext
from typing import Any

import jsonschema
import pytest

from pymistral.engine.constraint import GrammarCompiler
from pymistral.engine.core import EngineCore
from pymistral.engine.types import EngineRequest
from pymistral.errors import RequestValidationError
from pymistral.requests import Constraint, SamplingParams
from tests.engine.fakes import Collector

from .schemas import REFUSED, SHAPES, schemas

COUNT = 500


def test_every_finished_answer_satisfies_its_schema(noise: tuple[EngineCore, GrammarCompiler]) -> None:
    core, compiler = noise
    answers: list[tuple[Any, Collector]] = []
    for seed, schema in enumerate([*schemas(COUNT), *SHAPES]):
        sampling = SamplingParams(temperature=1.0, max_len=900, seed=seed)
        constraint = compiler.compile(Constraint.json_schema(schema))
        collector = Collector()
        core.add(core.prepare(EngineRequest([1, 2, 3], sampling, constraint=constraint), collector))
        answers.append((schema, collector))
    while core.busy:
        core.step()
    finished = [(schema, collector.texts[0]) for schema, collector in answers if collector.finished]
    unfinished = [str(collector.end.error) for _, collector in answers if not collector.finished]  # type: ignore[union-attr]
    assert all("before its constraint was satisfied" in error for error in unfinished), unfinished
    assert len(finished) >= 0.8 * COUNT
    invalid = [(schema, text, error) for schema, text in finished if (error := why_invalid(schema, text))]
    assert not invalid, f"{len(invalid)} of {len(finished)}: {invalid[:5]}"


def why_invalid(schema: Any, text: str) -> str:
    """Decimals, since 0.07 is a multiple of 0.01, but not in binary."""
    getcontext().prec = 5000  # a multiple of 0.01 may have a thousand digits
    try:
        exact = json.loads(json.dumps(schema), parse_float=decimal)
        value = json.loads(text, parse_float=decimal)
        jsonschema.Draft202012Validator(exact, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER).validate(value)
    except (ValueError, jsonschema.ValidationError) as error:
        return str(error)[:300]
    return ""


def decimal(text: str) -> Decimal:
    try:
        return Decimal(text)
    except InvalidOperation:  # an exponent of many digits
        return Decimal("-Infinity" if text[0] == "-" else "Infinity")


@pytest.mark.parametrize(("name", "schema"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_cannot_be_enforced_is_refused_by_name(noise: tuple[EngineCore, GrammarCompiler], name: str, schema: Any) -> None:
    with pytest.raises(RequestValidationError) as refused:
        noise[1].compile(Constraint.json_schema(schema))
    assert name in str(refused.value)


@pytest.mark.parametrize("pattern", [r"^[^\\]$", r'^[^"\\]+$', r"^[^\]\\\n]$", r"x[^\\/]*$"])
def test_what_a_class_excludes_comes_as_no_escape_either(noise: tuple[EngineCore, GrammarCompiler], pattern: str) -> None:
    grammar = noise[1].compile(Constraint.json_schema({"type": "string", "pattern": f"^x$|{pattern}"}))
    assert grammar.after(b'"x') is not None
    assert grammar.after(b'"x"') is not None
    assert grammar.after(rb'"\\"' if pattern[0] == "^" else rb'"x\\"') is None


def test_malformed_schemas_are_refused_or_harmless(noise: tuple[EngineCore, GrammarCompiler]) -> None:
    """Junk in any place of a schema: one clear error, or a grammar all the same."""
    junk: list[Any] = [None, True, -1, 1e300, "x", "#", "#/a/0", [], {}, [{}], {"$ref": "#"}, {"type": []}, [1, "a"]]
    errors = []
    for seed, schema in enumerate(schemas(300)):
        rng = random.Random(seed)
        text = json.dumps(schema)
        broken = json.loads(text)
        parent, key = rng.choice(list(places(broken)) or [([broken], 0)])
        parent[key] = rng.choice(junk)
        try:
            noise[1].compile(Constraint.json_schema(broken))
        except RequestValidationError as error:
            errors.append(str(error))
    assert 30 < len(errors) < 290
    assert all(errors)
    deep: Any = {"type": "string"}
    for _ in range(500):
        deep = {"type": "array", "items": deep}
    with pytest.raises(RequestValidationError):
        noise[1].compile(Constraint.json_schema(deep))


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a JSON value: what holds it, and by which key."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield value, key
        yield from places(item)


def test_the_schemas_are_varied() -> None:
    text = json.dumps(schemas(COUNT))
    keywords = (
        "type properties required items prefixItems anyOf oneOf allOf $ref enum const pattern format minLength maxLength minimum maximum "
    )
    keywords += (
        "exclusiveMinimum exclusiveMaximum multipleOf minItems maxItems additionalProperties patternProperties minProperties maxProperties"
    )
    assert all(text.count(f'"{keyword}":') >= 5 for keyword in keywords.split())
    assert len({json.dumps(schema) for schema in schemas(COUNT)}) >= 300
