"""The table of names against the `gguf` package's own."""

from __future__ import annotations

import re

import pytest
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map
from gguf.constants import Keys

from pymistral.loading import names

ARCHITECTURES = [*names.ARCHITECTURES.items(), ("llama", names.MIXTRAL)]
BY_NAME = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
# which Hugging Face keeps in the config
NOT_IN_HUGGING_FACE = re.compile("rope_")


@pytest.mark.parametrize(("gguf_name", "architecture"), ARCHITECTURES, ids=lambda value: getattr(value, "model_type", value))
def test_tensor_names_agree_with_the_gguf_package(gguf_name: str, architecture: names.Architecture) -> None:
    table = get_tensor_name_map(BY_NAME[gguf_name], 3)
    for pattern in (*architecture.tensors, *architecture.optional):
        canonical = names.canonical_name(architecture, pattern).replace("*", "2")
        if NOT_IN_HUGGING_FACE.search(canonical):
            continue
        hugging_face = canonical if canonical.startswith("lm_head") else f"model.{canonical}"
        found = table.get_name(hugging_face, try_suffixes=(".weight", ".bias"))
        if found is None and canonical.startswith("lm_head"):
            assert gguf_name in ("gemma", "gemma2")  # never untied
            continue
        assert found == pattern.replace("*", "2"), canonical


@pytest.mark.parametrize(("gguf_name", "architecture"), ARCHITECTURES, ids=lambda value: getattr(value, "model_type", value))
def test_no_two_tensors_get_one_name(gguf_name: str, architecture: names.Architecture) -> None:
    patterns = [*architecture.tensors, *architecture.optional]
    canonical = [names.canonical_name(architecture, pattern) for pattern in patterns]
    assert len(set(canonical)) == len(canonical) == len(set(patterns))
    assert all(("*" in name) == ("*" in pattern) for name, pattern in zip(canonical, patterns, strict=True))


def test_metadata_keys_exist_in_the_gguf_package() -> None:
    sections = (Keys.LLM, Keys.Attention, Keys.Rope)
    known = {value for section in sections for value in vars(section).values() if isinstance(value, str)}
    for key in (*names.INTEGERS, *names.REALS):
        assert f"{{arch}}.{key}" in known
    general = {value for section in (Keys.General, Keys.Tokenizer) for value in vars(section).values() if isinstance(value, str)}
    assert {*names.SAMPLING, *names.SPECIAL_TOKENS, *names.END_TOKENS} <= general


def test_architectures_are_known_to_the_gguf_package() -> None:
    assert set(names.ARCHITECTURES) <= set(BY_NAME)
    assert BY_NAME["llama"] is MODEL_ARCH.LLAMA
