"""Speculative decoding beside plain decoding of the same model: the same answers, in less time where guesses come true.

"quote" (this text again), "extract" (these lines as JSON) and "edit" (this code again, with a word changed) can copy
much of the prompt, after an example of what is wanted; "chat" has nothing to copy. Prompt lookup always runs; a draft
model does if --draft names one, and --isq and --draft-isq make a pair of one file. Kinds take turns within each
repetition. The exit code is 1 if an answer differs from the plain one, if prompt lookup gains less than a factor of 1.5
where the model copies, or if chat falls below 0.95 of plain speed.

A small model seldom copies code that it is asked to edit (SmolLM2 writes something else): "edit" is reported, and has no
floor.
"""

from __future__ import annotations

from contextlib import ExitStack

from pymistral import ModelBuilder, RequestBuilder, SamplingParams, SpeculativeConfig, TextSpeculativeBuilder
from pymistral.blocking import BlockingModel
from pymistral.builders.common import Buildable
from pymistral.loading.hub import DEFAULT_MODEL
from pymistral.responses import ChatCompletionResponse

from .report import Report, arguments, median

SUM = """def {name}(values):
    total = 0
    for value in values:
        if value is None:
            continue
        total += value
    return total
"""
READ = """def {name}(path, limit=100):
    lines = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file):
            if number >= limit:
                break
            line = line.strip()
            if line and not line.startswith("#"):
                lines.append(line)
    return lines
"""
LIGHTHOUSE = (
    "The lighthouse of Alexandria was built in the third century before our era. It stood on the island of Pharos and was more than a "
    "hundred metres high. Three earthquakes damaged it badly, and in 1480 its last stones became part of the citadel of Qaitbay. "
    "Divers found its remains on the floor of the eastern harbour in 1994."
)
BRIDGE = "The old bridge fell in the flood of 1872. A new one of iron was opened two years later, and stands to this day."
BOOKS = """- Dracula, Bram Stoker, 1897
- The Time Machine, H. G. Wells, 1895
"""
MORE_BOOKS = """- Moby-Dick, Herman Melville, 1851
- Middlemarch, George Eliot, 1871
- Treasure Island, Robert Louis Stevenson, 1883
- Frankenstein, Mary Shelley, 1818
- Walden, Henry David Thoreau, 1854
- Persuasion, Jane Austen, 1817
"""
AS_JSON = """{"title": "Dracula", "author": "Bram Stoker", "year": 1897}
{"title": "The Time Machine", "author": "H. G. Wells", "year": 1895}
"""
EXTRACT = 'Write each of these books as a JSON object with the keys "title", "author" and "year", one on a line:\n\n{books}'
EDIT, QUOTE = "Rename the function to `{name}` and write all of it again:\n\n{code}", "Say this text again, word for word:\n\n{text}"
TASKS = {
    "quote": (QUOTE.format(text=BRIDGE), BRIDGE, QUOTE.format(text=LIGHTHOUSE)),
    "extract": (EXTRACT.format(books=BOOKS), AS_JSON, EXTRACT.format(books=MORE_BOOKS)),
    "edit": (
        EDIT.format(name="add", code=SUM.format(name="total")),
        SUM.format(name="add"),
        EDIT.format(name="load", code=READ.format(name="read")),
    ),
    "chat": ("Explain how a sailing boat can move against the wind.",),
}
FLOORS = {"quote": 1.5, "extract": 1.5, "edit": 0.0, "chat": 0.95}


def ask(model: BlockingModel, task: str, temperature: float, tokens: int) -> ChatCompletionResponse:
    request = RequestBuilder().with_sampling(SamplingParams(temperature=temperature, seed=1, max_len=tokens))
    for number, message in enumerate(TASKS[task]):
        request.add_message("assistant" if number % 2 else "user", message)
    return model.send_chat_request(request)


def builders(model: str, isq: str | None, draft: str | None, draft_isq: str | None, gamma: int) -> dict[str, Buildable]:
    target = ModelBuilder(model, isq=isq)
    kinds: dict[str, Buildable] = {
        "plain": target,
        "prompt lookup": TextSpeculativeBuilder(target, config=SpeculativeConfig.prompt_lookup(3, gamma=gamma)),
    }
    if draft:
        kinds["draft model"] = TextSpeculativeBuilder(target, ModelBuilder(draft, isq=draft_isq), SpeculativeConfig(gamma=gamma))
    return kinds


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("-m", "--model", default=DEFAULT_MODEL, help=f"the target: a GGUF file or model id (default: {DEFAULT_MODEL})")
    parser.add_argument("-d", "--draft", help="a smaller model with the same tokenizer")
    parser.add_argument("--isq", metavar="TYPE", help="quantise the target to this type first")
    parser.add_argument("--draft-isq", metavar="TYPE", help="quantise the draft to this type first")
    parser.add_argument("-g", "--gamma", type=int, default=16, metavar="N", help="tokens to guess at most (default: 16)")
    parser.add_argument("-n", "--tokens", type=int, default=200, metavar="N", help="tokens of each answer at most (default: 200)")
    parser.add_argument("-r", "--repetitions", type=int, default=7, metavar="N", help="answers of each kind (default: 7)")
    args = parser.parse_args()
    repetitions, tokens = (1, 24) if args.quick else (args.repetitions, args.tokens)
    columns = {"task": "task", "temperature": "temp.", "kind": "kind", "speed": "tokens/s", "gain": "of plain"}
    report = Report("speculative", {**columns, "drafted": "guessed", "accepted": "accepted", "answer": "answer"})
    failed = False
    with ExitStack() as stack:
        kinds = {
            kind: stack.enter_context(BlockingModel.from_builder(builder))
            for kind, builder in builders(args.model, args.isq, args.draft, args.draft_isq, args.gamma).items()
        }
        for task in TASKS:
            for temperature in (0.0, 0.8):
                answers = {kind: ask(model, task, temperature, tokens) for kind, model in kinds.items()}  # and the prompt is cached
                speeds: dict[str, list[float]] = {kind: [] for kind in kinds}
                for _ in range(repetitions):
                    for kind, model in kinds.items():
                        speeds[kind].append(ask(model, task, temperature, tokens).usage.avg_compl_tok_per_sec)
                for kind, response in answers.items():
                    same = response.choices[0].message.content == answers["plain"].choices[0].message.content
                    gain = median(speeds[kind]) / median(speeds["plain"])
                    guesses = response.usage.completion_tokens_details
                    report.add(
                        task=task,
                        temperature=temperature,
                        kind=kind,
                        speed=median(speeds[kind]),
                        gain=gain,
                        drafted=guesses.drafted_tokens,
                        accepted=guesses.accepted_tokens,
                        answer="the same" if same else "another",
                    )
                    floor = FLOORS[task] if temperature == 0.0 or task == "chat" else 0.0
                    failed |= not same or (kind == "prompt lookup" and gain < floor and not args.quick)
    report.notes.append("Medians; the floor of prompt lookup is 1.5 for quote and extract (greedy), and 0.95 for chat.")
    report.finish(args)
    if failed:
        raise SystemExit("an answer differs from the plain one, or prompt lookup gained too little")


if __name__ == "__main__":
    main()
