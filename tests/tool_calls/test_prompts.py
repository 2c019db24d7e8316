"""What the templates show the model of tools, of its calls, and of their results."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pymistral import RequestBuilder
from pymistral.loading.chat_template import ChatTemplate
from pymistral.tool_calls import dialect_for

from .conftest import FAMILIES, TOOLS, template

ALTERNATING = """{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{%- endif %}{{ bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}{%- endif %}
    {{- '<start_of_turn>' + message['role'] + '\\n' + message['content'] + '<end_of_turn>\\n' }}
{%- endfor %}"""
"""As Gemma 2's."""
USERS_ONLY = ALTERNATING.partition("{{ bos_token }}")[2]
"""As that of the first Mistral."""


def call(index: int) -> dict[str, Any]:
    arguments = json.dumps({"city": f"city{index}", "days": 40 + index})
    return {"id": f"abcdefgh{index}", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


def prompt_of(source: str, request: RequestBuilder) -> str:
    messages, tools = dialect_for(source, lambda name: None).adapt(request.template_messages(), request.template_tools())
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>").render(messages, tools=tools)


@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("source", [*map(template, FAMILIES), ALTERNATING, USERS_ONLY], ids=[*FAMILIES, "alternating", "users-only"])
def test_tools_calls_and_results_are_shown(source: str, calls: int) -> None:
    made = [call(index) for index in range(calls)]
    request = RequestBuilder().add_message("user", "Weather?").set_tools(TOOLS).add_message_with_tool_call("assistant", "", made)
    for index in reversed(range(calls)):
        request.add_tool_message(f"result{index}", made[index]["id"])
    prompt = prompt_of(source, request)
    shown = ["get_weather", "Weather?", *(f"city{i}" for i in range(calls)), *(f"result{i}" for i in range(calls))]
    if source != template("qwen3"):  # an imitation without that part
        shown.append("anything-2")
    assert [text for text in shown if text not in prompt] == []


def test_a_template_that_shows_one_call_gets_each_before_its_result() -> None:
    request = RequestBuilder().add_message("user", "Weather?").add_message_with_tool_call("assistant", "", [call(0), call(1)])
    request.add_tool_message("result1", call(1)["id"]).add_tool_message("result0", call(0)["id"]).add_message("user", "Thanks.")
    prompt = prompt_of(template("llama3"), request)
    places = [prompt.index(text) for text in ("Weather?", "city0", "result0", "city1", "result1", "Thanks.")]
    assert places == sorted(places)


@pytest.mark.parametrize("source", [*map(template, FAMILIES)], ids=FAMILIES)
def test_a_call_needs_no_type(source: str) -> None:
    typeless = {key: value for key, value in call(0).items() if key != "type"}
    for made in (typeless, {**typeless, "type": None}):
        request = RequestBuilder().add_message("user", "Weather?").add_message_with_tool_call("assistant", "", [made])
        assert "city0" in prompt_of(source, request.add_tool_message("result0", "abcdefgh0"))


@pytest.mark.parametrize("ids", [(None, None), ("call_0", "call_1"), ("abcdefgh0", None)], ids=["none", "others", "some"])
@pytest.mark.parametrize("source", [*map(template, FAMILIES)], ids=FAMILIES)
def test_a_call_needs_no_id_and_may_have_any(source: str, ids: tuple[str | None, ...]) -> None:
    """As histories from elsewhere have them; Mistral's templates refuse all but nine letters and digits."""
    calls = [{**call(index), "id": id} for index, id in enumerate(ids)]
    results = [{"role": "tool", "tool_call_id": id, "content": f"result{index}"} for index, id in enumerate(ids)]
    history = [{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "", "tool_calls": calls}, *results]
    request = RequestBuilder.of([{key: value for key, value in message.items() if value is not None} for message in history])
    prompt = prompt_of(source, request)
    assert [text for text in ("city0", "city1", "result0", "result1") if text not in prompt] == []
    assert prompt == prompt_of(source, request)


def test_results_have_the_ids_that_their_calls_got() -> None:
    calls = [{**call(index), "id": f"call_{index}"} for index in range(2)]
    request = RequestBuilder().add_message("user", "Weather?").add_message_with_tool_call("assistant", "", calls)
    request.add_tool_message("result1", "call_1").add_tool_message("result0", "call_0")
    prompt = prompt_of(template("mistral"), request)
    assert prompt.count('"id": "000000001"') == prompt.count('"content": result0, "call_id": "000000001"') == 1
    assert prompt.count('"id": "000000002"') == prompt.count('"content": result1, "call_id": "000000002"') == 1


@pytest.mark.parametrize("arguments", ["", " ", "null", "[41]", '"42"', '{"city": "4', "4 3"])
@pytest.mark.parametrize("source", [*map(template, FAMILIES)], ids=FAMILIES)
def test_arguments_that_are_no_object(source: str, arguments: str) -> None:
    """As models write them, or as an answer that was cut leaves them: the model is told of its mistake, so it must be shown."""
    made = {"id": "abcdefgh0", "function": {"name": "get_weather", "arguments": arguments}}
    request = RequestBuilder().add_message("user", "Weather?").add_message_with_tool_call("assistant", "", [made])
    prompt = prompt_of(source, request.add_tool_message("result0", "abcdefgh0"))
    assert [text for text in ("get_weather", "result0", "4" * ("4" in arguments)) if text not in prompt] == []


@pytest.mark.parametrize("name", ["deepseek-r1-distill", "deepseek-v3.1"])
def test_the_system_prompt_stays_before_the_tools(name: str) -> None:
    request = RequestBuilder().add_message("system", "Be brief.").add_message("user", "Weather?").set_tools(TOOLS)
    prompt = prompt_of(template(name), request)
    assert prompt.startswith("<s>Be brief.")
    assert prompt.index("Be brief.") < prompt.index("### get_weather") < prompt.index("Weather?")


def test_text_beside_a_call_is_shown_by_a_template_that_takes_one_or_the_other() -> None:
    request = RequestBuilder().add_message("user", "Weather?").add_message_with_tool_call("assistant", "Let me look.", [call(0)])
    prompt = prompt_of(template("deepseek-r1-distill"), request)
    assert prompt.index("Let me look.") < prompt.index("city0")
