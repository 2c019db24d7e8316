"""Write tests/data/chat_template_goldens.json: what transformers renders for the templates in tests/data/chat_templates.

python make_chat_template_goldens.py      (needs transformers)

The templates imitate the forms of public models. Messages are given to transformers in the form that each template takes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

DATA = Path(__file__).parent.parent / "data"

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the weather for a location <b>now</b>",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Zürich or 東京"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "description": "The time", "parameters": {"type": "object", "properties": {}}}},
]


def say(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def call(arguments: Any) -> dict[str, Any]:
    return say(
        "assistant",
        "",
        tool_calls=[{"id": "abc123def", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}],
    )


ARGUMENTS = {"city": "Zürich", "days": 2}
ANSWER = say("tool", '{"temperature": 21}', tool_call_id="abc123def", name="get_weather")
CASES: dict[str, dict[str, Any]] = {
    "one": {"messages": [say("user", "Hello!")]},
    "no prompt": {"messages": [say("user", "Hello!"), say("assistant", "Hi.")], "add_generation_prompt": False},
    "system": {"messages": [say("system", "Be brief."), say("user", " What is 2+2? \n")]},
    "turns": {"messages": [say("user", "a"), say("assistant", "<think>\nhm\n</think>\n\nb"), say("user", "日本 <|im_end|> {{ x }} 'q'")]},
    "tools": {"messages": [say("user", "Weather?")], "tools": TOOLS},
    "call": {"messages": [say("user", "Weather?"), call(ARGUMENTS), ANSWER], "tools": TOOLS},
    "thinking off": {"messages": [say("user", "Hi")], "enable_thinking": False},
    "thinking on": {"messages": [say("user", "Hi")], "enable_thinking": True},
    "reasoning": {"messages": [say("user", "a"), say("assistant", "b", reasoning_content="because")], "add_generation_prompt": False},
    "thought": {"messages": [say("user", "a"), say("assistant", "b", thinking="because")], "add_generation_prompt": False},
    "documents": {"messages": [say("user", "a")], "documents": [{"title": "T", "text": "x"}, {"title": "U", "text": "y"}]},
    "names": {"messages": [say("user", "a", name="Ann"), say("assistant", "b"), say("user", "c", name="Bob")], "date_string": "1 Jan 2025"},
    "long": {"messages": [say("user" if i % 2 == 0 else "assistant", f"{i}") for i in range(11)]},
    "two users": {"messages": [say("user", "a"), say("user", "b")]},
    "unknown role": {"messages": [say("critic", "a")]},
}


def render(source: str, case: dict[str, Any]) -> str | None:
    options = {"add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>", **case}
    messages = options.pop("messages")
    try:
        return str(render_jinja_template([messages], chat_template=source, **options)[0][0])
    except Exception as error:
        print(f"    {type(error).__name__}: {error}")
        return None


def in_form(name: str, case: dict[str, Any]) -> dict[str, Any]:
    """The case with contents as parts, and arguments as JSON text, for the templates that need them so."""
    messages = case["messages"]
    if name == "parts-only":
        messages = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in messages]
    if name == "deepseek-r1":
        messages = [call(json.dumps(ARGUMENTS, ensure_ascii=False)) if "tool_calls" in message else message for message in messages]
    return case | {"messages": messages}


def main() -> None:
    renders: dict[str, dict[str, str | None]] = {}
    for file in sorted((DATA / "chat_templates").glob("*.jinja")):
        print(file.stem)
        renders[file.stem] = {label: render(file.read_text(), in_form(file.stem, case)) for label, case in CASES.items()}
    text = json.dumps({"cases": CASES, "renders": renders}, ensure_ascii=False, indent=1)
    (DATA / "chat_template_goldens.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
