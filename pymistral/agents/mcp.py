"""The tools of MCP servers: connections that live in a thread of their own as long as the model does."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
import threading
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO

from ..errors import ModelLoadError
from ..requests import Function, Tool
from ..tool_rounds import Toolbox, ToolCallback, ToolFailure
from .mcp_config import HttpSource, McpClientConfig, McpServerConfig, ProcessSource, WebSocketSource

if TYPE_CHECKING:
    from mcp import Client
    from mcp.client._transport import TransportStreams
    from mcp_types import CallToolResult

    from ..responses import CalledFunction

_CONNECT_SECONDS = 30.0
_CLOSE_SECONDS = 15.0
_MAX_PAGES = 100  # of a server's list of tools
_MAX_MESSAGE_BYTES = 16 << 20
_TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_log = logging.getLogger("pymistral")


def connect(config: McpClientConfig, toolbox: Toolbox) -> None:
    """Connect to the servers, and put their tools into the toolbox, which closes the connections.

    Raises
    ------
    ModelLoadError
        The extra is missing, a server cannot be reached, or two tools have one name.
    """
    try:
        import mcp  # noqa: F401
        import websockets  # noqa: F401
    except ImportError as error:
        raise ModelLoadError(f"MCP servers need the extra 'mcp': pip install 'pymistral[mcp]' ({error})") from error
    client = McpClient(config)
    toolbox.closing.callback(client.close)
    for name, callback in client.tools().items():
        if name in toolbox.callbacks:
            raise ModelLoadError(f"two tools are named {name!r}, one of them an MCP server's; give that server a tool_prefix")
        toolbox.callbacks[name] = callback


class McpClient:
    """Connections to MCP servers, in a thread with an event loop of its own, so that any loop and thread can use them."""

    def __init__(self, config: McpClientConfig) -> None:
        self._config = config
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="pymistral-mcp", daemon=True)
        self._thread.start()
        limit = self._submit(_new_limit(config.max_concurrent_calls)).result()
        self._connections = [Connection(server, config.tool_timeout_secs, limit) for server in config.servers if server.enabled]

    def tools(self) -> dict[str, ToolCallback]:
        """The tools of all servers, which are connected for that side by side."""
        listing = [self._submit(connection.list_tools()) for connection in self._connections]
        callbacks: dict[str, ToolCallback] = {}
        for connection, found in zip(self._connections, listing, strict=True):
            prefix = f"{connection.server.tool_prefix}_" if connection.server.tool_prefix else ""
            for tool in found.result():
                name = prefix + tool.function.name
                if name in callbacks:
                    raise ModelLoadError(f"two MCP tools are named {name!r}; give one of their servers a tool_prefix")
                callbacks[name] = self._callback(connection, tool, name)
        return callbacks

    def close(self) -> None:
        """End the connections, and the processes behind them."""
        closing = self._submit(_close_all(self._connections))
        with suppress(FutureTimeoutError):
            closing.result(_CLOSE_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSE_SECONDS)
        if not self._thread.is_alive():
            self._loop.close()

    def _callback(self, connection: Connection, tool: Tool, name: str) -> ToolCallback:
        async def call(function: CalledFunction) -> str:
            arguments = json.loads(function.arguments or "{}")
            return await asyncio.wrap_future(self._submit(connection.call(tool.function.name, arguments)))

        described = Function(name=name, description=tool.function.description, parameters=tool.function.parameters)
        # The connection has timeouts of its own, which do not count the waiting for other calls.
        return ToolCallback(function=call, tool=Tool(function=described) if self._config.auto_register_tools else None, timeout=None)

    def _submit(self, coroutine: Any) -> Future[Any]:
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError:
            coroutine.close()
            raise


class Connection:
    """One server: connected when it is needed, and anew after it has gone."""

    def __init__(self, server: McpServerConfig, timeout: float, limit: asyncio.Semaphore) -> None:
        self.server = server
        self._timeout = timeout
        self._limit = limit
        self._session: Session | None = None

    async def list_tools(self) -> list[Tool]:
        """The server's tools."""
        try:
            client = await self._client()
            tools: list[Tool] = []
            cursor: str | None = None
            for _ in range(_MAX_PAGES):
                page = await asyncio.wait_for(client.list_tools(cursor=cursor), self._timeout)
                tools += [
                    Tool(function=Function(name=tool.name, description=tool.description, parameters=tool.input_schema))
                    for tool in page.tools
                    if self._can_be_called(tool.name)
                ]
                cursor = page.next_cursor
                if cursor is None:
                    break
        except Exception as error:
            raise ModelLoadError(f"the MCP server {self.server.name!r} cannot be used: {_reason(error)}") from error
        return tools

    async def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """What a tool of the server answers.

        Raises
        ------
        McpToolError
            It failed, or the server did.
        """
        from mcp.shared.exceptions import MCPError
        from mcp_types import CONNECTION_CLOSED, INVALID_REQUEST, PARSE_ERROR, REQUEST_TIMEOUT

        async with self._limit:
            try:
                client = await self._client()
            except Exception as error:
                raise McpToolError(f"the MCP server {self.server.name!r} cannot be reached: {_reason(error)}") from error
            session = self._session
            try:
                result = await client.call_tool(name, dict(arguments), read_timeout_seconds=self._timeout)
            except Exception as error:
                code = error.code if isinstance(error, MCPError) else None
                if code == REQUEST_TIMEOUT:
                    raise McpToolError(f"the MCP server {self.server.name!r} did not answer within {self._timeout:g} s") from error
                if code in (None, CONNECTION_CLOSED, INVALID_REQUEST, PARSE_ERROR):  # INVALID_REQUEST: an HTTP session that has ended
                    if session is not None and session is self._session:
                        session.stop()  # the next call connects anew
                        self._session = None
                    raise McpToolError(f"the MCP server {self.server.name!r} failed during the call: {_reason(error)}") from error
                raise McpToolError(_reason(error)) from error
        text = _text(result)
        if result.is_error:
            raise McpToolError(text or "the tool failed and did not say why")
        return text

    async def close(self) -> None:
        """End the connection."""
        session, self._session = self._session, None
        if session is not None:
            await session.end()

    async def _client(self) -> Client:
        if self._session is None or self._session.ended:
            self._session = Session(self.server)
        return await self._session.client()

    def _can_be_called(self, name: str) -> bool:
        if _TOOL_NAME.fullmatch(name):
            return True
        _log.warning("the MCP server %r has a tool with a name that cannot be called: %.200r", self.server.name, name)
        return False


