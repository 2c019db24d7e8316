"""The text of web pages, and what a search engine finds. Both need the extra ``search``."""

from __future__ import annotations

import time
import zlib
from email.message import Message
from importlib.util import find_spec
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

from ..errors import ModelLoadError
from ..public_http import HttpReply, send
from ..requests.web_search import SearchResult

PAGE_SECONDS = 10.0
MAX_PAGE_BYTES = 2 << 20
MAX_PAGE_CHARACTERS = 200_000
MAX_REDIRECTS = 5
MAX_RESULTS = 10
_HEADERS = {
    "Accept": "text/html,application/xhtml+xml,text/plain;q=0.9,*/*;q=0.1",
    "Accept-Encoding": "gzip",
    "Accept-Language": "en, *;q=0.5",
}
_HTML = ("text/html", "application/xhtml+xml")
_TEXT = ("application/json", "application/xml", "application/javascript", "application/x-ndjson")


def require_search_extra() -> None:
    """Check that the libraries are there, without importing them.

    Raises
    ------
    ModelLoadError
        One is missing.
    """
    missing = [name for name in ("ddgs", "trafilatura") if find_spec(name) is None]
    if missing:
        raise ModelLoadError(f"web search needs {' and '.join(missing)}: pip install 'pymistral[search]'")


def search_duckduckgo(query: str) -> list[SearchResult]:
    """Ask DuckDuckGo; up to ten results, without the texts of the pages.

    Raises
    ------
    OSError
        It does not answer, or not as it should.
    """
    from ddgs import DDGS
    from ddgs.exceptions import DDGSException

    try:
        found = DDGS(timeout=int(PAGE_SECONDS)).text(query, max_results=MAX_RESULTS, backend="duckduckgo")
    except DDGSException as error:
        if "No results" in str(error):
            return []
        raise OSError(f"the search engine could not be asked: {error}") from error
    return [SearchResult(title=result["title"], description=result["body"], url=result["href"]) for result in found]


def page_text(url: str, *, allow_private: bool = False, timeout: float = PAGE_SECONDS) -> str:
    """The text of a page: of HTML its main part, without menus and the like; other text as it is.

    Parameters
    ----------
    allow_private
        Whether the host may be this machine, or one of the local network. Redirects are held to the same.
    timeout
        Seconds for all of it.

    Raises
    ------
    RequestValidationError
        The URL, or where it leads, is refused.
    OSError
        The page cannot be fetched, is too long, or is no text.
    """
    end = time.monotonic() + timeout
    for _ in range(MAX_REDIRECTS + 1):
        left = max(end - time.monotonic(), 0.001)
        reply = send("GET", _ascii(url), headers=_HEADERS, allow_private=allow_private, timeout=left, max_bytes=MAX_PAGE_BYTES)
        if reply.status in (301, 302, 303, 307, 308) and reply.headers.get("location"):
            url = urljoin(url, reply.headers["location"])
        elif reply.status == 200:
            return _text(url, reply)[:MAX_PAGE_CHARACTERS]
        else:
            raise OSError(f"{url} answered with HTTP status {reply.status}")
    raise OSError(f"{url} redirected more than {MAX_REDIRECTS} times")


def _ascii(url: str) -> str:
    """The URL with what is not ASCII in its path and query escaped."""
    try:
        parts = urlsplit(url.strip())
    except ValueError:
        return url  # and is refused as what it is
    reserved = "/%:@!$&'()*+,;=~?[]"
    return urlunsplit(parts._replace(path=quote(parts.path, safe=reserved), query=quote(parts.query, safe=reserved), fragment=""))


def _text(url: str, reply: HttpReply) -> str:
    header = Message()
    header["content-type"] = reply.headers.get("content-type", "text/html")
    kind, charset = header.get_content_type(), header.get_content_charset()
    body = _unpacked(url, reply)
    if kind in _HTML:
        return _html_text(body, charset)
    if kind.startswith("text/") or kind in _TEXT:
        return _decoded(body, charset)
    raise OSError(f"{url} is {kind}, which is no text")


def _unpacked(url: str, reply: HttpReply) -> bytes:
    encoding = reply.headers.get("content-encoding", "identity").lower()
    if encoding == "identity":
        return reply.body
    if encoding not in ("gzip", "x-gzip"):
        raise OSError(f"{url} is encoded as {encoding!r}, which was not asked for")
    unpacker = zlib.decompressobj(wbits=31)
    try:
        body = unpacker.decompress(reply.body, MAX_PAGE_BYTES)
    except zlib.error as error:
        raise OSError(f"{url} cannot be unpacked: {error}") from error
    if unpacker.unconsumed_tail:
        raise OSError(f"{url} has more than {MAX_PAGE_BYTES} bytes")
    return body


def _decoded(body: bytes, charset: str | None) -> str:
    try:
        return body.decode(charset or "utf-8", errors="replace")
    except LookupError:
        return body.decode(errors="replace")


def _html_text(body: bytes, charset: str | None) -> str:
    import trafilatura

    # Without a charset in the header, the page's own declaration or its bytes tell.
    document = _decoded(body, charset) if charset else trafilatura.utils.decode_file(body)
    text = trafilatura.extract(document, include_comments=False, favor_recall=True)
    return str(text or trafilatura.html2txt(document) or "").strip()
