"""How kernels are timed: CUDA graphs between events, the cache flushed, taking turns.

Each turn runs the kernel, its baseline and a large copy once, one after the other, each behind a
read of more than the L2 cache holds; medians over turns, ratios within a turn. A replayed graph
has no host time in it, as in serving. What cannot be captured is launched as it is, and says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

FLUSH_BYTES = 256 * 2**20
"""Five times the L2 cache of an H200 (50 MB)."""
COPY_BYTES = 512 * 2**20
"""Read, and as many written."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Median microseconds, the middle half of all turns, and whether the host is in them."""

    us: float
    quartiles_us: tuple[float, float]
    graph: bool


class Clock:
    """Times calls in turns on one GPU."""

    def __init__(self, device: torch.device, turns: int) -> None:
        self._turns = turns
        # Read and not written: lines that have to be written back would slow down what follows.
        self._flush = torch.zeros(FLUSH_BYTES // 4, device=device)
        self._sink = torch.zeros((), device=device)
        self._from = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
        self._to = torch.empty_like(self._from)

    def copy(self) -> None:
        """The copy that bandwidth is measured by."""
        self._to.copy_(self._from)

    def in_turns(
        self, calls: Sequence[Callable[[], object]]
    ) -> tuple[list[list[float]], list[bool]]:
        """Microseconds of every turn, for each call, and which calls were captured."""
        prepared = [_captured(call) for call in calls]
        times: list[list[float]] = [[] for _ in calls]
        for turn in range(self._turns + 2):
            for place, (call, _) in enumerate(prepared):
                took_us = self._once(call)
                if turn >= 2:  # the first ones warm up
                    times[place].append(took_us)
        return times, [graph for _, graph in prepared]

    def _once(self, call: Callable[[], object]) -> float:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.sum(self._flush, dim=0, out=self._sink)
        began.record()
        call()
        ended.record()
        ended.synchronize()
        return float(began.elapsed_time(ended)) * 1e3


def timed(times_us: Sequence[float], *, graph: bool) -> Timed:
    """The figures of one call."""
    low, middle, high = statistics.quantiles(times_us, n=4)
    return Timed(us=middle, quartiles_us=(low, high), graph=graph)


def ratio(of: Sequence[float], over: Sequence[float]) -> float:
    """The median of `of / over` within turns."""
    return statistics.median(a / b for a, b in zip(of, over, strict=True))


def _captured(call: Callable[[], object]) -> tuple[Callable[[], object], bool]:
    """The call as a CUDA graph; itself where it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return call, False
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay, True
