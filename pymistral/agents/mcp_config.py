"""Which MCP servers a model uses. The fields are those of mistral.rs's configuration files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..errors import ModelLoadError


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", defer_build=True)  # every builder imports this, few use it


S = TypeVar("S", bound=_Config)


class McpServerSource(_Config):
    """How a server is reached: made by `process`, `http` or `web_socket`."""

    @staticmethod
    def process(
        command: str, args: Sequence[str] = (), *, work_dir: str | Path | None = None, env: Mapping[str, str] | None = None
    ) -> ProcessSource:
        """A program on this machine, which is started and spoken to through its standard input and output.

        Parameters
        ----------
        command
            The program.
        args
            Its arguments.
        work_dir
            The folder it starts in; None: the current one.
        env
            Environment variables beside a few harmless ones (``PATH``, ``HOME`` ...); the rest of the environment is kept from it.
        """
        return _made(ProcessSource, command=command, args=args, work_dir=work_dir, env=env)

    @staticmethod
    def http(url: str, *, timeout_secs: float | None = None, headers: Mapping[str, str] | None = None) -> HttpSource:
        """A server that speaks streamable HTTP.

        Parameters
        ----------
        timeout_secs
            For connecting, and for each request. None: 30 for the one, 300 for the other.
        headers
            Sent with each request.
        """
        return _made(HttpSource, url=url, timeout_secs=timeout_secs, headers=headers)

    @staticmethod
    def web_socket(url: str, *, timeout_secs: float | None = None, headers: Mapping[str, str] | None = None) -> WebSocketSource:
        """A server behind a WebSocket.

        Parameters
        ----------
        timeout_secs
            For connecting; None: 30.
        headers
            Sent when connecting.
        """
        return _made(WebSocketSource, url=url, timeout_secs=timeout_secs, headers=headers)


class ProcessSource(McpServerSource):
    """A program that is started; see `McpServerSource.process`."""

    type: Literal["Process"] = "Process"
    command: Annotated[str, Field(min_length=1)]
    args: tuple[str, ...] = ()
    work_dir: Path | None = None
    env: dict[str, str] | None = None


class HttpSource(McpServerSource):
    """A server that speaks streamable HTTP; see `McpServerSource.http`."""

    type: Literal["Http"] = "Http"
    url: Annotated[str, Field(pattern=r"^https?://.")]
    timeout_secs: Annotated[float, Field(gt=0)] | None = None
    headers: dict[str, str] | None = None


class WebSocketSource(McpServerSource):
    """A server behind a WebSocket; see `McpServerSource.web_socket`."""

    type: Literal["WebSocket"] = "WebSocket"
    url: Annotated[str, Field(pattern=r"^wss?://.")]
    timeout_secs: Annotated[float, Field(gt=0)] | None = None
    headers: dict[str, str] | None = None


class McpServerConfig(_Config):
    """One MCP server."""

    name: Annotated[str, Field(min_length=1)]
    """What messages call it."""
    source: Annotated[Union[ProcessSource, HttpSource, WebSocketSource], Field(discriminator="type")]  # noqa: UP007
    """How it is reached: `McpServerSource`."""
    id: str | None = None
    """A name of the caller's own; nothing depends on it."""
    enabled: bool = True
    """False: it is left alone."""
    tool_prefix: str | None = None
    """Put before the names of its tools, with an underscore: ``fs`` makes ``read`` to ``fs_read``."""
    resources: list[str] | None = None
    """Patterns of resources, which files for mistral.rs may have; they are not used."""
    bearer_token: str | None = Field(default=None, repr=False)
    """Sent as ``Authorization: Bearer ...`` over HTTP and WebSocket."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ModelLoadError(_complaint("an MCP server", error)) from error


class McpClientConfig(_Config):
    """The MCP servers of a model, for `with_mcp_client`. A dict of the same form works there, too."""

    servers: list[McpServerConfig] = []
    auto_register_tools: bool = True
    """True: the model is told of all tools in every request. False: only requests that list a tool use it."""
    tool_timeout_secs: Annotated[float, Field(gt=0)] = 30
    """Seconds after which a call is given up, and the model is told so."""
    max_concurrent_calls: Annotated[int, Field(ge=1)] = 10
    """How many calls run at once, over all servers; more wait."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ModelLoadError(_complaint("the MCP configuration", error)) from error

    @field_validator("tool_timeout_secs", "max_concurrent_calls", mode="before")
    @classmethod
    def _or_default(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value


def checked_mcp_config(config: object) -> McpClientConfig:
    """A configuration from itself or a dict."""
    if isinstance(config, McpClientConfig):
        return config
    if isinstance(config, Mapping) and all(isinstance(key, str) for key in config):
        return McpClientConfig(**config)
    raise ModelLoadError(f"with_mcp_client takes an McpClientConfig or a dict of its form, got {config!r}")


def _made(source: type[S], **values: Any) -> S:
    try:
        return source(**values)
    except ValidationError as error:
        raise ModelLoadError(_complaint("an MCP server's source", error)) from error


def _complaint(what: str, error: ValidationError) -> str:
    problems = (
        f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors(include_url=False, include_input=False)
    )
    return f"{what} is not valid: {'; '.join(problems)}"
