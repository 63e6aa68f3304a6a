"""`Graphs`: whole steps recorded once and replayed, where a device can.

A step of a shape that was seen before is replayed with one launch; a new shape runs plainly and is
recorded right after, so nothing is recorded that traffic does not ask for and the first request
does not wait for shapes it never has. Keyed by all that a recording bakes in.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Final, Protocol

import torch

Replay = Callable[[], None]

MOST_GRAPHS: Final = 128
"""Recordings kept; each holds its launches (about 1 MiB for 40 layers) and no tensors of its own,
since all of them share one pool."""


class Recorder(Protocol):
    """Records what a function launches."""

    def record(self, body: Callable[[], None]) -> Replay:
        """Record `body` without running it; what comes back runs it."""


class Graphs:
    """Runs bodies by key; `recorder` None: always plainly."""

    def __init__(self, recorder: Recorder | None = None, *, most: int = MOST_GRAPHS) -> None:
        """Record at most `most` keys; those beyond run plainly."""
        self._recorder, self._most = recorder, most
        self._replays: dict[Hashable, Replay] = {}

    def __len__(self) -> int:
        return len(self._replays)

    def run(self, key: Hashable | None, body: Callable[[], None]) -> None:
        """Run `body`, or the recording of what had this key before.

        Args:
            key: stands for all that differs between bodies but the numbers in their buffers; None
                for a body that is not worth a recording.
            body: reads and writes buffers that stay where they are.
        """
        replay = self._replays.get(key)
        if replay is not None:
            replay()
            return
        body()
        if self._recorder is not None and key is not None and len(self._replays) < self._most:
            self._replays[key] = self._recorder.record(body)

    def clear(self) -> None:
        """Forget all recordings."""
        self._replays.clear()


class CudaRecorder:
    """CUDA graphs that share one memory pool: they never run at the same time."""

    def __init__(self) -> None:
        """Make the pool."""
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, body: Callable[[], None]) -> Replay:
        """See `Recorder.record`. The body ran before, so every kernel is compiled and loaded."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, pool=self._pool):
            body()
        return graph.replay
