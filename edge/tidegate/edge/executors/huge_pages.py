"""Memory in huge pages: what every decode step reads from end to end.

With pages of 4 KiB a read from memory stops at every page for a table walk, which a virtual machine
makes longer, and the processor fetches ahead within a page only: two threads of Zen 4 read 640 MiB
at 20 to 29 GB/s from small pages and at 32 to 34 GB/s from huge ones. Linux gives huge pages to who
asks for them ("madvise", the usual setting); where it does not, these are plain pages.
"""

from __future__ import annotations

import ctypes
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

HUGE_BYTES: Final = 2 << 20

_LEAST_BYTES: Final = 16 << 20
"""Of a mapping that is worth it: weights, not what Python or a library works with."""
_LEAST_SHARE: Final = 0.95
"""Of it that is in memory: a page that was never written would take memory that nobody needs."""
_AT_ONCE_BYTES: Final = 64 << 20
"""Between two looks at whether to stop: about a tenth of a second."""
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
"""Linux's; Python names the first only. The second is there since 6.1."""

_MAPPING: Final = re.compile(
    r"^(?P<first>[0-9a-f]+)-(?P<last>[0-9a-f]+) rw-p 0+ 00:00 0 *\n"
    r"(?:[A-Z]\w+: .*\n)*?Rss: +(?P<rss>\d+) kB$",
    re.MULTILINE,
)
"""Of /proc/self/smaps: memory without a file or a name."""


def huge_memory(nbytes: int) -> npt.NDArray[np.uint8]:
    """Memory [nbytes] that begins at a huge page; its pages are taken when they are written.

    numpy asks Linux for huge pages where an array is large (NUMPY_MADVISE_HUGEPAGE).
    """
    whole = np.empty(nbytes + HUGE_BYTES, np.uint8)
    start = -whole.ctypes.data % HUGE_BYTES
    return whole[start : start + nbytes]


class Collapse:
    """Moves what a library allocates from now on to huge pages, in a thread, after a while.

    What it is worth: benchmarks/edge/choices.py. Linux copies page
    by page while others read: nothing changes but where the bytes lie. Where it cannot do so at
    once, it is asked to do it in its own time.
    """

    def __init__(self) -> None:
        """Take note of the memory that is there already."""
        self.huge_bytes = 0
        self._there = {begin for begin, _ in _large_mappings(_smaps())}
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def begin_after(self, seconds: float) -> None:
        """Move what has come since, in so many seconds from now."""
        self._thread = threading.Thread(
            target=self._run, args=(seconds,), name="tidegate-huge-pages", daemon=True
        )
        self._thread.start()

    def wait(self) -> int:
        """Until all is done: bytes that lie in huge pages by it."""
        if self._thread is not None:
            self._thread.join()
        return self.huge_bytes

    def close(self) -> None:
        """Leave the rest as it is."""
        self._closing.set()
        self.wait()

    def _run(self, after_s: float) -> None:
        if self._closing.wait(after_s) or sys.platform != "linux":
            return
        advise = ctypes.CDLL(None).madvise
        for first, last in _large_mappings(_smaps()):
            for begin in range(first, last, _AT_ONCE_BYTES) if first not in self._there else ():
                if self._closing.is_set():
                    return
                nbytes = min(_AT_ONCE_BYTES, last - begin)
                place, length = ctypes.c_void_p(begin), ctypes.c_size_t(nbytes)
                advise(place, length, _MADV_HUGEPAGE)
                if advise(place, length, _MADV_COLLAPSE) == 0:
                    self.huge_bytes += nbytes


def _smaps() -> str:
    file = Path("/proc/self/smaps")
    return file.read_text(encoding="utf-8") if file.exists() else ""


def _large_mappings(smaps: str) -> Iterator[tuple[int, int]]:
    """Whole huge pages of this process's large anonymous memory: from address to before address.

    What is gone by the time it is advised on is refused by Linux, and what has taken its place is
    none the worse.

    Args:
        smaps: the text of /proc/self/smaps.
    """
    for found in _MAPPING.finditer(smaps):
        first, last = int(found["first"], 16), int(found["last"], 16)
        resident = int(found["rss"]) << 10
        if last - first >= _LEAST_BYTES and resident >= _LEAST_SHARE * (last - first):
            yield -(-first // HUGE_BYTES) * HUGE_BYTES, last // HUGE_BYTES * HUGE_BYTES
