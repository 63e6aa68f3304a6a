"""Memory that decode steps read comes in huge pages where the system gives them."""

from __future__ import annotations

import mmap
import re
import time
from pathlib import Path

import numpy as np

from tidegate.edge.executors.huge_pages import HUGE_BYTES, Collapse, huge_memory

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_kib_at(address: int) -> int:
    """`AnonHugePages` of the mapping that holds the address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1])
    return 0


def test_large_memory_is_in_huge_pages_unless_the_system_forbids_it() -> None:
    data = huge_memory(8 * HUGE_BYTES)
    assert (data.nbytes, data.ctypes.data % HUGE_BYTES) == (8 * HUGE_BYTES, 0)
    data[...] = 1
    given = SETTING.exists() and "[never]" not in SETTING.read_text()
    assert (huge_kib_at(data.ctypes.data) >= HUGE_BYTES >> 10) == given


def test_memory_of_any_size_is_as_long_as_asked() -> None:
    assert [huge_memory(size).nbytes for size in (0, 1, 4097, HUGE_BYTES + 1)] == [
        0,
        1,
        4097,
        HUGE_BYTES + 1,
    ]


def small_pages(nbytes: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Memory as a library gets it, which asks for nothing."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    data = np.frombuffer(mmap.mmap(-1, nbytes, flags=flags), np.uint8)
    data[:] = np.arange(nbytes, dtype=np.uint32) % 251
    return data


def test_memory_that_a_library_took_moves_to_huge_pages_with_what_is_in_it() -> None:
    collapse = Collapse()
    data = small_pages(16 * HUGE_BYTES)
    middle = data.ctypes.data + data.nbytes // 2
    collapse.begin_after(0)
    moved = collapse.wait()
    # How much it can move is the system's; what it says must be so.
    assert (huge_kib_at(middle) > 0) == (moved > 0) or "[always]" in SETTING.read_text()
    np.testing.assert_array_equal(data, np.arange(data.nbytes, dtype=np.uint32) % 251)


def test_memory_that_is_hardly_used_is_left_alone() -> None:
    collapse = Collapse()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    data = np.frombuffer(mmap.mmap(-1, 64 * HUGE_BYTES, flags=flags), np.uint8)
    data[:: 16 * HUGE_BYTES] = 1
    collapse.begin_after(0)
    collapse.wait()
    assert huge_kib_at(data.ctypes.data) == 0 or "[always]" in SETTING.read_text()


def test_closing_before_it_begins_moves_nothing() -> None:
    collapse = Collapse()
    collapse.begin_after(3600)
    began_s = time.monotonic()
    collapse.close()
    assert time.monotonic() - began_s < 5
    assert collapse.huge_bytes == 0


def test_memory_that_was_there_before_is_left_alone() -> None:
    data = small_pages(16 * HUGE_BYTES)
    collapse = Collapse()
    collapse.begin_after(0)
    collapse.wait()
    assert huge_kib_at(data.ctypes.data + data.nbytes // 2) == 0 or (
        "[always]" in SETTING.read_text()
    )
