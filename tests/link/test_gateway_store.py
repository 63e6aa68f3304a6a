"""The gateway's table of requests: what it keeps, what is bounded, what makes room."""

from __future__ import annotations

from pathlib import Path

import pytest

from tidegate.errors import CapacityError
from tidegate.link import gateway_store
from tidegate.link.at_rest import Database
from tidegate.link.envelope import DeviceId, RequestId, new_request_id
from tidegate.link.gateway_store import GatewayStore, Progress, RequestKey
from tidegate.link.messages import Status

DEVICE = DeviceId(b"d" * 16)
NEVER = 2**62


def new_id(unix_ms: int = 1_800_000_000_000) -> RequestId:
    return new_request_id(unix_ms)


@pytest.fixture
def store(tmp_path: Path) -> GatewayStore:
    return GatewayStore.open(tmp_path / "requests.sqlite")


def test_the_gateway_keeps_rows_answers_and_attempts(store: GatewayStore) -> None:
    key = RequestKey(DEVICE, new_id())
    assert store.find(key) is None
    store.begin(key, 2, expires_ms=NEVER)
    store.use_attempt(key, 5)
    store.append([Progress(key=key, first=0, payloads=[b"a", b"b"])])
    store.append([Progress(key=key, first=2, payloads=[], status=Status.FAILED, code="broken")])
    row = store.find(key)
    assert row is not None
    assert (row.attempt, row.status, row.code, row.closed) == (5, Status.FAILED, "broken", False)
    assert store.payloads(key) == [b"a", b"b"]
    store.close()


def test_a_fetched_answer_is_dropped_and_its_row_stays(store: GatewayStore) -> None:
    key = RequestKey(DEVICE, new_id())
    store.begin(key, 0, expires_ms=NEVER)
    store.append([Progress(key=key, first=0, payloads=[b"a"], status=Status.COMPLETE)])
    store.close_request(key)
    row = store.find(key)
    assert row is not None
    assert (row.closed, row.code, store.payloads(key)) == (True, "already_answered", [])
    store.close()


def test_the_gateways_rows_are_bounded_and_expiring_makes_room(tmp_path: Path) -> None:
    store = GatewayStore(Database(tmp_path / "r.sqlite", gateway_store.SCHEMA), max_rows=2)
    for ms in (1_000, 2_000):
        store.begin(RequestKey(DEVICE, new_id(ms)), 0, expires_ms=NEVER)
    with pytest.raises(CapacityError, match="at most 2"):
        store.begin(RequestKey(DEVICE, new_id(3_000)), 0, expires_ms=NEVER)
    store.expire(1_500, now_ms=0)
    store.begin(RequestKey(DEVICE, new_id(3_000)), 0, expires_ms=NEVER)
    store.close()


def test_answers_nobody_fetched_are_bounded_in_bytes(tmp_path: Path) -> None:
    store = GatewayStore(Database(tmp_path / "r.sqlite", gateway_store.SCHEMA), max_bytes=10_000)
    first, second, third = (RequestKey(DEVICE, new_id(ms)) for ms in (1_000, 2_000, 3_000))
    for key in (first, second):
        store.begin(key, 0, expires_ms=NEVER)
        store.append([Progress(key=key, first=0, payloads=[bytes(6_000)])])
    with pytest.raises(CapacityError, match="10000 bytes"):
        store.begin(third, 0, expires_ms=NEVER)
    store.close_request(second)
    store.begin(third, 0, expires_ms=NEVER)
    store.append([Progress(key=third, first=0, payloads=[bytes(6_000)])])
    store.close()
    store = GatewayStore(Database(tmp_path / "r.sqlite", gateway_store.SCHEMA), max_bytes=10_000)
    with pytest.raises(CapacityError, match="10000 bytes"):
        store.begin(RequestKey(DEVICE, new_id(4_000)), 0, expires_ms=NEVER)
    store.expire(1_500, now_ms=0)
    store.begin(RequestKey(DEVICE, new_id(4_000)), 0, expires_ms=NEVER)
    store.close()


def test_rows_go_when_their_ids_are_too_old_to_be_accepted(store: GatewayStore) -> None:
    old, young = (RequestKey(DEVICE, new_id(ms)) for ms in (1_000, 2_000))
    for key in (old, young):
        store.begin(key, 0, expires_ms=NEVER)
        store.append([Progress(key=key, first=0, payloads=[b"a"])])
    store.expire(1_500, now_ms=0)
    assert (store.find(old), store.payloads(old)) == (None, [])
    assert store.find(young) is not None
    store.expire(-5, now_ms=0)
    store.close()


def test_the_same_request_id_of_two_devices_are_two_requests(store: GatewayStore) -> None:
    name = new_id()
    ours, theirs = RequestKey(DEVICE, name), RequestKey(DeviceId(b"e" * 16), name)
    store.begin(ours, 0, expires_ms=NEVER)
    assert store.find(theirs) is None
    store.begin(theirs, 0, expires_ms=NEVER)
    store.append([Progress(key=ours, first=0, payloads=[b"a"])])
    assert store.payloads(theirs) == []
    store.close()


def test_advert_versions_only_grow_even_if_the_clock_goes_back(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    store = GatewayStore.open(path)
    assert store.next_advert_version(1000) == 1000
    assert store.next_advert_version(500) == 1001
    store.close()
    store = GatewayStore.open(path)
    assert store.next_advert_version(500) == 1002
    store.close()


def test_an_answer_is_dropped_an_hour_after_its_device_stopped_waiting(store: GatewayStore) -> None:
    key = RequestKey(DEVICE, new_id())
    store.begin(key, 0, expires_ms=5_000)
    store.append([Progress(key=key, first=0, payloads=[b"a"])])
    store.expire(0, now_ms=5_000 + 3_600_000)
    assert store.payloads(key) == [b"a"]
    store.expire(0, now_ms=5_001 + 3_600_000)
    row = store.find(key)
    assert row is not None
    assert (row.closed, row.code, store.payloads(key)) == (True, "deadline_exceeded", [])
    store.close()


def test_answers_that_were_begun_may_grow_until_the_store_is_full(tmp_path: Path) -> None:
    store = GatewayStore(Database(tmp_path / "r.sqlite", gateway_store.SCHEMA), max_bytes=10_000)
    key = RequestKey(DEVICE, new_id())
    store.begin(key, 0, expires_ms=NEVER)
    store.append([Progress(key=key, first=0, payloads=[bytes(7_600)])])
    with pytest.raises(CapacityError):
        store.begin(RequestKey(DEVICE, new_id()), 0, expires_ms=NEVER)
    assert 0 < store.room_bytes < 2_400
    store.close()


def test_payloads_that_come_again_are_not_counted_again(tmp_path: Path) -> None:
    store = GatewayStore(Database(tmp_path / "r.sqlite", gateway_store.SCHEMA), max_bytes=100_000)
    key = RequestKey(DEVICE, new_id())
    store.begin(key, 0, expires_ms=NEVER)
    store.append([Progress(key=key, first=0, payloads=[bytes(3_000), bytes(3_000)])])
    room = store.room_bytes
    store.append([Progress(key=key, first=0, payloads=[bytes(3_000), bytes(3_000)])])
    assert store.room_bytes == room
    store.append([Progress(key=key, first=1, payloads=[bytes(3_000), bytes(3_000)])])
    assert room - 3_200 < store.room_bytes < room - 3_000
    assert len(store.payloads(key)) == 3
    store.close()
