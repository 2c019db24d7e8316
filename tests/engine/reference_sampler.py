"""The semantics of sampling, written to be read: float64, whole arrays, whole contexts, nothing incremental.

What mistral.rs does, in its order: DRY; frequency, presence and repetition penalties; logit bias; then temperature and softmax (whose
result the log probabilities report); then top-k, top-p and min-p on the probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np


def adjusted_logits(logits: np.ndarray, params: Any, context: Sequence[int], prompt_length: int, breakers: frozenset[int]) -> np.ndarray:
    logits = logits.astype(np.float64)
    if params.dry_params is not None:
        for token, penalty in dry_penalties(context, params.dry_params, breakers).items():
            logits[token] -= penalty
    frequency, presence = params.frequency_penalty or 0.0, params.presence_penalty or 0.0
    repetition = 1.0 if params.repetition_penalty is None else params.repetition_penalty
    for token in set(context):
        count = list(context[prompt_length:]).count(token)
        logits[token] -= count * frequency + (count > 0) * presence
        logits[token] = logits[token] / repetition if logits[token] > 0 else logits[token] * repetition
    for token, bias in (params.logits_bias or {}).items():
        logits[token] += bias
    return logits


def dry_penalties(context: Sequence[int], dry: Any, breakers: frozenset[int]) -> dict[int, float]:
    longest: dict[int, int] = {}
    end = len(context) - 1
    for i in range(end):
        if context[i] != context[end] or context[i + 1] in breakers:
            continue
        length = 1
        while length < 50 and i - length >= 0 and context[i - length] == context[end - length] and context[end - length] not in breakers:
            length += 1
        longest[context[i + 1]] = max(length, longest.get(context[i + 1], 0))
    return {token: dry.multiplier * dry.base ** (n - dry.allowed_length) for token, n in longest.items() if n >= dry.allowed_length}


def probabilities(logits: np.ndarray, temperature: float) -> np.ndarray:
    scaled = logits / (temperature if temperature >= 1e-7 else 1.0)
    weights = np.exp(scaled - scaled.max())
    return weights / weights.sum()


def cut(probs: np.ndarray, params: Any) -> np.ndarray:
    """The distribution that is drawn from."""
    temperature = 1.0 if params.temperature is None else params.temperature
    order = np.argsort(-probs, kind="stable")
    if temperature < 1e-7:
        order = order[:1]
    if params.top_k is not None and params.top_k > 0:
        order = order[: params.top_k]
    kept = probs[order]
    keep = np.ones(order.size, bool)
    if params.top_p is not None and 0 < params.top_p < 1:
        before = np.cumsum(kept) - kept
        keep &= before < params.top_p * kept.sum()
    if params.min_p is not None and 0 < params.min_p < 1:
        keep &= kept > params.min_p * kept[0]
    keep[0] = True
    result = np.zeros_like(probs)
    result[order[keep]] = kept[keep]
    return result / result.sum()


MASK64 = (1 << 64) - 1


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) that depends on its arguments alone: three rounds of SplitMix64 (doi:10.1145/2714064.2660195)."""
    state = 0
    for word in (seed, choice, position):
        state = (state + word + 0x9E3779B97F4A7C15) & MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK64
        state ^= state >> 31
    return (state >> 11) * 2.0**-53


def is_drawn(token: int, probs: np.ndarray, params: Any, u: float, tolerance: float = 1e-6) -> bool:
    """Whether a token is what ``u`` picks, in the vocabulary's order, from what the cuts leave.

    On a hair's breadth around a border either answer is right.
    """
    for shift in (0.0, -tolerance, tolerance):
        near = SimpleNamespace(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p and params.top_p + shift,
            min_p=params.min_p and params.min_p * (1 + shift),
        )
        kept = cut(probs, near)
        end = float(kept[: token + 1].sum())
        if kept[token] > 0 and end - kept[token] - tolerance <= u <= end + tolerance:
            return True
    return False
