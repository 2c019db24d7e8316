"""What the families' templates render is read back exactly, wherever the stream is cut."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pymistral.tool_calls import family_of
from pymistral.tool_calls.reading import CallArguments, CallStart, new_call_id

from .conftest import FAMILIES, GOLDENS, SCHEMAS, dialect, read, template


def check(golden: dict[str, Any], answer: dict[str, Any]) -> None:
    assert answer["content"] == golden["content"]
    assert answer["reasoning"] == golden["reasoning"]
    assert [[name, json.loads(arguments)] for name, arguments in answer["calls"]] == golden["calls"]


def test_rendered_calls_are_read_back(golden: dict[str, Any]) -> None:
    check(golden, read(golden["template"], [golden["answer"]]))


def test_wherever_the_stream_is_cut(golden: dict[str, Any]) -> None:
    text = golden["answer"]
    whole = read(golden["template"], [text])
    for cut in range(1, len(text)):
        assert read(golden["template"], [text[:cut], text[cut:]]) == whole, (text[:cut], text[cut:])


def test_character_by_character(golden: dict[str, Any]) -> None:
    assert read(golden["template"], list(golden["answer"])) == read(golden["template"], [golden["answer"]])


@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_nothing_breaks_a_reader(name: str, data: st.DataObject) -> None:
    """Broken markup, in any parts: no exception, nothing lost but layout, and the same pieces for the same text."""
    answers = [golden["answer"] for golden in GOLDENS if golden["template"] == name]
    marks = [*dialect(name)[0].marks, "{", "}", '"', ",", "\n", "name", "get_weather", '{"name": "get_weather"', "<", "x"]
    text = "".join(data.draw(st.lists(st.sampled_from([*marks, *(answer[: len(answer) // 2] for answer in answers)]), max_size=8)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(name, parts) == read(name, [text])


@pytest.mark.parametrize("mark", ["[ARGS]", "[CALL_ID]"])
def test_a_mark_that_begins_like_an_array(mark: str) -> None:
    text = "[TOOL_CALLS]" + mark
    whole = read("mistral-call-id", [text])
    for cut in range(1, len(text)):
        assert read("mistral-call-id", [text[:cut], text[cut:]]) == whole, text[:cut]


@pytest.mark.parametrize("name", FAMILIES)
def test_content_streams_at_once(name: str) -> None:
    if name == "gpt-oss":
        pytest.skip("its content begins behind a header")
    reader = dialect(name)[0].reader(SCHEMAS)
    seen = ""
    for character in "It rains, I think.":
        seen += "".join(piece.text for piece in reader.push(character))
    assert seen == "It rains, I think."


def test_arguments_stream_while_they_are_written() -> None:
    reader = dialect("qwen2.5")[0].reader(SCHEMAS)
    reader.push('<tool_call>\n{"name": "get_weather", "arguments": {"ci')
    assert reader.push('ty": "Par') == [CallArguments('ty": "Par')]
    assert reader.push('is"}') == [CallArguments('is"}')]
    assert reader.push("}\n</tool_call>") == []
    start, *_ = reader.push('<tool_call>{"name": "anything-2", "arguments": {')
    assert isinstance(start, CallStart)


@pytest.mark.parametrize(("name", "start"), [("gemma4", "<|tool_call>call:f{a:"), ("llama4-pythonic", "[anything-2(a=")])
def test_values_nested_without_end(name: str, start: str) -> None:
    for nest in ("[", '{"a":', "{a:"):
        answer = read(name, [start + nest * 20_000])
        assert len(answer["calls"]) == 1


def test_types_come_from_the_schema() -> None:
    schema = {
        "$defs": {"Level": {"enum": [1, 2, "3"]}},
        "properties": {
            "text": {"type": "string"},
            "level": {"$ref": "#/$defs/Level"},
            "size": {"anyOf": [{"type": "number"}, {"type": "null"}]},
            "note": {"type": ["string", "null"]},
            "loop": {"$ref": "#/properties/loop"},
            "flags": {"type": "array"},
        },
    }
    values = {"text": "1", "level": "2", "size": "3", "note": "4", "loop": "5", "flags": "[6]"}
    expected = {"text": "1", "level": 2, "size": 3, "note": "4", "loop": 5, "flags": [6]}
    tags = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    keywords = ", ".join(f'{key}="{value}"' for key, value in values.items() if key != "loop")
    xml = read("qwen3-coder", [f"<tool_call>\n<function=f>\n{tags}</function>\n</tool_call>"], tools={"f": schema})
    python = read("llama4", [f"[f({keywords})]"], tools={"f": schema})
    assert json.loads(xml["calls"][0][1]) == expected
    assert json.loads(python["calls"][0][1]) | {"loop": 5} == {**expected, "level": "2"}
    null = read("qwen3-coder", ["<tool_call><function=f><parameter=note>null</parameter></function></tool_call>"], tools={"f": schema})
    assert null["calls"] == [["f", '{"note": null}']]


def test_families_are_told_by_their_templates() -> None:
    found = {name: family_of(template(name), lambda text: None).__name__ for name in FAMILIES}
    assert found == {
        "chatml": "PlainJson",
        "deepseek-r1": "DeepSeek",
        "deepseek-r1-distill": "DeepSeek",
        "deepseek-v3.1": "DeepSeek",
        "functiongemma": "Gemma",
        "gemma3": "PlainJson",
        "gemma4": "Gemma",
        "gpt-oss": "Harmony",
        "hermes": "Hermes",
        "llama-tag": "Llama",
        "llama3": "Llama",
        "llama4": "Pythonic",
        "llama4-pythonic": "Pythonic",
        "mistral": "Mistral",
        "mistral-call-id": "MistralNamed",
        "mistral-named": "MistralNamed",
        "phi4": "Phi4",
        "phi4-functools": "Phi4",
        "qwen2.5": "Hermes",
        "qwen3": "Hermes",
        "qwen3-coder": "QwenCoder",
        "qwen3.5": "QwenCoder",
    }


def test_ids_are_unique_and_of_the_form_that_mistral_wants() -> None:
    ids = {new_call_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(len(call) == 9 and call.isalnum() and call.isascii() for call in ids)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("qwen2.5", "<tool_call>\nnonsense\n</tool_call>", {"content": "<tool_call>\nnonsense\n</tool_call>", "calls": []}),
        (
            "qwen2.5",
            '<tool_call>{"arguments": {"a": 1}, "id": 7, "name": "f"}</tool_call> ok',
            {"content": "ok", "calls": [["f", '{"a": 1}']]},
        ),
        ("qwen2.5", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', {"calls": [["f", '{"a": 1}']]}),
        ("qwen2.5", '<tool_call>{"name": "f"}</tool_call>', {"calls": [["f", "{}"]]}),
        ("qwen2.5", '<tool_call>{"name": "f", "arguments": {"a": [1', {"calls": [["f", '{"a": [1']]}),
        ("qwen2.5", "a <tool", {"content": "a <tool", "calls": []}),
        ("mistral", "[TOOL_CALLS] oops", {"content": "[TOOL_CALLS]oops", "calls": []}),
        ("mistral", '[TOOL_CALLS]f[CALL_ID]abc[ARGS]{"a": 1}', {"calls": [["f", '{"a": 1}']]}),
        ("chatml", '{"name": "Bob", "age": 3}', {"content": '{"name": "Bob", "age": 3}', "calls": []}),
        (
            "chatml",
            '```json\n{"name": "get_weather", "parameters": {"city": "Rome"}}\n```',
            {"calls": [["get_weather", '{"city": "Rome"}']]},
        ),
        ("chatml", '```json\n{"a": 1}\n```', {"content": '```json\n{"a": 1}\n```', "calls": []}),
        ("phi4", '<|tool_call|>[{"type": "function", "function": {"name": "f", "arguments": {}}}]<|/tool_call|>', {"calls": [["f", "{}"]]}),
        (
            "gpt-oss",
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.",
            {"content": "Yes.", "reasoning": "Hm."},
        ),
        (
            "gpt-oss",
            '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a":1}',
            {"calls": [["f", '{"a":1}']]},
        ),
        ("gpt-oss", "no markup at all", {"content": "no markup at all"}),
        ("qwen3", "<think>\nnever ends", {"reasoning": "never ends", "content": ""}),
        ("qwen3-coder", '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', {"calls": [["f", '{"a": 1}']]}),
        ("qwen3-coder", "<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>", {"calls": [["f", '{"a": 1}']]}),
        ("qwen3-coder", "<tool_call><function=get_weather><parameter=city>7</parameter>", {"calls": [["get_weather", '{"city": "7"']]}),
        (
            "qwen3-coder",
            "<tool_call>\n<function=f>\n<parameter=a>\n<b></parameter></b>\n</parameter>\n</function>\n</tool_call>",
            {"calls": [["f", '{"a": "<b></parameter></b>"}']]},
        ),
        (
            "qwen3-coder",
            "<tool_call>\n<function=f>\n<parameter=a>\nx</parameter>\n<parameter=b>\ny</parameter></function>\n</tool_call>",
            {"calls": [["f", '{"a": "x", "b": "y"}']]},
        ),
        ("qwen3-coder", "<tool_call>\n<function=f>\n<parameter=a>\nx</parameter>\n", {"calls": [["f", '{"a": "x"']]}),
        ("qwen3-coder", "<tool_call>\n<function=f\noops", {"content": "<tool_call><function=f\noops", "calls": []}),
        ("qwen3-coder", "<tool_call><function=f><parameter=a>True</parameter></tool_call>", {"calls": [["f", '{"a": true}']]}),
        ("qwen3-coder", "<tool_call><function=f><parameter=a>\nNaN\n</parameter></function>", {"calls": [["f", '{"a": "NaN"}']]}),
        # Some templates quote every value: the schema knows better.
        ("llama4-pythonic", '[get_weather(city="Rome", days="2")]', {"calls": [["get_weather", '{"city": "Rome", "days": 2}']]}),
        ("llama4-pythonic", "[get_weather(city=7)]", {"calls": [["get_weather", '{"city": "7"}']]}),
        (
            "llama4-pythonic",
            "[get_weather( city = 'it\\'s \\u00e9\\ud83c\\udf89' )]",
            {"calls": [["get_weather", '{"city": "it\'s é🎉"}']]},
        ),
        (
            "llama4-pythonic",
            "<|python_start|>[anything-2(a=(1, None), b={'c': True, 2: x})]<|python_end|> ok",
            {"content": "ok", "calls": [["anything-2", '{"a": [1, null], "b": {"c": true, "2": "x"}}']]},
        ),
        ("llama4-pythonic", '{"name": "get_weather", "parameters": {"city": "Rome"}}', {"calls": [["get_weather", '{"city": "Rome"}']]}),
        ("llama4-pythonic", "[get_weather(c) for c in x]", {"content": "[get_weather(c) for c in x]", "calls": []}),
        ("llama4-pythonic", "[1, 2] and [unknown(a=1)]", {"content": "[1, 2] and [unknown(a=1)]", "calls": []}),
        ("llama4-pythonic", '[get_weather(city="Ro', {"calls": [["get_weather", '{"city": "Ro']]}),
        ("gemma4", "<|tool_call>call:f{a:[1,2}<tool_call|> ok", {"content": "ok", "calls": [["f", '{"a": [1, 2]}']]}),
        ("llama4", '[get_weather(city="Rome")]', {"calls": [["get_weather", '{"city": "Rome"}']]}),
    ],
)
def test_what_else_models_write(name: str, text: str, expected: dict[str, Any]) -> None:
    answer = read(name, [text])
    assert {key: answer[key] for key in expected} == expected
    assert read(name, list(text)) == answer


def test_an_answer_that_begins_inside_its_reasoning() -> None:
    assert read("deepseek-r1", ["Hm.\n</think>\n\nYes."], reasons=True) == {"content": "Yes.", "reasoning": "Hm.", "calls": []}


def test_without_tools_there_are_no_calls() -> None:
    text = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    assert read("qwen2.5", [text], tools={})["content"] == text
