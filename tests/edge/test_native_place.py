"""Tiles move from their file to memory while the model runs, and nothing is read that is gone."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from tidegate.edge.executors.native import Bytes
from tidegate.edge.executors.native_place import TilePlace
from tidegate.edge.executors.native_tiles import Tiles, load_tiles

SIZE = 20 << 20
"""More than two parts of what is copied at once."""


def digest(data: Bytes) -> int:
    return zlib.crc32(data.data)


class Operations:
    """What the native operations remember: where tiles that the graph has at `begin` are read."""

    def __init__(self) -> None:
        self.to: dict[int, int | None] = {}

    def place(self, begin: ctypes.c_void_p, end: ctypes.c_void_p, to: ctypes.c_void_p) -> None:
        assert begin.value is not None
        assert end.value == begin.value + SIZE
        self.to.pop(begin.value, None)
        if to.value != begin.value:
            self.to[begin.value] = to.value

    def read(self, tiles: Bytes) -> Bytes:
        """The bytes that a product would read."""
        address = self.to.get(tiles.ctypes.data, tiles.ctypes.data)
        assert address is not None
        return np.frombuffer(ctypes.string_at(address, tiles.nbytes), np.uint8)


def expected() -> Bytes:
    return np.random.default_rng(3).integers(0, 256, SIZE, np.uint8)


def tiles_of(file: Path | None) -> Tiles:
    def write(out: Bytes) -> None:
        out[:] = expected()

    return load_tiles(["w"], [SIZE], [write], digest, file)


def wait_until_moved(place: TilePlace) -> None:
    deadline = time.monotonic() + 20
    while not place.moved:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_mapped_tiles_move_to_memory_and_are_the_same(tmp_path: Path) -> None:
    operations, tiles = Operations(), tiles_of(tmp_path / "model.tiles")
    place = TilePlace(tiles, operations.place)
    place.move_after(0)
    wait_until_moved(place)
    while not operations.to:
        time.sleep(0.001)
    (to,) = operations.to.values()
    assert to != tiles.data.ctypes.data
    np.testing.assert_array_equal(operations.read(tiles.data), expected())
    place.close()
    assert operations.to == {}
    np.testing.assert_array_equal(operations.read(tiles.data), expected())


def resident_kib(tiles: Bytes) -> int:
    """Of the mapping that the tiles lie in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= tiles.ctypes.data < int(found[2], 16)
        elif inside and line.startswith("Rss:"):
            return int(line.split()[1])
    raise AssertionError("not mapped")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what is mapped")
def test_a_file_that_steps_read_until_the_move_leaves_memory_after_it(tmp_path: Path) -> None:
    operations, tiles = Operations(), tiles_of(tmp_path / "model.tiles")
    place = TilePlace(tiles, operations.place, step_s=0.05)
    place.move_after(0)
    while not operations.to:
        operations.read(tiles.data)  # as a step does that runs meanwhile
    deadline = time.monotonic() + 20
    while resident_kib(tiles.data) > 1024:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    place.close()


def test_tiles_in_memory_stay_where_they_are() -> None:
    operations = Operations()
    place = TilePlace(tiles_of(None), operations.place)
    place.move_after(0)
    place.close()
    assert (operations.to, place.moved) == ({}, False)


def test_tiles_stay_in_the_file_where_memory_is_short(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    operations = Operations()
    place = TilePlace(tiles_of(tmp_path / "model.tiles"), operations.place, lambda: SIZE)
    with caplog.at_level("INFO"):
        place.move_after(0)
        deadline = time.monotonic() + 20
        while "stay in the mapped file: 20 MiB" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.005)
    place.close()
    assert (operations.to, place.moved) == ({}, False)


def test_closing_before_the_move_leaves_all_as_it_was(tmp_path: Path) -> None:
    operations = Operations()
    place = TilePlace(tiles_of(tmp_path / "model.tiles"), operations.place)
    place.move_after(3600)
    place.close()
    assert (operations.to, place.moved) == ({}, False)


def test_a_place_that_is_dropped_unclosed_leaves_no_address_behind(tmp_path: Path) -> None:
    operations = Operations()
    place = TilePlace(tiles_of(tmp_path / "model.tiles"), operations.place)
    place.move_after(0)
    wait_until_moved(place)
    deadline = time.monotonic() + 20
    while not operations.to:
        time.sleep(0.001)
    del place
    while operations.to:  # its thread may still be about to end
        assert time.monotonic() < deadline
        gc.collect()


def failing_rehearsal(place: TilePlace, operations: Operations) -> None:
    with place.rehearsal():
        assert operations.to == {place.tiles.data.ctypes.data: None}
        raise ZeroDivisionError


def test_a_rehearsal_ends_also_where_a_step_fails(tmp_path: Path) -> None:
    operations = Operations()
    place = TilePlace(tiles_of(tmp_path / "model.tiles"), operations.place)
    with pytest.raises(ZeroDivisionError):
        failing_rehearsal(place, operations)
    assert operations.to == {}
