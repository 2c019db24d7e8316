"""An MCP server for the tests: ``stdio``, ``http PORT`` or ``ws PORT``; it prints a line on standard error when it is ready."""

import asyncio
import os
import sys

from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("tests")


@server.tool()
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@server.tool()
def fail(reason: str) -> str:
    """Fail."""
    raise ToolError(reason)


@server.tool()
async def sleep(seconds: float) -> str:
    """Sleep."""
    await asyncio.sleep(seconds)
    return "slept"


@server.tool()
def die() -> str:
    """End the server in the middle of the call."""
    os._exit(3)


@server.tool()
def pid() -> int:
    """The server's process."""
    return os.getpid()


@server.tool()
def environment(name: str) -> str:
    """An environment variable."""
    return os.environ.get(name, "unset")


@server.tool()
def header(name: str, context: Context) -> str:
    """A header of the request."""
    headers = context.headers or {}
    return headers.get(name.lower(), "none")


async def serve_web_socket(port: int) -> None:
    import anyio
    from mcp.shared.message import SessionMessage
    from mcp_types import jsonrpc_message_adapter
    from websockets.asyncio.server import serve

    async def serve_one(socket) -> None:
        if socket.request.headers.get("Authorization") != "Bearer secret":
            await socket.close(1008, "no token")
            return
        incoming, read_stream = anyio.create_memory_object_stream(0)
        write_stream, outgoing = anyio.create_memory_object_stream(0)

        async def receive() -> None:
            async with incoming:
                async for text in socket:
                    await incoming.send(SessionMessage(jsonrpc_message_adapter.validate_json(text, by_name=False)))

        async def transmit() -> None:
            async for message in outgoing:
                await socket.send(message.message.model_dump_json(by_alias=True, exclude_unset=True))

        low = server._lowlevel_server
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receive)
            tasks.start_soon(transmit)
            await low.run(read_stream, write_stream, low.create_initialization_options())
            tasks.cancel_scope.cancel()

    async with serve(serve_one, "127.0.0.1", port, subprotocols=["mcp"]):
        await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    kind, *port = sys.argv[1:]
    if kind == "stdio":
        server.run("stdio")
    elif kind == "http":
        server.run("streamable-http", port=int(port[0]))
    else:
        asyncio.run(serve_web_socket(int(port[0])))
