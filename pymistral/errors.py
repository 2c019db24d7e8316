"""Every exception that pymistral raises on purpose. Each message says what was wrong, where, and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .responses import ChatCompletionResponse


class PymistralError(Exception):
    """The base of all errors below: catch it to catch anything pymistral reports.

    Attributes
    ----------
    problem
        The message without its end that names a remedy of the Python API. The command line, which has other remedies or none, shows this.
    """

    def __init__(self, problem: str = "", in_python: str = "") -> None:
        super().__init__(problem + in_python)
        self.problem = problem


class ModelLoadError(PymistralError):
    """A model could not be found, fetched, parsed or built; nothing was left half-loaded."""


class RequestValidationError(PymistralError, ValueError):
    """A request is malformed or cannot be served by this model. It never reached the engine."""


class ToolArgumentsError(PymistralError, ValueError):
    """A model called a tool with arguments that its function does not take. The message is written for the model to read."""


class InferenceError(PymistralError):
    """The engine failed while it worked on a request."""


class ModelError(InferenceError):
    """Generation ended early because of an error in this request.

    Attributes
    ----------
    partial_response
        What had been generated up to then, or ``None`` if nothing was.
    """

    def __init__(self, message: str, partial_response: ChatCompletionResponse | None = None) -> None:
        super().__init__(message)
        self.partial_response = partial_response


class EngineClosedError(PymistralError, RuntimeError):
    """The model was closed, before or while it worked on the request."""


class ModelManagementError(PymistralError):
    """A model id is unknown, already taken, or not loaded."""


def as_inference_error(error: Exception) -> PymistralError:
    """The error for the caller, with the cause attached."""
    if isinstance(error, PymistralError):
        return error
    wrapped = InferenceError(f"{type(error).__name__} while generating: {error}")
    wrapped.__cause__ = error
    return wrapped


def counted(number: int, noun: str) -> str:
    """``1 token``, ``2 tokens``: how a message says how many."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
