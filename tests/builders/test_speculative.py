"""`TextSpeculativeBuilder` on real models: other speed, same text."""

from __future__ import annotations

from pathlib import Path

import pytest

from pymistral import ModelBuilder, RequestBuilder, SamplingParams, SpeculativeConfig, TextSpeculativeBuilder
from pymistral.blocking import BlockingModel
from pymistral.errors import ModelLoadError

PROMPTS = ["Say this again: one two three four one two three four one two three four", "Tell me about the sea."]


def answers(model: BlockingModel) -> list[tuple[str | None, int]]:
    found = []
    for prompt in PROMPTS:
        for temperature in (0.0, 0.8):
            request = RequestBuilder().add_message("user", prompt)
            request.with_sampling(SamplingParams(temperature=temperature, seed=1, max_len=64, frequency_penalty=0.1))
            response = model.send_chat_request(request)
            details = response.usage.completion_tokens_details
            assert 0 <= details.accepted_tokens <= details.drafted_tokens
            found.append((response.choices[0].message.content, details.accepted_tokens))
    return found


def test_the_text_is_that_of_the_target(smollm2_path: Path) -> None:
    target = ModelBuilder(smollm2_path)
    with BlockingModel.from_builder(target) as model:
        expected = answers(model)
    assert not any(accepted for _, accepted in expected)
    with BlockingModel.from_builder(TextSpeculativeBuilder(target, config=SpeculativeConfig.prompt_lookup(2))) as model:
        looked_up = answers(model)
    with BlockingModel.from_builder(TextSpeculativeBuilder(target, ModelBuilder(smollm2_path), SpeculativeConfig(gamma=4))) as model:
        drafted = answers(model)
    for guessed in (looked_up, drafted):
        assert [text for text, _ in guessed] == [text for text, _ in expected]
        assert sum(accepted for _, accepted in guessed) > 0


async def test_a_draft_model_must_have_the_same_tokens(smollm2_path: Path, gemma3_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"262144 tokens, the target 49152; take one of its family"):
        await TextSpeculativeBuilder(ModelBuilder(smollm2_path), ModelBuilder(gemma3_path)).build()


def test_what_cannot_be_is_refused() -> None:
    target = ModelBuilder("m")
    with pytest.raises(ModelLoadError, match="needs a draft model, or"):
        TextSpeculativeBuilder(target)
    with pytest.raises(ModelLoadError, match="not both"):
        TextSpeculativeBuilder(target, target, SpeculativeConfig.prompt_lookup(3))
    with pytest.raises(ModelLoadError, match=r"the target must be the builder of one model, .* got 'm\.gguf'"):
        TextSpeculativeBuilder("m.gguf", target)  # type: ignore[arg-type]
    with pytest.raises(ModelLoadError, match="the draft must be the builder of one model"):
        TextSpeculativeBuilder(target, TextSpeculativeBuilder(target, target))  # type: ignore[arg-type]
    with pytest.raises(ModelLoadError, match="config must be a SpeculativeConfig, got 3"):
        TextSpeculativeBuilder(target, target, 3)  # type: ignore[arg-type]
    for gamma in (0, 49, 1.5, True):
        with pytest.raises(ModelLoadError, match="gamma must be a whole number from 1 to 48"):
            SpeculativeConfig(gamma=gamma)  # type: ignore[arg-type]
    with pytest.raises(ModelLoadError, match="at least 1, got 0"):
        SpeculativeConfig.prompt_lookup(0)