class Session:
    """One connection from its beginning to its end. Entered and left by one task, as the library below requires."""

    def __init__(self, server: McpServerConfig) -> None:
        self._server = server
        self._ready: asyncio.Future[Client] = asyncio.get_running_loop().create_future()
        self._ready.add_done_callback(lambda ready: ready.cancelled() or ready.exception())  # seen, even if nobody waits
        self._stopping = asyncio.Event()
        self._task = asyncio.ensure_future(self._hold())

    @property
    def ended(self) -> bool:
        return self._task.done()

    async def client(self) -> Client:
        """The client, once it is connected."""
        timeout = getattr(self._server.source, "timeout_secs", None) or _CONNECT_SECONDS
        await asyncio.wait({self._ready}, timeout=timeout)
        if not self._ready.done():
            self._task.cancel()
            raise TimeoutError(f"it did not answer within {timeout:g} s")
        if self._ready.cancelled():
            raise ConnectionError("the connection was closed")
        return self._ready.result()

    def stop(self) -> None:
        self._stopping.set()

    async def end(self) -> None:
        self.stop()
        if not self._ready.done():
            self._task.cancel()
        await asyncio.wait({self._task}, timeout=_CLOSE_SECONDS)

    async def _hold(self) -> None:
        from mcp import Client

        try:
            async with Client(_transport(self._server)) as client:
                self._ready.set_result(client)
                await self._stopping.wait()
        except asyncio.CancelledError:
            self._ready.cancel()
            raise
        except BaseException as error:  # groups of what a connection's tasks raised
            if self._ready.done():
                _log.warning("the connection to the MCP server %r ended: %s", self._server.name, _reason(error))
            else:
                self._ready.set_exception(ConnectionError(_reason(error)))


class McpToolError(ToolFailure):
    """A tool of an MCP server failed."""


