"""Tokenizers: text to token ids and back.

Both families of vocabulary that GGUF calls `gpt2` (byte-level BPE) and `llama` (SentencePiece BPE) merge neighbouring symbols, best pair
first; they differ in what makes a pair good and in how text becomes symbols. The merging is done here, and words are remembered: a
vocabulary of 262k tokens is ready in the time it takes to build a dict, where the `tokenizers` package would need its merges derived and
indexed first. That package cuts the text into words, with its Unicode regular expressions.
"""

from __future__ import annotations

import logging
import re
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import IntEnum
from functools import cached_property
from heapq import heapify, heappop, heappush
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from ..errors import RequestValidationError
from .detokenizer import DecodeStream
from .merges import ranker
from .pre_tokenizers import KINDS
from .string_chains import code_points, joined

logger = logging.getLogger(__name__)

# Tokens that end a turn or a text, by name: files do not list them.
END_NAMES = """
    <|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <end_of_turn> <|endoftext|> <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|>
    <end_of_utterance> <eos> <｜end▁of▁sentence｜>
"""
# Tokens that are markup and no text, even where an older converter did not mark them so.
CONTROL_NAMES = f"""
    {END_NAMES} <|fim_prefix|> <|fim_suffix|> <|fim_middle|> <|fim_pad|> <|fim_repo|> <|fim_sep|> <|file_sep|> <|repo_name|>
    <fim_prefix> <fim_suffix> <fim_middle> <fim_pad> <fim-prefix> <fim-suffix> <fim-middle> <fim-pad> <PRE> <SUF> <MID>
    ▁<PRE> ▁<SUF> ▁<MID> <｜fim▁begin｜> <｜fim▁hole｜> <｜fim▁end｜>
"""


