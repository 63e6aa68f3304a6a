"""Memory that decode steps read comes in huge pages where the system gives them."""

from __future__ import annotations

import re
from pathlib import Path

from tidegate.edge.executors.huge_pages import HUGE_BYTES, huge_memory

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
