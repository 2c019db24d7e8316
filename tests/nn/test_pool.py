"""The threads that run programs: that they share the work, sleep, wake, and survive forks and the end of the interpreter."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable

import numpy as np
import numpy_reference as ref
import pytest
from numpy.typing import NDArray
from pymistral.kernels.cpu.compiler import load_kernels, spec

from pymistral.nn import functional as F
from pymistral.nn import pool as pools
from pymistral.nn.cpu import compile_graph
from pymistral.nn.cpu_program import CpuProgram
from pymistral.nn.graph import Tokens, recording
from pymistral.nn.memory import address, zeros
from pymistral.nn.pool import Launches, ThreadPool, available_threads, thread_pool
from pymistral.nn.state import Limits

ROWS, COLUMNS = 8, 64


def program(seed: int, threads: int, rows: int = ROWS) -> tuple[CpuProgram, Callable[[], None]]:
    """A few dependent launches, and a check that runs them and compares with what one thread computed."""
    rng = np.random.default_rng(seed)
    weights = [ref.random_tensor("Q4_1", COLUMNS, COLUMNS, rng)[0] for _ in range(4)]
    table = ref.random_tensor("F32", rows, COLUMNS, rng)[0]

    def build(threads: int) -> CpuProgram:
        with recording() as graph:
            x = y = F.embedding(Tokens(), table)
            for tensor in weights:
                y = F.linear(y, tensor) + x
        limits = Limits(max_tokens=rows, max_outputs=1, max_sequences=1, block_size=32, num_blocks=1, max_blocks=1)
        made = compile_graph(graph, limits, threads=threads)
        made.state.counts[0] = rows
        made.state.tokens[:] = range(rows)
        return made

    alone = build(1)
    alone.run()
    expected = alone.logits[:rows].copy()
    shared = build(threads)

    def check() -> None:
        shared.logits[:] = np.nan
        shared.run()
        assert shared.logits[:rows].tobytes() == expected.tobytes()

    return shared, check


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_any_number_of_threads(threads: int) -> None:
    _, check = program(threads, threads)
    for _ in range(200):
        check()


def norm_launches(pool: ThreadPool, rows: int, scratch: NDArray[np.generic]) -> tuple[Launches, list[NDArray[np.generic]]]:
    """RMSNorm to int8 panels works in the scratch of the thread that it runs on."""
    kernel = spec("norm.norm")
    x, weight, panels = zeros((rows, COLUMNS)), zeros(COLUMNS), zeros((rows + 16) * COLUMNS * 4, np.uint8)
    x[:] = weight[:] = 1
    bytes_of_thread = scratch.nbytes // pool.threads
    slots = np.array(
        [address(x), COLUMNS * 4, 0, 0, address(weight), 0, address(panels), COLUMNS, 0, 0, address(scratch), bytes_of_thread, 127],
        np.int64,
    )
    one = np.ones(1, np.int64)
    launches = Launches([(load_kernels([kernel])[kernel], address(slots), address(one), rows, 8, 0, 0, 0)], pool.threads)
    return launches, [x, weight, panels, slots, one]


def test_every_thread_takes_part() -> None:
    pool = thread_pool(3)
    scratch = zeros((pool.threads, COLUMNS))
    launches, _alive = norm_launches(pool, 20_000, scratch)
    deadline = time.monotonic() + 20
    while not scratch.any(axis=1).all():
        assert time.monotonic() < deadline, f"threads that worked: {scratch.any(axis=1)}"
        pool.run(launches)


@pytest.mark.parametrize("threads", [1, 3])
def test_what_the_caller_does_meanwhile(threads: int) -> None:
    pool = ThreadPool(threads)
    try:
        scratch = zeros((threads, COLUMNS))
        launches, _alive = norm_launches(pool, 20_000, scratch)
        pool.run(launches)  # all are awake
        for pause in (0.0, 0.1):  # the second time the others are through before the caller comes, and fall asleep
            scratch[:] = 0
            at_work: list[bool] = []

            def meanwhile(pause: float = pause, at_work: list[bool] = at_work) -> None:
                time.sleep(pause)
                at_work.append(bool(scratch.any()))

            pool.run(launches, meanwhile)
            assert scratch.any()
            assert len(at_work) == 1
        assert at_work == [threads > 1]

        def fail() -> None:
            raise RuntimeError("the caller's own")

        scratch[:] = 0
        with pytest.raises(RuntimeError, match="own"):
            pool.run(launches, fail)
        assert scratch.any()
        scratch[:] = 0
        pool.run(launches)
        assert scratch.any()
    finally:
        pool.close()


def test_a_thread_that_falls_asleep_as_a_step_begins_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "_PATIENCE", 1)
    pool = ThreadPool(3)
    try:
        scratch = zeros((pool.threads, COLUMNS))
        launches, _alive = norm_launches(pool, 1, scratch)
        for _ in range(20_000):
            pool.run(launches)
        scratch[:] = 0
        work, _alive_too = norm_launches(pool, 20_000, scratch)
        deadline = time.monotonic() + 20
        while not scratch.any(axis=1).all():
            assert time.monotonic() < deadline, f"threads that worked: {scratch.any(axis=1)}"
            pool.run(work)
    finally:
        pool.close()


def test_step_numbers_do_not_run_out() -> None:
    pool = ThreadPool(2)
    try:
        scratch = zeros((2, COLUMNS))
        launches, _alive = norm_launches(pool, 5, scratch)
        for before in (2**31 - 5, 2**32 - 5, 2**38 - 5):
            pool._step[0] = before  # idle
            for _ in range(10):
                scratch[:] = 0
                pool.run(launches)
                assert scratch.any()
    finally:
        pool.close()


def test_sleeping_and_waking() -> None:
    _, check = program(1, 2)
    for pause in (0, 0.0002, 0.001, 0.003, 0.01, 0.05) * 3:
        time.sleep(pause)
        check()


def test_alternating_programs_and_pools() -> None:
    checks = [program(seed, threads)[1] for seed, threads in ((1, 2), (2, 2), (3, 3), (4, 1), (5, 3))]
    for _ in range(50):
        for check in checks:
            check()


def test_many_programs_come_and_go() -> None:
    for seed in range(40):
        program(seed, 3)[1]()


def test_from_several_threads() -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            _, check = program(seed, 2)
            for _ in range(100):
                check()
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not any(worker.is_alive() for worker in workers)
    assert not failures


def test_idle_burns_nothing() -> None:
    _, check = program(1, 3)
    check()
    time.sleep(0.2)  # they fall asleep
    before = resource.getrusage(resource.RUSAGE_SELF)
    time.sleep(1)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.02


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_runs_and_builds() -> None:
    shared, check = program(1, 3)
    check()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for _ in range(20):
                check()  # the parent's program
            program(2, 3)[1]()
            program(3, 2)[1]()
            shared.logits[:] = 7
            status = 0
        finally:
            os._exit(status)
    for _ in range(200):
        check()
    shared.logits[:] = 5
    assert os.waitstatus_to_exitcode(wait(child)) == 0
    assert (shared.logits == 5).all()  # the child's memory is its own


def wait(child: int) -> int:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise AssertionError("the forked child hangs")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_while_another_thread_runs() -> None:
    _, check = program(1, 2)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            check()

    busy = threading.Thread(target=work)
    busy.start()
    try:
        for seed in range(5):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    program(seed, 2)[1]()
                    status = 0
                finally:
                    os._exit(status)
            assert os.waitstatus_to_exitcode(wait(child)) == 0
    finally:
        stop.set()
        busy.join()


AT_EXIT = """
import sys, threading, time
sys.path[:0] = {path!r}
from test_pool import program
_, check = program(1, 3)
check()
"""


@pytest.mark.parametrize(
    "end",
    [
        "",
        "time.sleep(0.1)",
        "threading.Thread(target=lambda: [check() for _ in iter(int, 1)], daemon=True).start(); time.sleep(0.1)",
        "threading.Thread(target=lambda: [check() for _ in range(300)]).start()",
        "sys.exit(3)",
        "import os; os.kill(os.getpid(), 2); time.sleep(5)",
    ],
    ids=["at once", "asleep", "daemon thread runs", "thread runs", "exit code", "interrupt"],
)
def test_the_interpreter_ends(end: str) -> None:
    source = textwrap.dedent(AT_EXIT.format(path=sys.path)) + end
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60)
    expected = 3 if "exit(3)" in end else -2 if "kill" in end else 0
    assert done.returncode == expected, done.stderr
    assert "Traceback" not in done.stderr or "KeyboardInterrupt" in done.stderr


def test_available_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYMISTRAL_THREADS", "3")
    assert available_threads() == 3
    for wrong in ("0", "-1", "many", "100000"):
        monkeypatch.setenv("PYMISTRAL_THREADS", wrong)
        with pytest.raises(ValueError, match="PYMISTRAL_THREADS"):
            available_threads()
    monkeypatch.delenv("PYMISTRAL_THREADS")
    assert 1 <= available_threads() <= (os.cpu_count() or 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_large_memory_is_not_shared_with_a_forked_child() -> None:
    memory = zeros(1 << 21, np.uint8)
    child = os.fork()
    if child == 0:
        memory[:] = 1
        os._exit(0)
    wait(child)
    assert not memory.any()
