import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pymistral.errors import ModelLoadError, RequestValidationError
from pymistral.loading.pre_tokenizers import KINDS
from pymistral.loading.tokenizer import BYTE_CHARACTERS, TokenType, merge
from pymistral.loading.tokenizer_gguf import tokenizer_from_gguf

GOLDENS = json.loads((Path(__file__).parent.parent / "data" / "tokenizer_goldens.json").read_text())
CORPUS: list[str] = GOLDENS["corpus"]


def metadata(model: str, /, **changes: Any) -> dict[str, Any]:
    """What the model's file says, with a stand-in for every token that the corpus cannot reach."""
    stored = dict(GOLDENS["models"][model]["metadata"])
    known, count = stored.pop("tokens"), stored.pop("count")
    rows = [known.get(str(i), [f"<absent {i}>", TokenType.NORMAL, -1e9]) for i in range(count)]
    merges = stored.pop("merges", None)
    fields = {**stored, "tokenizer.ggml.tokens": [row[0] for row in rows], "tokenizer.ggml.token_type": [row[1] for row in rows]}
    if merges is None:
        fields["tokenizer.ggml.scores"] = [row[2] for row in rows]
    else:
        fields["tokenizer.ggml.merges"] = merges
    return fields | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}


@pytest.fixture(scope="session")
def smollm2():
    return tokenizer_from_gguf(metadata("smollm2"))


@pytest.fixture(scope="session")
def gemma3():
    return tokenizer_from_gguf(metadata("gemma3"))


@pytest.fixture(params=["smollm2", "gemma3"], scope="session")
def model(request):
    return request.param


@pytest.fixture(scope="session")
def tokenizer(model, request):
    return request.getfixturevalue(model)


def digest(ids: list[int]) -> str:
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:8]


def test_corpus_is_broad():
    assert len(CORPUS) >= 200
    assert "" in CORPUS


def test_ids_equal_llama_cpp(model, tokenizer):
    for text, ids in zip(CORPUS, GOLDENS["models"][model]["ids"], strict=True):
        assert tokenizer.encode(text) == ids, text


def test_decoding_gives_the_text_back(model, tokenizer):
    for text in CORPUS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        expected = text.replace("▁", " ") if model == "gemma3" else text  # "▁" is how SentencePiece writes a space
        assert tokenizer.decode(ids, skip_special_tokens=False) == expected


@pytest.mark.parametrize("kind", GOLDENS["kinds"])
def test_every_pre_tokenizer_kind_equals_llama_cpp(kind):
    tokenizer = tokenizer_from_gguf(metadata("smollm2", pre=kind, add_bos_token=False))
    for text, expected in zip(CORPUS, GOLDENS["kinds"][kind], strict=True):
        assert digest(tokenizer.encode(text)) == expected, text


def test_space_prefix_equals_llama_cpp():
    tokenizer = tokenizer_from_gguf(metadata("gemma3", add_space_prefix=True))
    for text, expected in zip(CORPUS, GOLDENS["models"]["gemma3"]["prefixed"], strict=True):
        assert digest(tokenizer.encode(text)) == expected, text


def test_space_prefix_is_removed_again():
    tokenizer = tokenizer_from_gguf(metadata("gemma3", add_space_prefix=True))
    for text in ("Hello world", " Hello", "", "  two", "日本"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def words(kind: str, text: str) -> list[str]:
    return [word for word, _ in KINDS[kind].build().pre_tokenize_str(text)]


def test_kinds_that_follow_the_models_own_files():
    assert words("tekken", "ПриВет iPhone 12") == ["При", "Вет", " i", "Phone", " ", "1", "2"]
    assert words("gpt-4o", "I'LL HelloWorld's 12345") == ["I'LL", " Hello", "World's", " ", "123", "45"]
    assert words("kimi-k2", "abc中文def 日本") == ["abc", "中文", "def", " ", "日本"]


@pytest.mark.parametrize("kind", sorted(KINDS))
@given(text=st.text())
def test_words_are_the_text(kind, text):
    assert "".join(words(kind, text)) == text


@given(text=st.text(alphabet=st.characters(codec="utf-8")))
def test_any_text_comes_back(smollm2, gemma3, text):
    ids = gemma3.encode(text, add_special_tokens=False)
    assert gemma3.decode(ids, skip_special_tokens=False) == text.replace("▁", " ")
    if all(smollm2.token_to_id(BYTE_CHARACTERS[byte]) is not None for byte in text.encode()):  # it lacks bytes of unassigned planes
        assert smollm2.decode(smollm2.encode(text), skip_special_tokens=False) == text


@given(
    symbols=st.lists(st.sampled_from("abc"), max_size=12), ranks=st.dictionaries(st.text("abc", min_size=2, max_size=5), st.integers(0, 3))
)
def test_merge_equals_the_plain_definition(symbols, ranks):
    plain = symbols[:]
    while pairs := [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(plain)) if a + b in ranks]:
        _, i = min(pairs)
        plain[i : i + 2] = [plain[i] + plain[i + 1]]
    assert merge(symbols[:], lambda a, b: ranks.get(a + b)) == plain


