"""What a power cut takes from the gateway: payloads that were not synced yet, and no promise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from linkcores import WALL_S, CorePair, as_messages
from linklab import Crash, CrashingDatabase

from tidegate.link import gateway_store
from tidegate.link.at_rest import Database
from tidegate.link.effects import (
    Delivered,
    Ended,
    Start,
)
from tidegate.link.envelope import DeviceId, new_request_id
from tidegate.link.gateway_output import Finished, Produced
from tidegate.link.gateway_store import GatewayStore, Progress, RequestKey
from tidegate.link.messages import Status
from tidegate.link.timing import Timing

NEVER = 2**62


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[CorePair]:
    ends = CorePair(tmp_path, Timing(pacing="off"))
    yield ends
    ends.close()


def test_a_power_cut_takes_payloads_but_no_row_no_attempt_and_no_ending(tmp_path: Path) -> None:
    disk = CrashingDatabase(tmp_path / "g.sqlite", gateway_store.SCHEMA)
    store = GatewayStore(disk)
    key = RequestKey(DeviceId(b"d" * 16), new_request_id(int(WALL_S * 1000)))

    def cut_power() -> GatewayStore:
        disk.fuse, disk.after_commit, disk.power_cut = 0, False, True
        with pytest.raises(Crash):
            store.use_attempt(key, 99)
        return GatewayStore(disk)

    store.begin(key, 0, expires_ms=NEVER)
    store.append([Progress(key=key, first=0, payloads=[b"a", b"b"])])
    store.append([Progress(key=key, first=2, payloads=[b"c"])])
    store = cut_power()
    assert disk.lost_writes == 2
    assert store.payloads(key) == []
    row = store.find(key)
    assert row is not None
    assert row.attempt == 0

    store.append([Progress(key=key, first=0, payloads=[b"a"])])
    store.use_attempt(key, 7)
    store.append([Progress(key=key, first=1, payloads=[b"b"])])
    store = cut_power()
    assert store.payloads(key) == [b"a"], "what is synced puts all before it on the disk"
    row = store.find(key)
    assert row is not None
    assert row.attempt == 7

    store.append([Progress(key=key, first=1, payloads=[b"b"])])
    store.append([Progress(key=key, first=2, payloads=[], status=Status.COMPLETE)])
    store = cut_power()
    assert store.payloads(key) == [b"a", b"b"]
    row = store.find(key)
    assert row is not None
    assert row.status is Status.COMPLETE
    disk.close()


def test_only_writes_that_may_be_lost_go_without_a_sync(tmp_path: Path) -> None:
    database = Database(tmp_path / "d.sqlite", gateway_store.SCHEMA)
    normal, full = 1, 2
    for synced, level in ((False, normal), (True, full), (True, full), (False, normal)):
        with database.write(synced=synced) as db:
            assert db.execute("PRAGMA synchronous").fetchone() == (level,)
    with database.write() as db:
        assert db.execute("PRAGMA synchronous").fetchone() == (full,)
    database.close()


def test_values_of_one_row_are_sealed_apart_and_open_in_their_place_only(tmp_path: Path) -> None:
    database = Database(tmp_path / "d.sqlite", gateway_store.SCHEMA)
    values = [(b"row%d" % (number % 2), f"chunk {number}", b"same") for number in range(6)]
    sealed = database.cipher.seal_all(values)
    assert len(set(sealed)) == len(sealed)
    for (row, column, data), value in zip(values, sealed, strict=True):
        assert database.cipher.open(row, column, value) == data
    # More rows than it keeps ciphers of.
    many = [(b"%d" % number, "c", b"x") for number in range(3000)]
    for (row, column, data), value in zip(many, database.cipher.seal_all(many), strict=True):
        assert database.cipher.open(row, column, value) == data
    # What has gone is forgotten, and can still be opened where it has not.
    assert len(database.cipher._aeads) <= 1024
    database.cipher.forget(b"2999")
    assert b"2999" not in database.cipher._aeads
    assert database.cipher.open(b"row0", "chunk 0", sealed[0]) == b"same"
    database.close()


@pytest.mark.parametrize("repeats", [True, False], ids=["deterministic", "diverging"])
def test_after_a_power_cut_an_answer_goes_on_only_if_the_new_run_says_the_same(
    ends: CorePair, repeats: bool
) -> None:
    (run,) = ends.begin(1)
    sent = as_messages(ends.gateway.turn(0.2, [], [Produced(run, b"a"), Produced(run, b"b")]))
    (delivered,) = ends.device.turn(0.2, sent)
    assert isinstance(delivered, Delivered)
    acknowledged = as_messages(ends.device.turn(1.0, []))
    ends.gateway.turn(1.0, acknowledged, [])
    ends.gateway_disk.fuse, ends.gateway_disk.power_cut = 0, True
    with pytest.raises(Crash):
        ends.gateway.advert((), None)
    assert ends.gateway_disk.lost_writes > 0
    ends.start_gateway()

    again = as_messages(ends.device.turn(20.0, []))
    effects = ends.gateway.turn(20.0, again, [])
    (start,) = [effect for effect in effects if isinstance(effect, Start)]
    answer = [b"a", b"b", b"c", b"d"] if repeats else [b"a", b"x", b"c", b"d"]
    outputs = [Produced(start.run, payload) for payload in answer]
    finish = Produced(start.run, Finished(Status.COMPLETE))
    effects += ends.gateway.turn(20.1, [], [*outputs, finish])
    said = ends.device.turn(20.1, as_messages(effects))
    payloads = [p for one in said if isinstance(one, Delivered) for p in one.payloads]
    (ended,) = [effect for effect in said if isinstance(effect, Ended)]
    assert (payloads, ended.code) == (([b"c", b"d"], "") if repeats else ([], "answer_diverged"))