class TokenType(IntEnum):
    """What `tokenizer.ggml.token_type` says of each token."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class TextEncoder(Protocol):
    """Encodes text that holds no special tokens, and knows the bytes of the ordinary tokens."""

    def encode(self, text: str, *, after_special: bool) -> list[int]: ...

    def to_bytes(self, token: str) -> bytes: ...


class Tokenizer:
    """Text to token ids and back, exactly as the model was trained.

    Parameters
    ----------
    tokens
        The text of each token, by id.
    ids
        The id of each token, by text.
    types
        The `TokenType` of each token; control, user-defined and unknown tokens are found in the text before anything else.
    encoder
        Encodes the text between them.
    bos_token_id, eos_token_id
        The tokens that begin and end a text, if the vocabulary has them.
    add_bos, add_eos
        Whether `encode` adds them.
    space_prefix
        Whether the encoder puts a space before a text: decoding removes it again.
    strip_after_special
        Whether white space after a control token belongs to it (Phi-3).
    """

    def __init__(
        self,
        tokens: Sequence[str],
        ids: Mapping[str, int],
        types: ArrayLike,
        encoder: TextEncoder,
        *,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        add_bos: bool = False,
        add_eos: bool = False,
        space_prefix: bool = False,
        strip_after_special: bool = False,
    ) -> None:
        self.vocab_size = len(tokens)
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self._tokens = tokens
        self._ids = ids
        self._encoder = encoder
        self._prefix = [bos_token_id] if add_bos and bos_token_id is not None else []
        self._suffix = [eos_token_id] if add_eos and eos_token_id is not None else []
        self._space_prefix = space_prefix
        self._strip_after_special = strip_after_special

        kinds = np.asarray(types, np.int64)
        for name in self._ids.keys() & CONTROL_NAMES.split():
            if kinds[self._ids[name]] == TokenType.NORMAL:
                kinds[self._ids[name]] = TokenType.CONTROL
        hidden = np.isin(kinds, (TokenType.CONTROL, TokenType.UNKNOWN))
        literal = hidden | (kinds == TokenType.USER_DEFINED)
        self.special_token_ids = frozenset(np.flatnonzero(hidden).tolist())
        self._literal_ids = frozenset(np.flatnonzero(literal).tolist())
        self._find_special = SpecialTokens({tokens[i]: i for i in sorted(self._literal_ids, reverse=True) if tokens[i]}).find
        self._pieces: dict[int, bytes] = {}

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Every token that ends an answer: EOS, and the tokens whose names say that a turn or a text ends."""
        ids = {self._ids[name] for name in self._ids.keys() & END_NAMES.split()} & self.special_token_ids
        if self.eos_token_id is not None:
            ids.add(self.eos_token_id)
        if {"<|return|>", "<|call|>"} <= self._ids.keys():  # gpt-oss: <|end|> ends a message of an answer, not the answer
            ids.discard(self._ids.get("<|end|>", -1))
        return tuple(sorted(ids))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens in the text are parsed as such.

        Parameters
        ----------
        text
            Any string. Lone surrogates become U+FFFD.
        add_special_tokens
            Add BOS and EOS where the model wants them. Say `False` for what a chat template rendered: it writes them itself.
        """
        out = self._encode(text, self._find_special, after_special=True)
        return [*self._prefix, *out, *self._suffix] if add_special_tokens else out

    def _encode(self, text: str, find: Callable[[str], Iterable[tuple[int, int, int]]], *, after_special: bool) -> list[int]:
        if not text.isascii():
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        out: list[int] = []
        start = 0
        for begin, end, token in find(text):
            if begin < start:
                continue
            if begin > start:
                out += self._encoder.encode(text[start:begin], after_special=after_special)
            out.append(token)
            start = end
            if self._strip_after_special and token in self.special_token_ids:
                while start < len(text) and text[start].isspace():
                    start += 1
        if start < len(text):
            out += self._encoder.encode(text[start:], after_special=after_special)
        return out

    def decode(self, tokens: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of some tokens; bytes that are no UTF-8 become U+FFFD."""
        ids = list(tokens)
        for token in ids:
            self._check(token)
        text = b"".join(map(self._piece_function(skip_special_tokens), ids))
        return (text.removeprefix(b" ") if self._space_prefix else text).decode("utf-8", "replace")

    def decode_stream(self, *, skip_special_tokens: bool = True, keep: Iterable[str] = ()) -> DecodeStream:
        """A decoder for tokens that arrive one at a time. Ids beyond the vocabulary (padding of the model) decode to nothing.

        Parameters
        ----------
        skip_special_tokens
            Leave special tokens out of the text.
        keep
            Special tokens that stay in it nevertheless.
        """
        hidden = self.special_token_ids - {self._ids[name] for name in keep if name in self._ids} if skip_special_tokens else frozenset()
        return DecodeStream(lambda token: b"" if token in hidden else self._piece(token), strip_space=self._space_prefix)

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of a text that continues another: special tokens in it are mere text, no space is put before it."""
        return self._encode(text, self._find_user_defined, after_special=False)

    @cached_property
    def _find_user_defined(self) -> Callable[[str], Iterable[tuple[int, int, int]]]:
        """Finds what no merges make, such as Gemma's runs of spaces, and is text nevertheless."""
        return SpecialTokens(
            {self._tokens[i]: i for i in sorted(self._literal_ids - self.special_token_ids, reverse=True) if self._tokens[i]}
        ).find

    def token_to_id(self, token: str) -> int | None:
        """The id of a token, by its text as the vocabulary spells it."""
        return self._ids.get(token)

    def id_to_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; of a special token, its name."""
        self._check(token)
        return self._piece(token)

    def _check(self, token: int) -> None:
        if not 0 <= token < self.vocab_size:
            raise RequestValidationError(f"token id {token} is outside the vocabulary of {self.vocab_size} tokens")

    def _piece_function(self, skip_special_tokens: bool) -> Callable[[int], bytes]:
        return self._piece_or_nothing if skip_special_tokens else self._piece

    def _piece_or_nothing(self, token: int) -> bytes:
        return b"" if token in self.special_token_ids else self._piece(token)

    def _piece(self, token: int) -> bytes:
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._make_piece(token)
        return piece

    def _make_piece(self, token: int) -> bytes:
        if not 0 <= token < self.vocab_size:
            return b""
        text = self._tokens[token]
        return text.encode("utf-8", "replace") if token in self._literal_ids else self._encoder.to_bytes(text)


class SpecialTokens:
    """Finds the special tokens in a text, at each place the longest.

    A regular expression over their first two characters proposes places; a dict decides. (An alternation of gemma's 6,414 names would
    take longer to compile than the rest of the tokenizer takes to load.)
    """

    def __init__(self, ids: dict[str, int]) -> None:
        self._ids = ids
        lengths: dict[str, set[int]] = {}
        for name in ids:
            lengths.setdefault(name[:2], set()).add(len(name))
        for start, own in lengths.items():
            own |= lengths.get(start[0], set())
        self._lengths = {start: sorted(own, reverse=True) for start, own in lengths.items()}
        followers: dict[str, str] = {}
        for start in lengths:
            followers[start[0]] = followers.get(start[0], "") + re.escape(start[1:])
        alone = {start for start in lengths if len(start) == 1}
        patterns = [re.escape(first) + (f"[{seconds}]{'?' * (first in alone)}" if seconds else "") for first, seconds in followers.items()]
        self._candidates = re.compile("|".join(patterns)) if patterns else None

    def find(self, text: str) -> Iterable[tuple[int, int, int]]:
        """Start, end and id of each special token in the text, in order."""
        if self._candidates is None:
            return
        candidate = self._candidates.search(text)
        while candidate:
            begin = candidate.start()
            end = begin + 1
            for length in self._lengths[candidate[0]]:
                token = self._ids.get(text[begin : begin + length])
                if token is not None:
                    end = begin + length
                    yield begin, end, token
                    break
            candidate = self._candidates.search(text, end)


def merge(symbols: list[str], rank: Callable[[str, str], float | None]) -> list[str]:
    """Byte-pair encoding: join the neighbours of the lowest rank, the leftmost of equals, until no pair has a rank."""
    count = len(symbols)
    before, after = list(range(-1, count - 1)), list(range(1, count + 1))
    queue = []
    for i in range(count - 1):
        priority = rank(symbols[i], symbols[i + 1])
        if priority is not None:
            queue.append((priority, i, i + 1, len(symbols[i]) + len(symbols[i + 1])))
    heapify(queue)
    while queue:
        _, left, right, length = heappop(queue)
        if not symbols[left] or not symbols[right] or len(symbols[left]) + len(symbols[right]) != length:
            continue  # one of them has been merged since
        symbols[left] += symbols[right]
        symbols[right] = ""
        after[left] = after[right]
        if after[left] < count:
            before[after[left]] = left
        for i, j in ((before[left], left), (left, after[left])):
            if i >= 0 and j < count:
                priority = rank(symbols[i], symbols[j])
                if priority is not None:
                    heappush(queue, (priority, i, j, len(symbols[i]) + len(symbols[j])))
    return [symbol for symbol in symbols if symbol]


class WordCache(dict[str, list[int]]):
    """The token ids of words seen before; computes those of a new one. Long words are not kept, and a full cache starts again."""

    LONGEST_WORD = 64
    MOST_WORDS = 100_000

    def __init__(self, encode_word: Callable[[str], list[int]]) -> None:
        self._encode_word = encode_word

    def __missing__(self, word: str) -> list[int]:
        ids = self._encode_word(word)
        if len(word) <= self.LONGEST_WORD:
            if len(self) >= self.MOST_WORDS:
                self.clear()
            self[word] = ids
        return ids


def _byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each byte: itself where it is visible in Latin-1, else the next character from U+0100."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(stand_ins)) for byte in range(256)]


BYTE_CHARACTERS = _byte_characters()
BYTE_OF_CHARACTER = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}


class ByteLevelBPE:
    """GPT-2's scheme: words by regular expression, bytes as visible characters, pairs ranked by the list of merges."""

    def __init__(self, tokens: Sequence[str], ids: Mapping[str, int], merges: Sequence[str], pre: str) -> None:
        kind = KINDS[pre]
        self._ids = ids
        self._rank = ranker(merges, tokens, ids)
        self._whole_words = kind.whole_words
        self._split = kind.build().pre_tokenize_str
        self._words = WordCache(self._encode_word)

    def encode(self, text: str, *, after_special: bool) -> list[int]:
        words = self._words
        out: list[int] = []
        for word, _ in self._split(text):
            out += words[word]
        return out

    def to_bytes(self, token: str) -> bytes:
        try:
            return bytes([BYTE_OF_CHARACTER[character] for character in token])
        except KeyError:  # a token that was added as plain text
            return token.encode("utf-8", "replace")

    def _encode_word(self, word: str) -> list[int]:
        spelled = "".join([BYTE_CHARACTERS[byte] for byte in word.encode()])
        if self._whole_words and spelled in self._ids:
            return [self._ids[spelled]]
        out = []
        for symbol in merge(list(spelled), self._rank):
            if symbol in self._ids:
                out.append(self._ids[symbol])
            else:  # a vocabulary without this byte: there is nothing to say it with
                out += [self._ids[character] for character in symbol if character in self._ids]
        return out


