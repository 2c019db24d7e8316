"""Tools of MCP servers that the tests start."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from fake_model import call, scripted_model

from pymistral import AgentBuilder, McpClientConfig, McpServerConfig, McpServerSource, Model, ModelBuilder
from pymistral.agents.mcp import McpToolError, connect
from pymistral.blocking import BlockingModel
from pymistral.errors import ModelLoadError
from pymistral.responses import CalledFunction
from pymistral.tool_rounds import Toolbox

SERVER = str(Path(__file__).with_name("mcp_server.py"))
STDIO = McpServerSource.process(sys.executable, [SERVER, "stdio"])


def config(source: Any = STDIO, *, tool_prefix: str | None = None, bearer_token: str | None = None, **options: Any) -> McpClientConfig:
    server = McpServerConfig(name="tests", source=source, tool_prefix=tool_prefix, bearer_token=bearer_token)
    return McpClientConfig(servers=[server], **options)


@contextmanager
def tools(config: McpClientConfig) -> Iterator[Toolbox]:
    toolbox = Toolbox()
    try:
        connect(config, toolbox)
        yield toolbox
    finally:
        toolbox.close()


async def ask(toolbox: Toolbox, name: str, /, **arguments: Any) -> str:
    """Call a tool; what it raises is its error."""
    answer = await toolbox.callbacks[name].function(CalledFunction(name=name, arguments=json.dumps(arguments)))
    assert isinstance(answer, str)
    return answer


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z" if sys.platform == "linux" else True
    except (ProcessLookupError, FileNotFoundError):  # the second if it goes between the two looks
        return False


def gone(pid: int, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pid)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def serving(kind: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, SERVER, kind, str(port)], stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None
                assert time.monotonic() < end, "the server did not start"
                time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.wait()


async def test_stdio() -> None:
    with tools(config(tool_prefix="t")) as toolbox:
        assert set(toolbox.callbacks) >= {"t_add", "t_fail", "t_sleep", "t_die"}
        tool = toolbox.callbacks["t_add"].tool
        assert tool is not None
        assert tool.function.description == "Add two numbers."
        assert set((tool.function.parameters or {})["properties"]) == {"a", "b"}
        assert await ask(toolbox, "t_add", a=2, b=3) == "5"
        with pytest.raises(Exception, match="for a reason"):
            await ask(toolbox, "t_fail", reason="for a reason")
        with pytest.raises(Exception, match=r"(?i)a|valid"):
            await ask(toolbox, "t_add", a="many")
        pid = int(await ask(toolbox, "t_pid"))
        assert alive(pid)
    assert gone(pid)


async def test_a_model_with_mcp_tools() -> None:
    with tools(config()) as toolbox:
        async with scripted_model(call("add", a=2, b=3), "It is 5.", toolbox=toolbox) as model:
            response = await model.send_chat_request("2 + 3?")
            assert response.choices[0].message.content == "It is 5."
            assert [record.result_content for record in response.agentic_tool_calls or []] == ["5"]


def test_a_blocking_model_and_an_agent() -> None:
    replies = call("add", a=2, b=3), "5", call("fail", reason="why"), "Oh."
    with tools(config()) as toolbox, BlockingModel(scripted_model(*replies, toolbox=toolbox)) as model:
        assert model.chat("2 + 3?") == "5"
        response = asyncio.run(AgentBuilder(model).build().run("Fail"))
        (result,) = response.steps[0].tool_results
        assert result.is_error
        assert "why" in result.content
        assert response.final_text == "Oh."


async def test_not_registered_means_not_offered() -> None:
    with tools(config(auto_register_tools=False)) as toolbox:
        assert toolbox.callbacks["add"].tool is None
        assert await ask(toolbox, "add", a=2, b=3) == "5"


async def test_a_server_that_dies_during_a_call_is_started_anew() -> None:
    with tools(config()) as toolbox:
        before = int(await ask(toolbox, "pid"))
        with pytest.raises(Exception, match=r"the MCP server 'tests' failed during the call: .*[Cc]losed"):
            await ask(toolbox, "die")
        after = int(await ask(toolbox, "pid"))
        assert after != before
        os.kill(after, signal.SIGKILL)  # between two calls
        assert gone(after)
        with suppress(McpToolError):  # it may notice only now
            await ask(toolbox, "pid")
        assert await ask(toolbox, "add", a=1, b=1) == "2"


async def test_a_call_that_takes_too_long() -> None:
    with tools(config(tool_timeout_secs=0.3)) as toolbox:
        with pytest.raises(Exception, match=r"did not answer within 0\.3 s"):
            await ask(toolbox, "sleep", seconds=30)
        assert await ask(toolbox, "add", a=1, b=1) == "2"


@pytest.mark.parametrize("limit", [1, 4])
async def test_max_concurrent_calls(limit: int) -> None:
    with tools(config(max_concurrent_calls=limit)) as toolbox:
        begin = time.monotonic()
        await asyncio.gather(*(ask(toolbox, "sleep", seconds=0.4) for _ in range(4)))
        seconds = time.monotonic() - begin
        assert seconds >= 1.6 if limit == 1 else seconds < 1.6


async def test_cancelling_a_call() -> None:
    with tools(config(max_concurrent_calls=1)) as toolbox:
        task = asyncio.ensure_future(ask(toolbox, "sleep", seconds=60))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.wait_for(ask(toolbox, "add", a=1, b=1), 20) == "2"


async def test_the_environment_is_kept_from_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "of the application")
    with tools(config(McpServerSource.process(sys.executable, [SERVER, "stdio"], env={"GIVEN": "yes"}))) as toolbox:
        assert await ask(toolbox, "environment", name="SECRET") == "unset"
        assert await ask(toolbox, "environment", name="GIVEN") == "yes"


async def test_http() -> None:
    port = free_port()
    source = McpServerSource.http(f"http://127.0.0.1:{port}/mcp", headers={"X-Extra": "more"})
    with serving("http", port) as process, tools(config(source, bearer_token="secret")) as toolbox:
        assert await ask(toolbox, "add", a=2, b=3) == "5"
        assert await ask(toolbox, "header", name="Authorization") == "Bearer secret"
        assert await ask(toolbox, "header", name="X-Extra") == "more"
        with pytest.raises(Exception, match="the MCP server 'tests' failed during the call"):
            await ask(toolbox, "die")
        process.wait(20)
        with pytest.raises(Exception, match="the MCP server 'tests'"):
            await ask(toolbox, "add", a=2, b=3)
        with serving("http", port):
            assert await ask(toolbox, "add", a=2, b=3) == "5"


async def test_web_socket() -> None:
    port = free_port()
    source = McpServerSource.web_socket(f"ws://127.0.0.1:{port}/", timeout_secs=20)
    with serving("ws", port) as process, tools(config(source, bearer_token="secret")) as toolbox:
        assert await ask(toolbox, "add", a=2, b=3) == "5"
        with pytest.raises(Exception, match=r"the MCP server 'tests' failed during the call: .*[Cc]losed"):
            await ask(toolbox, "die")
        process.wait(20)
        with pytest.raises(Exception, match="the MCP server 'tests' cannot be reached"):
            await ask(toolbox, "add", a=2, b=3)
        with serving("ws", port):
            assert await ask(toolbox, "add", a=2, b=3) == "5"
            wrong = config(source, bearer_token="wrong")
            with pytest.raises(ModelLoadError, match="the MCP server 'tests' cannot be used"), tools(wrong):
                pass


async def test_servers_that_cannot_be_used(tmp_path: Path) -> None:
    for source, reason in (
        (McpServerSource.process("/no/such/program"), "/no/such/program"),
        (McpServerSource.process(sys.executable, ["-c", "print('hello')"]), "closed"),
        (McpServerSource.http(f"http://127.0.0.1:{free_port()}/mcp"), ""),
        (McpServerSource.web_socket(f"ws://127.0.0.1:{free_port()}/"), ""),
    ):
        toolbox = Toolbox()
        with pytest.raises(ModelLoadError, match=f"(?i)the MCP server 'tests' cannot be used: .*{reason}"):
            connect(config(source), toolbox)
        toolbox.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "pymistral-mcp"]


async def test_a_server_that_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"ws://127.0.0.1:{silent.getsockname()[1]}/"
        with (
            pytest.raises(ModelLoadError, match="the MCP server 'tests' cannot be used"),
            tools(config(McpServerSource.web_socket(url, timeout_secs=0.5))),
        ):
            pass


async def test_two_tools_with_one_name() -> None:
    servers = [McpServerConfig(name=name, source=STDIO) for name in ("a", "b")]
    message = "two MCP tools are named 'add'; give one of their servers a tool_prefix"
    with pytest.raises(ModelLoadError, match=message), tools(McpClientConfig(servers=servers)):
        pass
    servers[1].enabled = False
    with tools(McpClientConfig(servers=servers)) as toolbox:
        assert "add" in toolbox.callbacks


def test_builders_connect_and_close(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Toolbox] = []

    def load(builder: Any, toolbox: Toolbox, *_: Any) -> Model:
        seen.append(toolbox)
        if len(seen) > 1:
            raise ModelLoadError("no such model")
        return scripted_model(call("pid"), "done", toolbox=toolbox)

    monkeypatch.setattr("pymistral.builders.load._load_model", load)
    builder = ModelBuilder("m").with_mcp_client(config())
    with BlockingModel.from_builder(builder) as model:
        response = model.send_chat_request("Who?")
        (record,) = response.agentic_tool_calls or []
        assert alive(int(record.result_content))
    assert gone(int(record.result_content))
    with pytest.raises(ModelLoadError, match="no such model"):
        BlockingModel.from_builder(builder)
    assert not [thread for thread in threading.enumerate() if thread.name == "pymistral-mcp"]


def test_a_model_that_nobody_closes(tmp_path: Path) -> None:
    """The interpreter's end closes what is left."""
    script = (
        "import sys; sys.path[:0] = sys.argv[1:3]\n"
        "from fake_model import call, scripted_model\nfrom test_mcp import config\n"
        "from pymistral.agents.mcp import connect\nfrom pymistral.blocking import BlockingModel\n"
        "from pymistral.tool_rounds import Toolbox\n"
        "toolbox = Toolbox()\nconnect(config(), toolbox)\n"
        "model = BlockingModel(scripted_model(call('pid'), 'done', toolbox=toolbox))\n"
        "print(model.send_chat_request('Who?').agentic_tool_calls[0].result_content)\n"
    )
    here = Path(__file__).parent
    command = [sys.executable, "-c", script, str(here), str(here.parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert gone(int(done.stdout))


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mcp", None)
    with pytest.raises(ModelLoadError, match=r"MCP servers need the extra 'mcp': pip install 'pymistral\[mcp\]'"):
        connect(config(), Toolbox())


def test_configuration() -> None:
    text = json.dumps(
        {
            "servers": [
                {"name": "a", "tool_prefix": "fs", "source": {"type": "Process", "command": "npx", "args": ["-y"]}, "id": "1"},
                {"name": "b", "source": {"type": "Http", "url": "https://example.com/mcp", "timeout_secs": 5}, "bearer_token": "hidden"},
                {"name": "c", "source": {"type": "WebSocket", "url": "wss://example.com"}, "enabled": False},
            ],
            "auto_register_tools": True,
            "tool_timeout_secs": None,
            "max_concurrent_calls": 4,
        }
    )
    builder = ModelBuilder("m").with_mcp_client(json.loads(text))
    assert builder.mcp_client == McpClientConfig.model_validate_json(text)
    assert builder.mcp_client is not None
    assert (builder.mcp_client.tool_timeout_secs, builder.mcp_client.max_concurrent_calls) == (30, 4)
    assert "hidden" not in repr(builder.mcp_client)
    for wrong, message in (
        (lambda: McpServerSource.http("ftp://x"), "url: "),
        (lambda: McpServerSource.web_socket("http://x"), "url: "),
        (lambda: McpServerSource.process(""), "command: "),
        (lambda: McpServerSource.http("http://x", timeout_secs=0), "timeout_secs: "),
        (lambda: McpServerConfig(name="a"), "source: "),
        (lambda: McpServerConfig(name="a", source=STDIO, token="x"), "token: "),
        (lambda: McpClientConfig(max_concurrent_calls=0), "max_concurrent_calls: "),
        (lambda: ModelBuilder("m").with_mcp_client({"servers": 3}), "servers: "),
        (lambda: ModelBuilder("m").with_mcp_client("x"), "with_mcp_client takes"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ModelLoadError, match=message):
            wrong()
