"""Web search against a local site and a local search engine, up to a model that is told to search."""

from __future__ import annotations

import asyncio
import gzip
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from fake_model import call, scripted_model

from pymistral import (
    ApproximateUserLocation,
    Model,
    ModelBuilder,
    RequestBuilder,
    SearchContextSize,
    SearchFunctionParameters,
    SearchResult,
    WebSearchOptions,
)
from pymistral.agents import web_pages
from pymistral.agents.bm25 import bm25_scores, words
from pymistral.agents.web_pages import page_text, require_search_extra, search_duckduckgo
from pymistral.agents.web_search import EXTRACT_TOOL, SEARCH_TOOL, WebSearch, passages_of
from pymistral.errors import ModelLoadError, RequestValidationError, ToolArgumentsError
from pymistral.responses import CalledFunction
from pymistral.tool_rounds import Toolbox

Reply = tuple[int, Mapping[str, str], bytes]

PARAGRAPH = "The library of Lisbon opens at nine in the morning and has {} readers, who sit on three floors under a roof of blue glass. "
ARTICLE = f"""<!doctype html><html><head><title>Lisbon</title></head><body>
<nav><a href="/a">Home</a> <a href="/b">Shop our offers</a></nav>
<article><h1>Lisbon</h1><p>{PARAGRAPH.format("many") * 3}</p><p>{PARAGRAPH.format("quiet") * 3}</p></article>
<footer>Imprint and cookies</footer><script>alert("never")</script></body></html>"""


class Site:
    """A website of a test's own."""

    def __init__(self) -> None:
        self.pages: dict[str, Reply | Callable[[], Reply]] = {}
        self.asked: list[tuple[str, str, str]] = []
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
                site.asked.append((self.command, self.path, body))
                page = site.pages.get(self.path.partition("?")[0], (404, {}, b""))
                status, headers, text = page() if callable(page) else page
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text)

            do_POST = do_GET

            def log_message(self, *arguments: Any) -> None: ...

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def add(self, path: str, body: str | bytes, kind: str = "text/html; charset=utf-8", **headers: str) -> str:
        data = body.encode() if isinstance(body, str) else body
        self.pages[path] = (200, {"Content-Type": kind, **{name.replace("_", "-"): value for name, value in headers.items()}}, data)
        return self.url + path


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.server.shutdown()
    site.server.server_close()


def read(url: str, **options: Any) -> str:
    return page_text(url, allow_private=True, **options)


# ---- ranking --------------------------------------------------------------------------------------


def test_bm25_by_hand() -> None:
    """Two texts of equal length with one word each: idf = ln(1 + (2 - 1 + 0.5) / (1 + 0.5)) = ln 2, and the rest is 1."""
    scores = bm25_scores("cat", ["a cat", "a dog"])
    assert scores == pytest.approx([0.6931471805599453, 0.0])
    assert bm25_scores("nothing", ["a", ""]) == [0.0, 0.0]
    assert bm25_scores("", []) == []


def test_bm25_prefers_rare_words_and_short_texts() -> None:
    texts = ["the the the", "the zebra", "the zebra " + "and so on " * 20]
    scores = bm25_scores("The ZEBRA!", texts)
    assert scores[1] > scores[2] > scores[0] > 0


def test_scripts_without_spaces_have_words() -> None:
    assert words("Go 東京タワー, où?") == ["go", "東", "京", "タ", "ワ", "ー", "où"]


def test_passages() -> None:
    assert passages_of("") == []
    assert passages_of("a\n\nb\n") == ["a\nb"]
    parts = passages_of("\n".join(f"{i} " + "x" * 400 for i in range(3)) + "\n" + "y" * 3000)
    assert all(len(part) <= 1200 for part in parts)
    assert "".join(parts).count("x") == 1200
    assert "".join(parts).count("y") == 3000


# ---- pages ----------------------------------------------------------------------------------------


def test_the_main_part_of_a_page(site: Site) -> None:
    text = read(site.add("/", ARTICLE))
    assert "many readers" in text
    assert "quiet readers" in text
    assert "never" not in text
    assert "Shop our offers" not in text


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "shift_jis"])
def test_encodings(site: Site, encoding: str) -> None:
    word = "東京の図書館" if encoding == "shift_jis" else "Übermäßig schön"
    page = ARTICLE.replace("library of Lisbon", word).encode(encoding)
    assert word in read(site.add("/", page, f"text/html; charset={encoding}"))


