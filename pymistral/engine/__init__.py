"""The engine: scheduler, paged KV cache with prefix cache, sampling. Knows neither models nor files."""

from .engine import Engine, RequestHandle
from .types import (
    ChoiceFinished,
    Constraint,
    ConstraintState,
    Delta,
    EngineRequest,
    EngineStats,
    Event,
    LogitsProcessor,
    RequestFailed,
    RequestFinished,
    Runner,
    Segment,
    Tokenizer,
    TokenLogprob,
    Usage,
)

__all__ = [
    "ChoiceFinished",
    "Constraint",
    "ConstraintState",
    "Delta",
    "Engine",
    "EngineRequest",
    "EngineStats",
    "Event",
    "LogitsProcessor",
    "RequestFailed",
    "RequestFinished",
    "RequestHandle",
    "Runner",
    "Segment",
    "TokenLogprob",
    "Tokenizer",
    "Usage",
]
