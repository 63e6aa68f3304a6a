"""Gives back the pages of a mapped file that were read once and are not needed again.

They would stay in this process's memory for as long as there is room, beside what was made of them.
Read again they come back from the file, so nothing is lost; memory that is no unwritable mapping of
a file would be, and is left alone.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt


def forget_pages(data: npt.NDArray[np.uint8], *, never_written: bool = False) -> bool:
    """Drop the whole pages within `data` from memory; False where that cannot be done safely.

    Args:
        data: of a mapped file.
        never_written: the mapping may be writable, but the caller knows that nobody has written.
    """
    if sys.platform != "linux":
        return False
    begin = -(-data.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (data.ctypes.data + data.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if begin >= end or not _is_file(begin, end, never_written):
        return False
    place, length = ctypes.c_void_p(begin), ctypes.c_size_t(end - begin)
    return bool(ctypes.CDLL(None).madvise(place, length, mmap.MADV_DONTNEED) == 0)


def _is_file(begin: int, end: int, writable: bool) -> bool:
    """Whether one mapping of a file covers the addresses, and if this process can write to it."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        where, rights, _, _, inode, *_ = line.split()
        first, last = (int(address, 16) for address in where.split("-"))
        if first <= begin and end <= last:
            return inode != "0" and (writable or "w" not in rights)
    return False
