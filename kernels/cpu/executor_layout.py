"""Memory that the executor (`executor`) shares with whoever starts programs: offsets in bytes. No Numba here, so that a warm start loads
none.

A launch is eight int64: 0 kernel address, 1 slots address, 2 address of a count, 3 units for each of that count, 4 units in a chunk, 5
what must be done before it (see `NEEDS_ALL`), 6 address and 7 bytes of the weights that it, or the next launch that has any, will read.

A program's counters, in lines of 64 bytes: for each launch one line of done units, then one line for each thread's share of claimed units;
after them one int64 for each launch, its units in the running step. Each counter holds the step's number in its upper 40 bits.

The synchronisation block, in lines of 64 bytes: 0 step number (even while a program runs), 1 address of launches, 2 number of launches, 3
address of counters, 4 stop, 5 how many threads have to be woken; then from line 8 one line for each thread: whether it sleeps (1, or 2
while it is being woken), and whether it is inside a program.
"""

LINE = 64
NEEDS_ALL = 1  # all launches before this one
NEEDS_SHARE = 2  # for a thread's share of its units: that thread's share of the launch before, if it has done that itself, else all of it
UNIT_BITS = 24  # of a counter: what is left for step numbers lasts for decades
LAUNCH_WORDS = 8
LAUNCH_BYTES = LAUNCH_WORDS * 8
STEP, LAUNCHES, COUNT, COUNTERS, STOP, TO_WAKE = (LINE * i for i in range(6))
FIRST_THREAD = LINE * 8
INSIDE = 8  # in a thread's line


def counter_bytes(launches: int, threads: int) -> int:
    """Of a program's counters."""
    return launches * ((threads + 1) * LINE + 8)
