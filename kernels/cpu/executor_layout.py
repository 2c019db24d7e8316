"""Memory that the executor (`executor`) shares with whoever starts programs: offsets in bytes. No Numba here, so that a warm start loads none.

A launch is eight int64: 0 kernel address, 1 slots address, 2 address of a count, 3 units for each of that count, 4 units in a chunk,
5 whether all threads must meet before it, 6 and 7 unused.

The synchronisation block, in lines of 64 bytes: 0 step number, 1 arrivals at meetings, 2 address of launches, 3 number of launches, 4 address of counters and which
of their two sets is in use,
5 stop, 6 arrivals when this step began, 7 how many threads have to be woken; then from line 8 one line for each thread: 1 while it sleeps, 2 while
it is being woken.
"""

LINE = 64
LAUNCH_WORDS = 8
LAUNCH_BYTES = LAUNCH_WORDS * 8
STEP, ARRIVALS, LAUNCHES, COUNT, COUNTERS, STOP, ARRIVALS_BEFORE, TO_WAKE = (LINE * i for i in range(8))
PARITY = COUNTERS + 8
FIRST_SLEEPER = LINE * 8