def test_a_page_declares_its_own_encoding(site: Site) -> None:
    page = ARTICLE.replace("<head>", '<head><meta charset="utf-8">').replace("library of Lisbon", "bibliothèque 東京").encode()
    assert "bibliothèque 東京" in read(site.add("/", page, "text/html"))
    assert "plain ü" in read(site.add("/a", "plain ü", "text/plain; charset=nonsense"))


def test_other_content(site: Site) -> None:
    assert read(site.add("/json", '{"a": 1}', "application/json")) == '{"a": 1}'
    assert read(site.add("/packed", gzip.compress(b"packed"), "text/plain", Content_Encoding="gzip")) == "packed"
    with pytest.raises(OSError, match="is application/pdf, which is no text"):
        read(site.add("/pdf", b"%PDF", "application/pdf"))
    with pytest.raises(OSError, match="HTTP status 404"):
        read(site.url + "/missing")


def test_bounds(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_pages, "MAX_PAGE_BYTES", 1000)
    with pytest.raises(OSError, match="more than 1000 bytes"):
        read(site.add("/long", "x" * 1001, "text/plain"))
    with pytest.raises(OSError, match="more than 1000 bytes"):
        read(site.add("/bomb", gzip.compress(b"x" * 100_000), "text/plain", Content_Encoding="gzip"))
    with pytest.raises(OSError, match="cannot be unpacked"):
        read(site.add("/broken", b"nothing packed", "text/plain", Content_Encoding="gzip"))
    site.pages["/slow"] = lambda: (time.sleep(1), (200, {}, b""))[1]  # type: ignore[func-returns-value]
    with pytest.raises(OSError, match="timed out"):
        read(site.url + "/slow", timeout=0.1)


def test_redirects(site: Site) -> None:
    site.add("/end", "there", "text/plain")
    site.pages["/start"] = (302, {"Location": "/middle"}, b"")
    site.pages["/middle"] = (301, {"Location": site.url + "/end?q=ü"}, b"")
    assert read(site.url + "/start") == "there"
    assert site.asked[-1][1] == "/end?q=%C3%BC"
    site.pages["/round"] = (302, {"Location": "/round"}, b"")
    with pytest.raises(OSError, match="more than 5 times"):
        read(site.url + "/round")