def _transport(server: McpServerConfig) -> AbstractAsyncContextManager[TransportStreams]:
    from mcp.client.stdio import StdioServerParameters, stdio_client

    source = server.source
    if isinstance(source, ProcessSource):
        parameters = StdioServerParameters(command=source.command, args=list(source.args), env=source.env, cwd=source.work_dir)
        return stdio_client(parameters, errlog=_error_log())
    headers = dict(source.headers or {})
    if server.bearer_token:
        headers["Authorization"] = f"Bearer {server.bearer_token}"
    return _http(source, headers) if isinstance(source, HttpSource) else _web_socket(source, headers)


def _error_log() -> TextIO:
    """Where a server's standard error goes: to ours, unless something without a file stands in for that, as in notebooks."""
    try:
        sys.stderr.fileno()
    except (OSError, AttributeError):
        return sys.__stderr__ or sys.stderr
    return sys.stderr


@asynccontextmanager
async def _http(source: HttpSource, headers: dict[str, str]) -> AsyncIterator[TransportStreams]:
    import httpx2
    from mcp.client.streamable_http import streamable_http_client

    timeout = httpx2.Timeout(source.timeout_secs or _CONNECT_SECONDS, read=source.timeout_secs or 300)
    async with (
        httpx2.AsyncClient(headers=headers, timeout=timeout) as client,
        streamable_http_client(source.url, http_client=client) as streams,
    ):
        yield streams


@asynccontextmanager
async def _web_socket(source: WebSocketSource, headers: dict[str, str]) -> AsyncIterator[TransportStreams]:
    """JSON-RPC messages as text frames, under the subprotocol ``mcp``."""
    import anyio
    from mcp.shared.message import SessionMessage
    from mcp_types import jsonrpc_message_adapter
    from websockets.asyncio.client import connect as connect_socket
    from websockets.exceptions import ConnectionClosed
    from websockets.typing import Subprotocol

    incoming, read_stream = anyio.create_memory_object_stream[SessionMessage | Exception](0)
    write_stream, outgoing = anyio.create_memory_object_stream[SessionMessage](0)
    async with (
        connect_socket(
            source.url,
            additional_headers=headers,
            subprotocols=[Subprotocol("mcp")],
            open_timeout=source.timeout_secs or _CONNECT_SECONDS,
            max_size=_MAX_MESSAGE_BYTES,
        ) as socket,
        anyio.create_task_group() as tasks,
        incoming,
        read_stream,
        write_stream,
        outgoing,
    ):

        async def receive() -> None:
            with suppress(ConnectionClosed, anyio.ClosedResourceError, anyio.BrokenResourceError):
                async for text in socket:
                    await incoming.send(_message(text))
            await incoming.aclose()  # requests that wait learn that the connection has ended

        def _message(text: str | bytes) -> SessionMessage | Exception:
            try:
                return SessionMessage(jsonrpc_message_adapter.validate_json(text, by_name=False))
            except ValueError as error:
                return error

        async def transmit() -> None:
            with suppress(ConnectionClosed, anyio.ClosedResourceError):
                async for message in outgoing:
                    await socket.send(message.message.model_dump_json(by_alias=True, exclude_unset=True))

        tasks.start_soon(receive)
        tasks.start_soon(transmit)
        try:
            yield read_stream, write_stream
        finally:
            tasks.cancel_scope.cancel()


async def _new_limit(calls: int) -> asyncio.Semaphore:
    return asyncio.Semaphore(calls)  # made inside the loop, which Python 3.10 wants


async def _close_all(connections: list[Connection]) -> None:
    await asyncio.gather(*(connection.close() for connection in connections), return_exceptions=True)


def _text(result: CallToolResult) -> str:
    """A tool's result as the model reads it."""
    parts: list[str] = []
    for block in result.content:
        if block.type == "text":
            parts.append(block.text)
        elif block.type == "resource":
            parts.append(getattr(block.resource, "text", None) or f"[Resource: {block.resource.uri}]")
        elif block.type == "resource_link":
            parts.append(f"[Resource: {block.uri}]")
        else:
            parts.append(f"[{block.type.capitalize()}: {block.mime_type}]")
    if not parts and result.structured_content is not None:
        return json.dumps(result.structured_content, ensure_ascii=False)
    return "\n".join(parts)


def _reason(error: BaseException) -> str:
    """What went wrong: the first of the errors that a group holds."""
    while inner := getattr(error, "exceptions", None):
        error = inner[0]
    return str(error) or type(error).__name__
