"""Recording a model: its Python runs once, on symbols, and leaves a list of operations that a backend turns into a program."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..quantization.types import Tensor

# What the rows of an array stand for: the tokens of a step, or those of them whose logits are wanted.
TOKENS, OUTPUTS = "tokens", "outputs"


@dataclass(eq=False)
class Array:
    """A float32 array ``[rows, columns]`` that a program will compute; ``rows`` is known only when it runs.

    It adds, multiplies and indexes like a NumPy array; everything else is in `functional`.
    """

    rows: str
    columns: int

    def __add__(self, other: Array) -> Array:
        return emit("add", (self, _like(self, other)), columns=self.columns)

    def __mul__(self, other: Array | float) -> Array:
        if isinstance(other, Array):
            return emit("multiply", (self, _like(self, other)), columns=self.columns)
        return emit("scale", (self,), columns=self.columns, factor=float(other))

    def __getitem__(self, rows: OutputRows) -> Array:
        if not isinstance(rows, OutputRows):
            raise TypeError("an array is indexed by batch.output_rows only")
        return emit("take_rows", (self,), columns=self.columns, rows=OUTPUTS)


def _like(array: Array, other: Array) -> Array:
    if not isinstance(other, Array) or (array.rows, array.columns) != (other.rows, other.columns):
        raise ValueError(f"shapes differ: {array} and {other}")
    return other


# What operations work on: a symbol while a model is recorded, or else a NumPy array, which is computed at once.
A = TypeVar("A", Array, NDArray[np.float32])


def columns_of(x: Array | NDArray[np.float32]) -> int:
    if isinstance(x, Array):
        return x.columns
    if x.ndim != 2:
        raise ValueError(f"expected an array [rows, columns], got the shape {x.shape}")
    return int(x.shape[1])


@dataclass(eq=False)
class Node:
    """One operation: its name, the arrays it reads, what else it needs, and the array it makes."""

    op: str
    inputs: tuple[Array, ...]
    attributes: dict[str, Any]
    output: Array


@dataclass
class Graph:
    nodes: list[Node] = field(default_factory=list)

    @cached_property
    def matrices(self) -> list[Tensor]:
        """Of a graph that is complete: the weights with two dimensions, each once."""
        found: dict[int, Tensor] = {}
        for node in self.nodes:
            for value in node.attributes.values():
                tensors = value if isinstance(value, tuple) else (value,)
                found |= {id(tensor): tensor for tensor in tensors if isinstance(tensor, Tensor) and len(tensor.shape) == 2}
        return list(found.values())

    @cached_property
    def users(self) -> dict[Array, list[Node]]:
        """Of a graph that is complete: the nodes that read an array, each as often as it does."""
        found: dict[Array, list[Node]] = {}
        for node in self.nodes:
            for array in node.inputs:
                found.setdefault(array, []).append(node)
        return found

    @property
    def exact(self) -> bool:
        """Whether all matrices are float32: then attention and its cache are, too."""
        return {tensor.layout for tensor in self.matrices} == {"f32"}

    def cache_type(self, wanted: str = "auto", usual: str = "bf16") -> str:
        """The type of keys and values; ``auto`` is float32 for a model in float32, and what is ``usual`` for all others."""
        return wanted if wanted != "auto" else "f32" if self.exact else usual


@dataclass(frozen=True)
class Tokens:
    """Stands for the token ids of a step."""


@dataclass(frozen=True)
class OutputRows:
    """Stands for the rows whose logits are wanted."""


@dataclass(frozen=True)
class Batch:
    """What a model is called with. Positions, sequences and caches are the attention's business and stay out of a model's sight."""

    tokens: Tokens = Tokens()
    output_rows: OutputRows = OutputRows()


_recording: ContextVar[Graph | None] = ContextVar("recording", default=None)


@contextmanager
def recording() -> Iterator[Graph]:
    """Operations inside the block go to the graph that it yields."""
    graph = Graph()
    token = _recording.set(graph)
    try:
        yield graph
    finally:
        _recording.reset(token)


def emit(op: str, inputs: tuple[A, ...], *, columns: int, rows: str | None = None, **attributes: Any) -> A:
    """Record an operation and return its result. On NumPy arrays, outside a recording: run it as a program of its own (see `eager`)."""
    graph = _recording.get()
    arrays: tuple[Any, ...] = inputs
    symbols: tuple[Array, ...] = tuple(x for x in arrays if isinstance(x, Array))
    if graph is not None:
        if len(symbols) != len(inputs):
            raise TypeError(f"{op} of a NumPy array while a model is recorded: its values would be lost")
        output = Array(rows or symbols[0].rows, columns)
        graph.nodes.append(Node(op, symbols, attributes, output))
        return output  # type: ignore[return-value]
    if symbols or not inputs:
        raise RuntimeError(f"{op} of symbols outside a recording: call the model through nn.record, or give it NumPy arrays")
    from .eager import evaluate

    return evaluate(lambda *symbols: emit(op, symbols, columns=columns, rows=rows, **attributes), *arrays)  # type: ignore[return-value]


def record(model: Callable[[Batch], Array]) -> Graph:
    """Run a model's Python once and return what it did; the last node makes the logits."""
    with recording() as graph:
        logits = model(Batch())
    if not graph.nodes or graph.nodes[-1].output is not logits or logits.rows != OUTPUTS:
        raise ValueError("a model must end with the logits of batch.output_rows")
    return graph