def test_only_public_pages(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    url = site.add("/", ARTICLE)
    for private in (url, "http://localhost/", "http://[::1]/", "http://169.254.169.254/latest", "http://10.0.0.1/"):
        with pytest.raises(RequestValidationError, match="not a public address"):
            page_text(private)
    for wrong in ("file:///etc/passwd", "ftp://example.org/", "gopher://x", "javascript:1", "", "http://["):
        with pytest.raises(RequestValidationError):
            read(wrong)
    assert not site.asked
    # A public page that leads to a private one is not followed.
    monkeypatch.setattr(web_pages, "send", lambda *a, **o: send_after_redirect(*a, **o))
    with pytest.raises(RequestValidationError, match="not a public address"):
        page_text("http://public.example/")
    assert not site.asked


def send_after_redirect(method: str, url: str, **options: Any) -> Any:
    """`send`, but the public host answers with a redirect to this machine."""
    from pymistral.public_http import HttpReply, send

    if url == "http://public.example/":
        return HttpReply(302, {"location": "http://127.0.0.1:1/"}, b"")
    return send(method, url, **options)


# ---- the search engine ----------------------------------------------------------------------------


def test_duckduckgo_stands_in(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    from ddgs.engines.duckduckgo import Duckduckgo

    item = '<div class="links_main body"><h2>{0} title</h2><a href="{1}">{0} text</a></div>'
    links = "".join(item.format(name, f"https://{name}.example/") for name in ("first", "second"))
    monkeypatch.setattr(Duckduckgo, "search_url", site.add("/html/", f"<html><body>{links}</body></html>"))
    results = search_duckduckgo("lisbon library")
    assert {(result.title, result.description, result.url, result.content) for result in results} == {
        ("first title", "first text", "https://first.example/", ""),
        ("second title", "second text", "https://second.example/", ""),
    }
    assert "lisbon" in site.asked[0][2]
    site.add("/html/", "<html><body></body></html>")
    assert search_duckduckgo("nothing") == []


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    require_search_extra()
    monkeypatch.setattr(web_pages, "find_spec", lambda name: None)
    with pytest.raises(ModelLoadError, match=r"needs ddgs and trafilatura: pip install 'pymistral\[search\]'"):
        require_search_extra()


async def test_building_without_the_extra(smollm2_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_pages, "find_spec", lambda name: None)
    with pytest.raises(ModelLoadError, match=r"pymistral\[search\]"):
        await ModelBuilder(smollm2_path).with_search().build()


# ---- the tools ------------------------------------------------------------------------------------

RESULTS = [
    SearchResult(
        title="Porto", description="A city", url="https://porto.example/", content="Porto has bridges.\n" + "Wine is made there. " * 40
    ),
    SearchResult(
        title="Lisbon", description="A city", url="https://lisbon.example/", content="Nothing here. " * 80 + "\nThe tower is 30 m high."
    ),
]


def searching(callback: Any, *, context: int = 100_000, allow_private: bool = True) -> WebSearch:
    return WebSearch(callback, allow_private=allow_private, count_tokens=len, context=context)


def model_with(search: WebSearch, *replies: str) -> Model:
    toolbox = Toolbox()
    toolbox.searches = True
    toolbox.sources.append(search.tools)
    return scripted_model(*replies, toolbox=toolbox)


def request(**options: Any) -> RequestBuilder:
    return RequestBuilder().add_message("user", "How high is the tower?").with_web_search_options(WebSearchOptions(**options))


async def told(search: WebSearch, tool: str, **arguments: str) -> str:
    """What a model is told that calls a tool."""
    async with model_with(search, call(tool, **arguments), "done") as model:
        response = await model.send_chat_request(request())
    (record,) = response.agentic_tool_calls or []
    return record.result_content


async def output(search: WebSearch, query: str, **options: Any) -> list[dict[str, str]]:
    return json.loads(await search._search(query, WebSearchOptions(**options)))["output"]  # type: ignore[no-any-return]


async def test_a_model_searches() -> None:
    queries = []

    def search(parameters: SearchFunctionParameters) -> list[SearchResult]:
        queries.append(parameters.query)
        return [SearchResult(title="Lisbon", description="d", url="u", content="30 m")]

    assert json.loads(await told(searching(search), SEARCH_TOOL, query=" height of the tower ")) == {
        "output": [{"title": "Lisbon", "description": "d", "url": "u", "content": "30 m"}]
    }
    assert queries == ["height of the tower"]


async def test_a_callback_may_be_async() -> None:
    async def search(parameters: SearchFunctionParameters) -> list[SearchResult]:
        await asyncio.sleep(0)
        return RESULTS

    (best, _) = await output(searching(search), "tower height")
    assert best["title"] == "Lisbon"


async def test_the_best_passages_come_first_and_fit() -> None:
    search = searching(lambda parameters: RESULTS)
    lisbon, porto = await output(search, "tower")
    assert lisbon["content"].endswith("The tower is 30 m high.")
    assert porto["content"] == ""  # no word of the query is in it
    (only,) = await output(searching(lambda parameters: RESULTS, context=600), "tower high")
    assert only["title"] == "Lisbon"
    assert await output(searching(lambda parameters: RESULTS, context=30), "tower") == []
    assert await output(searching(lambda parameters: []), "tower") == []


async def test_a_query_that_matches_nothing_gets_what_fits() -> None:
    assert all(result["content"] for result in await output(searching(lambda parameters: RESULTS), "zyzzyva"))


@pytest.mark.parametrize(("size", "budget"), [("low", 4096), (SearchContextSize.MEDIUM, 8192), ("HIGH", 16384)])
async def test_the_budget_is_that_of_the_context_size(size: Any, budget: int) -> None:
    page = "\n".join(f"tower {index} " + "x" * 500 for index in range(100))
    search = searching(lambda parameters: [SearchResult(title="t", description="d", url="u", content=page)])
    (result,) = await output(search, "tower", search_context_size=size)
    assert budget - 700 < len(json.dumps({"output": [result]}, ensure_ascii=False)) <= budget


async def test_pages_that_the_engine_finds_are_read(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [SearchResult(title=path, description="d", url=site.url + path) for path in ("/lisbon", "/missing")]
    site.add("/lisbon", ARTICLE)
    monkeypatch.setattr("pymistral.agents.web_search.search_duckduckgo", lambda query: found)
    lisbon, missing = await output(searching(None), "Lisbon library")
    assert "many readers" in lisbon["content"]
    assert missing["content"] == ""
    site.asked.clear()
    assert [result["content"] for result in await output(searching(None, allow_private=False), "Lisbon")] == ["", ""]
    assert not site.asked


async def test_a_model_reads_a_site(site: Site) -> None:
    url = site.add("/", ARTICLE)
    (page,) = json.loads(await told(searching(None), EXTRACT_TOOL, url=url))["output"]
    assert page["url"] == url
    assert "many readers" in page["content"]
    refused = await told(searching(None, allow_private=False), EXTRACT_TOOL, url=url)
    assert "not a public address" in refused
    assert len(site.asked) == 1


@pytest.mark.parametrize("callback", [lambda parameters: 1 / 0, lambda parameters: ["text"]])
async def test_a_search_that_fails_is_told(callback: Any) -> None:
    assert (await told(searching(callback), SEARCH_TOOL, query="x")).startswith("Error: search_the_web failed: ")


@pytest.mark.parametrize("arguments", ["", "[]", "{}", '{"query": 1}', '{"query": " "}', "[" * 10_000])
async def test_arguments_are_checked(arguments: str) -> None:
    tool = searching(None).tools(request())[SEARCH_TOOL]
    with pytest.raises(ToolArgumentsError, match=r'search_the_web takes \{"query": "..."\}, got '):
        await tool.function(CalledFunction(name=SEARCH_TOOL, arguments=arguments))


def test_what_the_model_is_told_of_the_tools() -> None:
    search = searching(None)
    assert search.tools(RequestBuilder()) == {}
    tools = search.tools(
        request(user_location=ApproximateUserLocation(city="Porto", timezone="Europe/Lisbon"), extract_description="Read!")
    )
    searcher, extractor = tools[SEARCH_TOOL].tool, tools[EXTRACT_TOOL].tool
    assert searcher is not None
    assert extractor is not None
    assert searcher.function.description is not None
    assert searcher.function.description.endswith("The user's location: city Porto, timezone Europe/Lisbon.")
    assert extractor.function.description == "Read!"
    assert searcher.function.parameters is not None
    assert searcher.function.parameters["required"] == ["query"]
    assert searcher.function.strict


async def test_options_need_a_model_that_searches() -> None:
    async with scripted_model("done") as model:
        with pytest.raises(RequestValidationError, match=r"has no with_search\(\)"):
            await model.send_chat_request(request())


def test_options_in_the_form_of_openai() -> None:
    options = RequestBuilder().with_web_search_options(
        {"search_context_size": "high", "user_location": {"type": "approximate", "approximate": {"city": "Porto"}}}
    )
    assert options.web_search_options == WebSearchOptions(
        search_context_size=SearchContextSize.HIGH, user_location=ApproximateUserLocation(city="Porto")
    )
    for wrong in ({"search_context_size": "huge"}, {"size": 1}, {"user_location": "Porto"}, {"search_description": 1}, "on", None):
        with pytest.raises(RequestValidationError):
            RequestBuilder().with_web_search_options(wrong)  # type: ignore[arg-type]


async def test_a_real_model_searches(smollm2_path: Any) -> None:
    queries = []

    def search(parameters: SearchFunctionParameters) -> list[SearchResult]:
        queries.append(parameters.query)
        return RESULTS

    builder = ModelBuilder(smollm2_path).with_search().with_search_callback(search)
    async with await builder.build() as model:
        asked = request().set_tool_choice({"function": {"name": SEARCH_TOOL}}).set_max_tool_rounds(1).set_sampler_max_len(200)
        response = await model.send_chat_request(asked)
    (record,) = response.agentic_tool_calls or []
    assert queries == [json.loads(record.arguments)["query"]]
    assert {result["title"] for result in json.loads(record.result_content)["output"]} == {"Porto", "Lisbon"}
