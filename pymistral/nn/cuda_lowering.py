"""From a recorded graph to launches on an NVIDIA GPU, for one size of step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..kernels.cpu.tiles import FloatFormat
from ..kernels.cuda import attention, linear, moe, rowwise
from ..kernels.cuda.attention import Heads, Places
from ..kernels.cuda.launch import Launch
from ..kernels.cuda.operands import Rows, Weights
from ..kernels.cuda.planes import Layout
from ..quantization.types import Tensor
from .cuda import CudaModel, Size, stride_of
from .graph import TOKENS, Array, Node
from .lowering import Buffer, Lowering
from .quantize import tile_format
from .rope import Rope

_LEAVE_REST = ("linear", "add", "attention")  # operations whose kernels may not write what is behind the last column


@dataclass
class _Span:
    """The shape of device memory, as the free lists of `Lowering` want to know it."""

    shape: tuple[int, ...]
    itemsize: int


class _Matvec(NamedTuple):
    """A launch that more products may join: of matrices of this layout and width with these rows."""

    launch: Launch
    key: tuple[Layout, int, Rows]
    products: list[linear.Product]


class CudaLowering(Lowering):
    """The launches of one size. An array is kept in the forms that its readers want: float32, int8 with scales, bfloat16."""

    def __init__(self, model: CudaModel, size: Size) -> None:
        super().__init__(model.graph, model.limits)
        self.model, self.size = model, size
        self.launches: list[Launch] = []
        self._last_matvec: _Matvec | None = None
        self.q8_of: dict[Array, Buffer] = {}
        self.scales_of: dict[Array, Buffer] = {}
        self.bf16_of: dict[Array, Buffer] = {}
        self.forms += [self.q8_of, self.scales_of, self.bf16_of]
        state, place = model.state, model.place
        self.places = Places(
            positions=place(state.positions),
            slots=place(state.cache_slots),
            table_rows=place(state.table_rows),
            items=place(state.items),
            block_tables=place(state.block_tables),
            table_width=state.table_width,
        )
        self.lower()

    # ---- buffers ----------------------------------------------------------------------------------------------------

    def _allocate(self, shape: tuple[int, ...], dtype: Any) -> Buffer:
        itemsize = np.dtype(dtype).itemsize
        nbytes = int(np.prod(shape)) * itemsize
        return Buffer(_Span(shape, itemsize), self.model.arena.take(nbytes))

    def _max_rows(self, array: Array) -> int:
        return self.size.tokens if array.rows == TOKENS else self.size.outputs

    def _rows(self, array: Array) -> Buffer:
        buffer = self._new((self._max_rows(array), stride_of(array.columns)), np.float32)
        self.rows_of[array] = buffer
        return buffer

    def _vector(self, tensor: Tensor, offset: float = 0.0) -> Buffer:
        return self.model.weights.vector(tensor, offset)

    def _counted(self, array: Array) -> dict[str, int]:
        """How many rows there are, and how many there may be."""
        return {"count": self.model.count(array.rows), "max_rows": self._max_rows(array)}

    # ---- forms ------------------------------------------------------------------------------------------------------

    def _form_for(self, tensor: Tensor, rows: int, *, experts: bool = False) -> str:
        """The form of x that a product of so many rows takes."""
        format = tile_format(tensor)
        if rows <= linear.MATVEC_ROWS and (experts or not self._few(format.name, rows)):
            return "f32" if isinstance(format, FloatFormat) else "q8"
        return "bf16" if self._tensor_cores(format.name) else "f32"

    def _few(self, format: str, rows: int) -> bool:
        """Whether a product of so many rows is that of `linear.matmul_few`. Of one, too, for bfloat16: its `matvec` is no faster."""
        return (1 if format == "bf16" else 2) <= rows <= linear.FEW_ROWS and self._tensor_cores(format)

    def _tensor_cores(self, format: str) -> bool:
        return self.model.gpu.arch >= 80 and format != "f32"

    def _wanted(self, array: Array) -> set[str]:
        """The forms that all readers of the array take."""
        rows = self._max_rows(array)
        wanted = set() if self._only_multiplied(array) else {"f32"}
        for user in self.users.get(array, []):
            if user.op in ("linear", "gated_linear"):
                matrices = [user.attributes[name] for name in ("weight", "gate", "up") if name in user.attributes]
                wanted |= {self._form_for(matrix, rows) for matrix in matrices}
            elif user.op == "mixture_of_experts" and array is user.inputs[0]:
                wanted |= {self._form_for(user.attributes[name][0], rows, experts=True) for name in ("gate", "up")}
        return wanted or {"f32"}

    def _form(self, array: Array) -> Rows:
        """The forms that the array is kept in."""

        def where(table: dict[Array, Buffer]) -> int:
            return table[array].address if array in table else 0

        addresses = [where(table) for table in (self.rows_of, self.q8_of, self.scales_of, self.bf16_of)]
        return Rows(stride_of(array.columns), *addresses)

    def _add_form(self, array: Array, form: str) -> None:
        """Memory for one more form."""
        rows, stride = self._max_rows(array), stride_of(array.columns)
        if form == "f32":
            self._rows(array)
        elif form == "bf16":
            self.bf16_of[array] = self._new((rows, stride), np.uint16)
        else:
            self.q8_of[array] = self._new((rows, stride), np.int8)
            self.scales_of[array] = self._new((rows, stride // 32, 2), np.float32)

    def _out(self, array: Array) -> Rows:
        """Memory for all forms that are wanted of an array, which a kernel makes that can write them all."""
        for form in sorted(self._wanted(array)):
            if form != "f32" or array not in self.rows_of:
                self._add_form(array, form)
        return self._form(array)

    def _in(self, array: Array, form: str) -> Rows:
        """The array in a form, made now of its floats if it was not. Products leave what is behind their last column as it was."""
        rows = self._form(array)
        has = {"f32": rows.f32, "q8": rows.q8, "bf16": rows.bf16}[form]
        if has and not (form == "f32" and array.columns % 32 and self.graph.nodes[self.makers[array]].op in _LEAVE_REST):
            return rows
        if not has:
            self._add_form(array, form)
            made = self._form(array)
            target = Rows(
                made.stride, **{"q8": {"q8": made.q8, "scales": made.scales}, "bf16": {"bf16": made.bf16}, "f32": {"f32": made.f32}}[form]
            )
        else:
            target = Rows(rows.stride, f32=rows.f32)  # in place: fills up with zeros
        self.launches.append(rowwise.scale(rows, 1.0, array.columns, target, **self._counted(array)))
        return self._form(array)

    # ---- products ---------------------------------------------------------------------------------------------------

    def _product(self, x: Array, weight: Tensor, out: Buffer, *, accumulate: bool) -> None:
        matrix = self.model.weights.matrix(weight)
        rows, stride = self._max_rows(x), stride_of(weight.shape[0])
        source = self._in(x, self._form_for(weight, rows))
        counted = self._counted(x)
        few = self._few(matrix.layout.name, rows)
        if few or rows <= linear.MATVEC_ROWS:
            make = linear.matmul_few if few else linear.matvec
            self._matvec(make, linear.Product(matrix, out.address, stride), source, accumulate, counted)
            return
        options: dict[str, Any] = {"accumulate": accumulate, **counted}
        cores = self._tensor_cores(matrix.layout.name)
        if not cores or rows < linear.UNPACKED_ROWS:
            self.launches.append(linear.matmul(matrix, source, out.address, stride, tensor_cores=cores, **options))
            return
        matmul = linear.matmul_hopper if self.model.gpu.arch == 90 else linear.matmul_bf16
        address, unpacked = self._unpack(matrix)
        self.launches.append(matmul(address, matrix, source, out.address, stride, **options))
        if unpacked is not None:
            self._give_back(unpacked)

    def _unpack(self, matrix: Weights) -> tuple[int, Buffer | None]:
        """Where the matrix is in bfloat16, and what is to be given back when it has been read."""
        if matrix.layout.name == "bf16":
            return matrix.address, None
        unpacked = self._new((matrix.rows, stride_of(matrix.columns)), np.uint16)
        self.launches.append(linear.dequantize(matrix, unpacked.address))
        return unpacked.address, unpacked

    def _matvec(self, make: Callable[..., Launch], product: linear.Product, x: Rows, accumulate: bool, counted: dict[str, int]) -> None:
        """Products of the same rows that follow each other, say queries, keys and values, are one launch."""
        key = (product.weights.layout, product.weights.columns, x)
        last = self._last_matvec
        joins = last is not None and last.launch is self.launches[-1] and last.key == key and not accumulate
        products = [*last.products, product] if last is not None and joins else [product]
        launch = make(products, x, accumulate=accumulate, **counted)
        self.launches[-1 if joins else len(self.launches) :] = [launch]
        open_to_more = not accumulate and len(products) < linear.MATVEC_PRODUCTS
        self._last_matvec = _Matvec(launch, key, products) if open_to_more else None

    def _embedding(self, node: Node) -> None:
        matrix = self.model.weights.matrix(node.attributes["weight"])
        self._rows(node.output)
        tokens = self.model.place(self.model.state.tokens)
        self.launches.append(
            linear.embedding(matrix, tokens, self._form(node.output), node.attributes["scale"], **self._counted(node.output))
        )

    def _gated_linear(self, node: Node) -> None:
        (x,) = node.inputs
        options = node.attributes
        gate, up = options["gate"], options["up"]
        counted = self._counted(x)
        few = self._few(tile_format(gate).name, self._max_rows(x))
        if (few or self._max_rows(x) <= linear.MATVEC_ROWS) and tile_format(gate) == tile_format(up):
            source = self._in(x, self._form_for(gate, self._max_rows(x)))
            first, second = self.model.weights.matrix(gate), self.model.weights.matrix(up)
            make = linear.gated_matmul_few if few else linear.gated_matvec
            self.launches.append(make(first, second, source, options["activation"], self._out(node.output), **counted))
            return
        if self._is_gated_by_hopper(node):
            source, matrices = self._in(x, "bf16"), [self.model.weights.matrix(tensor) for tensor in (gate, up)]
            unpacked = [self._unpack(matrix) for matrix in matrices]
            addresses, out = (unpacked[0][0], unpacked[1][0]), self._out(node.output)
            self.launches.append(linear.gated_matmul_hopper(addresses, matrices[0], source, options["activation"], out, **counted))
            for _, buffer in unpacked:
                if buffer is not None:
                    self._give_back(buffer)
            return
        columns = node.output.columns
        parts = [self._new((self._max_rows(x), stride_of(columns)), np.float32) for _ in range(2)]
        for tensor, part in zip((gate, up), parts, strict=True):
            self._product(x, tensor, part, accumulate=False)
        gated, raised = (Rows(stride_of(columns), f32=part.address) for part in parts)
        self.launches.append(rowwise.gate(gated, raised, options["activation"], columns, self._out(node.output), **counted))
        for part in parts:
            self._give_back(part)

    def _is_gated_by_hopper(self, node: Node) -> bool:
        """Whether `linear.gated_matmul_hopper` can make all that is wanted."""
        cores = all(self._tensor_cores(tile_format(node.attributes[name]).name) for name in ("gate", "up"))
        enough = self._max_rows(node.output) >= linear.UNPACKED_ROWS
        return self.model.gpu.arch == 90 and cores and enough and self._wanted(node.output) == {"bf16"}

    # ---- rows -------------------------------------------------------------------------------------------------------

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
        launch = rowwise.norm(
            self._form(x),
            x.columns,
            epsilon,
            weight=weight.address if weight else 0,
            out=self._out(out) if out is not None else None,
            branch=Rows(stride_of(x.columns), f32=branch.address) if branch else None,
            branch_weight=branch_weight.address if branch_weight else 0,
            indices=self.model.place(self.model.state.output_rows) if picks_rows else 0,
            **self._counted(x if out is None else out),
        )
        self.launches.append(launch)

    def _take_rows(self, node: Node) -> None:
        (x,) = node.inputs
        if self._left_to_norm(node):
            return
        rows = self.model.place(self.model.state.output_rows)
        self.launches.append(rowwise.take_rows(self._form(x), rows, x.columns, self._out(node.output), **self._counted(node.output)))

    def _copy(self, array: Array, target: Buffer) -> None:
        out = Rows(stride_of(array.columns), f32=target.address)
        self.launches.append(rowwise.scale(self._form(array), 1.0, array.columns, out, **self._counted(array)))

    def _elementwise(self, node: Node, make: Callable[..., Launch], *parameters: Any) -> None:
        x = self._form(node.inputs[0])
        self.launches.append(make(x, *parameters, node.output.columns, self._out(node.output), **self._counted(node.output)))

    def _add(self, node: Node) -> None:
        self._elementwise(node, rowwise.add, self._form(node.inputs[1]))

    def _multiply(self, node: Node) -> None:
        self._elementwise(node, rowwise.multiply, self._form(node.inputs[1]))

    def _sigmoid_gate(self, node: Node) -> None:
        self._elementwise(node, rowwise.sigmoid_gate, self._form(node.inputs[1]))

    def _scale(self, node: Node) -> None:
        self._elementwise(node, rowwise.scale, node.attributes["factor"])

    def _soft_cap(self, node: Node) -> None:
        self._elementwise(node, rowwise.soft_cap, node.attributes["cap"])

    def _activate(self, node: Node) -> None:
        self._elementwise(node, rowwise.activate, node.attributes["activation"])

    def _add_vector(self, node: Node) -> None:
        (x,) = node.inputs
        source = self._form(x)
        vector = self._vector(node.attributes["vector"])
        if "f32" in self._wanted(node.output):
            self._in_place(node)
        self.launches.append(rowwise.add_vector(source, vector.address, x.columns, self._out(node.output), **self._counted(x)))

    # ---- attention --------------------------------------------------------------------------------------------------

    def _attention(self, node: Node) -> None:
        q, k, v = node.inputs
        options, model = node.attributes, self.model
        heads, limits = model.heads[id(node)], self.limits
        rope: Rope | None = options["rope"]
        norms = [options[name] for name in ("q_norm", "k_norm")]
        weights = [self._vector(norm.weight, norm.offset).address if norm else 0 for norm in norms]
        counted = self._counted(q)
        stride = stride_of(q.columns)
        buffer = self._to_overwrite(q, node)
        queries = Rows(stride, f32=buffer.address)
        self.launches.append(
            attention.rope_and_cache(
                queries,
                self._form(k),
                self._form(v),
                heads,
                self.places,
                q_norm=weights[0],
                k_norm=weights[1],
                epsilon=next((norm.epsilon for norm in norms if norm), 0.0),
                rotations=model.rotations[rope] if rope else 0,
                pairs=rope.pairs if rope else 0,
                scale=options["scale"],
                **counted,
            )
        )
        window, cap = options["window"] or 0, options["soft_cap"] or 0.0
        if self.size.prefill:
            self._prefill(node, queries, heads, window, cap)
        else:
            cores = attention.decode_tensor_cores(heads, model.gpu.arch)
            longest = limits.max_blocks * limits.block_size
            splits = attention.decode_splits(heads, counted["max_rows"], longest, model.gpu.multiprocessors, tensor_cores=cores)
            partials = self._new((attention.partial_floats(heads, counted["max_rows"], splits),), np.float32)
            scratch: dict[str, Any] = {"partials": partials.address, "arrived": model.arrived, "splits": splits, "tensor_cores": cores}
            scratch |= {"window": window, "soft_cap": cap, **counted}
            self.launches += attention.attention_decode(queries, heads, self.places, self._out(node.output), **scratch)
            self._give_back(partials)
        self._give_back(buffer)  # if it is a copy

    def _prefill(self, node: Node, queries: Rows, heads: Heads, window: int, cap: float) -> None:
        """The kernel writes float32 and bfloat16; `_in` makes other forms when they are wanted."""
        for form in sorted(self._wanted(node.output) & {"f32", "bf16"}) or ["f32"]:
            self._add_form(node.output, form)
        if "q8" in self._wanted(node.output) and node.output not in self.rows_of:
            self._rows(node.output)
        out, count = self._form(node.output), self.model.count("items")
        items = min(self.size.tokens, self.size.tokens // self.model.query_tile + self.limits.max_sequences)
        self.launches.append(
            attention.attention_prefill(queries, heads, self.places, out, window=window, soft_cap=cap, count=count, max_items=items)
        )

    # ---- mixtures of experts ----------------------------------------------------------------------------------------

    def _mixture_of_experts(self, node: Node) -> None:
        x, router = node.inputs
        options = node.attributes
        top_k, experts, activation = options["top_k"], router.columns, options["activation"]
        counted = self._counted(x)
        tokens = counted["max_rows"]
        choices = tokens * top_k
        stacks = {name: self.model.weights.stack(options[name]) for name in ("gate", "up", "down")}
        chosen, weights = (self._new((choices,), dtype) for dtype in (np.int32, np.float32))
        self.launches.append(
            moe.route(
                self._form(router),
                experts,
                top_k,
                normalize=options["normalize"],
                chosen=chosen.address,
                weights=weights.address,
                **counted,
            )
        )
        few = tokens <= linear.MATVEC_ROWS
        taken = [chosen, weights]

        def scratch(shape: tuple[int, ...], dtype: Any) -> Buffer:
            taken.append(self._new(shape, dtype))
            return taken[-1]

        groups: dict[int, dict[str, int]] = {}  # by the rows of a tile

        def grouped(tile: int) -> dict[str, int]:
            if tile not in groups:
                most = moe.max_expert_tiles(tokens, top_k, experts, tile)
                places, owners, tiles = (scratch(shape, np.int32).address for shape in ((most, tile), (most,), (1,)))
                groups[tile] = {"places": places, "tile_experts": owners, "tiles": tiles, "tile": tile, "max_tiles": most}
                where = {"places": places, "tile_experts": owners, "tiles": tiles}
                self.launches.append(moe.group(chosen.address, top_k, experts, tile, count=counted["count"], **where))
            return groups[tile]

        def by_expert(name: str, source: Rows, per_row: int) -> Rows:
            stack = stacks[name]
            out = scratch((choices, stride_of(stack.rows)), np.float32)
            stride = stride_of(stack.rows)
            if few:
                places = {"chosen": chosen.address, "top_k": top_k, "shared_x": per_row > 1, **counted}
                launch = moe.expert_matvec(stack, source, out.address, stride, **places)
            else:
                cores = self._tensor_cores(stack.layout.name)
                tile = linear.matmul_tile(choices) if cores else linear.MATMUL_FLOAT_TILE
                launch = moe.expert_matmul(stack, source, out.address, stride, choices_per_row=per_row, tensor_cores=cores, **grouped(tile))
            self.launches.append(launch)
            return Rows(stride, f32=out.address)

        gate, up = (by_expert(name, self._in(x, self._form_for(options[name][0], tokens, experts=True)), top_k) for name in ("gate", "up"))
        columns = stacks["gate"].rows
        gated = self._scratch_form(self._form_for(options["down"][0], tokens, experts=True), choices, columns, scratch)
        self.launches.append(moe.gate_choices(gate, up, columns, activation, top_k, gated, **counted))
        down = by_expert("down", gated, 1)
        self.launches.append(moe.combine(down, weights.address, top_k, x.columns, self._out(node.output), **counted))
        for buffer in taken:
            self._give_back(buffer)

    def _scratch_form(self, form: str, rows: int, columns: int, scratch: Callable[..., Buffer]) -> Rows:
        stride = stride_of(columns)
        if form == "q8":
            quants, scales = scratch((rows, stride), np.int8), scratch((rows, stride // 32, 2), np.float32)
            return Rows(stride, q8=quants.address, scales=scales.address)
        if form == "bf16":
            return Rows(stride, bf16=scratch((rows, stride), np.uint16).address)
        return Rows(stride, f32=scratch((rows, stride), np.float32).address)
