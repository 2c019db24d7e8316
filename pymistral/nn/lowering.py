"""What every backend does with a recorded graph: who reads an array, until when it needs memory, and which operations become one launch.

A backend is a subclass of `Lowering`. It has a method ``_name(node)`` for every operation that is not lowered here, and launches kernels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelLoadError
from ..quantization.floats import FLOATS, float_values
from ..quantization.types import Tensor
from .graph import TOKENS, Array, Graph, Node
from .state import Limits


@dataclass(eq=False)
class Buffer:
    """Memory that launches read and write; identity is what dependencies are found by."""

    array: Any  # of NumPy, or of the device
    address: int


def padded(columns: int) -> int:
    """Floats of a row in memory: rows start at whole 64 bytes."""
    return -(-columns // 16) * 16


def vector_values(tensor: Tensor, offset: float = 0.0) -> NDArray[np.float32]:
    """A vector's values plus ``offset``. Raises ModelLoadError if it is quantised."""
    if tensor.type not in FLOATS:
        raise ModelLoadError(f"tensor {tensor.name!r} is stored as {tensor.type.name}; a vector must be F32, F16 or BF16")
    values: NDArray[np.float32] = float_values(tensor) + np.float32(offset)
    return values


class Lowering(ABC):
    """One walk over the nodes of a graph, in order. `lower` calls ``_name(node)`` for each that is not yet part of another's launch."""

    def __init__(self, graph: Graph, limits: Limits) -> None:
        self.graph = graph
        self.limits = limits
        self.order = {id(node): index for index, node in enumerate(graph.nodes)}  # when a node has read its inputs
        self.makers = {node.output: index for index, node in enumerate(graph.nodes)}
        self.users = graph.users
        self.done: set[int] = set()  # nodes that are part of another's launch
        self.rows_of: dict[Array, Buffer] = {}  # where an array's floats are
        self.forms: list[dict[Array, Buffer]] = [self.rows_of]  # all that an array may be kept as
        self.free: dict[tuple[int, ...], list[Buffer]] = {}
        self.pending_add: dict[Array, tuple[Buffer, Buffer | None]] = {}  # x -> branch to add when it is next normed, its norm's weight

    def lower(self) -> None:
        for index, node in enumerate(self.graph.nodes):
            if index not in self.done:
                self.node = node
                getattr(self, f"_{node.op}")(node)
            self._release(index)

    # ---- what a backend does ----------------------------------------------------------------------------------------

    @abstractmethod
    def _allocate(self, shape: tuple[int, ...], dtype: Any) -> Buffer:
        """Zeroed memory that lives as long as the program."""

    @abstractmethod
    def _vector(self, tensor: Tensor, offset: float = 0.0) -> Buffer:
        """The weight of a norm, or a bias, as float32."""

    @abstractmethod
    def _product(self, x: Array, weight: Tensor, out: Buffer, *, accumulate: bool) -> None:
        """``out = x @ weight.T``, or ``out += ...``."""

    @abstractmethod
    def _norm(
        self,
        x: Array,
        out: Array | None,
        weight: Buffer | None,
        epsilon: float,
        *,
        branch: Buffer | None = None,
        branch_weight: Buffer | None = None,
        picks_rows: bool = False,
    ) -> None:
        """With a branch ``x += rms_norm(branch) * branch_weight``; then ``out = rms_norm(x) * weight``, of the output rows only if it
        ``picks_rows``.
        """

    @abstractmethod
    def _copy(self, array: Array, target: Buffer) -> None:
        """The array's rows into another buffer of that shape."""

    # ---- buffers ----------------------------------------------------------------------------------------------------

    def _max_rows(self, array: Array) -> int:
        return self.limits.max_tokens if array.rows == TOKENS else self.limits.max_outputs

    def _new(self, shape: tuple[int, ...], dtype: Any) -> Buffer:
        key = (*shape, np.dtype(dtype).itemsize)
        if self.free.get(key):
            return self.free[key].pop()
        return self._allocate(shape, dtype)

    def _rows(self, array: Array) -> Buffer:
        """A new buffer for the array's floats."""
        buffer = self._new((self._max_rows(array), padded(array.columns)), np.float32)
        self.rows_of[array] = buffer
        return buffer

    def _give_back(self, buffer: Buffer) -> None:
        """Let other arrays have the buffer, unless it still is an array's."""
        if all(buffer is not other for other in self.rows_of.values()):
            self.free.setdefault((*buffer.array.shape, buffer.array.itemsize), []).append(buffer)

    def _release(self, index: int) -> None:
        """Give back the buffers of arrays whose last user is behind us."""
        for form in self.forms:
            for array in [a for a in form if all(self.order[id(user)] <= index for user in self.users.get(a, []))]:
                if array is self.graph.nodes[-1].output or array in self.pending_add or self.makers[array] > index:
                    continue
                buffer = form.pop(array)
                if all(buffer is not other for other, _ in self.pending_add.values()):
                    self._give_back(buffer)

    def _in_place(self, node: Node) -> Buffer:
        """A buffer for what an elementwise operation makes of its operand: the operand's own, if nothing else needs that."""
        (x,) = node.inputs
        if self.users[x] == [node]:
            self.rows_of[node.output] = self.rows_of.pop(x)
            return self.rows_of[node.output]
        return self._rows(node.output)

    def _to_overwrite(self, array: Array, node: Node) -> Buffer:
        """The array's rows, or a copy of them if anything but this operand of the node needs them as they are."""
        source = self.rows_of[array]
        if self.users[array] == [node] and array is not self.graph.nodes[-1].output:
            return source
        copy = self._new(source.array.shape, np.float32)
        self._copy(array, copy)
        return copy

    # ---- what becomes one launch ------------------------------------------------------------------------------------

    def _next_node(self, array: Array) -> Node | None:
        """The node that uses the array right after it is made."""
        maker = self.makers[array]
        return next((node for node in self.graph.nodes[maker + 1 :][:1] if array in node.inputs), None)

    def _only_multiplied(self, array: Array) -> bool:
        """All that is ever done with the array is to multiply it by matrices."""
        return array is not self.graph.nodes[-1].output and all(user.op in ("linear", "gated_linear") for user in self.users.get(array, []))

    def _residual_of(self, node: Node) -> tuple[Node, Array] | None:
        """The addition that alone uses the node's result, and its other operand, if that may be overwritten."""
        users = self.users.get(node.output, [])
        if len(users) != 1 or users[0].op != "add":
            return None
        add = users[0]
        other = add.inputs[1] if add.inputs[0] is node.output else add.inputs[0]
        if other is node.output or other not in self.rows_of or other in self.pending_add:
            return None
        here = self.order[id(node)]
        if any(user is not add and self.order[id(user)] >= here for user in self.users[other]):
            return None
        return add, other

    def _replace(self, old: Array, add: Node) -> None:
        """The sum lives in the buffer of its operand ``old``, from now on."""
        self.rows_of[add.output] = self.rows_of.pop(old)
        self.done.add(self.order[id(add)])

    def _linear(self, node: Node) -> None:
        """x + linear(y): the product adds to x."""
        (x,) = node.inputs
        weight = node.attributes["weight"]
        residual = self._residual_of(node)
        if residual is None:
            self._product(x, weight, self._rows(node.output), accumulate=False)
            return
        add, into = residual
        self._product(x, weight, self.rows_of[into], accumulate=True)
        self._replace(into, add)

    def _rms_norm(self, node: Node) -> None:
        """x + rms_norm(branch): done when the sum is next normed, or at once if it is not."""
        (x,) = node.inputs
        weight, epsilon = self._vector(node.attributes["weight"], node.attributes["offset"]), node.attributes["epsilon"]
        residual = self._residual_of(node)
        if residual is not None and self.users[x] == [node] and x in self.rows_of:
            add, into = residual
            branch = self.rows_of[x]
            self._replace(into, add)
            following = self._next_node(add.output)
            if following is not None and following.op == "rms_norm" and following.attributes["epsilon"] == epsilon:
                self.pending_add[add.output] = (branch, weight)
            else:
                self._norm(add.output, None, None, epsilon, branch=branch, branch_weight=weight)
            return
        maker = self.graph.nodes[self.makers[x]]
        picks_rows = maker.op == "take_rows" and x not in self.rows_of
        source = maker.inputs[0] if picks_rows else x
        pending, pending_weight = self.pending_add.pop(source, (None, None))
        self._norm(source, node.output, weight, epsilon, branch=pending, branch_weight=pending_weight, picks_rows=picks_rows)
        if pending is not None:
            self._give_back(pending)

    def _left_to_norm(self, node: Node) -> bool:
        """Whether picking rows can be left to the norm that follows."""
        users = self.users.get(node.output, [])
        if len(users) == 1 and users[0].op == "rms_norm" and self._next_node(node.output) is users[0]:
            self.order[id(node)] = self.order[id(users[0])]
            return True
        return False
