"""The merges of byte-level BPE: which pairs of symbols become one, and in which order."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from .string_chains import code_points, joined
from .string_index import index_of

Rank = Callable[[str, str], int | None]


def ranker(merges: Sequence[str], tokens: Sequence[str], ids: Mapping[str, int]) -> Rank:
    """A function that says at which place the merge of two symbols stands; None if they do not merge.

    Training adds a token to the vocabulary with each merge, so a vocabulary mostly lists what the merges make, in their order: then the
    token's id and where it is cut say what a dictionary of all merges would, in a hundredth of its memory.

    Parameters
    ----------
    merges
        "left right" each. Symbols hold no spaces.
    tokens
        The vocabulary.
    ids
        The first place of each token in it.
    """
    cuts = _cuts(joined(merges), len(merges))
    first = _first_made(merges, tokens) if len(ids) == len(tokens) and len(cuts) == len(merges) > 0 else None
    if first is None:
        ranks = index_of(merges)
        return lambda left, right: ranks.get(f"{left} {right}")

    def rank(left: str, right: str) -> int | None:
        place = ids.get(left + right, -1) - first
        return place if 0 <= place < len(cuts) and cuts[place] == len(left) else None

    return rank


def _cuts(text: str, count: int) -> array[int]:
    """How long the left symbol of each merge is; nothing unless all of them are two symbols, of which the left is not empty."""
    characters = code_points(text)
    spaces = np.flatnonzero(characters == ord(" "))
    starts = np.flatnonzero(characters == 0) + 1
    if len(spaces) != count or len(starts) != count - 1 or (spaces[:-1] >= starts).any():
        return array("i")
    lengths = spaces - np.concatenate([[0], starts])
    return array("i", lengths.astype(np.intc).tobytes() if lengths.min() > 0 else ())


def _first_made(merges: Sequence[str], tokens: Sequence[str]) -> int | None:
    """The id of the token that the first merge makes, if the others make those that follow it. Each merge has one space."""
    vocabulary = f"\0{joined(tokens)}\0"
    if vocabulary.count("\0") != len(tokens) + 1:
        return None
    place = vocabulary.find("\0" + joined(merges).replace(" ", "") + "\0")
    return None if place < 0 else vocabulary.count("\0", 0, place)
