"""Whatever a grammar lets through satisfies its schema, however little the model cares: its logits are noise here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation, getcontext
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from numpy.typing import NDArray

from pymistral.engine.constraint import GrammarCompiler
from pymistral.engine.core import EngineCore
from pymistral.engine.types import EngineRequest, Segment
from pymistral.errors import RequestValidationError
from pymistral.loading.checkpoint import load_gguf
from pymistral.nn.sampling import SamplingProgram
from pymistral.requests import Constraint, SamplingParams
from tests.engine.fakes import Collector

from .schemas import REFUSED, schemas

COUNT = 500


class NoiseRunner:
    """Random logits, in which what ends a string is a little more likely than in nature."""

    max_num_seqs, max_batch_tokens, max_output_rows = 32, 512, 64
    block_size, num_blocks, max_sequence_length = 32, 2048, 1024

    def __init__(self, vocab_size: int, closing: Sequence[int]) -> None:
        self.vocab_size = vocab_size
        self._rng = np.random.default_rng(0)
        self._rows = (1.5 * self._rng.standard_normal((64, vocab_size))).astype(np.float32)
        self._rows[:, list(closing)] += 1.5
        self.sample = SamplingProgram(vocab_size, threads=1).run

    def forward(self, segments: Sequence[Segment]) -> NDArray[np.float32]:
        return self._rows[self._rng.integers(0, len(self._rows), sum(segment.outputs for segment in segments))]


@pytest.fixture(scope="module")
def engine(smollm2_path: Path) -> tuple[EngineCore, GrammarCompiler]:
    checkpoint = load_gguf(smollm2_path)
    tokenizer = checkpoint.tokenizer
    closing = [token for token in range(tokenizer.vocab_size) if tokenizer.id_to_bytes(token)[:1] in (b'"', b"}", b"]")]
    core = EngineCore(NoiseRunner(tokenizer.vocab_size, closing), tokenizer, eos_token_ids=checkpoint.eos_token_ids)
    return core, GrammarCompiler(tokenizer, tokenizer.vocab_size, checkpoint.eos_token_ids)


def test_every_finished_answer_satisfies_its_schema(engine: tuple[EngineCore, GrammarCompiler]) -> None:
    core, compiler = engine
    answers: list[tuple[Any, Collector]] = []
    for seed, schema in enumerate(schemas(COUNT)):
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
def test_what_cannot_be_enforced_is_refused_by_name(engine: tuple[EngineCore, GrammarCompiler], name: str, schema: Any) -> None:
    with pytest.raises(RequestValidationError) as refused:
        engine[1].compile(Constraint.json_schema(schema))
    assert name in str(refused.value)


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
