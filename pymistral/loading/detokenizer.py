"""Token ids back to text while they are being generated."""

from __future__ import annotations

import codecs
from collections.abc import Callable

_Utf8 = codecs.getincrementaldecoder("utf-8")


class DecodeStream:
    """Turns a stream of tokens into text, a token at a time and never half a character.

    The concatenation of all `step` results and `flush` equals `Tokenizer.decode` of the same tokens.

    Parameters
    ----------
    piece
        The bytes that a token adds to the text; ``b""`` for one that is skipped.
    strip_space
        Whether the vocabulary puts a space before the first word that is no part of the text.
    """

    def __init__(self, piece: Callable[[int], bytes], *, strip_space: bool) -> None:
        self._piece = piece
        self._decode = _Utf8("replace").decode
        self._strip_space = strip_space

    def step(self, token: int) -> str:
        """The text that became certain with this token."""
        piece = self._piece(token)
        if self._strip_space and piece:
            self._strip_space = False
            piece = piece.removeprefix(b" ")
        return self._decode(piece)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never finished."""
        return self._decode(b"", True)
