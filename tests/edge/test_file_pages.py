"""Pages that were read are given back, and only where nothing can be lost."""

from __future__ import annotations

import mmap
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from tidegate.edge.executors.file_pages import forget_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what is mapped")
NBYTES = 8 << 20


def written(folder: Path) -> Path:
    file = folder / "weights.bin"
    file.write_bytes(np.random.default_rng(0).integers(0, 256, NBYTES, np.uint8).tobytes())
    return file


def resident_bytes(address: int) -> int:
    """Of the mapping that holds the address."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        where = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if where:
            found = int(where[1], 16) <= address < int(where[2], 16)
        elif found and line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("not mapped")


def test_a_mapped_file_is_forgotten_and_read_again(tmp_path: Path) -> None:
    file = written(tmp_path)
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ)
    data = np.frombuffer(mapped, np.uint8)
    total = int(data.sum(dtype=np.uint64))
    middle = data[100:-100]
    before = resident_bytes(data.ctypes.data)
    assert forget_pages(middle)
    # All but the first and the last page, which `middle` holds in part.
    assert before - resident_bytes(data.ctypes.data) >= NBYTES - 2 * mmap.PAGESIZE
    assert int(data.sum(dtype=np.uint64)) == total


def test_memory_that_is_no_file_keeps_what_it_holds() -> None:
    data = np.full(NBYTES, 7, np.uint8)
    assert not forget_pages(data)
    assert (data == 7).all()


def test_a_mapping_that_can_be_written_keeps_what_it_holds(tmp_path: Path) -> None:
    data = np.memmap(written(tmp_path), np.uint8, "c").view(np.ndarray)
    data[:] = 9
    assert not forget_pages(data)
    assert (data == 9).all()


def test_less_than_a_page_is_left_alone(tmp_path: Path) -> None:
    data = np.memmap(written(tmp_path), np.uint8, "r").view(np.ndarray)
    assert not forget_pages(data[1:100])
