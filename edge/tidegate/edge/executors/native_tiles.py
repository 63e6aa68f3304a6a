"""Tiles of all weights of a model in one buffer: a file that is mapped, else memory.

A file of tiles costs nothing to load; `native_place` says what becomes of it then. It is a cache:
named after everything it follows from, written aside and renamed, checked before use, and whatever
is wrong with it leads to tiles in memory and a line in words. Checksums find what a disk forgot,
not what somebody wrote, and a file that shrinks while it is mapped ends the process: so a file that
another user owns or may write is not used.

    magic, 8 bytes | length of the tiles, 8 bytes | SHA-256 of the names of the weights, 32 bytes |
    CRC-32 of every 16 MiB, 4 bytes each | zeros up to a multiple of 4096 | tiles
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np

from tidegate.edge.executors.huge_pages import huge_memory
from tidegate.edge.executors.native import TILE_ALIGNMENT, Bytes

_MAGIC: Final = b"TGTILES2"
_SUMS_AT: Final = 48
_PART_BYTES: Final = 16 << 20
_PAGE_BYTES: Final = 4096
_MOST_FILES: Final = 4
"""Kept of one folder: of a model and of one that guesses for it, the old ones and the new ones."""
_SCRATCH: Final = ".tiles-"
_ABANDONED_S: Final = 3600.0
"""Since the last write to a file that is not yet whole: whoever wrote it has ended. The tiles of
1.1 B weights are written in seconds."""

Write = Callable[[Bytes], None]
"""Fills the tiles of one weight."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Tiles:
    """All tiles, one weight after another; must outlive the model that uses them."""

    data: Bytes
    mapped: bool
    """They lie in a mapped file."""
    source: str
    """Where they came from, in words, such as `cache` or `memory: no cache folder`."""


def load_tiles(
    names: Sequence[str], sizes: Sequence[int], write: Sequence[Write], file: Path | None
) -> Tiles:
    """Tiles of those sizes in bytes: from `file`, made and kept there, or made in memory.

    Args:
        names: of each weight, its shape included: another release may find others of equal sizes,
            or the same in another order.
        sizes: of each weight's tiles, multiples of `TILE_ALIGNMENT`.
        write: fills each.
        file: named after the bytes that the tiles follow from; its folder is made. None for memory.
    """
    total = sum(sizes)
    if file is None:
        return Tiles(
            data=_in_memory(sizes, write), mapped=False, source="memory: no cache folder is set"
        )
    of = _digest(names)
    try:
        data, source = _mapped(file, of, total), "cache"
        if data is None:
            _write_file(file, of, sizes, write)
            data, source = _mapped(file, of, total), "written to cache"
            source = source if data is not None else f"{file} is not as it was written"
    except OSError as error:
        data, source = None, str(error)
    if data is None:
        return Tiles(data=_in_memory(sizes, write), mapped=False, source=f"memory: {source}")
    return Tiles(data=data, mapped=True, source=source)


def parts_of(data: Bytes, sizes: Sequence[int]) -> list[Bytes]:
    """The tiles of each weight."""
    ends = np.cumsum([0, *sizes]).tolist()
    return [data[begin:end] for begin, end in pairwise(ends)]


def _in_memory(sizes: Sequence[int], write: Sequence[Write]) -> Bytes:
    data = huge_memory(sum(sizes))
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda fill, part: fill(part), write, parts_of(data, sizes)))
    return data


def _aligned(nbytes: int) -> Bytes:
    whole = np.empty(nbytes + TILE_ALIGNMENT, np.uint8)
    start = -whole.ctypes.data % TILE_ALIGNMENT
    return whole[start : start + nbytes]


def _digest(names: Sequence[str]) -> bytes:
    return hashlib.sha256("\n".join(names).encode()).digest()


