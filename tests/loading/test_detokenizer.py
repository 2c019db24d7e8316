import pytest
from hypothesis import given
from hypothesis import strategies as st

from pymistral.loading.tokenizer import BYTE_CHARACTERS, TokenType
from pymistral.loading.tokenizer_gguf import tokenizer_from_gguf

BYTES = [f"<0x{i:02X}>" for i in range(256)]


def byte_fallback(space_prefix: bool = False):
    tokens = ["<unk>", "<s>", "</s>", *BYTES, "▁", "a", "b", "▁a", "▁ab", "日", "\n"]
    types = [
        TokenType.UNKNOWN,
        TokenType.CONTROL,
        TokenType.CONTROL,
        *[TokenType.BYTE] * 256,
        *[TokenType.NORMAL] * 6,
        TokenType.USER_DEFINED,
    ]
    return tokenizer_from_gguf(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.scores": [float(-i) for i in range(len(tokens))],
            "tokenizer.ggml.add_space_prefix": space_prefix,
        }
    )


def byte_level():
    tokens = ["<|end|>", *BYTE_CHARACTERS, "Ġa", "ab", "æĹ¥", "æĹ", "¥ðŁ"]
    return tokenizer_from_gguf(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [TokenType.CONTROL] + [TokenType.NORMAL] * (len(tokens) - 1),
            "tokenizer.ggml.merges": ["Ġ a", "a b", "æ Ĺ", "æĹ ¥"],
        }
    )


TOKENIZERS = [byte_fallback(), byte_fallback(space_prefix=True), byte_level()]


@pytest.fixture(params=range(3), scope="module", ids=["byte-fallback", "space-prefix", "byte-level"])
def tokenizer(request):
    return TOKENIZERS[request.param]


def stream(tokenizer, tokens, **options):
    decoder = tokenizer.decode_stream(**options)
    return [decoder.step(token) for token in tokens], decoder.flush()


@given(text=st.text(alphabet=st.characters(codec="utf-8", exclude_characters="▁")), skip=st.booleans())
def test_stream_of_a_text_equals_decode(tokenizer, text, skip):
    tokens = tokenizer.encode(text)
    steps, rest = stream(tokenizer, tokens, skip_special_tokens=skip)
    assert "".join(steps) + rest == tokenizer.decode(tokens, skip_special_tokens=skip)
    if "\n" not in text:  # as in llama.cpp, the word after a user-defined token gets the prefix too, and keeps it
        assert tokenizer.decode(tokens) == text


@given(data=st.data(), skip=st.booleans())
def test_stream_of_any_tokens_equals_decode(tokenizer, data, skip):
    tokens = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    steps, rest = stream(tokenizer, tokens, skip_special_tokens=skip)
    assert "".join(steps) + rest == tokenizer.decode(tokens, skip_special_tokens=skip)


@given(text=st.text(alphabet=st.characters(codec="utf-8", exclude_characters="▁\ufffd")))
def test_never_half_a_character(tokenizer, text):
    steps, rest = stream(tokenizer, tokenizer.encode(text))
    assert "\ufffd" not in "".join(steps)
    assert rest == ""


def test_a_character_appears_with_its_last_byte():
    tokenizer = byte_fallback()
    steps, rest = stream(tokenizer, [3 + byte for byte in "é😀".encode()])
    assert steps == ["", "é", "", "", "", "😀"]
    assert rest == ""


def test_an_unfinished_character_is_replaced_at_the_end():
    tokenizer = byte_fallback()
    assert stream(tokenizer, [3 + byte for byte in "a😀".encode()[:-1]]) == (["a", "", "", ""], "\ufffd")


def test_special_tokens_do_not_break_a_character():
    tokenizer = byte_fallback()
    first, second = (3 + byte for byte in "é".encode())
    assert stream(tokenizer, [first, 2, second]) == (["", "", "é"], "")


def test_space_at_the_start():
    prefixed, plain = byte_fallback(space_prefix=True), byte_fallback()
    tokens = [plain.token_to_id("▁a"), plain.token_to_id("▁a")]
    assert stream(prefixed, [1, *tokens]) == (["", "a", " a"], "")
    assert stream(plain, [1, *tokens]) == (["", " a", " a"], "")
    assert stream(prefixed, [1, *tokens], skip_special_tokens=False) == (["<s>", " a", " a"], "")


def test_padding_of_the_model_decodes_to_nothing(tokenizer):
    assert stream(tokenizer, [tokenizer.vocab_size, 10**6]) == (["", ""], "")
