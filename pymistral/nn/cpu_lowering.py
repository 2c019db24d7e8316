"""From a recorded graph to launches on the CPU: the kernels of each operation, and their arguments."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np

from ..errors import ModelLoadError
from ..kernels.cpu import geometry
from ..kernels.cpu.compiler import spec
from ..kernels.cpu.tiles import FloatFormat
from ..quantization.types import Tensor
from .cpu_caches import Caches
from .cpu_lanes import Rows
from .cpu_launches import CpuLaunching
from .cpu_weights import Matrix, TiledWeights
from .graph import OUTPUTS, TOKENS, Array, Graph, Node
from .lowering import Buffer, padded
from .memory import address
from .quantize import tile_format
from .rope import Rope
from .state import Limits

_CHUNK_BYTES = (16 << 10, 256 << 10)  # of weights that a thread claims at once: reading is faster the longer it goes straight on
_CHUNKS_PER_THREAD = 64  # of a matrix that is large enough for that
_PIECES_PER_THREAD = 16  # that the products of experts are cut into
_FEWEST_GROUPS = 8  # of tiles of logits for each thread: fewer would be shared out unevenly
_LANE_FETCHES = 1 << 20  # bytes of keys and values that a lane asks for: what the second-level cache of its core has room for
_LOGITS_MARGIN = 4.0  # logits as near as this to the largest one, as they are sampled from, are worth activations of 16 bits


def _float_bits(value: float) -> int:
    bits: int = struct.unpack("<I", struct.pack("<f", value))[0]
    return bits


class CpuLowering(CpuLaunching):
    """With a ``base`` the program is for prompts: it shares that one's weights and caches, and multiplies tokens in wide panels."""

    def __init__(self, graph: Graph, limits: Limits, threads: int, weights: TiledWeights, base: CpuLowering | None = None) -> None:
        super().__init__(graph, limits, threads, weights, wide=base is not None)
        self.base = base
        self.caches: Caches = base.caches if base else Caches(graph, limits)
        self.state.parts_of_block = self.caches.parts
        self.routings: dict[tuple[int, int], tuple[Buffer, ...]] = {}
        self.fetching: list[int] | None = None  # slots of the last gated product, which may fetch what the next attention reads
        self.lower()

    # ---- products ---------------------------------------------------------------------------------------------------

    def _product(self, x: Array, weight: Tensor, out: Buffer, *, accumulate: bool) -> None:
        matrix = self.weights[weight]
        if self._is_wide(x) and self._takes_panels(x, weight):
            self._wide_product(x, matrix, out, accumulate)
            return
        out_row_bytes = 4 * padded(weight.shape[0])
        count = self.state.count_address(x.rows)
        common = (out.address, 0, matrix.tile_bytes, out_row_bytes, count, int(accumulate))
        unpacked, lane_slot, units, chunk = 0, None, matrix.tile_count, self._chunk(matrix)
        makes_logits, peaks = x is self.makes_logits, None
        if self._takes_wide(x, weight):
            source = self._wide(x)
            slots = [matrix.address, source.address, *common]
            slots[3] = x.columns // 32
            kernel, row_bytes = spec("bf16_matmul.matmul"), 0
        elif matrix.is_float:
            source = self.rows_of[x]
            row_bytes = self._row_bytes(x)
            slots = [matrix.address, source.address, *common, row_bytes]
            slots[3] = x.columns
            kernel = spec("matmul.float_matmul", layout=matrix.format.name)
        else:
            source = self._panels(x)
            slots = [matrix.address, source.address, *common, 0, 0, 0]
            slots[3] = x.columns // 32
            kernel, row_bytes = spec("matmul.matmul", layout=matrix.format.name), geometry.panel_row_bytes(x.columns)
            unpacked, lane_slot = geometry.unpacked_bytes(matrix.format.name, x.columns), 10
            if makes_logits and not accumulate and units >= _FEWEST_GROUPS * geometry.LOGITS_GROUP * self.threads:
                peaks = self._new((self._max_rows(x), groups := geometry.logits_groups(weight.shape[0])), np.float32)
                kernel = spec("logits.product", layout=matrix.format.name)
                slots += [weight.shape[0], groups, peaks.address]
                units, chunk = groups, max(1, chunk // geometry.LOGITS_GROUP)
        strides = {1: row_bytes, 2: out_row_bytes} | ({13: 4 * units} if peaks else {})
        if makes_logits:
            self.logits_launch = len(self.launches)
        self._launch(
            kernel,
            slots,
            "one",
            units=units,
            chunk=chunk,
            reads=(source, out) if accumulate else (source,),
            writes=(out, peaks) if peaks else (out,),
            scratch=(8, unpacked) if unpacked else None,
            weights=(matrix.address, matrix.tiles.nbytes),
            product_rows=Rows(strides, 6, lane_slot=lane_slot) if row_bytes else None,
        )
        if makes_logits and (x in self.panels_of or x in self.wide_of) and not accumulate:
            self._refine_logits(x, matrix, out, peaks)

    def _refine_logits(self, x: Array, matrix: Matrix, logits: Buffer, peaks: Buffer | None) -> None:
        """The likeliest once more, of finer activations. A model may scale its logits before they are sampled from: so the margin, too."""
        vocabulary, columns = matrix.tensor.shape
        groups = geometry.logits_groups(vocabulary)
        factor = next((user.attributes["factor"] for user in self.users.get(self.node.output, []) if user.op == "scale"), 1.0)
        pieces = 4 * self.threads
        found, peaks = peaks is not None, peaks or self._new((self._max_rows(x), groups), np.float32)
        common = (logits.address, 4 * padded(vocabulary), vocabulary, groups, pieces, peaks.address)
        if not found:
            self._launch(spec("logits.peaks"), common, x.rows, units=pieces, reads=(logits,), writes=(peaks,))
        source = self.rows_of[x]
        margin = _float_bits(_LOGITS_MARGIN / max(abs(factor), 1e-6))
        of_matrix = matrix.address, source.address, self._row_bytes(x), columns // 32, matrix.tile_bytes
        maxima = self._new((self._max_rows(x), groups), np.float32)
        slots = (*common, margin, *of_matrix, 0, 0, maxima.address)
        self._launch(
            spec("logits.refine", layout=matrix.format.name),
            slots,
            x.rows,
            units=pieces,
            reads=(logits, peaks, source),
            writes=(logits, maxima),
            scratch=(12, geometry.word_row_bytes(columns)),
        )
        self._give_back(peaks)
        if self.node is self.graph.nodes[-1]:  # nothing changes them any more
            self.logits_maxima = maxima

    def _wide_product(self, x: Array, matrix: Matrix, out: Buffer, accumulate: bool) -> None:
        source = self._panels(x)
        slots = (
            matrix.address,
            source.address,
            out.address,
            x.columns // 32,
            int(matrix.format.tile_bytes(x.columns)),
            4 * padded(matrix.tensor.shape[0]),
            self.state.count_address(x.rows),
            int(accumulate),
            matrix.tile_count,
            0,
            0,
            geometry.wide_tokens(self._max_rows(x)),
        )
        units = -(-matrix.tile_count // 2)
        self._launch(
            spec("amx.matmul", layout=matrix.format.name),
            slots,
            "one",
            units=units,
            chunk=self._wide_chunk(units),
            reads=(source, out) if accumulate else (source,),
            writes=(out,),
            scratch=(9, geometry.wide_scratch_bytes(self._max_rows(x))),
            weights=(matrix.address, matrix.tiles.nbytes),
        )

    def _chunk(self, matrix: Matrix) -> int:
        """Tiles to claim at once: enough bytes to stream, few enough to share out evenly."""
        even = matrix.tile_count // (4 * self.threads)
        fewest, most = _CHUNK_BYTES
        share = min(max(fewest, matrix.tiles.nbytes // (_CHUNKS_PER_THREAD * self.threads)), most)
        return max(1, min(even, share // int(matrix.tile_bytes)))

    def _wide_chunk(self, units: int) -> int:
        return max(1, min(geometry.WIDE_GROUP, units // (4 * self.threads)))

    def _embedding(self, node: Node) -> None:
        matrix = self.weights[node.attributes["weight"]]
        out = self._rows(node.output)
        slots = (
            address(self.state.tokens),
            matrix.address,
            out.address,
            node.output.columns,
            matrix.tile_bytes,
            self._row_bytes(node.output),
            _float_bits(node.attributes["scale"]),
        )
        self._launch(spec("embedding.embedding", layout=matrix.format.name), slots, TOKENS, writes=(out,))

    def _gated_linear(self, node: Node) -> None:
        (x,) = node.inputs
        gate, up = self.weights[node.attributes["gate"]], self.weights[node.attributes["up"]]
        activation = node.attributes["activation"]
        columns = node.output.columns
        takes_panels = all(self._takes_panels(x, node.attributes[name]) for name in ("gate", "up"))
        leaves_panels = node.output is not self.makes_logits and self._only_feeds(node.output, self._takes_panels)
        if gate.format is up.format and takes_panels and columns % 32 == 0 and leaves_panels:
            source = self._panels(x)
            out = self._new_panels(node.output)
            wide = self._is_wide(x)
            slots = (
                gate.address,
                up.address,
                source.address,
                x.columns // 32,
                gate.tile_bytes,
                self.state.count_address(x.rows),
                out.address,
                columns // 32,
                0,
                0,
                geometry.wide_tokens(self._max_rows(x)) if wide else self._largest(node.output),
                *(0, 0, 0, 0, 0, 0, 0),
            )
            scratch = geometry.wide_scratch_bytes(self._max_rows(x)) if wide else geometry.gated_scratch_bytes(gate.format.name, x.columns)
            strides = {2: geometry.panel_row_bytes(x.columns), 6: geometry.panel_row_bytes(columns)}
            self._launch(
                spec("amx.gated_matmul" if wide else "matmul.gated_matmul", layout=gate.format.name, activation=activation),
                slots,
                "one",
                units=columns // 32,
                chunk=self._wide_chunk(columns // 32) if wide else max(1, self._chunk(gate) // 4),
                reads=(source,),
                writes=(out,),
                scratch=(8, scratch),
                weights=(gate.address, gate.tiles.nbytes),
                product_rows=None if wide else Rows(strides, 5, 14, 15),
            )
            self.fetching = None if wide else self.launches[-1].slots
            return
        shape = (self._max_rows(x), padded(columns))
        gated, raised = self._new(shape, np.float32), self._new(shape, np.float32)
        self._product(x, node.attributes["gate"], gated, accumulate=False)
        self._product(x, node.attributes["up"], raised, accumulate=False)
        wide = node.output is not self.makes_logits and self._only_feeds(node.output, self._takes_wide)
        if wide:
            out, kernel = self._new_wide(node.output), spec("elementwise.gate", activation=activation, panels="wide")
        else:
            self.rows_of[node.output] = out = gated
            kernel = spec("elementwise.gate", activation=activation)
        of_rows = (gated.address, raised.address, out.address, columns if wide else padded(columns), self._row_bytes(node.output))
        self._launch(kernel, of_rows, x.rows, reads=(gated, raised), writes=(gated, out))
        self._give_back(gated)
        self._give_back(raised)

    def _only_feeds(self, array: Array, takes: Callable[[Array, Tensor], bool]) -> bool:
        """All users take the array as panels, of either kind, and nobody reads its floats."""
        return self._only_multiplied(array) and all(takes(array, matrix) for matrix in self._matrices_of(array))

    # ---- rows -------------------------------------------------------------------------------------------------------

    def _input(self, node: Node) -> None:
        """An array of eager mode: no launch, its values are here."""
        values = node.attributes["values"]
        self._rows(node.output).array[: len(values), : node.output.columns] = values

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
        source = self.rows_of[x]
        rows, panels, kernel = None, None, spec("norm.norm")
        if out is not None and self.users.get(out) and self._only_feeds(out, self._takes_panels):
            panels = self._new_panels(out)
            kernel = spec("norm.norm", panels="wide") if self._is_wide(out) else kernel
            rows = self._rows(out) if out is self.makes_logits else None
        elif out is not None and self.users.get(out) and self._only_feeds(out, self._takes_wide):
            panels = self._new_wide(out)
            kernel = spec("norm.norm", panels="wide")
            rows = self._rows(out) if out is self.makes_logits else None
        elif out is not None:
            rows = self._rows(out)
        slots = (
            source.address,
            self._row_bytes(x),
            branch.address if branch else 0,
            branch_weight.address if branch_weight else 0,
            weight.address if weight else 0,
            rows.address if rows else 0,
            panels.address if panels else 0,
            x.columns,
            _float_bits(epsilon),
            address(self.state.output_rows) if picks_rows else 0,
            0,
            0,
            self._largest(out) if out is not None else 0,
        )
        changed = (source, branch) if branch else ()
        made = [buffer for buffer in (rows, panels) if buffer]
        count = out.rows if out is not None else x.rows
        scratch = (10, 4 * padded(x.columns))
        self._launch(kernel, slots, count, reads=(source, *changed), writes=(*made, *changed), scratch=scratch)

    def _take_rows(self, node: Node) -> None:
        (x,) = node.inputs
        if self._left_to_norm(node):
            return
        out = self._rows(node.output)
        source = self.rows_of[x]
        slots = (source.address, address(self.state.output_rows), out.address, padded(x.columns), self._row_bytes(x))
        self._launch(spec("elementwise.take_rows"), slots, OUTPUTS, reads=(source,), writes=(out,))

    def _copy(self, array: Array, target: Buffer) -> None:
        source = self.rows_of[array]
        slots = (source.address, 0, target.address, padded(array.columns), self._row_bytes(array), _float_bits(1.0))
        self._launch(spec("elementwise.scale"), slots, array.rows, reads=(source,), writes=(target,))

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
        out = self._in_place(node)
        slots = (source.address, vector.address, out.address, padded(x.columns), self._row_bytes(x))
        self._launch(spec("elementwise.add_vector"), slots, x.rows, reads=(source,), writes=(out,))

    def _activate(self, node: Node) -> None:
        x, out = self.rows_of[node.inputs[0]], self._rows(node.output)
        slots = (x.address, 0, out.address, padded(node.output.columns), self._row_bytes(node.output))
        kernel = spec("elementwise.activate", activation=node.attributes["activation"])
        self._launch(kernel, slots, node.output.rows, reads=(x,), writes=(out,))

    def _sigmoid_gate(self, node: Node) -> None:
        x, gate = node.inputs
        self._elementwise(node, "sigmoid_gate", self.rows_of[x], self.rows_of[gate], self._row_bytes(gate))

    def _scale(self, node: Node) -> None:
        self._elementwise(node, "scale", self.rows_of[node.inputs[0]], None, _float_bits(node.attributes["factor"]))

    def _soft_cap(self, node: Node) -> None:
        self._elementwise(node, "soft_cap", self.rows_of[node.inputs[0]], None, _float_bits(node.attributes["cap"]))

    def _elementwise(self, node: Node, name: str, x: Buffer, y: Buffer | None, parameter: int = 0) -> None:
        out = self._rows(node.output)
        slots = (x.address, y.address if y else 0, out.address, padded(node.output.columns), self._row_bytes(node.output), parameter)
        reads = (x, y) if y else (x,)
        self._launch(spec(f"elementwise.{name}"), slots, node.output.rows, reads=reads, writes=(out,))

    # ---- attention --------------------------------------------------------------------------------------------------

    def _attention(self, node: Node) -> None:
        q, k, v = node.inputs
        options = node.attributes
        head_dim = options["head_dim"]
        if head_dim % 16:
            raise ModelLoadError(f"heads of {head_dim} dimensions are not supported: they must be a multiple of 16")
        heads, kv_heads = q.columns // head_dim, k.columns // head_dim
        group = heads // kv_heads
        limits = self.limits
        layout = self.caches.layout
        module = geometry.attention_module(layout, group, head_dim)
        group_of_layers, keys, values = self.caches.of_layer(len(self.state.caches))
        self.state.caches.append((keys.array, values.array))
        if self.fetching is not None:
            read = self.state.read_blocks[0, group_of_layers]
            self.fetching[11:15] = (keys.address, values.address, keys.array[0].nbytes, address(read))
            self.fetching = None
            self.state.most_read = max(1, min(self.state.most_read, _LANE_FETCHES // (2 * keys.array[0].nbytes)))
        self.state.query_tile = min(self.state.query_tile, geometry.query_tile_tokens(module, group))
        norms = [options[name] for name in ("q_norm", "k_norm")]
        weights = [self._vector(norm.weight, norm.offset) if norm else None for norm in norms]
        epsilon = next((norm.epsilon for norm in norms if norm), 0.0)
        rope: Rope | None = options["rope"]
        if rope is not None and rope not in self.state.ropes:
            self.state.ropes.append(rope)
        q_rows, k_rows = self._to_overwrite(q, node), self._to_overwrite(k, node)
        v_rows = self._to_overwrite(v, node) if layout == "int16" else self.rows_of[v]
        slots: tuple[int, ...] = (
            q_rows.address,
            self._row_bytes(q),
            k_rows.address,
            self._row_bytes(k),
            v_rows.address,
            self._row_bytes(v),
            heads,
            kv_heads,
            *(weight.address if weight else 0 for weight in weights),
            _float_bits(epsilon),
            address(rope.table) if rope else 0,
            rope.pairs if rope else 0,
            _float_bits(options["scale"]),
            address(self.state.positions),
            address(self.state.cache_slots[group_of_layers]),
            keys.address,
            values.address,
            limits.block_size,
        )
        self._launch(
            spec("rope.rope_and_cache", head_dim=head_dim, cache=layout),
            slots,
            TOKENS,
            reads=(q_rows, k_rows, v_rows),
            writes=(q_rows, keys, values),
            spoils=(k_rows, v_rows) if layout == "int16" else (k_rows,),
        )
        out = self._rows(node.output)
        items = "output_items" if options.get("for_outputs") else "items"
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
            address(self.state.block_tables[group_of_layers]),
            self.state.table_width,
            options["window"] or 0,
            _float_bits(options["soft_cap"] or 0.0),
            0,
            0,
            partials.address,
            self.state.count_address(items),
        )
        constants = {"cache": layout} if module == "float_attention" else {}
        self._launch(
            spec(f"{module}.attention", head_dim=head_dim, group=group, **constants),
            slots,
            items,
            units=kv_heads,
            reads=(q_rows, keys, values),
            writes=(out, partials),
            scratch=(14, geometry.attention_scratch_bytes(module, group, head_dim)),
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
        for rows in (q_rows, k_rows, v_rows):
            self._give_back(rows)  # the copies

    # ---- mixtures of experts ----------------------------------------------------------------------------------------

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

        def by_expert(tensors: tuple[Tensor, ...], source: Buffer) -> Buffer:
            matrices = [self.weights[tensor] for tensor in tensors]
            first = matrices[0]
            addresses = [matrix.address for matrix in matrices]
            stride = addresses[1] - addresses[0] if len(addresses) > 1 else 0
            if any(place != addresses[0] + index * stride for index, place in enumerate(addresses)):
                raise ValueError(f"{tensors[0].name}: experts are packed one after the other, once")
            out_rows, columns = first.tensor.shape
            out = self._new((rows, padded(out_rows)), np.float32)
            input_bytes = 4 * padded(columns) if first.is_float else geometry.panel_row_bytes(columns)
            width = columns if first.is_float else columns // 32
            common = (first.tile_bytes, 4 * padded(out_rows), 0, 0, input_bytes if first.is_float else 0)
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
                scratch=(22, geometry.experts_scratch_bytes(first.format.name, columns)),
            )
            return out

        def panels_or_rows(columns: int, floats: bool) -> Buffer:
            if floats:
                return self._new((rows, padded(columns)), np.float32)
            return self._new((geometry.panels_bytes(rows, columns),), np.uint8)

        floats = [isinstance(tile_format(options[name][0]), FloatFormat) for name in ("gate", "up", "down")]
        if floats[0] != floats[1]:
            raise ModelLoadError(f"tensors {options['gate'][0].name!r} and {options['up'][0].name!r}: one is quantised, the other is not")
        kind = {True: "no", False: "yes"}
        source = self.rows_of[x]
        gathered = panels_or_rows(x.columns, floats[0])
        largest_in, largest_gated = (
            geometry.largest_activation(self.weights[options[name][0]].format.name for name in names)
            for names in (("gate", "up"), ("down",))
        )
        slots = (source.address, self._row_bytes(x), row_of.address, top_k, gathered.address, padded(x.columns), largest_in)
        self._launch(spec("moe.gather", panels=kind[floats[0]]), slots, x.rows, units=top_k, reads=(source, row_of), writes=(gathered,))
        gate, up = by_expert(options["gate"], gathered), by_expert(options["up"], gathered)
        columns = options["gate"][0].shape[0]
        panels = gate if floats[2] else panels_or_rows(columns, False)
        slots = (gate.address, up.address, 4 * padded(columns), row_of.address, panels.address, padded(columns), largest_gated)
        kernel = spec("moe.activate", activation=options["activation"], panels=kind[floats[2]])
        self._launch(kernel, slots, x.rows, units=top_k, reads=(gate, up, row_of), writes=(gate, panels))
        down = by_expert(options["down"], panels)
        out = self._rows(node.output)
        slots = (down.address, self._row_bytes(x), row_of.address, weights.address, top_k, out.address, padded(x.columns))
        self._launch(spec("moe.combine"), slots, x.rows, reads=(down, row_of, weights), writes=(out,))
        for buffer in {id(buffer): buffer for buffer in (gathered, gate, up, panels, down)}.values():
            self._give_back(buffer)

    def _routing(self, choices: int, experts: int) -> tuple[Buffer, ...]:
        """Which token goes to which expert in `kernels.cpu.moe`; all layers share these.

        From `moe.route`: chosen experts, their weights; from `moe.group`: rows and first row of each expert, experts with rows, their
        number, row of each choice.
        """
        known = self.routings.get((choices, experts))
        if known is None:
            of_choices = [self._allocate((choices,), dtype) for dtype in (np.int32, np.float32, np.int32)]
            of_experts = [self._allocate((size,), np.int64) for size in (experts, experts, experts, 1)]
            known = self.routings[choices, experts] = (*of_choices[:2], *of_experts, of_choices[2])
        return known
