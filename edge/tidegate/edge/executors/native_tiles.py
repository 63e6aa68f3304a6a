"""Tiles of all weights of a model in one buffer: a file that is mapped, else memory.

A file of tiles costs nothing to load and its pages are shared, given back under pressure and
counted once. It is a cache: named after everything it follows from, written aside and renamed,
checked before use, and whatever is wrong with it leads to tiles in memory and a line in words.

    magic, 8 bytes | length of the tiles, 8 bytes | CRC-32 of every 16 MiB, 4 bytes each |
    zeros up to a multiple of 4096 | tiles
"""

from __future__ import annotations

import contextlib
import tempfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np

from tidegate.edge.executors.native import TILE_ALIGNMENT, Bytes

_MAGIC: Final = b"TGTILES1"
_PART_BYTES: Final = 16 << 20
_PAGE_BYTES: Final = 4096
_MOST_FILES: Final = 4
"""Kept of one folder: of a model and of one that guesses for it, the old ones and the new ones."""

Write = Callable[[Bytes], None]
"""Fills the tiles of one weight."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Tiles:
    """All tiles, one weight after another; must outlive the model that uses them."""

    data: Bytes
    source: str
    """Where they came from, in words, such as `cache` or `memory: no cache folder`."""


def load_tiles(sizes: Sequence[int], write: Sequence[Write], file: Path | None) -> Tiles:
    """Tiles of those sizes in bytes: from `file`, made and kept there, or made in memory.

    Args:
        sizes: of each weight's tiles, multiples of `TILE_ALIGNMENT`.
        write: fills each.
        file: named after all that the tiles follow from; its folder is made. None for memory.
    """
    total = sum(sizes)
    if file is None:
        return Tiles(data=_in_memory(sizes, write), source="memory: no cache folder is set")
    try:
        data, source = _mapped(file, total), "cache"
        if data is None:
            _write_file(file, sizes, write)
            data, source = _mapped(file, total), "written to cache"
    except OSError as error:
        data, source = None, str(error)
    if data is None:
        return Tiles(data=_in_memory(sizes, write), source=f"memory: {source}")
    return Tiles(data=data, source=source)


def parts_of(data: Bytes, sizes: Sequence[int]) -> list[Bytes]:
    """The tiles of each weight."""
    ends = np.cumsum([0, *sizes]).tolist()
    return [data[begin:end] for begin, end in pairwise(ends)]


def _in_memory(sizes: Sequence[int], write: Sequence[Write]) -> Bytes:
    data = _aligned(sum(sizes))
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda fill, part: fill(part), write, parts_of(data, sizes)))
    return data


def _aligned(nbytes: int) -> Bytes:
    whole = np.empty(nbytes + TILE_ALIGNMENT, np.uint8)
    start = -whole.ctypes.data % TILE_ALIGNMENT
    return whole[start : start + nbytes]


def _head_bytes(total: int) -> int:
    needed = 16 + 4 * -(-total // _PART_BYTES)
    return -(-needed // _PAGE_BYTES) * _PAGE_BYTES


def _head(total: int, sums: list[int]) -> bytes:
    head = _MAGIC + total.to_bytes(8, "little") + b"".join(s.to_bytes(4, "little") for s in sums)
    return head.ljust(_head_bytes(total), b"\0")


def _mapped(file: Path, total: int) -> Bytes | None:
    """The tiles in `file`; None if there is no such file, or it is not whole and right."""
    start = _head_bytes(total)
    if not file.is_file() or file.stat().st_size != start + total:
        return None
    # Private, because OpenVINO takes no array that cannot be written; nothing writes to it.
    data: Bytes = np.memmap(file, np.uint8, "c").view(np.ndarray)
    found, tiles = data[:start].tobytes(), data[start:]
    file.touch()  # the most recently used are kept
    return tiles if found == _head(total, _sums(tiles)) else None


def _sums(data: Bytes) -> list[int]:
    """CRC-32 of every part, against a disk that forgets; several at once, at 2 GB/s each."""
    parts = [data[i : i + _PART_BYTES].data for i in range(0, data.nbytes, _PART_BYTES)]
    with ThreadPoolExecutor(max_workers=4) as pool:
        return list(pool.map(zlib.crc32, parts))


def _write_file(file: Path, sizes: Sequence[int], write: Sequence[Write]) -> None:
    """Write aside, then rename, so that no one ever maps half a file; one weight is held."""
    file.parent.mkdir(parents=True, exist_ok=True)
    total = sum(sizes)
    sums = _RunningSums()
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".tiles-", delete=False) as scratch:
        path = Path(scratch.name)
        try:
            scratch.seek(_head_bytes(total))
            for size, fill in zip(sizes, write, strict=True):
                part = _aligned(size)
                fill(part)
                sums.add(part)
                scratch.write(part.data)
            scratch.seek(0)
            scratch.write(_head(total, sums.finish()))
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
    """Remove all but the most recently used files of the folder; a mapped one lives on unseen."""
    others = [file for file in newest.parent.glob("*.tiles") if file != newest]
    others.sort(key=lambda file: file.stat().st_mtime, reverse=True)
    for file in others[_MOST_FILES - 1 :]:
        with contextlib.suppress(OSError):
            file.unlink()
