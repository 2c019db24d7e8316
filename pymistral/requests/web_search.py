"""What a request says of web search, and what searches."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import RequestValidationError
from .enums import PlainEnum


class SearchContextSize(PlainEnum):
    """How many tokens the results of a search may take: 4,096, 8,192 or 16,384, and never more than a third of the model's context."""

    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"


@dataclass(frozen=True, kw_only=True)
class ApproximateUserLocation:
    """Where the user is, more or less, for the model to know when it searches.

    Parameters
    ----------
    city, country, region
        Names.
    timezone
        As ``Europe/Paris``.
    """

    city: str | None = None
    country: str | None = None
    region: str | None = None
    timezone: str | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not isinstance(value, str):
                raise RequestValidationError(f"user_location: {name} must be a string, got {value!r}")

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in asdict(self).items() if value)


@dataclass(frozen=True, kw_only=True)
class WebSearchOptions:
    """Web search for a request, and how it is done.

    Parameters
    ----------
    search_context_size
        How much of the context results may take: ``"low"``, ``"medium"`` (the default) or ``"high"``.
    user_location
        Where the user is; OpenAI's ``{"type": "approximate", "approximate": {...}}`` works, too.
    search_description, extract_description
        What the model is told of the tools ``search_the_web`` and ``website_content_extractor``, instead of their own descriptions.

    Raises
    ------
    RequestValidationError
        A value is none of these.
    """

    search_context_size: SearchContextSize | str = SearchContextSize.MEDIUM
    user_location: ApproximateUserLocation | Mapping[str, Any] | None = None
    search_description: str | None = None
    extract_description: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "search_context_size", SearchContextSize(self.search_context_size))
        object.__setattr__(self, "user_location", _location(self.user_location))
        for name in ("search_description", "extract_description"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise RequestValidationError(f"{name} must be a string, got {value!r}")

    @classmethod
    def of(cls, options: object) -> WebSearchOptions:
        """Options from themselves, or from OpenAI's ``web_search_options`` as a dict."""
        if isinstance(options, WebSearchOptions):
            return options
        known = {field.name for field in fields(cls)}
        if isinstance(options, Mapping) and options.keys() <= known:
            return cls(**options)
        raise RequestValidationError(f"web search options are WebSearchOptions or a dict with some of {sorted(known)}, got {options!r}")


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """One result of a search.

    Parameters
    ----------
    title
        Its title.
    description
        What the search engine says of it.
    url
        Where it is.
    content
        The text of the page.
    """

    title: str
    description: str
    url: str
    content: str = ""


@dataclass(frozen=True)
class SearchFunctionParameters:
    """What the model searches for."""

    query: str


SearchCallback = Callable[[SearchFunctionParameters], Iterable[SearchResult] | Awaitable[Iterable[SearchResult]]]
"""Searches instead of DuckDuckGo. It gives results with their contents, the best first; it may be async."""


def _location(location: object) -> ApproximateUserLocation | None:
    if location is None or isinstance(location, ApproximateUserLocation):
        return location
    if isinstance(location, Mapping):
        known = {field.name for field in fields(ApproximateUserLocation)}
        parts = location.get("approximate", location)
        if isinstance(parts, Mapping) and parts.keys() <= known:
            return ApproximateUserLocation(**parts)
    raise RequestValidationError(f"user_location must be an ApproximateUserLocation, got {location!r}")
