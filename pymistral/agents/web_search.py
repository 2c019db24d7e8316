"""The built-in tools ``search_the_web`` and ``website_content_extractor``, with which requests that ask for it search the web.

Results go to the model as mistral.rs gives them, ``{"output": [{"title", "description", "url", "content"}, ...]}``, but of each page only
the passages that answer the query best.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from ..errors import RequestValidationError, ToolArgumentsError
from ..requests import Function, RequestBuilder, Tool
from ..requests.web_search import SearchCallback, SearchContextSize, SearchFunctionParameters, SearchResult, WebSearchOptions
from ..responses import CalledFunction
from ..threads import in_thread
from ..tool_rounds import ToolCallback, is_async
from .bm25 import bm25_scores
from .web_pages import page_text, search_duckduckgo

SEARCH_TOOL, EXTRACT_TOOL = "search_the_web", "website_content_extractor"
BUDGETS = {SearchContextSize.LOW: 4096, SearchContextSize.MEDIUM: 8192, SearchContextSize.HIGH: 16384}  # tokens, those of mistral.rs
PASSAGE_CHARACTERS = 600
SEARCH_DESCRIPTION = """\
Search the web. Call this for anything recent, or that you do not know for certain, and base your answer on what it returns.
You may call it several times. It returns {"output": [{"title": ..., "description": ..., "url": ..., "content": ...}, ...]}."""
EXTRACT_DESCRIPTION = """\
Read one website. Call this if the user names a site, or to read more of a page that a search found.
It returns {"output": [{"url": ..., "content": ...}]}."""
_log = logging.getLogger("pymistral")


Ranking = Callable[[str, Sequence[str]], Sequence[float]]
"""Scores texts for a query; 0 or less is no match."""


class WebSearch:
    """The tools, for one model.

    Parameters
    ----------
    callback
        What searches; None: DuckDuckGo, and the pages that it finds are fetched.
    allow_private
        Whether pages may be on this machine or the local network.
    count_tokens
        How many tokens a text has.
    context
        The model's context, in tokens.
    rank
        How passages are ranked.
    """

    def __init__(
        self,
        callback: SearchCallback | None,
        *,
        allow_private: bool,
        count_tokens: Callable[[str], int],
        context: int,
        rank: Ranking = bm25_scores,
    ) -> None:
        self._callback, self._allow_private = callback, allow_private
        self._count_tokens, self._context, self._rank = count_tokens, context, rank

    def tools(self, request: RequestBuilder) -> Mapping[str, ToolCallback]:
        """The tools of a request: none, unless it has web search options."""
        if (options := request.web_search_options) is None:
            return {}

        async def search(function: CalledFunction) -> str:
            return await self._search(_argument(function, "query"), options)

        return {
            SEARCH_TOOL: ToolCallback(function=search, tool=_search_tool(options)),
            EXTRACT_TOOL: ToolCallback(function=self._extract, tool=_extract_tool(options)),
        }

    async def _search(self, query: str, options: WebSearchOptions) -> str:
        results = await self._results(query)
        budget = min(BUDGETS[SearchContextSize(options.search_context_size)], self._context // 3)
        return await in_thread(self._output, query, results, budget)

    async def _results(self, query: str) -> list[SearchResult]:
        if self._callback is not None:
            return await _called_back(self._callback, SearchFunctionParameters(query))
        found = await in_thread(search_duckduckgo, query)
        return await asyncio.gather(*map(self._with_content, found))

    async def _with_content(self, result: SearchResult) -> SearchResult:
        """The result with the text of its page; what cannot be read has none."""
        try:
            return replace(result, content=await in_thread(page_text, result.url, allow_private=self._allow_private))
        except (OSError, RequestValidationError) as error:
            _log.info("web search: %s", error)
            return result

    async def _extract(self, function: CalledFunction) -> str:
        url = _argument(function, "url")
        content = await in_thread(page_text, url, allow_private=self._allow_private)
        return _json([{"url": url, "content": content}])

    def _output(self, query: str, results: Sequence[SearchResult], budget: int) -> str:
        """The best passages of the results that fit into so many tokens, the best result first; if the query matches none, all that fit."""
        passages = [(index, part) for index, result in enumerate(results) for part in passages_of(result.content)]
        headers = [f"{result.title}\n{result.description}" for result in results]
        scores = self._rank(query, [*headers, *(part for _, part in passages)])
        header_scores, passage_scores = scores[: len(headers)], scores[len(headers) :]
        best = list(header_scores)
        for (index, _), score in zip(passages, passage_scores, strict=True):
            best[index] = max(best[index], score)
        order = sorted(range(len(results)), key=lambda index: -best[index])

        left, shown = budget, set[int]()
        for index in order:
            cost = self._count_tokens(_json([asdict(replace(results[index], content=""))]))
            if cost <= left:
                left -= cost
                shown.add(index)
        chosen: set[int] = set()
        for number in sorted(range(len(passages)), key=lambda number: -passage_scores[number]):
            if left <= 0 or (passage_scores[number] <= 0 and any(passage_scores[other] > 0 for other in chosen)):
                break
            index, part = passages[number]
            if index in shown and (cost := self._count_tokens(json.dumps(part, ensure_ascii=False))) <= left:
                left -= cost
                chosen.add(number)
        contents = {index: "\n".join(passages[n][1] for n in sorted(chosen) if passages[n][0] == index) for index in shown}
        return _json([asdict(replace(results[index], content=contents[index])) for index in order if index in shown])


def passages_of(text: str) -> list[str]:
    """The text in passages of some hundred characters, at line ends if there are any."""
    passages: list[str] = []
    for line in text.splitlines():
        for start in range(0, len(line), 2 * PASSAGE_CHARACTERS):
            part = line[start : start + 2 * PASSAGE_CHARACTERS].strip()
            if not part:
                continue
            if passages and len(passages[-1]) + len(part) < PASSAGE_CHARACTERS:
                passages[-1] += f"\n{part}"
            else:
                passages.append(part)
    return passages


async def _called_back(callback: SearchCallback, parameters: SearchFunctionParameters) -> list[SearchResult]:
    found = callback(parameters) if is_async(callback) else await in_thread(callback, parameters)
    results = list(await found if inspect.isawaitable(found) else found)
    for result in results:
        if not isinstance(result, SearchResult):
            raise TypeError(f"a search callback gives SearchResult objects, got {result!r}")
    return results


def _argument(function: CalledFunction, name: str) -> str:
    try:
        value = json.loads(function.arguments)[name]
    except (ValueError, KeyError, TypeError, RecursionError):
        value = None
    if not isinstance(value, str) or not value.strip():
        raise ToolArgumentsError(f'{function.name} takes {{"{name}": "..."}}, got {function.arguments[:200]}')
    return value.strip()


def _search_tool(options: WebSearchOptions) -> Tool:
    description = options.search_description or SEARCH_DESCRIPTION
    if options.user_location:
        description += f"\nThe user's location: {options.user_location}."
    return _tool(SEARCH_TOOL, description, "query", "A query for web searching.", 200)


def _extract_tool(options: WebSearchOptions) -> Tool:
    return _tool(EXTRACT_TOOL, options.extract_description or EXTRACT_DESCRIPTION, "url", "The URL of the website to read.", 2000)


# A small model may not find the end of what it writes: hence the most characters.
def _tool(name: str, description: str, parameter: str, meaning: str, most: int) -> Tool:
    parameters = {
        "type": "object",
        "properties": {parameter: {"type": "string", "description": meaning, "maxLength": most}},
        "required": [parameter],
        "additionalProperties": False,
    }
    return Tool(function=Function(name=name, description=description, parameters=parameters, strict=True))


def _json(output: Sequence[Mapping[str, Any]]) -> str:
    return json.dumps({"output": output}, ensure_ascii=False)
