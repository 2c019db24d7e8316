"""What shape an answer must have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import RequestValidationError
from .json_schema import prepared_schema

ConstraintKind = Literal["regex", "lark", "json_schema", "llguidance"]


@dataclass(frozen=True)
class Constraint:
    """The shape that an answer must have; made by one of its class methods.

    The model still chooses, but only among the tokens that can lead to such an answer. Reaching `max_len` before the answer is whole is
    a `ModelError`, with what there was of it.

    Examples
    --------
    >>> Constraint.regex("(yes|no)")
    Constraint.regex('(yes|no)')
    """

    kind: ConstraintKind
    """Which of the class methods made it."""
    grammar: str
    """The regular expression or grammar; a JSON schema as JSON text."""
    of: str = field(default="", compare=False)
    """The type that it was made from, for messages."""

    @classmethod
    def regex(cls, pattern: str) -> Constraint:
        """The whole answer matches a regular expression, in the syntax of Rust's `regex` crate (no look-around, no back-references)."""
        return cls("regex", _text("regex", pattern))

    @classmethod
    def lark(cls, grammar: str) -> Constraint:
        """The answer follows a context-free grammar in llguidance's dialect of Lark; it begins at the rule ``start``."""
        return cls("lark", _text("lark", grammar))

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool | str) -> Constraint:
        """The answer is JSON that a schema allows, its object keys in the schema's order, with a space after each ``,`` and ``:``.

        Objects get no properties but those that the schema names, unless it says otherwise with ``additionalProperties``.

        Parameters
        ----------
        schema
            The schema (draft 2020-12) as a dict or as JSON text. Its key ``x-guidance`` can ask for another layout.

        Raises
        ------
        RequestValidationError
            It is no JSON, or uses a feature that cannot be enforced while generating; the message names it.
        """
        return cls("json_schema", json.dumps(prepared_schema(_schema(schema)), ensure_ascii=False))

    @classmethod
    def llguidance(cls, grammar: Mapping[str, Any] | str) -> Constraint:
        """The answer follows a grammar in llguidance's own form: an object with a list of ``grammars``, as a dict or as JSON text."""
        text = grammar if isinstance(grammar, str) else _dumps("llguidance", grammar)
        try:
            parsed = json.loads(text)
        except ValueError as error:
            raise RequestValidationError(f"Constraint.llguidance: the grammar is no JSON: {error}") from None
        if not isinstance(parsed, dict) or not isinstance(parsed.get("grammars"), list):
            raise RequestValidationError('Constraint.llguidance takes {"grammars": [...]}, for instance [{"lark_grammar": "start: ..."}]')
        return cls("llguidance", text)

    def __repr__(self) -> str:
        return f"Constraint.{self.kind}({self.grammar!r})"


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise RequestValidationError(f"Constraint.{name} takes a non-empty string, got {value!r}")
    return value


def _schema(schema: object) -> Any:
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise RequestValidationError(f"Constraint.json_schema: the schema is no JSON: {error}") from None
    elif isinstance(schema, Mapping):
        schema = json.loads(_dumps("json_schema", schema))
    if not isinstance(schema, dict | bool):
        remedy = "; generate_structured takes types" if isinstance(schema, type) else ""
        raise RequestValidationError(f"Constraint.json_schema takes a schema as a dict or as JSON text, got {schema!r}{remedy}")
    return schema


def _dumps(name: str, value: Mapping[str, Any]) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestValidationError(f"Constraint.{name}: this cannot be written as JSON: {error}") from None
