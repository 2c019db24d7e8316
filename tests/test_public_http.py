"""The guarded HTTP client, and the dispatch of tool calls over it, against a local server."""

from __future__ import annotations

import http.server
import ipaddress
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fake_model import call, scripted_model

from pymistral import Function, RequestBuilder, Tool
from pymistral.blocking import BlockingModel
from pymistral.errors import RequestValidationError
from pymistral.public_http import is_public, send
from pymistral.tool_rounds import Toolbox, ToolCallback

ADD = Tool(function=Function(name="add", strict=False))


class Handler(http.server.BaseHTTPRequestHandler):
    seen: list[tuple[str, Any, dict[str, str]]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.seen.append((self.path, json.loads(body) if body else None, dict(self.headers)))
        kind = self.path.strip("/")
        if kind == "redirect":
            self.answer(b"", 302, Location="/object")
        elif kind == "error":
            self.answer(b"no", 500)
        elif kind == "slow":
            self.send_response(200)
            self.end_headers()
            for _ in range(100):
                time.sleep(0.05)
                self.wfile.write(b"x")
        elif kind == "big":
            self.answer(b"x" * 6_000_000)
        else:
            self.answer({"object": b'{"content": "five"}', "text": b"just text", "string": b'"a string"', "other": b'{"a": 1}'}[kind])

    do_GET = do_POST

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Handler.seen = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700:4700::1111", True),
        ("127.0.0.1", False),
        ("127.8.8.8", False),
        ("10.0.0.1", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1", False),
        ("fc00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::808:808", True),
        ("::127.0.0.1", False),
        ("::2", False),
        ("::ffff:0:127.0.0.1", False),
        ("::ffff:0:8.8.8.8", True),
        ("64:ff9b:1::808:808", False),
        ("fec0::1", False),
        ("192.0.0.192", False),
        ("2002:7f00:1::", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) == public


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///etc/passwd", "must begin with http"),
        ("ftp://example.com", "must begin with http"),
        ("example.com", "must begin with http"),
        ("http://", "must name a host"),
        ("http://user:password@example.com", "and no user"),
        ("http://example.com:99999", "no valid URL"),
        ("http://[::1", "no valid URL"),
        ("http://example.com/\r\nHost: x", "without spaces and control characters"),
        ("http://127.0.0.1/", "not a public address"),
        ("http://[::ffff:10.0.0.1]/", "not a public address"),
        ("http://169.254.169.254/latest", "not a public address"),
        (3, "a URL is a string"),
    ],
)
def test_urls_that_are_refused_when_they_are_set(url: Any, message: str) -> None:
    with pytest.raises(RequestValidationError, match=message):
        RequestBuilder().set_tool_dispatch_url(url)


@pytest.mark.parametrize("host", ["localhost", "127.1", "2130706433", "0x7f000001"])
def test_names_and_odd_spellings_are_looked_up_and_refused(server: str, host: str) -> None:
    port = server.rpartition(":")[2]
    with pytest.raises((RequestValidationError, OSError)):
        send("POST", f"http://{host}:{port}/object")
    assert Handler.seen == []


def test_the_connection_goes_to_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    connected: list[tuple[str, int]] = []

    def resolve(host: str, port: int, **_: object) -> list[Any]:
        asked.append(host)
        address = "93.184.216.34" if len(asked) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    def connect(address: tuple[str, int], *_: object) -> socket.socket:
        connected.append(address)
        raise ConnectionRefusedError("no network here")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(ConnectionRefusedError):
        send("POST", "http://rebinding.example/")
    assert (asked, connected) == (["rebinding.example"], [("93.184.216.34", 80)])


def test_one_private_address_among_several_is_enough_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in ("93.184.216.34", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(RequestValidationError, match=r"is at 10\.0\.0\.1, which is not a public address"):
        send("GET", "http://two.example/")


def test_bounds(server: str) -> None:
    assert send("GET", f"{server}/text", allow_private=True).body == b"just text"
    assert send("GET", f"{server}/redirect", allow_private=True).status == 302
    with pytest.raises(OSError, match="sent more than 1000 bytes"):
        send("GET", f"{server}/big", allow_private=True, max_bytes=1000)
    begin = time.monotonic()
    with pytest.raises(OSError, match="timed out"):
        send("GET", f"{server}/slow", allow_private=True, timeout=0.5)
    assert time.monotonic() - begin < 4
    with pytest.raises(ssl.SSLError):
        send("GET", server.replace("http:", "https:"), allow_private=True, timeout=10)


def dispatched(url: str, *, allow_private: bool = True) -> RequestBuilder:
    return RequestBuilder().add_message("user", "Add").set_tools([ADD]).set_tool_dispatch_url(url, allow_private=allow_private)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("object", "five"),
        ("text", "just text"),
        ("string", "a string"),
        ("other", '{"a": 1}'),
        ("error", "Error: add failed: OSError: the tool server answered with HTTP status 500"),
        ("redirect", "Error: add failed: OSError: the tool server answered with HTTP status 302"),
        ("big", "Error: add failed: OSError: 127.0.0.1 sent more than 4194304 bytes"),
    ],
)
async def test_calls_are_dispatched(server: str, path: str, said: str) -> None:
    async with scripted_model(call("add", a=1), "done") as model:
        response = await model.send_chat_request(dispatched(f"{server}/{path}"))
    assert response.choices[0].message.content == "done"
    assert [record.result_content for record in response.agentic_tool_calls or []] == [said]
    ((where, body, headers),) = Handler.seen
    assert (where, body) == (f"/{path}", {"name": "add", "arguments": {"a": 1}})
    assert headers["Content-Type"] == "application/json"


def test_streams_and_blocking_code_dispatch_too(server: str) -> None:
    with BlockingModel(scripted_model(call("add", a=1), "done")) as model:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in model.stream_chat_request(dispatched(f"{server}/object")))
    assert text == "done"
    assert len(Handler.seen) == 1


async def test_a_private_name_is_refused_when_it_is_looked_up(server: str) -> None:
    url = server.replace("127.0.0.1", "localhost")
    async with scripted_model(call("add", a=1), "done") as model:
        response = await model.send_chat_request(dispatched(f"{url}/object", allow_private=False))
    (record,) = response.agentic_tool_calls or []
    assert "which is not a public address" in record.result_content
    assert Handler.seen == []


async def test_callbacks_go_before_the_url(server: str) -> None:
    toolbox = Toolbox({"add": ToolCallback(function=lambda function: "mine")})
    async with scripted_model(call("add", a=1), "done", toolbox=toolbox) as model:
        response = await model.send_chat_request(dispatched(f"{server}/object"))
    assert [record.result_content for record in response.agentic_tool_calls or []] == ["mine"]
    assert Handler.seen == []