def test_bos_and_eos(smollm2, gemma3):
    assert gemma3.encode("") == [2]
    assert gemma3.encode("", add_special_tokens=False) == []
    assert smollm2.encode("") == []
    both = tokenizer_from_gguf(metadata("gemma3", add_bos_token=True, add_eos_token=True))
    assert both.encode("") == [2, 1]
    assert gemma3.bos_token_id == 2
    assert gemma3.eos_token_id == 1
    assert smollm2.end_token_ids == (0, 2)


def test_special_tokens_are_skipped_on_request(smollm2):
    ids = smollm2.encode("a<|im_end|>b")
    assert smollm2.decode(ids) == "ab"
    assert smollm2.decode(ids, skip_special_tokens=False) == "a<|im_end|>b"
    assert smollm2.special_token_ids >= {0, 1, 2}


def test_a_continuation_has_the_tokens_that_are_text(gemma3):
    """llama.cpp's ids with parse_special=False: runs of spaces and of line ends, and HTML, are tokens of their own; markup is text."""
    assert gemma3.encode_continuation("a    b\n\n<table>") == gemma3.encode("a    b\n\n<table>", add_special_tokens=False)
    assert gemma3.encode_continuation("    ") == [gemma3.token_to_id("    ")]
    assert gemma3.token_to_id("<eos>") not in gemma3.encode_continuation("a<eos>")
    assert gemma3.encode_continuation("") == []


def test_white_space_after_a_special_token_belongs_to_it_in_phi3():
    tokenizer = tokenizer_from_gguf(metadata("gemma3") | {"general.name": "Phi-3 mini"})
    assert tokenizer.encode("<eos>\n  Hello") == tokenizer.encode("<eos>Hello")


def test_bytes_of_tokens(smollm2, gemma3):
    assert gemma3.id_to_bytes(gemma3.token_to_id("<0xE2>")) == b"\xe2"
    assert gemma3.id_to_bytes(gemma3.token_to_id("▁the")) == b" the"
    assert smollm2.id_to_bytes(smollm2.token_to_id("Ġthe")) == b" the"
    assert smollm2.id_to_bytes(0) == b"<|endoftext|>"
    for tokenizer in (smollm2, gemma3):
        assert all(isinstance(tokenizer.id_to_bytes(i), bytes) for i in range(0, tokenizer.vocab_size, 101))


@pytest.mark.parametrize("token", [-1, 10**9])
def test_ids_outside_the_vocabulary_are_refused(tokenizer, token):
    with pytest.raises(RequestValidationError, match=f"{token} is outside the vocabulary"):
        tokenizer.decode([token])
    with pytest.raises(RequestValidationError, match=f"{token} is outside the vocabulary"):
        tokenizer.id_to_bytes(token)


def test_lone_surrogates_become_replacement_characters(tokenizer):
    assert tokenizer.encode("a\ud83d b") == tokenizer.encode("a\ufffd b")
    assert tokenizer.encode("\ud83d\ude00") == tokenizer.encode("😀")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "t5"}, "tokenizer.ggml.model is 't5'"),
        ({"model": None}, "tokenizer.ggml.model is missing"),
        ({"model": 3}, "must be str"),
        ({"pre": "nonsense"}, "tokenizer.ggml.pre is 'nonsense'"),
        ({"tokens": []}, "tokens is empty"),
        ({"tokens": "abc"}, "tokens is missing or no array"),
        ({"tokens": [1, 2]}, "tokens must be an array of strings"),
        ({"merges": None}, "merges is missing"),
        ({"token_type": [1]}, "token_type must hold a number for each"),
        ({"token_type": ["a"] * 49152}, "token_type must hold a number for each"),
        ({"add_bos_token": "yes"}, "add_bos_token must be bool"),
        ({"bos_token_id": "1"}, "bos_token_id must be an integer"),
        ({"model": "llama"}, "scores is missing"),
    ],
)
def test_broken_metadata(changes, message):
    with pytest.raises(ModelLoadError, match=message):
        tokenizer_from_gguf(metadata("smollm2", **changes))


def test_special_ids_outside_the_vocabulary_are_ignored(caplog):
    assert tokenizer_from_gguf(metadata("smollm2", bos_token_id=10**6)).bos_token_id is None
    assert "bos_token_id is 1000000" in caplog.text


def test_long_words_take_no_quadratic_time(gemma3):
    assert gemma3.decode(gemma3.encode("ab" * 50_000)) == "ab" * 50_000
