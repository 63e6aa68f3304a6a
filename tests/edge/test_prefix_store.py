"""The prefix store: bounded, lasting, and never giving back what was not written."""

from __future__ import annotations

import logging
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tidegate.edge.prefix_store import FolderStore, NoStore, open_store
from tidegate.edge.prefix_store_files import MAGIC, OVERHEAD_BYTES, UnitFolder
from tidegate.errors import ConfigError

UNIT = 1000
FILE = UNIT + OVERHEAD_BYTES


def key_of(number: int) -> bytes:
    return number.to_bytes(16, "big")


def data_of(number: int) -> bytes:
    return random.Random(number).randbytes(UNIT)


@contextmanager
def opened(folder: Path, *, units: int = 100) -> Iterator[FolderStore]:
    store = open_store(folder, budget_bytes=units * FILE)
    assert isinstance(store, FolderStore)
    try:
        yield store
    finally:
        store.close()


def fill(folder: Path, *numbers: int, units: int = 100) -> None:
    """One life of a store, in which these units are saved."""
    with opened(folder, units=units) as store:
        for number in numbers:
            store.save(key_of(number), data_of(number))


def unit_file(folder: Path, number: int) -> Path:
    return folder / f"{key_of(number).hex()}.kv"


def test_what_is_saved_is_there_at_once_and_after_a_restart(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.save(key_of(1), data_of(1))
        assert store.holds(key_of(1))
        assert store.load(key_of(1)) == data_of(1)
        assert not store.holds(key_of(2))
        assert store.load(key_of(2)) is None
    with opened(tmp_path) as store:
        assert store.holds(key_of(1))
        assert store.load(key_of(1)) == data_of(1)
        assert store.numbers().kept_bytes == FILE
        assert store.numbers().errors == 0


def test_nobody_else_can_read_the_files_and_they_show_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "prefixes"
    with opened(folder) as store:
        store.save(key_of(1), b"the secret prompt " * 50)
    assert folder.stat().st_mode & 0o777 == 0o700
    files = list(folder.iterdir())
    assert len(files) == 3
    for path in files:
        assert path.stat().st_mode & 0o777 == 0o600, path
        assert b"secret" not in path.read_bytes()


@pytest.mark.parametrize("place", [0, 5, len(MAGIC), len(MAGIC) + 11, 200, FILE - 17, FILE - 1])
def test_a_changed_byte_anywhere_is_noticed_and_the_file_removed(
    tmp_path: Path, place: int
) -> None:
    fill(tmp_path, 1, 2)
    path = unit_file(tmp_path, 1)
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << random.Random(place).randrange(8)
    path.write_bytes(content)
    with opened(tmp_path) as store:
        assert store.load(key_of(1)) is None
        assert not store.holds(key_of(1))
        assert not path.exists()
        assert store.load(key_of(2)) == data_of(2)
        assert (store.numbers().errors, store.numbers().units) == (1, 1)


@pytest.mark.parametrize("kind", ["empty", "cut", "longer", "foreign", "future", "renamed", "key"])
def test_what_is_not_a_whole_unit_of_this_store_is_ignored_and_removed(
    tmp_path: Path, kind: str
) -> None:
    fill(tmp_path, 1)
    path = unit_file(tmp_path, 1)
    content = path.read_bytes()
    changed = {
        "empty": b"",
        "cut": content[: FILE // 2],
        "longer": content + b"\0",
        "foreign": b"something else entirely" * 40,
        "future": MAGIC.replace(b"1", b"2") + content[len(MAGIC) :],
    }
    path.write_bytes(changed.get(kind, content))
    wanted = key_of(1)
    if kind == "renamed":
        wanted = key_of(7)
        path.rename(unit_file(tmp_path, 7))
    if kind == "key":
        (tmp_path / "prefix.key").write_bytes(bytes(32))
    with opened(tmp_path) as store:
        assert store.load(wanted) is None
        assert store.numbers().errors == 1
        assert list(tmp_path.glob("*.kv")) == []
        store.save(wanted, data_of(3))
    with opened(tmp_path) as store:
        assert store.load(wanted) == data_of(3)


def test_a_file_that_somebody_deleted_is_a_miss_and_no_error(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    with opened(tmp_path) as store:
        unit_file(tmp_path, 1).unlink()
        assert store.load(key_of(1)) is None
        assert (store.numbers().errors, store.numbers().kept_bytes) == (0, 0)


def test_only_our_own_names_are_ever_removed(tmp_path: Path) -> None:
    (tmp_path / "letter.kv").write_text("dear all")
    (tmp_path / ".0123.kv.tmp").write_text("mine")
    half = tmp_path / f".{key_of(9).hex()}.kv.0a1b2c3d"
    half.write_bytes(MAGIC)
    fill(tmp_path, *range(5), units=2)
    assert (tmp_path / "letter.kv").read_text() == "dear all"
    assert (tmp_path / ".0123.kv.tmp").exists()
    assert not half.exists()
    assert len(list(tmp_path.glob("*.kv"))) == 3


def test_the_longest_unused_go_first_over_restarts_too(tmp_path: Path) -> None:
    fill(tmp_path, 1, 2, 3, units=4)
    with opened(tmp_path, units=4) as store:
        store.use((key_of(1),))
    with opened(tmp_path, units=4) as store:
        store.save(key_of(4), data_of(4))
        store.save(key_of(5), data_of(5))
    with opened(tmp_path, units=4) as store:
        assert [number for number in range(1, 6) if store.holds(key_of(number))] == [1, 3, 4, 5]
        assert store.numbers().kept_bytes <= 4 * FILE
    with opened(tmp_path, units=1) as store:
        assert store.numbers().units == 1
        assert store.numbers().evictions == 3
    assert len(list(tmp_path.glob("*.kv"))) == 1


class SlowToRemove(UnitFolder):
    """A disk that stalls whenever a file is to go."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.removing, self.go_on = threading.Event(), threading.Event()

    def remove(self, key: bytes) -> None:
        self.removing.set()
        assert self.go_on.wait(10)
        super().remove(key)


def test_a_disk_that_stalls_holds_up_nobody_who_only_asks(tmp_path: Path) -> None:
    folder = SlowToRemove(tmp_path)
    store = FolderStore(folder, budget_bytes=FILE)
    store.save(key_of(1), data_of(1))
    store.save(key_of(2), data_of(2))
    assert folder.removing.wait(10)
    asking = threading.Thread(target=store.numbers, daemon=True)
    asking.start()
    asking.join(2)
    stuck = asking.is_alive()
    folder.go_on.set()
    store.close()
    assert not stuck
    assert store.numbers().evictions == 1


def test_a_prefix_loses_its_end_before_its_beginning(tmp_path: Path) -> None:
    fill(tmp_path, 1, 2, 3)
    with opened(tmp_path) as store:
        store.use((key_of(1), key_of(2), key_of(3)))
    with opened(tmp_path, units=2) as store:
        assert store.holds(key_of(1))
        assert not store.holds(key_of(3))


def test_a_clock_that_goes_backwards_changes_no_order(tmp_path: Path) -> None:
    fill(tmp_path, 1, 2)
    for number in (1, 2):
        os.utime(unit_file(tmp_path, number), ns=(2**62, 2**62 - number))
    fill(tmp_path, 3, units=2)
    with opened(tmp_path) as store:
        assert [number for number in (1, 2, 3) if store.holds(key_of(number))] == [1, 3]


def test_a_second_process_is_refused_by_name_and_the_first_goes_on(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        with pytest.raises(ConfigError, match=r"prefix_cache = .*: must be a folder of its own"):
            open_store(tmp_path, budget_bytes=FILE)
        store.save(key_of(1), data_of(1))
    fill(tmp_path, 2)
    with opened(tmp_path) as store:
        assert store.load(key_of(1)) == data_of(1)


def test_a_full_disk_ends_the_writing_with_one_line_and_reading_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, 1)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(tmp_path) as store, caplog.at_level(logging.WARNING):
        resource.setrlimit(resource.RLIMIT_FSIZE, (UNIT // 2, hard))  # as good as a full disk
        try:
            for number in (2, 3, 4):
                store.save(key_of(number), data_of(number))
            store.close()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert len(caplog.records) == 1
        assert "no more prefixes are kept on disk" in caplog.text
        assert not store.numbers().writing
        assert store.numbers().errors == 1
        assert store.room_bytes() == 0
        assert not store.holds(key_of(2))
        assert store.load(key_of(1)) == data_of(1)
        fill(tmp_path, 5)
    assert [path.name for path in tmp_path.glob(".*.kv.*")] == []


def test_a_folder_that_cannot_be_written_turns_the_tier_off_with_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        store = open_store(Path("/proc/tidegate/prefixes"), budget_bytes=FILE)
    assert isinstance(store, NoStore)
    assert len(caplog.records) == 1
    assert "prefixes are not kept on disk: /proc/tidegate/prefixes" in caplog.text
    store.save(key_of(1), data_of(1))
    assert not store.holds(key_of(1))
    assert (store.numbers().writing, store.numbers().errors) == (False, 1)


def test_a_key_that_others_may_read_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, 1)
    (tmp_path / "prefix.key").chmod(0o644)
    assert isinstance(open_store(tmp_path, budget_bytes=FILE), NoStore)
    assert "chmod 600" in caplog.text


def test_no_more_is_queued_than_a_bound_and_room_comes_back(tmp_path: Path) -> None:
    big = bytes(20 << 20)
    store = open_store(tmp_path, budget_bytes=1 << 30)
    assert isinstance(store, FolderStore)
    store.save(key_of(1), big)
    store.save(key_of(2), big)
    assert store.room_bytes() <= 12 << 20
    store.close()
    assert store.room_bytes() == 32 << 20
    assert store.numbers().writes == 2


WRITER = """
import sys
from pathlib import Path
from tidegate.edge.prefix_store import open_store
store = open_store(Path(sys.argv[1]), budget_bytes=1 << 30)
print("writing", flush=True)
number = 0
while True:
    while store.room_bytes() > 31 << 20:
        number += 1
        store.save(number.to_bytes(16, "big"), number.to_bytes(4, "big") * 50_000)
"""


@pytest.mark.system
def test_a_writer_that_is_killed_leaves_whole_units_or_none(tmp_path: Path) -> None:
    for life in range(4):
        command = [sys.executable, "-P", "-c", WRITER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == b"writing\n"
                time.sleep(0.2 + 0.1 * life)
            finally:
                process.kill()
        assert process.returncode == -signal.SIGKILL
        store = open_store(tmp_path, budget_bytes=1 << 30)
        assert isinstance(store, FolderStore)
        numbers = [int(path.stem, 16) for path in tmp_path.glob("*.kv")]
        assert numbers
        for number in numbers:
            assert store.load(key_of(number)) == number.to_bytes(4, "big") * 50_000
        assert store.numbers().errors == 0
        assert list(tmp_path.glob(".*.kv.*")) == []
        store.close()
