"""Okapi BM25: how well texts answer a query, by the words that they share (Robertson and Zaragoza, 2009)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

K1, B = 1.5, 0.75
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")  # scripts without spaces: each character is a word


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return _WORD.findall(text.lower())


def bm25_scores(query: str, texts: Sequence[str]) -> list[float]:
    """The score of each text for a query: 0 where it has no word of the query, otherwise above 0.

    Parameters
    ----------
    query
        What is looked for.
    texts
        What is looked through. How rare a word is, is told by these texts.
    """
    counts = [Counter(words(text)) for text in texts]
    lengths = [count.total() for count in counts]
    mean = sum(lengths) / len(lengths) if any(lengths) else 1.0
    scores = [0.0] * len(texts)
    for word in set(words(query)):
        having = sum(word in count for count in counts)
        rarity = math.log1p((len(texts) - having + 0.5) / (having + 0.5))
        for index, count in enumerate(counts):
            if seen := count[word]:
                scores[index] += rarity * seen * (K1 + 1) / (seen + K1 * (1 - B + B * lengths[index] / mean))
    return scores
