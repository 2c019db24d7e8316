"""From a recorded graph to a program for the CPU: fusions, buffers, weights in tiles, and the list of kernel launches."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelLoadError
from ..kernels.cpu import geometry
from ..kernels.cpu.compiler import Progress, Spec, load_kernels, spec
from ..kernels.cpu.executor_layout import UNIT_BITS
from ..kernels.cpu.tiles import FLOAT_FORMATS, ROWS, TILE_FORMATS, FloatFormat, TileFormat
from ..quantization.types import BLOCK_SIZES, GgmlType, Tensor
from .graph import OUTPUTS, TOKENS, Array, Graph, Node
from .memory import address, forget, zeros
from .pool import EXECUTOR_KERNELS, Launches, ThreadPool, thread_pool
from .rope import Rope
from .sampling import SAMPLING_KERNEL
from .state import Limits, State

_PACK_BYTES = 16 << 20  # of a file's weights that are in memory at once while they are packed
_CHUNK_BYTES = 16 << 10  # of weights that a thread claims at once
_PIECES_PER_THREAD = 16  # that the products of experts are cut into


@dataclass(eq=False)
class _Buffer:
    """Memory that launches read and write; identity is what dependencies are found by."""

    array: NDArray[Any]

    @property
    def address(self) -> int:
        return address(self.array)


@dataclass
class _Launch:
    kernel: Spec
    slots: list[int]
    count: str  # which of the state's counts
    units: int  # for each of that count
    chunk: int
    reads: tuple[_Buffer, ...]
    writes: tuple[_Buffer, ...]
    weights: tuple[int, int]  # address and bytes of what it streams through
    label: str
    results: list[_Result]


@dataclass
class _Result:
    """What a launch computes as floats."""

    array: NDArray[Any]
    rows: str
    columns: int


@dataclass
class _Matrix:
    tensor: Tensor
    format: TileFormat | FloatFormat
    tiles: NDArray[Any]

    @property
    def tile_bytes(self) -> int:
        return self.format.tile_bytes(self.tensor.shape[1])

    @property
    def tile_count(self) -> int:
        return -(-self.tensor.shape[0] // ROWS)

    @property
    def is_float(self) -> bool:
        return isinstance(self.format, FloatFormat)


def tile_format(tensor: Tensor) -> TileFormat | FloatFormat:
    """The tiles that a tensor's type becomes. Raises ModelLoadError if there are none."""
    name = tensor.type.name.lower()
    format = TILE_FORMATS.get(name) or FLOAT_FORMATS.get(name)
    if format is None:
        known = ", ".join(sorted(name.upper() for name in (*TILE_FORMATS, *FLOAT_FORMATS)))
        raise ModelLoadError(f"tensor {tensor.name!r} is stored as {tensor.type.name}, which is not supported; these are: {known}")
    if isinstance(format, TileFormat) and tensor.shape[1] % format.columns:
        raise ModelLoadError(f"tensor {tensor.name!r}: {tensor.shape[1]} columns are not a multiple of {format.columns}")
    return format


