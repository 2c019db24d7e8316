"""Two models, or one that quotes itself: speculative decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ModelLoadError
from .common import Buildable, Builder
from .load import load_model, load_runner

if TYPE_CHECKING:
    from ..engine.cuda_runner import CudaRunner
    from ..engine.runner import CpuRunner
    from ..engine.speculative import Speculation
    from ..loading.checkpoint import Checkpoint
    from ..model import Model

MOST_GUESSES = 48


@dataclass(frozen=True)
class SpeculativeConfig:
    """How tokens are guessed ahead.

    Parameters
    ----------
    gamma
        The most tokens to guess at a time, 1 to 48. Fewer are guessed, or none, where that is faster.
    ngram
        Guess from the text itself (see `prompt_lookup`). None: a draft model guesses.
    """

    gamma: int = 16
    ngram: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.gamma, int) or isinstance(self.gamma, bool) or not 1 <= self.gamma <= MOST_GUESSES:
            raise ModelLoadError(f"gamma must be a whole number from 1 to {MOST_GUESSES}, got {self.gamma!r}")
        if self.ngram is not None and (not isinstance(self.ngram, int) or isinstance(self.ngram, bool) or self.ngram < 1):
            raise ModelLoadError(f"prompt_lookup takes a whole number of at least 1, got {self.ngram!r}")

    @classmethod
    def prompt_lookup(cls, n: int = 3, *, gamma: int = 16) -> SpeculativeConfig:
        """Guess that a text goes on as it did where its last ``n`` tokens occurred before: fast for edits, quotes and summaries.

        No second model is needed.
        """
        return cls(gamma, n)


class TextSpeculativeBuilder(Buildable):
    """Builds a model whose answers are guessed ahead, by a smaller model or from the text itself, and checked several tokens at a time.

    The answers are those of the target alone, at any temperature; ``usage.completion_tokens_details`` counts the guesses.

    Parameters
    ----------
    target
        The builder of the model that answers.
    draft
        The builder of a smaller model with the same tokenizer; None with `SpeculativeConfig.prompt_lookup`.
    config
        How tokens are guessed.

    Raises
    ------
    ModelLoadError
        There is no draft model and no prompt lookup, or both; or one of them is no builder of a single model.

    Examples
    --------
    >>> builder = TextSpeculativeBuilder(TextModelBuilder("model.gguf"), config=SpeculativeConfig.prompt_lookup(3))
    """

    def __init__(self, target: Builder, draft: Builder | None = None, config: SpeculativeConfig | None = None) -> None:
        _check_builder("target", target)
        if draft is not None:
            _check_builder("draft", draft)
        if config is not None and not isinstance(config, SpeculativeConfig):
            raise ModelLoadError(f"config must be a SpeculativeConfig, got {config!r}")
        self.target, self.draft = target, draft
        self.config = config or SpeculativeConfig()
        if draft is None and self.config.ngram is None:
            raise ModelLoadError("speculative decoding needs a draft model, or SpeculativeConfig.prompt_lookup(n)")
        if draft is not None and self.config.ngram is not None:
            raise ModelLoadError("give a draft model or SpeculativeConfig.prompt_lookup(n), not both")

    def _name(self) -> str:
        return self.target._name()

    def _load(self) -> Model:
        return load_model(self.target, self._speculation)

    def _speculation(self, target: Checkpoint, runner: CpuRunner | CudaRunner) -> Speculation:
        from ..engine.speculative import DraftModel, PromptLookup, Speculation

        if self.draft is None:
            assert self.config.ngram is not None
            return Speculation(PromptLookup(self.config.ngram), self.config.gamma)
        checkpoint, draft, _ = load_runner(self.draft)
        check_same_tokens(target, checkpoint, self.draft._source()[0])
        return Speculation(DraftModel(draft, runner.vocab_size), self.config.gamma)


def _check_builder(role: str, builder: object) -> None:
    if not isinstance(builder, Builder):
        raise ModelLoadError(f"the {role} must be the builder of one model, such as ModelBuilder(...), got {builder!r}")


def check_same_tokens(target: Checkpoint, draft: Checkpoint, name: str) -> None:
    """A draft model must mean the same by each token id."""
    ours, theirs = target.tokenizer, draft.tokenizer
    if ours.vocab_size != theirs.vocab_size:
        raise ModelLoadError(f"the draft model {name} has {theirs.vocab_size} tokens, the target {ours.vocab_size}; take one of its family")
    for token in range(ours.vocab_size):
        if ours.id_to_bytes(token) != theirs.id_to_bytes(token):
            raise ModelLoadError(
                f"the draft model {name} has another token {token} ({theirs.id_to_bytes(token)!r}) than the target "
                f"({ours.id_to_bytes(token)!r}); take one of its family"
            )
