"""`Graphs`: whole steps recorded once and replayed, where a device can.

A step of a shape that was seen before is replayed with one launch; a new shape runs plainly and is
recorded right after, so nothing is recorded that traffic does not ask for and the first request
does not wait for shapes it never has. Keyed by all that a recording bakes in. What cannot be
recorded runs plainly, and the log says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Final, Protocol

import torch

_log = logging.getLogger(__name__)

Replay = Callable[[], None]

MOST_GRAPHS: Final = 128
"""Recordings kept, those used last. Each holds its launches (about 1 MiB for 40 layers) and no
tensors of its own, since all of them share one pool."""


class Recorder(Protocol):
    """Records what a function launches."""

    def record(self, body: Callable[[], None]) -> Replay:
        """Record `body` without running it; what comes back runs it."""


class Graphs:
    """Runs bodies by key; `recorder` None: always plainly."""

    def __init__(self, recorder: Recorder | None = None, *, most: int = MOST_GRAPHS) -> None:
        """Keep at most `most` recordings: a further one takes the place of the longest unused."""
        self._recorder, self._most = recorder, most
        self._replays: dict[Hashable, Replay] = {}
        """The longest unused first."""
        self._plain: set[Hashable] = set()
        """What could not be recorded."""

    def __len__(self) -> int:
        return len(self._replays)

    def run(self, key: Hashable | None, body: Callable[[], None]) -> None:
        """Run `body`, or the recording of what had this key before.

        Args:
            key: stands for all that differs between bodies but the numbers in their buffers; None
                for a body that is not worth a recording.
            body: reads and writes buffers that stay where they are.
        """
        replay = self._replays.pop(key, None)
        if replay is not None:
            self._replays[key] = replay
            replay()
            return
        body()
        if key is None or key in self._plain:
            return
        if self._recorder is not None:
            self._record(self._recorder, key, body)

    def _record(self, recorder: Recorder, key: Hashable, body: Callable[[], None]) -> None:
        """Keep a recording; a body that cannot be recorded has run, and will run plainly."""
        try:
            self._replays[key] = recorder.record(body)
        except RuntimeError as error:  # the boundary between recording and serving
            self._plain.add(key)
            _log.warning("a step cannot be recorded and runs slower: %s", error)
        if len(self._replays) > self._most:
            # Recording waits for the device, so nothing runs that would be freed here.
            del self._replays[next(iter(self._replays))]

    def clear(self) -> None:
        """Forget all recordings."""
        self._replays.clear()
        self._plain.clear()


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
