"""A recorded model, lowered and compiled for the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .cpu_weights import Packing
from .pool import Launches, ThreadPool
from .state import State

_FEWEST = 2  # launches of a step in parts that are run at once


class Result(NamedTuple):
    """What a launch computes as floats."""

    array: NDArray[Any]
    rows: str
    columns: int


@dataclass
class CpuProgram:
    """A recorded model, ready to run.

    Attributes
    ----------
    state
        What changes between steps; fill it before `run`.
    logits
        float32 ``[max_outputs, vocab_size]``; the first ``outputs`` rows are those of the last run.
    logits_maxima
        float32 ``[max_outputs, ...]``: the largest logit of each `sampling_layout.BLOCK`, or NaN if one is; None if they are not found.
    packing
        Whether all weights are in place: the methods that run anything wait for it.
    """

    state: State
    logits: NDArray[np.float32]
    logits_maxima: NDArray[np.float32] | None
    names: list[str]
    labels: list[str]
    weight_bytes: int
    packing: Packing
    _launches: Launches
    _lane_records: Callable[[int], list[list[int]]]  # of launches with so many panels in a lane
    _pool: ThreadPool
    _results: list[list[Result]] = field(repr=False)
    _alive: list[Any] = field(repr=False)
    _eager: bool = field(default_factory=lambda: os.environ.get("PYMISTRAL_EAGER", "0") not in ("", "0"))
    _in_lanes: dict[int, Launches | None] = field(default_factory=dict, repr=False)  # by the panels of a lane, as they are asked for
    _launched: int = 0  # of a step that is run in parts
    _launch_seconds: float = 0.0

    def has_lanes(self, panels: int) -> bool:
        """Whether a step may be one in which each lane has so many panels of tokens (see `cpu_lanes`)."""
        if self._eager or not 0 < panels <= self.state.most_panels:
            return False
        if panels not in self._in_lanes:  # not made before many streams come: that takes some milliseconds
            records = self._lane_records(panels)
            self._in_lanes[panels] = Launches(records, self._pool.threads) if records else None
        return self._in_lanes[panels] is not None

    @property
    def _current(self) -> Launches:
        return self._in_lanes.get(self.state.panels_in_lane) or self._launches

    def run(self, meanwhile: Callable[[], object] | None = None) -> None:
        """Run one step, and call ``meanwhile`` when it has begun. With ``PYMISTRAL_EAGER=1``, launch by launch, each checked."""
        self.packing.wait()
        if not self._eager:
            self._pool.run(self._current, meanwhile)
            return
        if meanwhile is not None:
            meanwhile()
        self.run_checked()

    def begin(self) -> None:
        """Begin a step that `proceed` runs. Its state must stay as it is until that is through."""
        self._launched, self._launch_seconds = 0, 0.0

    def proceed(self, seconds: float) -> bool:
        """Run so many more launches of a step as take about so long, but some at least; returns whether the step is through."""
        self.packing.wait()
        if self._eager:
            self.run_checked()
            return True
        total, begin, before = self._launches.count, perf_counter(), self._launch_seconds
        count = _FEWEST if seconds < inf else total
        while self._launched < total and count:
            count = min(count, total - self._launched)
            self._pool.run(self._launches, first=self._launched, count=count)
            self._launched += count
            spent = perf_counter() - begin
            self._launch_seconds = before + spent
            # Launches differ, and layers are alike: what all have taken says how many will fit, and what few have taken says little.
            count = int(min(self._launched, max(0.0, seconds - spent) * self._launched / self._launch_seconds))
        return self._launched == total

    def run_one_by_one(self) -> list[float]:
        """Run each launch as a program of its own, and return their seconds: for profiles and debugging."""
        self.packing.wait()
        seconds = []
        for row in self._current.table:
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
        self.packing.wait()
        for number, (row, results) in enumerate(zip(self._launches.table, self._results, strict=True)):
            self._pool.run(Launches([[int(word) for word in row]], self._pool.threads))
            for result in results:
                values = result.array[: self.state.count(result.rows), : result.columns]
                wrong = np.argwhere(~np.isfinite(values))
                if len(wrong):
                    at = tuple(int(i) for i in wrong[0])
                    where = f"launch {number} of {len(self.labels)}, {self.labels[number]}"
                    raise FloatingPointError(f"{where}: {values[at]} in row {at[0]}, column {at[1]}")
