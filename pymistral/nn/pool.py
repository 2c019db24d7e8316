"""The threads that run programs. One pool for each number of threads, shared by all models of the process."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..kernels.cpu.compiler import Progress, entry_point, load_kernels, spec
from ..kernels.cpu.executor_layout import FIRST_THREAD, INSIDE, LAUNCH_BYTES, LAUNCH_WORDS, LINE, STEP, STOP, TO_WAKE, counter_bytes
from .memory import address, zeros

EXECUTOR_KERNELS = (spec("executor.lead"), spec("executor.work"), spec("executor.follow"))

# How long an idle thread looks for the next step before it sleeps: spins of the pause instruction, about 1 ms.
_PATIENCE = 40_000

_RECENT = 16  # programs


def available_threads() -> int:
    """Cores that this process may use: its affinity, its cgroup's quota, or ``PYMISTRAL_THREADS``."""
    forced = os.environ.get("PYMISTRAL_THREADS")
    if forced:
        try:
            threads = int(forced)
        except ValueError:
            threads = 0
        if not 1 <= threads <= 1024:
            raise ValueError(f"PYMISTRAL_THREADS={forced!r}: expected a number from 1 to 1024")
        return threads
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _cgroup_cores()))


def _cgroup_cores() -> int:
    """Whole cores that the cgroup's CPU quota allows, rounded up; a large number where there is none."""
    unlimited = 1 << 16
    try:
        quota, period = open("/sys/fs/cgroup/cpu.max").read().split()  # noqa: SIM115
        return unlimited if quota == "max" else max(1, -(-int(quota) // int(period)))
    except (OSError, ValueError):
        return unlimited


class Launches:
    """A program's launches in the form that the executor reads, with its counters. See `kernels.cpu.executor_layout`."""

    def __init__(self, records: Sequence[Sequence[int]], threads: int) -> None:
        self.count = len(records)
        self.table = zeros((max(1, len(records)), LAUNCH_WORDS), np.int64)
        if records:
            self.table[:, : len(records[0])] = records
        self.counters = zeros(counter_bytes(max(1, len(records)), threads), np.uint8)
        self._addresses = address(self.table), address(self.counters)

    def arguments(self, first: int = 0, count: int | None = None) -> tuple[int, int, int]:
        """Where some of the launches lie, how many they are, and the counters: those of a step before stand for zero."""
        table, counters = self._addresses
        return table + LAUNCH_BYTES * first, self.count - first if count is None else count, counters


class ThreadPool:
    """``threads - 1`` threads beside the caller's. They spin between steps for about a millisecond and then sleep."""

    def __init__(self, threads: int, progress: Progress | None = None) -> None:
        self.threads = threads
        self._sync: NDArray[Any] = zeros(FIRST_THREAD + (threads + 1) * LINE, np.uint8)
        self._sync_address = address(self._sync)
        words = self._sync.view(np.int64)
        self._step, self._stop, self._to_wake = (words[at // 8 :][:1] for at in (STEP, STOP, TO_WAKE))
        self._sleeping = [words[(FIRST_THREAD + thread * LINE) // 8 :][:1] for thread in range(threads)]
        self._inside = [words[(FIRST_THREAD + thread * LINE + INSIDE) // 8 :][:1] for thread in range(1, threads)]
        # Threads that come late may still look at the tables of programs that are over: these stay alive a while.
        self._recent: deque[Launches] = deque()
        addresses = load_kernels(EXECUTOR_KERNELS, progress)
        lead, work, follow = (addresses[kernel] for kernel in EXECUTOR_KERNELS)
        self._lead, self._work, self._follow = entry_point(lead, 6), entry_point(work, 2), entry_point(follow, 5)
        self._start()

    def _start(self) -> None:
        """Begin anew: with no step running, and no thread but those that are started here."""
        self._forked = False
        self._lock = threading.Lock()
        self._step[0] |= 1  # idle
        for flags in (*self._sleeping, *self._inside):
            flags[0] = 0
        self._wake = [threading.Semaphore(0) for _ in range(self.threads)]
        self._workers = [
            threading.Thread(target=self._serve, args=(thread, self._wake[thread]), name=f"pymistral-{thread}", daemon=True)
            for thread in range(1, self.threads)
        ]
        for worker in self._workers:
            worker.start()

    def run(self, launches: Launches, meanwhile: Callable[[], object] | None = None, *, first: int = 0, count: int | None = None) -> None:
        """Run a program, or some of its launches, to the end. One at a time; the caller's thread works too, once it has called
        ``meanwhile``. The first must not be one that needs a share of the one before (`NEEDS_SHARE`)."""
        if self._forked:
            with _pools_lock:
                if self._forked:
                    self._start()
        with self._lock:
            if launches not in self._recent:
                self._recent.append(launches)
                if len(self._recent) > _RECENT:
                    self._settle()
                    self._recent.popleft()
            self._lead(self._sync_address, self.threads, *launches.arguments(first, count), meanwhile is None)
            asleep = self._to_wake[0]
            if asleep:
                self._wake_sleepers()
            try:
                if meanwhile is not None:
                    meanwhile()
            finally:
                if asleep or meanwhile is not None:
                    self._work(self._sync_address, self.threads)

    def _wake_sleepers(self) -> None:
        for thread, state in enumerate(self._sleeping):
            if state[0] == 2:
                state[0] = 0
                self._wake[thread].release()

    def _settle(self) -> None:
        """Wait until no thread is inside a program: between steps, none enters one."""
        while any(inside[0] for inside in self._inside):
            time.sleep(0)

    def _serve(self, thread: int, wake: threading.Semaphore) -> None:
        last = zeros(8, np.int64)
        while not self._stop[0]:
            self._follow(self._sync_address, thread, self.threads, address(last), _PATIENCE)
            if not self._stop[0]:
                wake.acquire()

    def close(self) -> None:
        """End the threads. Programs that still run afterwards have the caller's thread alone."""
        if self._forked:
            return
        with self._lock:
            self._stop[0] = 1
            for semaphore in self._wake:
                semaphore.release()
        for worker in self._workers:
            worker.join()


_pools: dict[int, ThreadPool] = {}
_pools_lock = threading.Lock()


def thread_pool(threads: int) -> ThreadPool:
    """The process's pool of this size."""
    with _pools_lock:
        if threads not in _pools:
            _pools[threads] = ThreadPool(threads)
            atexit.register(_pools[threads].close)
        return _pools[threads]


def _after_fork() -> None:
    """Threads do not survive a fork, and locks stay as some of them left them."""
    global _pools_lock
    _pools_lock = threading.Lock()
    for pool in _pools.values():
        pool._forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
