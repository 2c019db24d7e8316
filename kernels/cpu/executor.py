"""Running a program: every thread walks the same list of launches and claims work in chunks; a launch waits for those that it depends on.

Each thread starts with its own contiguous share of an op's units (so it streams through its own stretch of the weights) and then helps the
others with theirs. What a launch waits for is work that is done, not threads that have arrived: a thread that lost its core while it held
no work holds up nobody. It may wake up when the step, or even the next, is over. So every counter carries the number of its step, is
claimed by compare and exchange, and a thread that finds a newer number leaves. A counter with an older number stands for zero, so nothing
has to be cleared.

While a thread waits, it fetches its share of the weights that come next into its cache.

`executor_layout` states how launches, counters and the synchronisation block lie in memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .executor_layout import (
    COUNT,
    COUNTERS,
    FIRST_THREAD,
    INSIDE,
    LAUNCH_BYTES,
    LAUNCHES,
    LINE,
    NEEDS_ALL,
    NEEDS_SHARE,
    STEP,
    STOP,
    TO_WAKE,
    UNIT_BITS,
)
from .helpers import inline
from .simd import load_i64, prefetch, store_i64
from .vectors import operation, pointer

_I64 = ir.IntType(64)
_SPINS_BEFORE_YIELD = 2000
_FETCH_AHEAD = 256 << 10  # bytes of weights that a waiting thread fetches at most: a part of its second-level cache
LEADER = np.int64(0)  # a thread's number; with a literal 0 Numba would make another function of `run_program`
_SHIFT = UNIT_BITS
_LOW = (1 << UNIT_BITS) - 1


@operation(types.boolean, types.intp, types.int64, types.int64)
def compare_exchange(b, address, expected, value):
    """Store ``value`` if ``expected`` is there; returns whether it was."""
    result = b.cmpxchg(pointer(b, address, _I64), expected, value, "seq_cst", "seq_cst")
    return b.extract_value(result, 1)


@operation(types.int64, types.intp, types.int64)
def atomic_exchange(b, address, value):
    return b.atomic_rmw("xchg", pointer(b, address, _I64), value, "seq_cst")


@operation(types.int64, types.intp)
def atomic_load(b, address):
    return b.load_atomic(pointer(b, address, _I64), "seq_cst", 8)


@operation(types.void, types.intp, types.int64)
def atomic_store(b, address, value):
    b.store_atomic(value, pointer(b, address, _I64), "seq_cst", 8)


@operation(types.void, types.intp, types.int64)
def atomic_store_relaxed(b, address, value):
    """A store that is whole, in no particular order with others."""
    b.store_atomic(value, pointer(b, address, _I64), "monotonic", 8)


@operation(types.void)
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
    """Call a compiled kernel by address. Numba's calling convention puts two pointers first: for the result (None is stored) and
    for an exception.
    """

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
def wait_for(done, wanted, step, upcoming, upcoming_end):
    """Wait until a done counter holds ``wanted``. Returns how far the weights have been fetched, or -1 if the step is over."""
    spins = 0
    while True:
        value = atomic_load(done)
        if value == wanted:
            return upcoming
        if value >> _SHIFT > step:
            return -1
        if upcoming < upcoming_end:
            for line in range(4):
                prefetch(upcoming + line * LINE)
            upcoming += 4 * LINE
        else:
            pause()
        spins += 1
        if spins >= _SPINS_BEFORE_YIELD:
            _yield()


@inline
def claim(counter, step, size, chunk):
    """Claim up to ``chunk`` units. Returns the first, ``size`` or more if none is left, or -1 if the step is over."""
    while True:
        value = atomic_load(counter)
        number = value >> _SHIFT
        if number > step:
            return -1
        at = value & _LOW if number == step else 0
        if at >= size or compare_exchange(counter, value, step << _SHIFT | (at + chunk)):
            return at


@inline
def add_done(counter, step, units):
    while True:
        value = atomic_load(counter)
        new = value + units if value >> _SHIFT == step else step << _SHIFT | units
        if compare_exchange(counter, value, new):
            return


@inline
def run_program(launches, count, counters, step, thread, threads):
    """Walk the launches. The leader, thread 0, returns when all work is done, the others when they find no more."""
    stride = (threads + 1) * LINE
    unit_counts = counters + count * stride
    first_open = 0  # launches before this one are done
    own_share = False  # whether this thread alone has done its share of the launch before
    fetched = 0
    fetched_of = 0
    for index in range(count + 1):
        launch = launches + index * LAUNCH_BYTES
        needs = load_i64(launch + 40) if index < count else NEEDS_ALL
        if needs == NEEDS_ALL:
            if index == count and thread > 0:
                return
            upcoming = 0
            upcoming_end = 0
            if index < count:
                weights = load_i64(launch + 48)
                nbytes = load_i64(launch + 56)
                if weights != fetched_of:
                    fetched_of = weights
                    fetched = weights + nbytes * thread // threads
                upcoming = fetched
                upcoming_end = min(weights + nbytes * (thread + 1) // threads, weights + nbytes * thread // threads + _FETCH_AHEAD)
            for before in range(first_open, index):
                wanted = atomic_load(unit_counts + 8 * before)
                if wanted >> _SHIFT != step:
                    return
                if wanted & _LOW:
                    upcoming = wait_for(counters + before * stride, wanted, step, upcoming, upcoming_end)
                    if upcoming < 0:
                        return
            if upcoming > 0:
                fetched = upcoming
            first_open = index
        if index == count:
            return
        tagged = atomic_load(unit_counts + 8 * index)
        if tagged >> _SHIFT != step:
            return
        units = tagged & _LOW
        done = counters + index * stride
        chunk = load_i64(launch + 32)
        finished = 0
        waits = needs == NEEDS_SHARE
        for turn in range(threads):
            if waits and (turn > 0 or not own_share):
                wanted = atomic_load(unit_counts + 8 * (index - 1))
                if wanted >> _SHIFT != step or wait_for(done - stride, wanted, step, 0, 0) < 0:
                    return
                waits = False
            owner = (thread + turn) % threads
            share = units * owner // threads
            size = units * (owner + 1) // threads - share
            while size > 0:
                at = claim(done + (owner + 1) * LINE, step, size, chunk)
                if at < 0:
                    return
                if at >= size:
                    break
                end = min(at + chunk, size)
                call_kernel(load_i64(launch), load_i64(launch + 8), share + at, share + end, thread)
                finished += end - at
            if turn == 0:
                own_share = finished == size
        if finished:
            add_done(done, step, finished)


def lead() -> Any:
    """Begin a step and, if it is asked to (``joins``) and no thread sleeps, work through it as thread 0 until all is done.

    Otherwise the threads that are awake have begun, and the caller has to wake those whose line now holds 2 (the synchronisation block says
    how many) and to call `work`.
    """

    def lead_program(sync, threads, launches, count, counters, joins):
        step = (atomic_load(sync + STEP) | 1) + 1  # even, also after a step that was interrupted
        unit_counts = counters + count * (threads + 1) * LINE
        for index in range(count):
            launch = launches + index * LAUNCH_BYTES
            units = load_i64(load_i64(launch + 16)) * load_i64(launch + 24)
            atomic_store_relaxed(unit_counts + 8 * index, step << _SHIFT | units)
        store_i64(sync + LAUNCHES, launches)
        store_i64(sync + COUNT, count)
        store_i64(sync + COUNTERS, counters)
        atomic_store(sync + STEP, step)
        asleep = 0
        for thread in range(1, threads):
            sleeping = sync + FIRST_THREAD + thread * LINE
            if atomic_load(sleeping) == 1 and atomic_exchange(sleeping, 2) == 1:
                asleep += 1
        store_i64(sync + TO_WAKE, asleep)
        if joins and asleep == 0:
            run_program(launches, count, counters, step, LEADER, threads)
            atomic_store(sync + STEP, step + 1)

    return lead_program


def work() -> Any:
    """The rest of a step that `lead` began."""

    def work_program(sync, threads):
        step = atomic_load(sync + STEP)
        run_program(load_i64(sync + LAUNCHES), load_i64(sync + COUNT), load_i64(sync + COUNTERS), step, LEADER, threads)
        atomic_store(sync + STEP, step + 1)

    return work_program


def follow() -> Any:
    """Work on every step as another thread, until told to stop or nothing came for ``patience`` spins; then the thread is marked asleep.

    ``last`` is the address where this thread keeps the number of its last step.
    """

    def follow_programs(sync, thread, threads, last, patience):
        sleeping = sync + FIRST_THREAD + thread * LINE
        inside = sleeping + INSIDE
        done = load_i64(last)
        spins = 0
        while atomic_load(sync + STOP) == 0:
            step = atomic_load(sync + STEP)
            if step & 1 == 0 and step != done:
                # Whoever frees a program's memory looks at `inside` after the step is over: one of the two sees the other.
                atomic_store(inside, 1)
                launches, count, counters = load_i64(sync + LAUNCHES), load_i64(sync + COUNT), load_i64(sync + COUNTERS)
                if atomic_load(sync + STEP) == step:
                    run_program(launches, count, counters, step, thread, threads)
                    done = step
                    store_i64(last, done)
                    spins = 0
                atomic_store(inside, 0)
                continue
            pause()
            spins += 1
            if spins >= patience:
                # The leader raises the step before it looks for sleepers: one of the two sees the other.
                atomic_store(sleeping, 1)
                now = atomic_load(sync + STEP)
                # If it is too late to stay awake, the leader has to find the 2 that it left.
                if now & 1 or now == done or not compare_exchange(sleeping, 1, 0):
                    break
                spins = 0

    return follow_programs


def lane() -> Any:
    """A list of launches that a thread works through alone, for some of a step's tokens. Units are lanes.

    Slots: 0 launches of the first lane, followed by those of the next; 1 launches of a lane. They are as `executor_layout` states, but for
    word 2: the address of two int64, from where to where its units go when multiplied by word 3.
    """

    def kernel(slots, begin, end, thread):
        count = load_i64(slots + 8)
        for index in range(begin * count, end * count):
            launch = load_i64(slots) + index * LAUNCH_BYTES
            bounds, units, chunk = load_i64(launch + 16), load_i64(launch + 24), load_i64(launch + 32)
            last = load_i64(bounds + 8) * units
            for at in range(load_i64(bounds) * units, last, chunk):
                call_kernel(load_i64(launch), load_i64(launch + 8), at, min(at + chunk, last), thread)

    return kernel


def by_lane() -> Any:
    """A launch whose rows are divided among lanes: a thread's share of the units is one lane's, and needs that thread's lane alone.

    Slots: 0 kernel, 1 its arguments for the first lane, 2 bytes from there to those for the next, 3 units of a lane.
    """

    def kernel(slots, begin, end, thread):
        units = load_i64(slots + 24)
        lane = begin // units
        call_kernel(load_i64(slots), load_i64(slots + 8) + lane * load_i64(slots + 16), begin - lane * units, end - lane * units, thread)

    return kernel
