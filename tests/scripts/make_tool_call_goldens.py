"""Write tests/data/tool_call_goldens.json: answers with tool calls and reasoning, as each family's chat template renders them.

python make_tool_call_goldens.py      (needs transformers)

The templates imitate the forms of public models. Messages are given to transformers in the form that each template takes. What an answer
adds to the prompt, without the tokens that end it, is what the model would generate.
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
            "description": "Get the weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "anything-2", "description": "Any", "parameters": {"type": "object", "properties": {}}}},
]
WEATHER = ("get_weather", {"city": "Zürich", "days": 2})
TRICKY = (
    "anything-2",
    {
        "quote": 'say "hi" \\ {not} [an] object, </tool_cal>',
        "lines": "a\n\tb",
        "other": "日本 🎉",
        "nested": {"list": [1, -2.5, True, False, None, "x,y:z", []], "object": {}},
    },
)
EMPTY = ("anything-2", {})
CASES: dict[str, dict[str, Any]] = {
    "one": {"calls": [WEATHER]},
    "tricky": {"calls": [TRICKY]},
    "empty": {"calls": [EMPTY]},
    "two": {"calls": [WEATHER, TRICKY]},
    "three": {"calls": [WEATHER, EMPTY, WEATHER]},
    "content": {"content": 'It is 21° there. {"name": 3} <b>[x]</b>\n\nBye!', "calls": []},
    "content and call": {"content": "Let me look:", "calls": [WEATHER]},
    "reasoning": {"content": "Because.", "reasoning": "Hm.\n\nOr <not>?", "calls": []},
    "reasoning and call": {"content": "", "reasoning": "I should look.", "calls": [WEATHER]},
}
SINGLE = {"llama3", "gpt-oss"}  # one call in an answer
REASONING = {"qwen3", "qwen3.5", "gemma4", "gpt-oss"}
TEXT_ARGUMENTS = {"deepseek-r1", "deepseek-v3.1"}
ENDS = (
    *("<|im_end|>\n", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "</s>", "<｜end▁of▁sentence｜>", "<|end|>", "<end_of_turn>\n", "<turn|>\n"),
    *("<|call|>", "<|return|>"),
)
USER = {"role": "user", "content": "Weather?"}
SYSTEM = {"role": "system", "content": "Be brief."}


def assistant(name: str, case: dict[str, Any]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": case.get("content", "")}
    if "reasoning" in case:
        message |= {"reasoning_content": case["reasoning"], "thinking": case["reasoning"]}
    as_json = [json.dumps({"name": tool, "arguments": arguments}, ensure_ascii=False) for tool, arguments in case["calls"]]
    if name == "phi4" and as_json:
        message["content"] += f"<|tool_call|>[{', '.join(as_json)}]<|/tool_call|>"
    elif name in ("chatml", "gemma3") and as_json:
        message["content"] = "\n".join(as_json)
    elif as_json:
        message["tool_calls"] = [
            {
                "id": f"call0000{index}",
                "type": "function",
                "function": {"name": tool, "arguments": json.dumps(arguments, ensure_ascii=False) if name in TEXT_ARGUMENTS else arguments},
            }
            for index, (tool, arguments) in enumerate(case["calls"])
        ]
    return message


def render(source: str, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
    options = {"bos_token": "<s>", "eos_token": "</s>", "tools": TOOLS, "add_generation_prompt": add_generation_prompt}
    return str(render_jinja_template([messages], chat_template=source, **options)[0][0])


def golden(name: str, source: str, label: str, case: dict[str, Any]) -> dict[str, Any] | None:
    if (name in SINGLE and len(case["calls"]) > 1) or ("reasoning" in case and name not in REASONING):
        return None
    messages = [USER] if name.startswith(("mistral", "gemma")) else [SYSTEM, USER]
    prompt = render(source, messages, True).removesuffix("<think>\n")
    whole = render(source, [*messages, assistant(name, case)], False)
    # Some templates print a line end behind the role only when there is content.
    start = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
    assert start >= len(prompt) - 1, (name, label, prompt[start:], whole[start:])
    answer = whole[start:].removeprefix(" " if name == "mistral" else "")  # which belongs to the template
    while end := next((end for end in ENDS if answer.endswith(end)), None):
        answer = answer.removesuffix(end)
    content = case.get("content", "")
    if name in ("chatml", "gemma3") and case["calls"]:
        content = ""
    return {
        "template": name,
        "case": label,
        "answer": answer,
        "content": content if content in answer else "",
        "reasoning": case.get("reasoning", "") if case.get("reasoning", "") in answer else "",
        "calls": case["calls"],
    }


def main() -> None:
    files = [*(DATA / "tool_templates").glob("*.jinja")]
    files += [
        DATA / "chat_templates" / f"{name}.jinja"
        for name in ("hermes", "qwen2.5", "qwen3", "llama3", "mistral", "deepseek-r1", "chatml", "gemma3")
    ]
    goldens = []
    for file in sorted(files, key=lambda file: file.stem):
        goldens += [golden(file.stem, file.read_text(), label, case) for label, case in CASES.items()]
    lines = ",\n ".join(json.dumps(golden, ensure_ascii=False) for golden in goldens if golden)
    (DATA / "tool_call_goldens.json").write_text(f'{{"tools": {json.dumps(TOOLS)},\n "goldens": [\n {lines}\n ]}}\n')


if __name__ == "__main__":
    main()
