r"""How a byte-level vocabulary cuts text into words before any merge: one entry per `tokenizer.ggml.pre` kind.

A kind is a sequence of regular expressions, each applied to what the previous one left; matches and the gaps between them are both
kept. The expressions run in oniguruma (the `tokenizers` package), whose `\p{..}` and `\s` follow Unicode. Contractions are spelled
`[sS]` and not `(?i:s)`: the latter also matches U+017F.
"""

from __future__ import annotations

from typing import NamedTuple

from tokenizers import Regex
from tokenizers.pre_tokenizers import PreTokenizer, Sequence, Split

CONTRACTION = "'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"


def cl100k(digits: str, *, contraction: str = CONTRACTION + "|", newlines: str = r"[\r\n]*", tail: str = TAIL) -> str:
    """The family that began with OpenAI's cl100k: words with one leading mark, groups of digits, punctuation with its newlines."""
    return rf"{contraction}[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+{newlines}|{tail}"


def o200k(digits: str, *, contraction: str = f"(?:{CONTRACTION})?", without: str = "", newlines: str = r"[\r\n/]*") -> str:
    """The family that began with OpenAI's o200k: words also break where lower case turns into upper case."""
    upper = rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{without}]"
    lower = rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{without}]"
    lead = r"[^\r\n\p{L}\p{N}]?"
    words = f"{lead}{upper}*{lower}+{contraction}|{lead}{upper}+{lower}*{contraction}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+{newlines}|{TAIL}"


LLAMA3 = cl100k(r"\p{N}{1,3}")
QWEN2 = cl100k(r"\p{N}")
CJK_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
CJK_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
# The cased letters and the punctuation that DeepSeek's first tokenizer lists.
CASED_LETTERS = (
    r"[\p{Lu}\p{Ll}\p{Lt}&&[^\u10d0-\u10ff\u2cf3\u2d00-\u2d2d\ua790-\ua7fa\uab30-\uab68]"
    r"&&[^\x{10570}-\x{105bc}\x{16e40}-\x{16e7f}\x{1d400}-\x{1df1e}]]"
)
PUNCTUATION = "[!-/:-~！-／：-～‘-‟\u3000-。]"
DEEPSEEK3_WORDS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + TAIL
SENTENCE_MARKS = " ?[^(\\s|.,!?…。，、।۔،)]+"


class PreTokenizerKind(NamedTuple):
    """What a `pre` kind implies: its expressions, and the two defaults that the file may not state."""

    patterns: tuple[str, ...]
    whole_words: bool = False  # a word that is a token needs no merges
    add_bos: bool = False

    def build(self) -> PreTokenizer:
        return Sequence([Split(Regex(pattern), "isolated") for pattern in self.patterns])


def _kinds() -> dict[str, PreTokenizerKind]:
    kind = PreTokenizerKind
    gpt2, digits_first, qwen2 = kind((GPT2,)), kind((r"\p{N}", GPT2)), kind((QWEN2,))
    llama3 = kind((LLAMA3,), whole_words=True, add_bos=True)
    llama3_merged = kind((LLAMA3,))
    deepseek3 = kind((r"\p{N}{1,3}", CJK_KANA, DEEPSEEK3_WORDS))
    o200k_kind = kind((o200k(r"\p{N}{1,3}"),))
    bailing = kind((cl100k(r"\p{N}", contraction="'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|", tail=r"\s*[\r\n]|\s+(?!\S)|\s+"),))
    return {
        "default": kind((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
        **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), llama3),
        **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), llama3_merged),
        **dict.fromkeys(
            (
                "gpt-2",
                "phi-2",
                "gigachat",
                "a.x-4.0",
                "mellum",
                "modern-bert",
                "mpt",
                "olmo",
                "jais",
                "trillion",
                "granite-docling",
                "exaone4",
            ),
            gpt2,
        ),
        **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), digits_first),
        **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "solar-open", "grok-2", "kormo"), qwen2),
        "qwen35": kind((CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + TAIL,)),
        "deepseek-llm": kind(
            ("[\r\n]", rf"\s?{CASED_LETTERS}+", rf"\s?{PUNCTUATION}+", r"\s+$", CJK_HANGUL, r"\p{N}+"),
        ),
        "deepseek-coder": kind(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK_HANGUL, r"\p{N}")),
        **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), deepseek3),
        "falcon": kind((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")),
        **dict.fromkeys(("poro-chat", "bloom", "gpt3-finnish"), kind((SENTENCE_MARKS,))),
        "viking": kind((SENTENCE_MARKS, r"\p{N}")),
        # llama.cpp approximates these two families with ASCII case; here they split as the models were trained.
        "tekken": kind((o200k(r"\p{N}", contraction=""),), whole_words=True, add_bos=True),
        **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2"), o200k_kind),
        "kimi-k2": kind((r"\p{Han}+|" + o200k(r"\p{N}{1,3}", without=r"&&[^\p{Han}]", newlines=r"[\r\n]*"),)),
        "superbpe": kind((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
        **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), bailing),
        "seed-coder": kind((CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|" + TAIL,)),
    }


KINDS = _kinds()
