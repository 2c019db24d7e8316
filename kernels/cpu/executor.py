"""Running a program: every thread walks the same list of launches, claims work in chunks, and meets the others where a launch depends on them.

Each thread starts with its own contiguous share of an op's units (so it streams through its own stretch of the weights) and then helps the others
with theirs: a thread that lost its core does not hold up the rest. Shares are claimed from one counter for each thread and launch, each in its own
cache line. There are two sets of counters, used in turn: in each run a thread clears its own lines of the other set.
`executor_layout` states how launches and the synchronisation block lie in memory.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .executor_layout import ARRIVALS, ARRIVALS_BEFORE, COUNT, COUNTERS, FIRST_SLEEPER, LAUNCH_BYTES, LAUNCHES, LINE, PARITY, STEP, STOP, TO_WAKE
from .helpers import inline
from .simd import _operation, _pointer, load_i64, store_i64

_I64 = ir.IntType(64)
_SPINS_BEFORE_YIELD = 2000


@_operation(types.int64, types.intp, types.int64)
def atomic_add(b, address, value):
    """Returns what was there before."""
    return b.atomic_rmw("add", _pointer(b, address, _I64), value, "acq_rel")


@_operation(types.int64, types.intp, types.int64)
def atomic_exchange(b, address, value):
    return b.atomic_rmw("xchg", _pointer(b, address, _I64), value, "seq_cst")


@_operation(types.int64, types.intp)
def atomic_load(b, address):
    return b.load_atomic(_pointer(b, address, _I64), "seq_cst", 8)


@_operation(types.void, types.intp, types.int64)
def atomic_store(b, address, value):
    b.store_atomic(value, _pointer(b, address, _I64), "seq_cst", 8)


@_operation(types.void)
def pause(b):
    """Tell the core that it spins."""
    triple = b.module.triple
    if "x86" in triple or "i686" in triple:
        function_type = ir.FunctionType(ir.VoidType(), [])
        b.call(cgutils.get_or_insert_function(b.module, function_type, "llvm.x86.sse2.pause"), [])
    elif "aarch64" in triple or "arm64" in triple:
        function_type = ir.FunctionType(ir.VoidType(), [ir.IntType(32)])
        b.call(cgutils.get_or_insert_function(b.module, function_type, "llvm.aarch64.hint"), [ir.Constant(ir.IntType(32), 1)])


_yield = types.ExternalFunction("sched_yield", types.int32())


@intrinsic
def call_kernel(typing_context, kernel, slots, begin, end, thread):
    """Call a compiled kernel by address. Numba's calling convention puts two pointers first: for the result (None is stored) and for an exception."""

    def codegen(context, b, sig, values):
        address, *arguments = values
        pointer = ir.IntType(8).as_pointer()
        function_type = ir.FunctionType(ir.IntType(32), [pointer, pointer, *[_I64] * 4])
        unused = cgutils.alloca_once(b, _I64)
        unused = b.bitcast(unused, pointer)
        b.call(b.inttoptr(address, function_type.as_pointer()), [unused, unused, *arguments])
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), codegen


@inline
def meet(sync, target):
    """Wait until ``target`` arrivals have been counted."""
    spins = 0
    while atomic_load(sync + ARRIVALS) < target:
        pause()
        spins += 1
        if spins >= _SPINS_BEFORE_YIELD:
            _yield()


@inline
def run_program(sync, thread, threads):
    """Walk the launches."""
    arrivals = load_i64(sync + ARRIVALS_BEFORE)
    launches = load_i64(sync + LAUNCHES)
    count = load_i64(sync + COUNT)
    set_bytes = count * threads * LINE
    parity = load_i64(sync + PARITY)
    counters = load_i64(sync + COUNTERS) + parity * set_bytes
    other = load_i64(sync + COUNTERS) + (1 - parity) * set_bytes + thread * LINE
    for index in range(count):
        launch = launches + index * LAUNCH_BYTES
        if load_i64(launch + 40) and index > 0:
            atomic_add(sync + ARRIVALS, 1)
            arrivals += threads
            meet(sync, arrivals)
        units = load_i64(load_i64(launch + 16)) * load_i64(launch + 24)
        chunk = load_i64(launch + 32)
        kernel = load_i64(launch)
        slots = load_i64(launch + 8)
        line = counters + index * threads * LINE
        store_i64(other + index * threads * LINE, 0)
        for turn in range(threads):
            owner = (thread + turn) % threads
            counter = line + owner * LINE
            share = units * owner // threads
            share_end = units * (owner + 1) // threads
            while share + atomic_load(counter) < share_end:
                begin = share + atomic_add(counter, chunk)
                if begin >= share_end:
                    break
                call_kernel(kernel, slots, begin, min(begin + chunk, share_end), thread)
    atomic_add(sync + ARRIVALS, 1)
    meet(sync, arrivals + threads)


def lead() -> Any:
    """Begin a step and, unless a thread sleeps, work through it as thread 0 until all are done.

    If threads sleep, their number is left in the synchronisation block and nothing is run: wake those whose line now holds 2, then call `work`.
    """

    def lead_program(sync, threads):
        store_i64(sync + ARRIVALS_BEFORE, atomic_load(sync + ARRIVALS))
        atomic_add(sync + STEP, 1)
        asleep = 0
        for thread in range(1, threads):
            sleeping = sync + FIRST_SLEEPER + thread * LINE
            if atomic_load(sleeping) == 1 and atomic_exchange(sleeping, 2) == 1:
                asleep += 1
        store_i64(sync + TO_WAKE, asleep)
        if asleep == 0:
            run_program(sync, 0, threads)

    return lead_program


def work() -> Any:
    """The rest of a step that `lead` began."""

    def work_program(sync, threads):
        run_program(sync, 0, threads)

    return work_program


def follow() -> Any:
    """Work on every step as another thread, until told to stop or nothing came for ``patience`` spins; then the thread is marked asleep.

    ``last`` is the address where this thread keeps the number of its last step.
    """

    def follow_programs(sync, thread, threads, last, patience):
        sleeping = sync + FIRST_SLEEPER + thread * LINE
        step = load_i64(last)
        spins = 0
        while atomic_load(sync + STOP) == 0:
            if atomic_load(sync + STEP) != step:
                step += 1
                store_i64(last, step)
                run_program(sync, thread, threads)
                spins = 0
                continue
            pause()
            spins += 1
            if spins >= patience:
                # The leader raises the step before it looks for sleepers, so one of the two sees the other.
                atomic_store(sleeping, 1)
                if atomic_load(sync + STEP) == step or atomic_exchange(sleeping, 0) == 2:
                    break
                spins = 0

    return follow_programs