SPACE = "▁"


class SentencePieceBPE:
    """SentencePiece's scheme: "▁" for a space, any pair that is a token may merge, ranked by score; unknown characters as bytes."""

    def __init__(
        self, tokens: Sequence[str], ids: Mapping[str, int], scores: ArrayLike, *, unknown: int | None, space_prefix: bool
    ) -> None:
        self._ids = ids
        self._costs = array("f", (-np.asarray(scores, np.float32)).tobytes())
        self._unknown = [] if unknown is None else [unknown]
        self._space_prefix = space_prefix
        self._split = self._word_pattern(joined(tokens)).split
        self._words = WordCache(self._encode_word)

    @staticmethod
    def _word_pattern(tokens: str) -> re.Pattern[str]:
        """Where text can be cut without changing its tokens: before a "▁", after a character that precedes "▁" in no token."""
        characters = code_points("\0" + tokens)
        glued = set(map(chr, np.unique(characters[:-1][characters[1:] == ord(SPACE)]))) - {"\0"}
        return re.compile(f"(?<=[^{''.join(map(re.escape, sorted(glued)))}])(?={SPACE})" if glued else f"(?<=.)(?={SPACE})", re.DOTALL)

    def encode(self, text: str, *, after_special: bool) -> list[int]:
        if self._space_prefix and after_special:
            text = " " + text
        words = self._words
        out: list[int] = []
        for word in self._split(text.replace(" ", SPACE)):
            out += words[word]
        return out

    def to_bytes(self, token: str) -> bytes:
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass
        return token.replace(SPACE, " ").encode("utf-8", "replace")

    def _encode_word(self, word: str) -> list[int]:
        out = []
        for symbol in merge(list(word), self._cost):
            token = self._ids.get(symbol)
            if token is not None:
                out.append(token)
            else:
                for byte in symbol.encode():
                    out += [self._ids[name]] if (name := f"<0x{byte:02X}>") in self._ids else self._unknown
        return out

    def _cost(self, left: str, right: str) -> float | None:
        token = self._ids.get(left + right)
        return None if token is None else self._costs[token]
