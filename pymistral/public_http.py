"""HTTP to addresses that somebody else chose: only public ones unless allowed, no redirects, everything bounded."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from .errors import RequestValidationError

# IPv6 networks with an IPv4 address inside, and the byte where it begins: RFC 4291 (twice), 2765, 6052, 3056.
_EMBEDDED = {
    ipaddress.IPv6Network(network): byte
    for network, byte in {"::/96": 12, "::ffff:0:0/96": 12, "::ffff:0:0:0/96": 12, "64:ff9b::/96": 12, "2002::/16": 2}.items()
}
# Not public either, though not every version of Python knows: RFC 6890 (where clouds keep metadata), 3879, 8215.
_LOCAL = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "fec0::/10", "64:ff9b:1::/48")))


@dataclass(frozen=True)
class HttpReply:
    """What a server answered."""

    status: int
    headers: Mapping[str, str]
    """With names in lower case."""
    body: bytes


def checked_url(url: object, *, allow_private: bool = False) -> SplitResult:
    """The parts of a URL that may be asked, as far as the URL itself tells: names are looked up only when it is.

    Raises
    ------
    RequestValidationError
        It is not http or https, it is malformed, or its host is an address that is not public.
    """
    if not isinstance(url, str) or not url.isprintable() or " " in url:
        raise RequestValidationError(f"a URL is a string without spaces and control characters, got {url!r}")
    try:
        parts = urlsplit(url)
        _ = parts.port
        host = (parts.hostname or "").encode("idna")
    except ValueError as error:
        raise RequestValidationError(f"{url!r} is no valid URL: {error}") from error
    if parts.scheme not in ("http", "https"):
        raise RequestValidationError(f"{url!r} must begin with http:// or https://")
    if not host or parts.username is not None:
        raise RequestValidationError(f"{url!r} must name a host, and no user")
    if not allow_private:
        try:
            address = ipaddress.ip_address(host.decode())
        except ValueError:
            return parts
        if not is_public(address):
            raise RequestValidationError(_refusal(url, str(address)))
    return parts


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether it can be any machine's address: not loopback, private, link-local, multicast, reserved, nor one of these in disguise."""
    if isinstance(address, ipaddress.IPv6Address):
        for network, byte in _EMBEDDED.items():
            if address in network:
                return is_public(ipaddress.IPv4Address(address.packed[byte : byte + 4]))
    return address.is_global and not address.is_multicast and not any(address in network for network in _LOCAL)


def send(
    method: str,
    url: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    *,
    allow_private: bool = False,
    timeout: float = 30.0,
    max_bytes: int = 4 << 20,
) -> HttpReply:
    """Send one request and read the reply. The connection goes to the very address that was checked; redirects are not followed.

    Parameters
    ----------
    allow_private
        Whether the host may be one that is not public: this machine, or one of the local network.
    timeout
        Seconds for all of it.
    max_bytes
        The longest body that is read.

    Raises
    ------
    RequestValidationError
        The URL or what its name stands for is refused.
    OSError
        The host cannot be found, does not answer in time, or does not speak HTTP; or its reply is too long.
    """
    end = time.monotonic() + timeout
    parts = checked_url(url, allow_private=allow_private)
    host = (parts.hostname or "").encode("idna").decode()
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    connection = (http.client.HTTPSConnection if secure else http.client.HTTPConnection)(host, port)
    with _connect(url, host, port, allow_private, end) as plain, ExitStack() as stack:
        sock = stack.enter_context(ssl.create_default_context().wrap_socket(plain, server_hostname=host)) if secure else plain
        connection.sock = sock
        try:
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request(method, path, body, {"User-Agent": "pymistral", "Connection": "close", **(headers or {})})
            sock.settimeout(_left(end))
            with connection.getresponse() as reply:
                text = _read(reply, sock, host, max_bytes, end)
            return HttpReply(reply.status, {name.lower(): value for name, value in reply.headers.items()}, text)
        except (http.client.HTTPException, UnicodeError) as error:
            raise OSError(f"{host} does not speak HTTP as it should: {error!r}") from error


def _connect(url: str, host: str, port: int, allow_private: bool, end: float) -> socket.socket:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(sockaddr[0]) for *_, sockaddr in found]
    for address in addresses:
        if not allow_private and not is_public(ipaddress.ip_address(address.partition("%")[0])):
            raise RequestValidationError(_refusal(url, address))
    failure: OSError = OSError(f"{host} has no address")
    for address in dict.fromkeys(addresses):
        try:
            return socket.create_connection((address, port), _left(end))
        except OSError as error:  # noqa: PERF203
            failure = error
    raise failure


def _read(reply: http.client.HTTPResponse, sock: socket.socket, host: str, max_bytes: int, end: float) -> bytes:
    body = b""
    while piece := reply.read1(min(1 << 16, max_bytes + 1 - len(body))):
        body += piece
        if len(body) > max_bytes:
            raise OSError(f"{host} sent more than {max_bytes} bytes")
        if not reply.isclosed():  # newer Pythons close it, and the socket with it, at the last byte that Content-Length announces
            sock.settimeout(_left(end))
    return body


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


def _refusal(url: str, address: str) -> str:
    return f"{url!r} is at {address}, which is not a public address; allow it with allow_private=True if you trust it"