def _padded(columns: int) -> int:
    return -(-columns // 16) * 16


def _float_bits(value: float) -> int:
    bits: int = struct.unpack("<I", struct.pack("<f", value))[0]
    return bits


@dataclass
class CpuProgram:
    """A recorded model, ready to run.

    Attributes
    ----------
    state
        What changes between steps; fill it before `run`.
    logits
        float32 ``[max_outputs, vocab_size]``; the first ``outputs`` rows are those of the last run.
    """

    state: State
    logits: NDArray[np.float32]
    names: list[str]
    labels: list[str]
    weight_bytes: int
    _launches: Launches
    _pool: ThreadPool
    _results: list[list[_Result]] = field(repr=False)
    _alive: list[Any] = field(repr=False)
    _eager: bool = field(default_factory=lambda: os.environ.get("PYMISTRAL_EAGER", "0") not in ("", "0"))

    def run(self) -> None:
        """Run one step. With ``PYMISTRAL_EAGER=1``, launch by launch, each checked."""
        if self._eager:
            self.run_checked()
        else:
            self._pool.run(self._launches)

    def run_one_by_one(self) -> list[float]:
        """Run each launch as a program of its own, and return their seconds: for profiles and debugging."""
        from time import perf_counter

        seconds = []
        for row in self._launches.table:
            single = Launches([[int(word) for word in row]], self._pool.threads)
            start = perf_counter()
            self._pool.run(single)
            seconds.append(perf_counter() - start)
        return seconds

    def run_checked(self) -> None:
        """Run each launch as a program of its own, and look at what it wrote.

        Raises
        ------
        FloatingPointError
            A launch computed what is no finite number; the message names it.
        """
        for number, (row, results) in enumerate(zip(self._launches.table, self._results, strict=True)):
            self._pool.run(Launches([[int(word) for word in row]], self._pool.threads))
            for result in results:
                values = result.array[: self.state.count(result.rows), : result.columns]
                wrong = np.argwhere(~np.isfinite(values))
                if len(wrong):
                    at = tuple(int(i) for i in wrong[0])
                    where = f"launch {number} of {len(self.labels)}, {self.labels[number]}"
                    raise FloatingPointError(f"{where}: {values[at]} in row {at[0]}, column {at[1]}")


def compile_graph(graph: Graph, limits: Limits, *, threads: int, progress: Progress | None = None) -> CpuProgram:
    """Lower a graph, compile what kernels are missing, pack the weights, and return the program.

    Raises ModelLoadError if a weight's type or shape cannot be used.
    """
    return _Lowering(graph, limits, threads).finish(progress)


class _Lowering:
    def __init__(self, graph: Graph, limits: Limits, threads: int) -> None:
        self.graph = graph
        self.limits = limits
        self.threads = threads
        self.state = State(limits)
        self.exact = graph.exact
        self.launches: list[_Launch] = []
        self.matrices: dict[int, _Matrix] = {}
        self.arena: NDArray[Any] = zeros(self._weight_bytes(), np.uint8, huge_pages=True)
        self.arena_used = 0
        self.alive: list[Any] = []
        self.scratch_bytes = 0
        self.scratch = _Buffer(np.zeros(0, np.uint8))  # made when its size is known; slots hold a placeholder until then
        self.scratch_slots: list[tuple[list[int], int]] = []

        self.order = {id(node): index for index, node in enumerate(graph.nodes)}  # when a node has read its inputs
        self.users: dict[Array, list[Node]] = {}
        for node in graph.nodes:
            for array in node.inputs:
                self.users.setdefault(array, []).append(node)
        self.done: set[int] = set()  # nodes that are part of another's launch
        self.rows_of: dict[Array, _Buffer] = {}
        self.panels_of: dict[Array, _Buffer] = {}
        self.residuals_of: dict[Array, _Buffer] = {}
        self.free: dict[tuple[int, ...], list[_Buffer]] = {}
        self.pending_add: dict[Array, tuple[_Buffer, NDArray[Any] | None]] = {}  # x -> branch to add when it is next normed
        self.routings: dict[tuple[int, int], tuple[_Buffer, ...]] = {}
        self.state_buffer = _Buffer(np.zeros(0, np.uint8))

        for index, node in enumerate(graph.nodes):
            if index not in self.done:
                self.node = node
                getattr(self, f"_{node.op}")(node)
            self._release(index)

    # ---- buffers ----------------------------------------------------------------------------------------------------

    def _max_rows(self, array: Array) -> int:
        """Whole panels: a matrix product writes all rows of the last one."""
        return geometry.whole_panels(self.limits.max_tokens if array.rows == TOKENS else self.limits.max_outputs)

    def _new(self, shape: tuple[int, ...], dtype: Any) -> _Buffer:
        key = (*shape, np.dtype(dtype).itemsize)
        if self.free.get(key):
            return self.free[key].pop()
        buffer = _Buffer(zeros(shape, dtype))
        self.alive.append(buffer.array)
        return buffer

    def _rows(self, array: Array) -> _Buffer:
        """A new buffer for the array's floats."""
        buffer = self._new((self._max_rows(array), _padded(array.columns)), np.float32)
        self.rows_of[array] = buffer
        return buffer

    def _new_panels(self, array: Array) -> _Buffer:
        buffer = self._new((geometry.panels_bytes(self._max_rows(array), array.columns),), np.uint8)
        self.panels_of[array] = buffer
        if array.rows == OUTPUTS:
            # Logits come straight from these activations: they are few, and worth 15 bits instead of 8.
            self.residuals_of[array] = self._new(buffer.array.shape, np.uint8)
        return buffer

    def _residual_panels(self, array: Array) -> int:
        return self.residuals_of[array].address if array in self.residuals_of else 0

    def _release(self, index: int) -> None:
        """Give back the buffers of arrays whose last user is behind us."""
        for table in (self.rows_of, self.panels_of, self.residuals_of):
            for array in [a for a in table if all(self.order[id(user)] <= index for user in self.users.get(a, []))]:
                if array is self.graph.nodes[-1].output or array in self.pending_add:
                    continue
                if self.order_of_maker(array) > index:
                    continue
                buffer = table.pop(array)
                if all(buffer is not other for other in (*self.rows_of.values(), *(b for b, _ in self.pending_add.values()))):
                    key = (*buffer.array.shape, buffer.array.itemsize)
                    self.free.setdefault(key, []).append(buffer)

    def order_of_maker(self, array: Array) -> int:
        return next(index for index, node in enumerate(self.graph.nodes) if node.output is array)

    def _row_bytes(self, array: Array) -> int:
        return _padded(array.columns) * 4

    # ---- weights ----------------------------------------------------------------------------------------------------

    def _weight_bytes(self) -> int:
        """Of all matrices in tiles, each rounded up to cache lines."""
        return sum(-(-tile_format(tensor).nbytes(*tensor.shape) // 64) * 64 for tensor in self.graph.matrices())

    def _matrix(self, tensor: Tensor) -> _Matrix:
        known = self.matrices.get(id(tensor))
        if known is None:
            format = tile_format(tensor)
            size = format.nbytes(*tensor.shape)
            tiles = self.arena[self.arena_used : self.arena_used + size]
            self.arena_used += -(-size // 64) * 64
            known = self.matrices[id(tensor)] = _Matrix(tensor, format, tiles)
        return known

    def _vector(self, tensor: Tensor, offset: float = 0.0) -> NDArray[Any]:
        """A norm's weight as aligned float32."""
        readers: dict[GgmlType, Any] = {GgmlType.F32: np.float32, GgmlType.F16: np.float16}
        if tensor.type == GgmlType.BF16:
            values = (tensor.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        elif tensor.type in readers:
            values = tensor.data.view(readers[tensor.type])
        else:
            raise ModelLoadError(f"tensor {tensor.name!r} is stored as {tensor.type.name}; a vector must be F32, F16 or BF16")
        vector = zeros(_padded(values.size), np.float32)
        vector[: values.size] = values.astype(np.float32) + np.float32(offset)
        self.alive.append(vector)
        return vector

    # ---- launches ---------------------------------------------------------------------------------------------------

    def _launch(
        self,
        kernel: Spec,
        slots: Iterable[int],
        rows: str,
        *,
        units: int = 1,
        chunk: int = 1,
        reads: Iterable[_Buffer] = (),
        writes: Iterable[_Buffer] = (),
        scratch: tuple[int, int] | None = None,
        weights: tuple[int, int] = (0, 0),
    ) -> None:
        """``scratch`` is (slot, bytes for each thread); the slot after it gets the bytes."""
        values = list(slots)
        if scratch is not None:
            slot, nbytes = scratch
            self.scratch_bytes = max(self.scratch_bytes, -(-nbytes // 64) * 64)
            self.scratch_slots.append((values, slot))
        tensors = [value.name for value in self.node.attributes.values() if isinstance(value, Tensor)]
        written = tuple(writes)
        results = [_Result(buffer.array, x.rows, x.columns) for x, buffer in self.rows_of.items() if buffer in written]
        label = " ".join([kernel.factory, *tensors])
        self.launches.append(_Launch(kernel, values, rows, units, chunk, tuple(reads), written, weights, label, results))

    def _panels(self, x: Array) -> _Buffer:
        """x as int8 panels, quantised now if it is not yet."""
        if x not in self.panels_of:
            source = self.rows_of[x]
            panels = self._new_panels(x)
            self._launch(
                spec("quantize.quantize"),
                (source.address, self._row_bytes(x), panels.address, x.columns, self._residual_panels(x)),
                x.rows,
                reads=(source,),
                writes=(panels,),
            )
        return self.panels_of[x]

    def _chunk(self, matrix: _Matrix) -> int:
        """Tiles to claim at once: enough bytes to stream, few enough to share out evenly."""
        even = matrix.tile_count // (4 * self.threads)
        return max(1, min(even, _CHUNK_BYTES // matrix.tile_bytes))

    def _product(self, x: Array, tensor: Tensor, out: _Buffer, out_row_bytes: int, accumulate: bool) -> None:
        matrix = self._matrix(tensor)
        count = self.state.count_address(x.rows)
        common = (out.address, 0, matrix.tile_bytes, out_row_bytes, count, int(accumulate))
        if matrix.is_float:
            source = self.rows_of[x]
            slots = [address(matrix.tiles), source.address, *common, self._row_bytes(x)]
            slots[3] = x.columns
            kernel = spec("matmul.float_matmul", layout=matrix.format.name)
        else:
            source = self._panels(x)
            slots = [address(matrix.tiles), source.address, *common, self._residual_panels(x)]
            slots[3] = x.columns // 32
            kernel = spec("matmul.matmul", layout=matrix.format.name)
        reads = (source, out) if accumulate else (source,)
        self._launch(
            kernel,
            slots,
            "one",
            units=matrix.tile_count,
            chunk=self._chunk(matrix),
            reads=reads,
            writes=(out,),
            weights=(address(matrix.tiles), matrix.tiles.nbytes),
        )

    # ---- operations -------------------------------------------------------------------------------------------------

    def _input(self, node: Node) -> None:
        """An array of eager mode: no launch, its values are here."""
        values = node.attributes["values"]
        self._rows(node.output).array[: len(values), : node.output.columns] = values

    def _embedding(self, node: Node) -> None:
        matrix = self._matrix(node.attributes["weight"])
        out = self._rows(node.output)
        slots = (
            address(self.state.tokens),
            address(matrix.tiles),
            out.address,
            node.output.columns,
            matrix.tile_bytes,
            self._row_bytes(node.output),
            _float_bits(node.attributes["scale"]),
        )
        self._launch(spec("embedding.embedding", layout=matrix.format.name), slots, TOKENS, writes=(out,))

    def _linear(self, node: Node) -> None:
        (x,) = node.inputs
        into = self._residual_of(node)
        if into is not None:
            add, residual = into
            self._product(x, node.attributes["weight"], self.rows_of[residual], self._row_bytes(node.output), accumulate=True)
            self._replace(residual, add)
            return
        self._product(x, node.attributes["weight"], self._rows(node.output), self._row_bytes(node.output), accumulate=False)

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

    def _gated_linear(self, node: Node) -> None:
        (x,) = node.inputs
        gate, up = self._matrix(node.attributes["gate"]), self._matrix(node.attributes["up"])
        activation = node.attributes["activation"]
        columns = node.output.columns
        if gate.format is up.format and not gate.is_float and columns % 32 == 0 and self._only_feeds_panels(node.output):
            source = self._panels(x)
            out = self._new_panels(node.output)
            slots = (
                address(gate.tiles),
                address(up.tiles),
                source.address,
                x.columns // 32,
                gate.tile_bytes,
                self.state.count_address(x.rows),
                out.address,
                columns // 32,
                0,
                0,
            )
            self._launch(
                spec("matmul.gated_matmul", layout=gate.format.name, activation=activation),
                slots,
                "one",
                units=columns // 32,
                chunk=max(1, self._chunk(gate) // 4),
                reads=(source,),
                writes=(out,),
                scratch=(8, geometry.gated_scratch_bytes()),
                weights=(address(gate.tiles), gate.tiles.nbytes),
            )
            return
        gated, raised = self._rows(node.output), self._new((self._max_rows(x), _padded(columns)), np.float32)
        self._product(x, node.attributes["gate"], gated, self._row_bytes(node.output), accumulate=False)
        self._product(x, node.attributes["up"], raised, self._row_bytes(node.output), accumulate=False)
        row_bytes = self._row_bytes(node.output)
        one = (gated.address, 0, gated.address, _padded(columns), row_bytes)
        self._launch(spec("elementwise.activate", activation=activation), one, x.rows, reads=(gated,), writes=(gated,))
        two = (gated.address, raised.address, gated.address, _padded(columns), row_bytes)
        self._launch(spec("elementwise.multiply"), two, x.rows, reads=(gated, raised), writes=(gated,))
        self.free.setdefault((*raised.array.shape, 4), []).append(raised)

    def _only_feeds_panels(self, array: Array) -> bool:
        """All users take the array as int8 panels, and nobody reads its floats."""
        return (
            array is not self.graph.nodes[-1].output
            and all(
                all(not self._matrix(user.attributes[name]).is_float for name in ("weight", "gate", "up") if name in user.attributes)
                for user in self.users.get(array, [])
                if user.op in ("linear", "gated_linear")
            )
            and all(user.op in ("linear", "gated_linear") for user in self.users.get(array, []))
        )

    def _rms_norm(self, node: Node) -> None:
        (x,) = node.inputs
        weight = self._vector(node.attributes["weight"], node.attributes["offset"])
        residual = self._residual_of(node)
        if residual is not None and self.users[x] == [node] and x in self.rows_of:
            # x + rms_norm(branch): done when the sum is next normed, or at once if it is not
            add, into = residual
            branch = self.rows_of[x]
            self._replace(into, add)
            self._add_branch(add.output, branch, weight, node.attributes["epsilon"])
            return
        self._norm(x, node.output, weight, node.attributes["epsilon"])

    def _add_branch(self, total: Array, branch: _Buffer, weight: NDArray[Any] | None, epsilon: float) -> None:
        following = self._next_node(total)
        if following is not None and following.op == "rms_norm" and following.attributes["epsilon"] == epsilon:
            self.pending_add[total] = (branch, weight)
            return
        x = self.rows_of[total]
        slots = self._norm_slots(total, x, branch, weight, None, 0, 0, epsilon, rows=0)
        self._launch(spec("norm.norm"), slots, total.rows, reads=(x, branch), writes=(x, branch), scratch=(10, 4 * _padded(total.columns)))

    def _next_node(self, array: Array) -> Node | None:
        """The first node that uses the array, if nothing else that is still to be lowered comes before it."""
        maker = self.order_of_maker(array)
        return next((node for node in self.graph.nodes[maker + 1 :][:1] if array in node.inputs), None)

    def _norm(self, x: Array, out: Array, weight: NDArray[Any], epsilon: float) -> None:
        source = x
        rows = 0
        maker = self.graph.nodes[self.order_of_maker(x)]
        if maker.op == "take_rows" and x not in self.rows_of:
            source = maker.inputs[0]
            rows = address(self.state.output_rows)
        buffer = self.rows_of[source]
        branch, branch_weight = self.pending_add.pop(source, (None, None))
        wants_panels = bool(self.users.get(out)) and self._only_feeds_panels(out)
        target = self._new_panels(out) if wants_panels else self._rows(out)
        slots = self._norm_slots(
            source,
            buffer,
            branch,
            branch_weight,
            weight,
            0 if wants_panels else target.address,
            target.address if wants_panels else 0,
            epsilon,
            rows,
            self._residual_panels(out),
        )
        touched = (buffer, branch) if branch is not None else ()
        self._launch(
            spec("norm.norm"),
            slots,
            out.rows,
            reads=(buffer, *touched),
            writes=(target, *touched),
            scratch=(10, 4 * _padded(x.columns)),
        )
        if branch is not None:
            self._give_back(branch)

    def _give_back(self, buffer: _Buffer) -> None:
        if all(buffer is not other for other in self.rows_of.values()):
            self.free.setdefault((*buffer.array.shape, buffer.array.itemsize), []).append(buffer)

    def _norm_slots(
        self,
        array: Array,
        x: _Buffer,
        branch: _Buffer | None,
        branch_weight: NDArray[Any] | None,
        weight: NDArray[Any] | None,
        out: int,
        panels: int,
        epsilon: float,
        rows: int,
        residuals: int = 0,
    ) -> tuple[int, ...]:
        return (
            x.address,
            self._row_bytes(array),
            branch.address if branch is not None else 0,
            address(branch_weight) if branch_weight is not None else 0,
            address(weight) if weight is not None else 0,
            out,
            panels,
            array.columns,
            _float_bits(epsilon),
            rows,
            0,
            0,
            residuals,
        )

    def _take_rows(self, node: Node) -> None:
        (x,) = node.inputs
        users = self.users.get(node.output, [])
        if len(users) == 1 and users[0].op == "rms_norm" and self._next_node(node.output) is users[0]:
            self.order[id(node)] = self.order[id(users[0])]  # the norm reads the rows itself
            return
        out = self._rows(node.output)
        source = self.rows_of[x]
        slots = (source.address, address(self.state.output_rows), out.address, _padded(x.columns), self._row_bytes(x))
        self._launch(spec("elementwise.take_rows"), slots, OUTPUTS, reads=(source,), writes=(out,))

    def _add(self, node: Node) -> None:
        x, y = node.inputs
        self._elementwise(node, "add", self.rows_of[x], self.rows_of[y])

    def _multiply(self, node: Node) -> None:
        x, y = node.inputs
        self._elementwise(node, "multiply", self.rows_of[x], self.rows_of[y])

    def _add_vector(self, node: Node) -> None:
        (x,) = node.inputs
        vector = self._vector(node.attributes["vector"])
        source = self.rows_of[x]
        if self.users[x] == [node]:
            out = self.rows_of[node.output] = self.rows_of.pop(x)
        else:
            out = self._rows(node.output)
        slots = (source.address, address(vector), out.address, _padded(x.columns), self._row_bytes(x))
        self._launch(spec("elementwise.add_vector"), slots, x.rows, reads=(source,), writes=(out,))

    def _activate(self, node: Node) -> None:
        x, out = self.rows_of[node.inputs[0]], self._rows(node.output)
        slots = (x.address, 0, out.address, _padded(node.output.columns), self._row_bytes(node.output))
        kernel = spec("elementwise.activate", activation=node.attributes["activation"])
        self._launch(kernel, slots, node.output.rows, reads=(x,), writes=(out,))

    def _sigmoid_gate(self, node: Node) -> None:
        x, gate = node.inputs
        self._elementwise(node, "sigmoid_gate", self.rows_of[x], self.rows_of[gate], self._row_bytes(gate))

    def _scale(self, node: Node) -> None:
        self._elementwise(node, "scale", self.rows_of[node.inputs[0]], None, _float_bits(node.attributes["factor"]))

    def _soft_cap(self, node: Node) -> None:
        self._elementwise(node, "soft_cap", self.rows_of[node.inputs[0]], None, _float_bits(node.attributes["cap"]))

    def _elementwise(self, node: Node, name: str, x: _Buffer, y: _Buffer | None, parameter: int = 0) -> None:
        out = self._rows(node.output)
        slots = (x.address, y.address if y else 0, out.address, _padded(node.output.columns), self._row_bytes(node.output), parameter)
        reads = (x, y) if y else (x,)
        self._launch(spec(f"elementwise.{name}"), slots, node.output.rows, reads=reads, writes=(out,))

    def _mixture_of_experts(self, node: Node) -> None:
        x, router = node.inputs
        options = node.attributes
        top_k, experts = options["top_k"], router.columns
        choices = self._max_rows(x) * top_k
        rows = geometry.gathered_rows(choices, experts)
        routing = self._routing(choices, experts)
        chosen, weights, counts, firsts, active, used, row_of = routing
        logits = self.rows_of[router]
        slots: tuple[int, ...] = (
            logits.address,
            self._row_bytes(router),
            experts,
            top_k,
            int(options["normalize"]),
            chosen.address,
            weights.address,
        )
        self._launch(spec("moe.route"), slots, x.rows, reads=(logits,), writes=(chosen, weights))
        tokens = self.state.count_address(x.rows)
        addresses = [buffer.address for buffer in (counts, firsts, active, used, row_of)]
        slots = (chosen.address, tokens, top_k, experts, geometry.panel_tokens(), *addresses)
        self._launch(spec("moe.group"), slots, "one", reads=(chosen,), writes=routing[2:])

        def by_expert(tensors: tuple[Tensor, ...], source: _Buffer) -> _Buffer:
            matrices = [self._matrix(tensor) for tensor in tensors]
            first = matrices[0]
            addresses = [address(matrix.tiles) for matrix in matrices]
            stride = addresses[1] - addresses[0] if len(addresses) > 1 else 0
            if any(place != addresses[0] + index * stride for index, place in enumerate(addresses)):
                raise ValueError(f"{tensors[0].name}: experts are packed one after the other, once")
            out_rows, columns = first.tensor.shape
            out = self._new((rows, _padded(out_rows)), np.float32)
            input_bytes = 4 * _padded(columns) if first.is_float else geometry.panel_row_bytes(columns)
            width = columns if first.is_float else columns // 32
            common = (first.tile_bytes, 4 * _padded(out_rows), 0, 0, input_bytes if first.is_float else 0)
            slots = [addresses[0], source.address, out.address, width, *common, *(0,) * 7]
            pieces = _PIECES_PER_THREAD * self.threads
            slots += [active.address, counts.address, firsts.address, first.tile_count, stride, input_bytes, 0, 0, used.address, pieces]
            self._launch(
                spec("moe.experts", layout=first.format.name),
                slots,
                "one",
                units=pieces,
                reads=(source, *routing[2:]),
                writes=(out,),
                scratch=(22, geometry.EXPERTS_SCRATCH_BYTES),
            )
            return out

        def panels_or_rows(columns: int, floats: bool) -> _Buffer:
            if floats:
                return self._new((rows, _padded(columns)), np.float32)
            return self._new((geometry.panels_bytes(rows, columns),), np.uint8)

        floats = [isinstance(tile_format(options[name][0]), FloatFormat) for name in ("gate", "up", "down")]
        if floats[0] != floats[1]:
            raise ModelLoadError(f"tensors {options['gate'][0].name!r} and {options['up'][0].name!r}: one is quantised, the other is not")
        kind = {True: "no", False: "yes"}
        source = self.rows_of[x]
        gathered = panels_or_rows(x.columns, floats[0])
        slots = (source.address, self._row_bytes(x), row_of.address, top_k, gathered.address, _padded(x.columns))
        self._launch(spec("moe.gather", panels=kind[floats[0]]), slots, x.rows, units=top_k, reads=(source, row_of), writes=(gathered,))
        gate, up = by_expert(options["gate"], gathered), by_expert(options["up"], gathered)
        columns = options["gate"][0].shape[0]
        panels = gate if floats[2] else panels_or_rows(columns, False)
        slots = (gate.address, up.address, 4 * _padded(columns), row_of.address, panels.address, _padded(columns))
        kernel = spec("moe.activate", activation=options["activation"], panels=kind[floats[2]])
        self._launch(kernel, slots, x.rows, units=top_k, reads=(gate, up, row_of), writes=(gate, panels))
        down = by_expert(options["down"], panels)
        out = self._rows(node.output)
        slots = (down.address, self._row_bytes(x), row_of.address, weights.address, top_k, out.address, _padded(x.columns))
        self._launch(spec("moe.combine"), slots, x.rows, reads=(down, row_of, weights), writes=(out,))
        for buffer in {id(buffer): buffer for buffer in (gathered, gate, up, panels, down)}.values():
            self._give_back(buffer)

    def _routing(self, choices: int, experts: int) -> tuple[_Buffer, ...]:
        """Which token goes to which expert in `kernels.cpu.moe`; all layers share these.

        From `moe.route`: chosen experts, their weights; from `moe.group`: rows and first row of each expert, experts with rows, their
        number, row of each choice.
        """
        known = self.routings.get((choices, experts))
        if known is None:
            of_choices = [zeros(choices, dtype) for dtype in (np.int32, np.float32, np.int32)]
            of_experts = [zeros(size, np.int64) for size in (experts, experts, experts, 1)]
            known = self.routings[choices, experts] = tuple(_Buffer(array) for array in (*of_choices[:2], *of_experts, of_choices[2]))
            self.alive += [buffer.array for buffer in known]
        return known

    def _attention(self, node: Node) -> None:
        q, k, v = node.inputs
        options = node.attributes
        head_dim = options["head_dim"]
        if head_dim % 16:
            raise ModelLoadError(f"heads of {head_dim} dimensions are not supported: they must be a multiple of 16")
        heads, kv_heads = q.columns // head_dim, k.columns // head_dim
        group = heads // kv_heads
        limits = self.limits
        shape = (limits.num_blocks, kv_heads, limits.block_size, head_dim)
        dtype = np.float32 if self.exact else np.uint16  # bfloat16
        keys, values = _Buffer(zeros(shape, dtype)), _Buffer(zeros(shape, dtype))
        self.alive += [keys.array, values.array]
        self.state.caches.append((keys.array, values.array))
        self.state.query_tile = min(self.state.query_tile, geometry.query_tile_tokens(group))
        norms = [options[name] for name in ("q_norm", "k_norm")]
        weights = [self._vector(norm.weight, norm.offset) if norm else None for norm in norms]
        epsilon = next((norm.epsilon for norm in norms if norm), 0.0)
        rope: Rope | None = options["rope"]
        if rope is not None and rope not in self.state.ropes:
            self.state.ropes.append(rope)
        q_rows, k_rows, v_rows = self._to_overwrite(q, node), self._to_overwrite(k, node), self.rows_of[v]
        slots: tuple[int, ...] = (
            q_rows.address,
            self._row_bytes(q),
            k_rows.address,
            self._row_bytes(k),
            v_rows.address,
            self._row_bytes(v),
            heads,
            kv_heads,
            *(address(weight) if weight is not None else 0 for weight in weights),
            _float_bits(epsilon),
            address(rope.table) if rope else 0,
            rope.pairs if rope else 0,
            _float_bits(options["scale"]),
            address(self.state.positions),
            address(self.state.cache_slots),
            keys.address,
            values.address,
            limits.block_size,
        )
        self._launch(
            spec("rope.rope_and_cache", head_dim=head_dim, **({"cache": "f32"} if self.exact else {})),
            slots,
            TOKENS,
            reads=(q_rows, k_rows, v_rows),
            writes=(q_rows, k_rows, keys, values),
        )
        out = self._rows(node.output)
        partials = self._new((self.state.max_partials * kv_heads * geometry.partial_floats(group, head_dim),), np.float32)
        slots = (
            q_rows.address,
            self._row_bytes(q),
            out.address,
            self._row_bytes(node.output),
            keys.address,
            values.address,
            limits.block_size,
            kv_heads,
            address(self.state.positions),
            address(self.state.items),
            address(self.state.block_tables),
            self.state.table_width,
            options["window"] or 0,
            _float_bits(options["soft_cap"] or 0.0),
            0,
            0,
            partials.address,
        )
        self._launch(
            spec("exact_attention.attention" if self.exact else "attention.attention", head_dim=head_dim, group=group),
            slots,
            "items",
            units=kv_heads,
            reads=(q_rows, keys, values),
            writes=(out, partials),
            scratch=(14, geometry.attention_scratch_bytes(group, head_dim)),
        )
        slots = (address(self.state.merges), partials.address, kv_heads, out.address, self._row_bytes(node.output), 0, 0)
        self._launch(
            spec("attention.merge", head_dim=head_dim, group=group),
            slots,
            "merges",
            units=kv_heads,
            reads=(partials,),
            writes=(out,),
            scratch=(5, 4 * geometry.partial_floats(group, head_dim)),
        )
        self._give_back(partials)
        for rows in (q_rows, k_rows):
            self._give_back(rows)  # the copies

    def _to_overwrite(self, array: Array, node: Node) -> _Buffer:
        """The array's rows, or a copy of them if anything but this operand of the node needs them as they are."""
        source = self.rows_of[array]
        if self.users[array] == [node] and array is not self.graph.nodes[-1].output:
            return source
        copy = self._new(source.array.shape, np.float32)
        slots = (source.address, 0, copy.address, _padded(array.columns), self._row_bytes(array), _float_bits(1.0))
        self._launch(spec("elementwise.scale"), slots, array.rows, reads=(source,), writes=(copy,))
        return copy

    # ---- the program ------------------------------------------------------------------------------------------------

    def finish(self, progress: Progress | None) -> CpuProgram:
        scratch = zeros(max(64, self.scratch_bytes * self.threads), np.uint8)
        for slots, index in self.scratch_slots:
            slots[index : index + 2] = [address(scratch), self.scratch_bytes]
        packers = {
            key: spec("repack.repack", layout=matrix.format.name, block_bytes=BLOCK_SIZES[matrix.tensor.type][1])
            for key, matrix in self.matrices.items()
        }
        wanted = [*EXECUTOR_KERNELS, SAMPLING_KERNEL, *(launch.kernel for launch in self.launches), *packers.values()]
        addresses = load_kernels(wanted, progress)
        pool = thread_pool(self.threads)
        for key, matrix in self.matrices.items():
            self._pack(matrix, addresses[packers[key]], pool)
        records = []
        touched: tuple[set[int], set[int]] = (set(), set())  # read and written since the last meeting
        for launch in self.launches:
            reads, writes = {id(buffer) for buffer in launch.reads}, {id(buffer) for buffer in launch.writes}
            meet = bool(reads & touched[1] or writes & (touched[0] | touched[1]))
            touched = (reads, writes) if meet else (touched[0] | reads, touched[1] | writes)
            arguments = np.array(launch.slots, np.int64)
            self.alive.append(arguments)
            count = self.state.count_address(launch.count)
            most = 1 if launch.count == "one" else len(self.state.items)
            if launch.units * most >> UNIT_BITS:
                raise ValueError(f"{launch.label}: {launch.units} units for each of {most} are more than a program counts")
            records.append([addresses[launch.kernel], address(arguments), count, launch.units, launch.chunk, int(meet), *launch.weights])
        weights = [0, 0]
        for record in reversed(records):
            # waiting threads fetch the weights of the next launch that has any
            weights = record[6:] if record[6] else weights
            record[6:] = weights
        self.alive += [scratch, self.arena]
        logits = self.graph.nodes[-1].output
        return CpuProgram(
            state=self.state,
            logits=self.rows_of[logits].array[:, : logits.columns],
            names=[launch.kernel.factory for launch in self.launches],
            labels=[launch.label for launch in self.launches],
            weight_bytes=sum(matrix.tiles.nbytes for matrix in self.matrices.values()),
            _launches=Launches(records, self.threads),
            _pool=pool,
            _results=[launch.results for launch in self.launches],
            _alive=self.alive,
        )

    def _pack(self, matrix: _Matrix, kernel: int, pool: ThreadPool) -> None:
        """Blocks to tiles, a part at a time, each forgotten when done: the file and the tiles are never in memory together."""
        rows, columns = matrix.tensor.shape
        row_bytes = matrix.tensor.data.size // rows
        part = max(1, _PACK_BYTES // (row_bytes * ROWS)) * ROWS
        one = np.ones(1, np.int64)
        for first in range(0, rows, part):
            count = min(part, rows - first)
            source = matrix.tensor.data[first * row_bytes : (first + count) * row_bytes]
            target = address(matrix.tiles) + first // ROWS * matrix.tile_bytes
            slots = np.array([address(source), target, count, columns], np.int64)
            tiles = -(-count // ROWS)
            pool.run(Launches([(kernel, address(slots), address(one), tiles, max(1, tiles // 64), 0)], pool.threads))
            forget(source)
