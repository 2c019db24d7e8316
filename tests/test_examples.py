"""Every example runs as it stands, on the real SmolLM2."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SAYS: dict[str, str | tuple[str, ...]] = {
    "getting_started/text_generation.py": "Paris",
    "getting_started/streaming.py": "tok/s",
    "advanced/error_handling.py": (
        "ModelLoadError: missing.gguf",
        "temperature must be a finite number",
        "the prompt has 8224 tokens",
        "'uniqueItems' cannot be enforced",
        "ModelError: the answer was cut",
        "| so far: ",
        "ModelManagementError: ",
        "EngineClosedError: ",
        "PymistralError: EngineClosed",
    ),
    "advanced/multi_model.py": "ModelManagementError: ",
    "advanced/file_logging.py": "INFO",
    "advanced/paged_attn.py": "1024 tokens",
    "advanced/search_callback.py": "search_the_web(",
    "advanced/web_search.py": "opens at 9:30",
    "advanced/speculative.py": "the same text",
    "advanced/tools.py": 'get_weather({"city": "Paris"}) -> It is sunny in Paris',
    "advanced/agent.py": "text_response after 2 turns",
    "advanced/agent_streaming.py": "result: Sunny, 72F in Paris",
    "advanced/tool_callback.py": "local_search(",
    "advanced/mcp_client.py": 'get_weather({"city": "Paris"}) -> It is sunny in Paris',
    "cookbook/agent.py": "12 plus 30 is 42.",
    "cookbook/multiturn.py": "of them cached",
    "cookbook/rag.py": "Ada Linden",
    "quantization/isq.py": "Q4K: ",
}


@pytest.mark.parametrize("name", sorted(str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*.py")))
def test_example(name: str, smollm2_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(smollm2_path)]
    if name == "getting_started/gguf.py":
        arguments = ["--model", str(smollm2_path.parent), "--file", smollm2_path.name]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    out = capsys.readouterr().out
    says = SAYS.get(name, "")
    assert [text for text in ((says,) if isinstance(says, str) else says) if text not in out] == []
    assert out.strip()
