"""Files of tiles: whole and right, or made again; and never a reason not to start."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.edge.executors.native import TILE_ALIGNMENT, Bytes
from tidegate.edge.executors.native_tiles import Tiles, load_tiles, parts_of

NAMES = ["k", "down", "v"]
SIZES = [64, 17 << 20, 128]
"""The second crosses a border between two checked parts."""


def digest(data: Bytes) -> int:
    return zlib.crc32(data.data)


def writers(record: list[int], seed: int = 0) -> list[Callable[[Bytes], None]]:
    """One per weight; notes which were called."""

    def writer(place: int) -> Callable[[Bytes], None]:
        def write(out: Bytes) -> None:
            assert out.ctypes.data % TILE_ALIGNMENT == 0
            record.append(place)
            out[:] = np.random.default_rng([seed, place]).integers(0, 256, out.size, np.uint8)

        return write

    return [writer(place) for place in range(len(SIZES))]


def load(file: Path | None, record: list[int] | None = None) -> Tiles:
    return load_tiles(NAMES, SIZES, writers([] if record is None else record), digest, file)


@pytest.fixture(scope="module")
def expected() -> Bytes:
    return load(None).data.copy()


def test_a_file_is_written_once_and_then_mapped(tmp_path: Path, expected: Bytes) -> None:
    file = tmp_path / "new" / "model.tiles"
    first: list[int] = []
    second: list[int] = []
    assert load(file, first).source == "written to cache"
    again = load(file, second)
    assert again.source == "cache"
    assert (first, second) == ([0, 1, 2], [])
    assert again.data.ctypes.data % TILE_ALIGNMENT == 0
    np.testing.assert_array_equal(again.data, expected)
    assert [part.size for part in parts_of(again.data, SIZES)] == SIZES
    assert [path.name for path in file.parent.iterdir()] == ["model.tiles"]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "a bit of the first part": lambda body: flipped(body, 5000),
    "a bit of the last part": lambda body: flipped(body, len(body) - 1),
    "the digest of the names": lambda body: flipped(body, 17),
    "a checksum": lambda body: flipped(body, 49),
    "the magic": lambda body: flipped(body, 0),
    "the length": lambda body: flipped(body, 8),
    "a byte too few": lambda body: body[:-1],
    "a byte too many": lambda body: body + b"\0",
    "nothing left": lambda body: b"",
}


def flipped(body: bytes, place: int) -> bytes:
    return body[:place] + bytes([body[place] ^ 4]) + body[place + 1 :]


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_made_again(name: str, tmp_path: Path, expected: Bytes) -> None:
    file = tmp_path / "model.tiles"
    load(file)
    file.write_bytes(DAMAGE[name](file.read_bytes()))
    again = load(file)
    assert again.source == "written to cache"
    np.testing.assert_array_equal(again.data, expected)
    assert load(file).source == "cache"


def test_a_file_of_other_weights_of_the_same_sizes_is_made_again(tmp_path: Path) -> None:
    for names in (["k", "v"], ["v", "k"]):
        write = writers([])
        given = {"k": write[0], "v": write[2]}
        tiles = load_tiles(
            names, [64, 64], [given[n] for n in names], digest, tmp_path / "model.tiles"
        )
        assert tiles.source == "written to cache"


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_file_that_others_may_write_is_made_again(
    mode: int, tmp_path: Path, expected: Bytes
) -> None:
    file = tmp_path / "model.tiles"
    load(file)
    file.chmod(mode)
    again = load(file)
    assert again.source == "written to cache"
    assert file.stat().st_mode & 0o777 == 0o600
    np.testing.assert_array_equal(again.data, expected)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give away"
)
def test_a_file_of_another_user_is_made_again(tmp_path: Path) -> None:
    file = tmp_path / "model.tiles"
    load(file)
    os.chown(file, 12345, -1)
    assert load(file).source == "written to cache"
    assert file.stat().st_uid == 0


def test_a_new_folder_is_for_its_user_only(tmp_path: Path) -> None:
    load(tmp_path / "new" / "model.tiles")
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    for name, age_s in ((".tiles-old", 7200), (".tiles-running", 60)):
        (tmp_path / name).write_bytes(b"half")
        then_s = time.time() - age_s
        os.utime(tmp_path / name, (then_s, then_s))
    load(tmp_path / "model.tiles")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tiles-running", "model.tiles"]


def test_a_folder_that_cannot_be_written_leads_to_tiles_in_memory(
    tmp_path: Path, expected: Bytes
) -> None:
    (tmp_path / "plain").write_text("a file where the folder should be")
    tiles = load(tmp_path / "plain" / "model.tiles")
    assert tiles.source.startswith("memory: ")
    assert "plain" in tiles.source
    np.testing.assert_array_equal(tiles.data, expected)


def test_a_writer_that_fails_leaves_no_file_behind(tmp_path: Path) -> None:
    def fail(out: Bytes) -> None:
        raise MemoryError("no room")

    with pytest.raises(MemoryError):
        load_tiles(["k"], [64], [fail], digest, tmp_path / "model.tiles")
    assert list(tmp_path.iterdir()) == []


def test_only_the_files_used_last_are_kept(tmp_path: Path) -> None:
    for age, name in enumerate(("one", "two", "three", "four")):
        load_tiles(["k"], [64], writers([])[:1], digest, tmp_path / f"{name}.tiles")
        os.utime(tmp_path / f"{name}.tiles", (1000 - age, 1000 - age))
    (tmp_path / "other").write_text("not ours")
    load_tiles(
        ["k"], [64], writers([])[:1], digest, tmp_path / "three.tiles"
    )  # used, so the newest of them
    load_tiles(["k"], [64], writers([])[:1], digest, tmp_path / "new.tiles")
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["new.tiles", "one.tiles", "other", "three.tiles", "two.tiles"]


@given(st.lists(st.integers(0, 40).map(lambda n: n * TILE_ALIGNMENT), min_size=1))
def test_parts_lie_one_after_another(sizes: list[int]) -> None:
    data = np.arange(sum(sizes), dtype=np.uint32).astype(np.uint8)
    parts = parts_of(data, sizes)
    assert [part.size for part in parts] == sizes
    np.testing.assert_array_equal(np.concatenate(parts), data)
