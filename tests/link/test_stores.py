"""The outbox and the gateway's store: what survives, what is bounded, what the disk shows."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from linklab import Crash, CrashingDatabase

from tidegate.errors import CapacityError, IdentityError, LinkError
from tidegate.link import gateway_store, outbox
from tidegate.link.at_rest import Database, Schema
from tidegate.link.envelope import DeviceId, RequestId, new_request_id
from tidegate.link.gateway_store import GatewayStore, Progress, RequestKey
from tidegate.link.messages import Status
from tidegate.link.outbox import KEEP_RESULT_MS, Name, Outbox, OutboxFullError, Outcome

DEVICE = DeviceId(b"d" * 16)
NEVER = 2**62


def new_id(unix_ms: int = 1_800_000_000_000) -> RequestId:
    return new_request_id(unix_ms)


def test_a_request_and_its_answer_survive_a_restart(tmp_path: Path) -> None:
    box = Outbox.open(tmp_path / "outbox.sqlite")
    name = new_id()
    box.add(name, b"prompt", deadline_ms=5, model="m")
    box.use_attempt(name, 0)
    box.save(name, 0, [b"a", b""])
    box.save(name, 2, [b"c"], outcome=Outcome.DONE)
    box.close()
    box = Outbox.open(tmp_path / "outbox.sqlite")
    row = box.find(name)
    assert row is not None
    assert (row.model, row.attempt, row.outcome) == ("m", 1, Outcome.DONE)
    assert row.body == b"", "nobody sends it again"
    assert box.payloads(name) == [b"a", b"", b"c"]
    assert box.ids() == [(name, Outcome.DONE)]
    box.remove(name)
    assert box.find(name) is None
    assert box.payloads(name) == []
    box.close()


def test_saving_the_same_payload_again_changes_nothing(tmp_path: Path) -> None:
    box = Outbox.open(tmp_path / "outbox.sqlite")
    name = new_id()
    box.add(name, b"", deadline_ms=5, model=None)
    box.save(name, 0, [b"a"])
    box.save(name, 0, [b"other", b"b"])
    assert box.payloads(name) == [b"a", b"b"]
    box.close()


def test_the_files_show_neither_prompt_nor_answer_nor_model(tmp_path: Path) -> None:
    box = Outbox.open(tmp_path / "outbox.sqlite")
    store = GatewayStore.open(tmp_path / "requests.sqlite")
    name = new_id()
    box.add(name, b"a secret prompt", deadline_ms=5, model="secret-model")
    box.save(name, 0, [b"a secret answer"])
    key = RequestKey(DEVICE, name)
    store.begin(key, 0, expires_ms=NEVER)
    store.append([Progress(key=key, first=0, payloads=[b"a secret answer"])])
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert len(content) > 10_000
    assert b"secret" not in content
    files = list(tmp_path.glob("*.sqlite*"))
    assert len(files) == 6, "two databases, each with -wal and -shm"
    assert {path.stat().st_mode & 0o077 for path in files} == {0}
    box.close()
    store.close()


def test_the_outbox_is_bounded_in_rows_and_bytes(tmp_path: Path) -> None:
    box = Outbox(Database(tmp_path / "outbox.sqlite", outbox.SCHEMA), max_rows=3, max_bytes=10_000)
    box.add(new_id(), bytes(4000), deadline_ms=5, model=None)
    box.add(new_id(), bytes(4000), deadline_ms=5, model=None)
    with pytest.raises(CapacityError, match="10000 bytes"):
        box.add(new_id(), bytes(4000), deadline_ms=5, model=None)
    box.add(new_id(), b"", deadline_ms=5, model=None)
    with pytest.raises(CapacityError, match="at most 3"):
        box.add(new_id(), b"", deadline_ms=5, model=None)
    box.close()


def test_results_nobody_fetched_are_forgotten_a_day_after_their_deadline(tmp_path: Path) -> None:
    box = Outbox.open(tmp_path / "outbox.sqlite")
    old, young = new_id(1), new_id(2)
    still_open = new_id(3)
    box.add(old, b"", deadline_ms=1000, model=None)
    box.add(young, b"", deadline_ms=3000, model=None)
    box.add(still_open, b"", deadline_ms=1000, model=None)
    box.save(old, 0, [], outcome=Outcome.DONE)
    box.save(young, 0, [], outcome=Outcome.DONE)
    box.expire(2000 + KEEP_RESULT_MS)
    assert [name for name, _ in box.ids()] == [young, still_open]
    box.close()


def test_a_store_with_another_key_is_refused_by_name(tmp_path: Path) -> None:
    Outbox.open(tmp_path / "outbox.sqlite").close()
    (tmp_path / "outbox.key").write_bytes(os.urandom(32))
    with pytest.raises(LinkError, match=r"outbox\.sqlite: was written with another key"):
        Outbox.open(tmp_path / "outbox.sqlite")
    (tmp_path / "outbox.key").chmod(0o644)
    with pytest.raises(IdentityError, match="chmod 600"):
        Outbox.open(tmp_path / "outbox.sqlite")


def test_a_file_that_is_no_database_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "outbox.sqlite").write_bytes(b"not a database, but long enough to be read" * 10)
    with pytest.raises(LinkError, match=r"outbox\.sqlite"):
        Outbox.open(tmp_path / "outbox.sqlite")


def test_a_damaged_value_is_noticed(tmp_path: Path) -> None:
    box = Outbox.open(tmp_path / "outbox.sqlite")
    name, other = new_id(), new_id()
    for request_id in (name, other):
        box.add(request_id, b"prompt", deadline_ms=5, model=None)
        box.save(request_id, 0, [b"a"])
    box.close()
    with sqlite3.connect(tmp_path / "outbox.sqlite") as db:
        db.execute(
            "UPDATE chunks SET sealed = (SELECT sealed FROM chunks WHERE request_id = ?)"
            " WHERE request_id = ?",
            (other, name),
        )
    db.close()
    box = Outbox.open(tmp_path / "outbox.sqlite")
    assert box.payloads(other) == [b"a"]
    with pytest.raises(LinkError, match="damaged"):
        box.payloads(name)
    box.close()


def test_a_full_disk_is_a_capacity_error_and_leaves_the_store_usable(tmp_path: Path) -> None:
    database = Database(tmp_path / "outbox.sqlite", outbox.SCHEMA)
    box = Outbox(database)
    ((pages,),) = database.read("PRAGMA page_count")
    database.read(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(CapacityError, match="cannot be written"):
        box.add(new_id(), bytes(100_000), deadline_ms=5, model=None)
    database.read("PRAGMA max_page_count = 100000")
    box.add(new_id(), bytes(100_000), deadline_ms=5, model=None)
    assert len(box.ids()) == 1
    box.close()


@pytest.mark.parametrize("after_commit", [False, True])
def test_a_crash_leaves_all_of_a_write_or_none_of_it(tmp_path: Path, after_commit: bool) -> None:
    database = CrashingDatabase(tmp_path / "outbox.sqlite", outbox.SCHEMA)
    box = Outbox(database)
    name = new_id()
    box.add(name, b"", deadline_ms=5, model=None)
    database.fuse, database.after_commit = 0, after_commit
    with pytest.raises(Crash):
        box.save(name, 0, [b"a", b"b"], outcome=Outcome.DONE)
    row = box.find(name)
    assert row is not None
    assert (box.payloads(name), row.outcome) == (
        ([b"a", b"b"], Outcome.DONE) if after_commit else ([], Outcome.OPEN)
    )
    box.close()


def test_a_whole_answer_nobody_reads_makes_room_for_one_that_grows(tmp_path: Path) -> None:
    box = Outbox(Database(tmp_path / "outbox.sqlite", outbox.SCHEMA), max_bytes=10_000)
    old, unread, growing = new_id(1), new_id(2), new_id(3)
    for name in (old, unread):
        box.add(name, b"", deadline_ms=5, model=None)
        box.save(name, 0, [bytes(3000)], outcome=Outcome.DONE)
    box.add(growing, b"", deadline_ms=5, model=None)
    box.save(growing, 0, [bytes(5000)])
    row = box.find(old)
    assert row is not None
    assert (row.outcome, row.code, box.payloads(old)) == (Outcome.FAILED, "answer_dropped", [])
    assert [held.outcome for held in box.held()] == [Outcome.FAILED, Outcome.DONE, Outcome.OPEN]
    assert box.dropped == 1
    with pytest.raises(OutboxFullError, match="10000 bytes"):
        box.save(growing, 1, [bytes(6000)])
    assert box.payloads(growing) == [bytes(5000)]
    box.close()


acts = st.tuples(st.sampled_from("asder"), st.integers(0, 5), st.integers(0, 900))


@given(st.lists(acts, max_size=25))
@settings(max_examples=20, deadline=None)  # the disk takes its time
def test_the_outbox_knows_how_much_it_holds(acts: list[tuple[str, int, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        box = Outbox(Database(Path(folder) / "o.sqlite", outbox.SCHEMA), max_bytes=4000)
        names = [new_id(1000 + i) for i in range(6)]
        for act, which, size in acts:
            name = names[which]
            known = box.find(name)
            with suppress(CapacityError):
                match act:
                    case "a" if known is None:
                        box.add(name, bytes(size), deadline_ms=which, model=None)
                    case "s" if known is not None:
                        box.save(name, len(box.payloads(name)), [bytes(size)] * 2)
                    case "d" if known is not None:
                        box.save(name, size % 3, [b"x"], outcome=Outcome.DONE)
                    case "e":
                        box.expire(which + KEEP_RESULT_MS)
                    case "r":
                        box.remove(name)
            held_bytes = sum(held.held_bytes for held in box.held())
            assert held_bytes <= 4000
            assert Outbox(box._db, max_bytes=4000)._bytes == box._bytes == held_bytes
        box.close()


def test_a_request_is_found_by_the_name_its_caller_gave_it(tmp_path: Path) -> None:
    box = Outbox.open(tmp_path / "outbox.sqlite")
    name = new_id()
    box.add(name, b"", deadline_ms=5, model=None, name=Name("a secret word", b"digest"), priority=2)
    box.close()
    box = Outbox.open(tmp_path / "outbox.sqlite")
    row = box.find_named("a secret word")
    assert row is not None
    assert (row.request_id, row.digest, row.priority) == (name, b"digest", 2)
    assert box.find_named("another") is None
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"secret" not in content
    assert b"digest" not in content.replace(b"sealed_digest", b"")
    box.close()


def test_what_is_removed_is_in_no_file_any_more(tmp_path: Path) -> None:
    database = Database(tmp_path / "outbox.sqlite", outbox.SCHEMA)
    box = Outbox(database)
    name = new_id()
    box.add(name, bytes(20_000), deadline_ms=5, model=None)
    box.save(name, 0, [bytes(5000)])
    ((body,),) = database.read("SELECT sealed_body FROM requests")
    ((chunk,),) = database.read("SELECT sealed FROM chunks")
    pieces = [body[:60], body[9_000:9_060], body[-60:], chunk[:60], chunk[-60:]]

    def found() -> list[bool]:
        content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
        return [piece in content for piece in pieces]

    assert all(found())
    box.remove(name)
    box.expire(0)
    assert not any(found())
    box.close()


def old_outbox(folder: Path) -> tuple[Path, RequestId]:
    """An outbox with one request, as the first release wrote it."""
    path, name = folder / "outbox.sqlite", new_id()
    database = Database(path, ())
    with database.write() as db:
        for statement in outbox.SCHEMA[0]:
            db.execute(statement)
        seal = database.cipher.seal
        values = (name, 7, 3, 0, "", seal(name, "model", b"m"), seal(name, "body", b"prompt"))
        db.execute("INSERT INTO requests VALUES (?, ?, ?, ?, ?, ?, ?)", values)
    database.close()
    return path, name


def test_an_outbox_of_the_first_release_is_taken_over(tmp_path: Path) -> None:
    path, name = old_outbox(tmp_path)
    box = Outbox.open(path)
    row = box.find(name)
    assert row is not None
    assert (row.body, row.attempt, row.priority, row.digest) == (b"prompt", 3, 1, None)
    box.close()


def tables(path: Path) -> list[tuple[str]]:
    with sqlite3.connect(path) as db:
        found = db.execute("SELECT sql FROM sqlite_master ORDER BY name").fetchall()
        ((version,),) = db.execute("PRAGMA user_version").fetchall()
    db.close()
    return [*found, (str(version),)]


@pytest.mark.parametrize("schema", [outbox.SCHEMA, gateway_store.SCHEMA], ids=["outbox", "gateway"])
def test_a_migration_that_was_interrupted_anywhere_starts_over(
    schema: Schema, tmp_path: Path
) -> None:
    Database(tmp_path / "whole.sqlite", schema).close()
    wanted = tables(tmp_path / "whole.sqlite")
    statements = sum(map(len, schema))
    interruptions: list[dict[str, Any]] = [{"statements": count} for count in range(statements)]
    for fuse in range(1 + len(schema)):
        interruptions += [{"fuse": fuse, "after_commit": late} for late in (False, True)]
    for number, interruption in enumerate(interruptions):
        path = tmp_path / f"{number}.sqlite"
        with pytest.raises(Crash):
            CrashingDatabase(path, schema, **interruption)
        Database(path, schema).close()
        assert tables(path) == wanted, interruption
        assert b"".join(path.read_bytes() for path in tmp_path.glob(f"{number}.*"))


def test_a_step_that_was_killed_with_its_process_leaves_nothing(tmp_path: Path) -> None:
    path, name = old_outbox(tmp_path)
    # The last statement of the step never returns: the process is killed in the middle of it.
    script = (
        "import os, signal, sqlite3, sys\n"
        "from pathlib import Path\n"
        "from tidegate.link import outbox\n"
        "from tidegate.link.at_rest import Database\n"
        "class Dying(Database):\n"
        "    def _run(self, db, statement):\n"
        "        super()._run(db, statement)\n"
        "        if 'UNIQUE' in statement:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "Dying(Path(sys.argv[1]), outbox.SCHEMA)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", script, str(path)], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    box = Outbox.open(path)
    assert box.ids() == [(name, Outcome.OPEN)]
    box.close()


def test_a_store_of_a_newer_release_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "outbox.sqlite"
    Database(path, (*outbox.SCHEMA, ("CREATE TABLE later (x)",))).close()
    with pytest.raises(LinkError, match=r"outbox\.sqlite: schema version 3: .* up to 2"):
        Outbox.open(path)


def test_stores_keep_ciphers_of_what_is_under_way_only(tmp_path: Path) -> None:
    store = GatewayStore.open(tmp_path / "requests.sqlite")
    box = Outbox.open(tmp_path / "outbox.sqlite")
    before = len(store._db.cipher._aeads), len(box._db.cipher._aeads)
    for _ in range(5):
        key = RequestKey(DEVICE, new_id())
        store.begin(key, 0, expires_ms=NEVER)
        store.append([Progress(key=key, first=0, payloads=[b"a"], status=Status.COMPLETE)])
        box.add(key.request_id, b"prompt", deadline_ms=NEVER, model=None)
        box.save(key.request_id, 0, [b"a"], outcome=Outcome.DONE)
        store.close_request(key)
        box.remove(key.request_id)
    assert (len(store._db.cipher._aeads), len(box._db.cipher._aeads)) == before
    store.close()
    box.close()