def _head_bytes(total: int) -> int:
    needed = _SUMS_AT + 4 * -(-total // _PART_BYTES)
    return -(-needed // _PAGE_BYTES) * _PAGE_BYTES


def _head(of: bytes, total: int, sums: list[int]) -> bytes:
    begin = _MAGIC + total.to_bytes(8, "little") + of
    assert len(begin) == _SUMS_AT
    return (begin + b"".join(s.to_bytes(4, "little") for s in sums)).ljust(
        _head_bytes(total), b"\0"
    )


def _mapped(file: Path, of: bytes, total: int) -> Bytes | None:
    """The tiles in `file`; None if there is no such file, or it is not ours, whole and right."""
    start = _head_bytes(total)
    if not file.is_file():
        return None
    with file.open("rb") as opened:
        # What is looked at is what is mapped, whatever becomes of the name.
        facts = os.fstat(opened.fileno())
        if facts.st_size != start + total or not _is_ours(facts):
            return None
        # Private, because OpenVINO takes no array that cannot be written; nothing writes to it.
        data: Bytes = np.memmap(opened, np.uint8, "c").view(np.ndarray)
    found, tiles = data[:start].tobytes(), data[start:]
    if found != _head(of, total, _sums(tiles)):
        return None
    with contextlib.suppress(OSError):  # a folder that is only read serves as well
        file.touch()  # the most recently used are kept
    return tiles


def _is_ours(facts: os.stat_result) -> bool:
    """Whether nobody else can change the file; of the machine's own user it may be."""
    if sys.platform == "win32":
        return True
    others_write = facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return facts.st_uid in (0, os.geteuid()) and not others_write


def _sums(data: Bytes) -> list[int]:
    """CRC-32 of every part, against a disk that forgets; several at once, at 2 GB/s each."""
    parts = [data[i : i + _PART_BYTES].data for i in range(0, data.nbytes, _PART_BYTES)]
    with ThreadPoolExecutor(max_workers=4) as pool:
        return list(pool.map(zlib.crc32, parts))


def _write_file(file: Path, of: bytes, sizes: Sequence[int], write: Sequence[Write]) -> None:
    """Write aside, then rename, so that no one ever maps half a file; one weight is held."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    total = sum(sizes)
    sums = _RunningSums()
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=_SCRATCH, delete=False) as scratch:
        path = Path(scratch.name)
        try:
            scratch.seek(_head_bytes(total))
            for size, fill in zip(sizes, write, strict=True):
                part = _aligned(size)
                fill(part)
                sums.add(part)
                scratch.write(part.data)
            scratch.seek(0)
            scratch.write(_head(of, total, sums.finish()))
            scratch.flush()
            path.replace(file)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    _prune(file)


class _RunningSums:
    """The CRC-32 of every part of a stream."""

    def __init__(self) -> None:
        self._done: list[int] = []
        self._sum, self._bytes = 0, 0

    def add(self, data: Bytes) -> None:
        """Go on with `data`."""
        at = 0
        while at < data.nbytes:
            piece = data[at : at + _PART_BYTES - self._bytes]
            self._sum = zlib.crc32(piece.data, self._sum)
            self._bytes += piece.nbytes
            at += piece.nbytes
            if self._bytes == _PART_BYTES:
                self._done.append(self._sum)
                self._sum, self._bytes = 0, 0

    def finish(self) -> list[int]:
        """All of them."""
        return [*self._done, self._sum] if self._bytes else self._done


def _prune(newest: Path) -> None:
    """Remove all but the most recently used files of the folder; a mapped one lives on unseen.

    So are those that a process which was killed has left half-written.
    """
    folder = newest.parent
    with contextlib.suppress(OSError):  # others may remove the same
        others = [file for file in folder.glob("*.tiles") if file != newest]
        others.sort(key=lambda file: file.stat().st_mtime, reverse=True)
        last_s = time.time() - _ABANDONED_S
        half = [file for file in folder.glob(f"{_SCRATCH}*") if file.stat().st_mtime < last_s]
        for file in [*others[_MOST_FILES - 1 :], *half]:
            file.unlink(missing_ok=True)
