"""Memory that decode steps read comes in huge pages where the system gives them."""

from __future__ import annotations

import re
from pathlib import Path

from tidegate.edge.executors.huge_pages import HUGE_BYTES, huge_memory

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def asks_for_huge_pages(address: int) -> bool:
    """Whether the mapping that holds the address does: `hg` of its `VmFlags`."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    return False


def test_large_memory_asks_for_huge_pages_where_the_system_has_them() -> None:
    # How many it gets depends on how much of the machine's memory still lies together.
    data = huge_memory(8 * HUGE_BYTES)
    assert (data.nbytes, data.ctypes.data % HUGE_BYTES) == (8 * HUGE_BYTES, 0)
    data[...] = 1
    assert asks_for_huge_pages(data.ctypes.data) == SETTING.exists()


def test_memory_of_any_size_is_as_long_as_asked() -> None:
    assert [huge_memory(size).nbytes for size in (0, 1, 4097, HUGE_BYTES + 1)] == [
        0,
        1,
        4097,
        HUGE_BYTES + 1,
    ]
