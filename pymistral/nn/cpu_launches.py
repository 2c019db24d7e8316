"""What a program for the CPU is put together of: buffers, panels of activations, and the list of launches."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from ..kernels.cpu import geometry
from ..kernels.cpu.compiler import Progress, Spec, load_kernels, spec
from ..kernels.cpu.executor_layout import NEEDS_ALL, UNIT_BITS
from ..kernels.cpu.tiles import FloatFormat
from ..quantization.types import Tensor
from .cpu_lanes import Rows, in_lanes, lanes_of
from .cpu_program import CpuProgram, Result
from .cpu_weights import TiledWeights
from .graph import OUTPUTS, TOKENS, Array, Graph
from .lowering import Buffer, Lowering, padded, vector_values
from .memory import address, zeros
from .pool import Launches, thread_pool
from .quantize import tile_format
from .sampling import SAMPLING_KERNEL
from .state import Limits, State

_LANE_KERNELS = (spec("executor.lane"), spec("executor.by_lane"))


class Launch(NamedTuple):
    kernel: Spec
    slots: list[int]
    rows: str  # which of the state's counts
    units: int  # for each of that count
    chunk: int
    reads: tuple[Buffer, ...]
    writes: tuple[Buffer, ...]
    weights: tuple[int, int]  # address and bytes of what it streams through
    product_rows: Rows | None
    for_tokens: bool  # and not for the rows that are wanted
    label: str
    results: list[Result]


class CpuLaunching(Lowering):
    """Keeps what is launched, and makes a program of it. ``wide``: tokens are multiplied as wide panels."""

    def __init__(self, graph: Graph, limits: Limits, threads: int, weights: TiledWeights, *, wide: bool) -> None:
        super().__init__(graph, limits)
        self.threads = threads
        self.state = State(limits, lanes=lanes_of(threads))
        self.wide = wide
        self.launches: list[Launch] = []
        self.weights = weights
        self.alive: list[Any] = []
        self.scratch_bytes = 0
        self.scratch_slots: list[tuple[list[int], int]] = []  # they hold a placeholder until the scratch's size is known
        self.panels_of: dict[Array, Buffer] = {}
        self.wide_of: dict[Array, Buffer] = {}  # wide panels, which are bfloat16
        self.forms += [self.panels_of, self.wide_of]
        products = [node.inputs[0] for node in graph.nodes if node.op == "linear"]
        self.logits_launch: int | None = None  # which one makes them
        self.logits_maxima: Buffer | None = None  # of each `geometry.LOGITS_GROUP`, if they are found
        self.makes_logits = products[-1] if products and products[-1].rows == OUTPUTS else None

    # ---- buffers ----------------------------------------------------------------------------------------------------

    def _allocate(self, shape: tuple[int, ...], dtype: Any) -> Buffer:
        array = zeros(shape, dtype)
        self.alive.append(array)
        return Buffer(array, address(array))

    def _max_rows(self, array: Array) -> int:
        """Whole panels: a matrix product writes all rows of the last one."""
        rows = geometry.whole_panels(super()._max_rows(array))
        return int(geometry.wide_tokens(rows) if self._is_wide(array) else rows)

    def _row_bytes(self, array: Array) -> int:
        return padded(array.columns) * 4

    def _vector(self, tensor: Tensor, offset: float = 0.0) -> Buffer:
        values = vector_values(tensor, offset)
        vector = self._allocate((padded(values.size),), np.float32)
        vector.array[: values.size] = values
        return vector

    # ---- panels -----------------------------------------------------------------------------------------------------

    def _is_wide(self, array: Array) -> bool:
        """Whether the array is multiplied as wide panels. Few rows make logits."""
        return self.wide and array.rows == TOKENS

    def _takes_panels(self, array: Array, matrix: Tensor) -> bool:
        format = tile_format(matrix)
        return not isinstance(format, FloatFormat) or (self._is_wide(array) and format.name == "bf16" and array.columns % 32 == 0)

    def _matrices_of(self, array: Array) -> list[Tensor]:
        """What it is multiplied by."""
        users = [user for user in self.users.get(array, []) if user.op in ("linear", "gated_linear")]
        return [user.attributes[name] for user in users for name in ("weight", "gate", "up") if name in user.attributes]

    def _largest(self, array: Array) -> int:
        """The largest quant of the panels that it becomes."""
        return int(geometry.largest_activation(self.weights[matrix].format.name for matrix in self._matrices_of(array)))

    def _new_panels(self, array: Array) -> Buffer:
        if self._is_wide(array):
            wide = self._new((geometry.wide_panels_bytes(self._max_rows(array), array.columns),), np.uint8)
            self.panels_of[array] = wide
            return wide
        panels = self._new((geometry.panels_bytes(self._max_rows(array), array.columns),), np.uint8)
        self.panels_of[array] = panels
        return panels

    def _panels(self, x: Array) -> Buffer:
        """x as panels, made now if they are not yet."""
        if x not in self.panels_of:
            source = self.rows_of[x]
            panels = self._new_panels(x)
            self._launch(
                spec("amx.widen" if self._is_wide(x) else "quantize.quantize"),
                (source.address, self._row_bytes(x), panels.address, x.columns, self._largest(x)),
                x.rows,
                reads=(source,),
                writes=(panels,),
            )
        return self.panels_of[x]

    def _takes_wide(self, array: Array, matrix: Tensor) -> bool:
        """Whether the product is of pairs of bfloat16."""
        return bool(geometry.multiplies_bf16(tile_format(matrix).name, array.columns))

    def _new_wide(self, array: Array) -> Buffer:
        rows = geometry.wide_tokens(self._max_rows(array))
        self.wide_of[array] = wide = self._new((geometry.wide_panels_bytes(rows, array.columns),), np.uint8)
        return wide

    def _wide(self, x: Array) -> Buffer:
        """x as wide panels, made now if they are not yet."""
        if x not in self.wide_of:
            source = self.rows_of[x]
            wide = self._new_wide(x)
            slots = (source.address, self._row_bytes(x), wide.address, x.columns)
            self._launch(spec("amx.widen"), slots, x.rows, reads=(source,), writes=(wide,))
        return self.wide_of[x]

    # ---- launches ---------------------------------------------------------------------------------------------------

    def _launch(
        self,
        kernel: Spec,
        slots: Iterable[int],
        rows: str,
        *,
        units: int = 1,
        chunk: int = 1,
        reads: Iterable[Buffer] = (),
        writes: Iterable[Buffer] = (),
        spoils: Iterable[Buffer] = (),
        scratch: tuple[int, int] | None = None,
        weights: tuple[int, int] = (0, 0),
        product_rows: Rows | None = None,
    ) -> None:
        """What it leaves in what it ``spoils`` nobody wants. ``scratch`` is (slot, bytes for each thread); the slot after it gets the
        bytes.
        """
        values = list(slots)
        if scratch is not None:
            slot, nbytes = scratch
            self.scratch_bytes = max(self.scratch_bytes, -(-nbytes // 64) * 64)
            self.scratch_slots.append((values, slot))
        tensors = [value.name for value in self.node.attributes.values() if isinstance(value, Tensor)]
        written = tuple(writes)
        results = [Result(buffer.array, x.rows, x.columns) for x, buffer in self.rows_of.items() if buffer in written]
        label = " ".join([kernel.factory, *tensors])
        self.launches.append(
            Launch(
                kernel,
                values,
                rows,
                units,
                chunk,
                tuple(reads),
                (*written, *spoils),
                weights,
                product_rows,
                self.node.output.rows == TOKENS,
                label,
                results,
            )
        )

    # ---- the program ------------------------------------------------------------------------------------------------

    def kernels(self) -> list[Spec]:
        """All that the program needs."""
        return [SAMPLING_KERNEL, *_LANE_KERNELS, *(launch.kernel for launch in self.launches), *self.weights.packers]

    def finish(self, progress: Progress | None) -> CpuProgram:
        scratch = zeros(max(64, self.scratch_bytes * self.threads), np.uint8)
        for slots, index in self.scratch_slots:
            slots[index : index + 2] = [address(scratch), self.scratch_bytes]
        addresses = load_kernels(self.kernels(), progress)
        packing = self.weights.begin(self.threads)
        arguments = np.array([slot for launch in self.launches for slot in launch.slots], np.int64)
        arguments_at = accumulate((8 * len(launch.slots) for launch in self.launches), initial=address(arguments))
        records = []
        touched: tuple[set[int], set[int]] = (set(), set())  # read and written since the last meeting
        for launch, slots_at in zip(self.launches, arguments_at, strict=False):
            reads, writes = {id(buffer) for buffer in launch.reads}, {id(buffer) for buffer in launch.writes}
            meet = bool(reads & touched[1] or writes & (touched[0] | touched[1]))
            touched = (reads, writes) if meet else (touched[0] | reads, touched[1] | writes)
            count = self.state.count_address(launch.rows)
            most = 1 if launch.rows == "one" else len(self.state.items)
            if launch.units * most >> UNIT_BITS:
                raise ValueError(f"{launch.label}: {launch.units} units for each of {most} are more than a program counts")
            records.append(
                [addresses[launch.kernel], slots_at, count, launch.units, launch.chunk, NEEDS_ALL if meet else 0, *launch.weights]
            )
        weights = [0, 0]
        for record in reversed(records):
            # waiting threads fetch the weights of the next launch that has any
            weights = record[6:] if record[6] else weights
            record[6:] = weights
        self.alive += [scratch, arguments, self.weights.arena]
        logits = len(self.launches) if self.logits_launch is None else self.logits_launch
        lane_kernels = addresses[_LANE_KERNELS[0]], addresses[_LANE_KERNELS[1]]
        last = self.graph.nodes[-1].output
        return CpuProgram(
            state=self.state,
            logits=self.rows_of[last].array[:, : last.columns],
            logits_maxima=self.logits_maxima.array if self.logits_maxima else None,
            names=[launch.kernel.factory for launch in self.launches],
            labels=[launch.label for launch in self.launches],
            weight_bytes=self.weights.nbytes,
            packing=packing,
            _launches=Launches(records, self.threads),
            _lane_records=partial(in_lanes, self.launches, records, logits, self.state, lane_kernels, alive=self.alive),
            _pool=thread_pool(self.threads),
            _results=[launch.results for launch in self.launches],
            _alive=self.alive,
        )
