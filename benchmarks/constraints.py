"""What a constraint costs: decode speed with a JSON schema beside free decode, on one model.

Kinds take turns within each repetition, so that a noisy machine is noisy for all of them. "schema" is JSON in our
layout, where names and punctuation are forced; "flexible" leaves white space to the model; "string" is nothing but a
long string, where no token is forced. The exit code is 1 if the schema decodes at less than 80 % of free speed.
"""

from __future__ import annotations

from typing import Any

from pymistral import Constraint, ModelBuilder, RequestBuilder
from pymistral.blocking import BlockingModel
from pymistral.errors import ModelError
from pymistral.loading.hub import DEFAULT_MODEL

from .report import Report, arguments, median

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "likes": {"type": "array", "items": {"type": "string", "maxLength": 20}, "minItems": 2, "maxItems": 4},
    },
    "required": ["name", "age", "likes"],
}
PEOPLE: dict[str, Any] = {"type": "array", "items": PERSON, "minItems": 200}
KINDS = {
    "free": None,
    "schema": Constraint.json_schema(PEOPLE),
    "flexible": Constraint.json_schema({**PEOPLE, "x-guidance": {"whitespace_flexible": True}}),
    "string": Constraint.json_schema({"type": "string", "minLength": 100_000}),
}
LEAST = 0.8


def speed(model: BlockingModel, constraint: Constraint | None, tokens: int) -> float:
    """Tokens per second of an answer that is cut off in the middle."""
    request = RequestBuilder().add_message("user", "Invent two hundred people.").set_sampler_max_len(tokens).set_sampler_temperature(1.0)
    try:
        return model.send_chat_request(request.set_constraint(constraint)).usage.avg_compl_tok_per_sec
    except ModelError as error:
        if error.partial_response is None:
            raise
        return error.partial_response.usage.avg_compl_tok_per_sec


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("-m", "--model", default=DEFAULT_MODEL, help=f"a GGUF file or model id (default: {DEFAULT_MODEL})")
    parser.add_argument("-n", "--tokens", type=int, default=200, metavar="N", help="tokens of each answer (default: 200)")
    parser.add_argument("-r", "--repetitions", type=int, default=9, metavar="N", help="answers of each kind (default: 9)")
    args = parser.parse_args()
    repetitions, tokens = (2, 40) if args.quick else (args.repetitions, args.tokens)
    report = Report("constraints", {"kind": "constraint", "speed": "tokens/s", "low": "lowest", "high": "highest", "share": "of free"})
    speeds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with BlockingModel.from_builder(ModelBuilder(args.model)) as model:
        for constraint in KINDS.values():
            speed(model, constraint, 8)
        for _ in range(repetitions):
            for kind, constraint in KINDS.items():
                speeds[kind].append(speed(model, constraint, tokens))
    free = median(speeds["free"])
    for kind, values in speeds.items():
        report.add(kind=kind, speed=median(values), low=min(values), high=max(values), share=median(values) / free)
    report.finish(args)
    raise SystemExit(median(speeds["schema"]) < LEAST * free)


if __name__ == "__main__":
    main()
