"""Tiles of all weights of a model in one buffer: a file that is mapped, else memory.

A file of tiles costs nothing to load; `native_place` says what becomes of it then. It is a cache:
named after everything it follows from, written aside and renamed, checked before use, and whatever
is wrong with it leads to tiles in memory and a line in words. Digests find what a disk forgot,
not what somebody wrote, and a file that shrinks while it is mapped ends the process: so a file that
another user owns or may write is not used.

    magic, 8 bytes | length of the tiles, 8 bytes | SHA-256 of the names of the weights, 32 bytes |
    digest of every weight's tiles, 8 bytes each | zeros up to a multiple of 4096 | tiles
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np

from tidegate.edge.executors.huge_pages import huge_memory
from tidegate.edge.executors.native import TILE_ALIGNMENT, Bytes

_MAGIC: Final = b"TGTILES3"
_DIGESTS_AT: Final = 48
_PAGE_BYTES: Final = 4096
_MOST_FILES: Final = 4
"""Kept of one folder: of a model and of one that guesses for it, the old ones and the new ones."""
_SCRATCH: Final = ".tiles-"
_ABANDONED_S: Final = 3600.0
"""Since the last write to a file that is not yet whole: whoever wrote it has ended. The tiles of
1.1 B weights are written in seconds."""

Write = Callable[[Bytes], None]
"""Fills the tiles of one weight."""
Digest = Callable[[Bytes], int]
"""64 bits that change with the tiles of a weight."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Tiles:
    """All tiles, one weight after another; must outlive the model that uses them."""

    data: Bytes
    mapped: bool
    """They lie in a mapped file."""
    source: str
    """Where they came from, in words, such as `cache` or `memory: no cache folder`."""


def load_tiles(
    names: Sequence[str],
    sizes: Sequence[int],
    write: Sequence[Write],
    digest: Digest,
    file: Path | None,
) -> Tiles:
    """Tiles of those sizes in bytes: from `file`, made and kept there, or made in memory.

    Args:
        names: of each weight, its shape included: another release may find others of equal sizes,
            or the same in another order.
        sizes: of each weight's tiles, multiples of `TILE_ALIGNMENT`.
        write: fills each.
        digest: tells damage to a file.
        file: named after the bytes that the tiles follow from; its folder is made. None for memory.
    """
    if file is None:
        return Tiles(
            data=_in_memory(sizes, write), mapped=False, source="memory: no cache folder is set"
        )
    of = sha256("\n".join(names).encode()).digest()
    try:
        data, source = _mapped(file, of, sizes, digest), "cache"
        if data is None:
            _write_file(file, of, sizes, write, digest)
            data, source = _mapped(file, of, sizes, digest), "written to cache"
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


def _head_bytes(weights: int) -> int:
    return -(-(_DIGESTS_AT + 8 * weights) // _PAGE_BYTES) * _PAGE_BYTES


def _head(of: bytes, total: int, digests: Sequence[int]) -> bytes:
    begin = _MAGIC + total.to_bytes(8, "little") + of
    assert len(begin) == _DIGESTS_AT
    return (begin + b"".join(one.to_bytes(8, "little") for one in digests)).ljust(
        _head_bytes(len(digests)), b"\0"
    )


def _mapped(file: Path, of: bytes, sizes: Sequence[int], digest: Digest) -> Bytes | None:
    """The tiles in `file`; None if there is no such file, or it is not ours, whole and right."""
    start, total = _head_bytes(len(sizes)), sum(sizes)
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
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(digest, parts_of(tiles, sizes)))
    if found != _head(of, total, digests):
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


def _write_file(
    file: Path, of: bytes, sizes: Sequence[int], write: Sequence[Write], digest: Digest
) -> None:
    """Write aside, then rename, so that no one ever maps half a file; one weight is held."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    digests: list[int] = []
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=_SCRATCH, delete=False) as scratch:
        path = Path(scratch.name)
        try:
            scratch.seek(_head_bytes(len(sizes)))
            for size, fill in zip(sizes, write, strict=True):
                part = _aligned(size)
                fill(part)
                digests.append(digest(part))
                scratch.write(part.data)
            scratch.seek(0)
            scratch.write(_head(of, sum(sizes), digests))
            scratch.flush()
            path.replace(file)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    _prune(file)


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
