"""Where the native operations read a model's tiles: in the mapped file, and later in huge pages.

A mapped file costs nothing at the start. But where the system keeps it in pages of 4 KiB, a decode
step, which reads every tile once, is up to 1.1 times as fast from huge ones (see `huge_pages`; how
much is for benchmarks/edge/choices.py to say). To take so much
memory from the system would make up a good part of a cold start (1.1 B weights: 0.3 s where it is
at hand, 1.5 s in a virtual machine that gets it from its host). So a start reads the file, and a
thread copies the tiles a little later, tells the operations, and gives the file's pages back.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from tidegate.edge.executors.file_pages import forget_pages
from tidegate.edge.executors.huge_pages import huge_memory
from tidegate.edge.executors.native import Bytes
from tidegate.edge.executors.native_tiles import Tiles
from tidegate.edge.machine import read_machine
from tidegate.engine.exit_threads import start_until_exit

_log = logging.getLogger(__name__)

_PART_BYTES: Final = 8 << 20
_SPARE: Final = 1.25
"""Memory that must be available, as a multiple of the tiles: less and they stay in the file, whose
pages the system can take back."""

Place = Callable[[ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p], object]
"""`tidegate_openvino_place`."""


def _available_bytes() -> int:
    return read_machine().available_bytes


class TilePlace:
    """The place of one model's tiles; must outlive every model compiled with them."""

    def __init__(
        self,
        tiles: Tiles,
        place: Place,
        available: Callable[[], int] = _available_bytes,
        step_s: float = 2.0,
    ) -> None:
        """Start with the tiles where they are.

        Args:
            tiles: of the model.
            place: tells the operations.
            available: bytes of memory that may be taken.
            step_s: after which any step has ended that began before.
        """
        self.tiles, self._step_s = tiles, step_s
        self._place, self._available = place, available
        self._closing = threading.Event()
        self._mover: threading.Thread | None = None
        # Held until nothing points to it any more.
        moved: list[Bytes] = []
        self._moved = moved
        self._undo = weakref.finalize(self, _read_again, place, tiles, moved)

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Within it the model computes none of its products.

        So it takes the memory of its largest steps at the price of its smallest.
        """
        _read_at(self._place, self.tiles, None)
        try:
            yield
        finally:
            _read_at(self._place, self.tiles, self.tiles.data)

    def move_after(self, seconds: float) -> None:
        """Move the tiles to huge pages, in a thread and so many seconds from now."""
        if self.tiles.mapped:
            self._mover = threading.Thread(
                target=self._move, args=(seconds,), name="tidegate-tiles", daemon=True
            )
            start_until_exit(self._mover, self._closing.set)

    @property
    def moved(self) -> bool:
        """They lie in huge pages of their own, by `move_after`."""
        return bool(self._moved)

    def close(self) -> None:
        """Stop moving; no model may run any more that was compiled with the tiles."""
        self._closing.set()
        if self._mover is not None:
            self._mover.join()
            self._mover = None
        self._undo()

    def _move(self, seconds: float) -> None:
        if self._closing.wait(seconds):
            return
        tiles = self.tiles.data
        if self._available() < _SPARE * tiles.nbytes:
            _log.info("tiles stay in the mapped file: %d MiB are not to spare", tiles.nbytes >> 20)
            return
        with contextlib.suppress(MemoryError):
            memory = huge_memory(tiles.nbytes)
            for at in range(0, tiles.nbytes, _PART_BYTES):
                if self._closing.is_set():
                    return
                memory[at : at + _PART_BYTES] = tiles[at : at + _PART_BYTES]
            self._moved.append(memory)
            _read_at(self._place, self.tiles, memory)
            # Only now: a step that ran meanwhile would have read the pages in again.
            self._closing.wait(self._step_s)
            forget_pages(tiles, never_written=True)


def _read_at(place: Place, tiles: Tiles, memory: Bytes | None) -> None:
    begin = tiles.data.ctypes.data
    to = ctypes.c_void_p(None if memory is None else memory.ctypes.data)
    place(ctypes.c_void_p(begin), ctypes.c_void_p(begin + tiles.data.nbytes), to)


def _read_again(place: Place, tiles: Tiles, moved: list[Bytes]) -> None:
    """Undo all, so that nothing reads what is about to be given back."""
    _read_at(place, tiles, tiles.data)
    moved.clear()
