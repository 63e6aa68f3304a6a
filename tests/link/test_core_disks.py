"""The two cores on disks that refuse, in stores that are full and against limits of size."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from coreends import OFFERS, Ends, published, started
from linklab import CrashingDatabase

from tidegate.errors import RequestError
from tidegate.link.device_states import State
from tidegate.link.effects import (
    Delivered,
    Ended,
    GatewayEffect,
    Publish,
    Stop,
)
from tidegate.link.envelope import (
    DeviceId,
)
from tidegate.link.gateway_output import Produced
from tidegate.link.gateway_store import GatewayStore, RequestKey
from tidegate.link.identity import load_device
from tidegate.link.limits import MAX_REQUEST_BODY_BYTES
from tidegate.link.messages import MAX_ANSWER_BYTES, MAX_PAYLOAD_BYTES
from tidegate.link.outbox import Outbox, Outcome
from tidegate.link.prekeys import VALID_FOR_S


@pytest.mark.parametrize("end", ["cancel", "done"])
def test_a_full_disk_at_the_end_of_a_request_drops_it_and_nothing_else(
    ends: Ends, end: str
) -> None:
    request_id = ends.ask()
    start = started(ends.to_gateway(ends.request()))
    if end == "cancel":
        word, _ = ends.device.cancel(0.0, request_id)
    else:
        (answer,) = ends.finish(start.run, b"one")
        word = ends.to_device(answer)[1]
    assert isinstance(word, Publish)
    ends.store.begin(RequestKey(DeviceId(bytes(16)), request_id), 0, expires_ms=2**62)
    ends.gateway_disk.refuse = True
    assert ends.to_gateway(word) == ([Stop(start.run)] if end == "cancel" else [])
    assert ends.gateway.tally.snapshot().store_failures == 1
    assert ends.gateway.produced(0.0, [Produced(start.run, b"late")]) == []
    assert ends.to_gateway(word) == []
    assert ends.gateway.load == 0.0


def test_a_repeated_answer_counts_once_against_its_size(ends: Ends) -> None:
    ends.ask()
    start = started(ends.to_gateway(ends.request()))
    payload = bytes(MAX_PAYLOAD_BYTES)
    whole = [payload] * (MAX_ANSWER_BYTES // MAX_PAYLOAD_BYTES)
    ends.gateway.produced(0.0, [Produced(start.run, payload) for payload in whole])
    ends.start_gateway()
    ends.now_s = 30.0
    start = started(ends.to_gateway(ends.request()))
    ends.finish(start.run, *whole)
    counters = ends.gateway.tally.snapshot()
    assert (counters.completed, counters.failed) == (1, 0)


def test_a_disk_that_refuses_prekeys_is_counted_and_survived(tmp_path: Path) -> None:
    ends = Ends(tmp_path)
    (tmp_path / "prekeys.json").mkdir()
    ends.gateway.poll(0.0)
    ends.gateway.advert(OFFERS, None)
    assert ends.gateway.tally.snapshot().store_failures == 2
    assert ends.prekeys.public(ends.wall_s()) == []
    (tmp_path / "prekeys.json").rmdir()
    ends.meet()
    assert len(ends.device.gateways(ends.now_s)) == 1
    ends.close()


def test_while_old_prekeys_cannot_be_erased_no_row_of_theirs_is(ends: Ends) -> None:
    """What an old prekey still opens must still be known to have run."""
    row = RequestKey(load_device(ends.root / "device").device_id, ends.ask())
    started(ends.to_gateway(ends.request()))
    (ends.root / "prekeys.json").unlink()
    (ends.root / "prekeys.json").mkdir()
    ends.now_s = VALID_FOR_S + 3600.0
    ends.gateway.poll(ends.now_s)
    assert ends.store.find(row) is not None
    (ends.root / "prekeys.json").rmdir()
    ends.now_s += 3600.0
    ends.gateway.poll(ends.now_s)
    assert ends.store.find(row) is None


def test_a_registry_that_cannot_be_read_drops_the_request_and_nothing_else(ends: Ends) -> None:
    ends.ask()
    request = ends.request()
    with sqlite3.connect(ends.root / "gateway" / "devices.sqlite") as db:
        db.execute("ALTER TABLE devices RENAME TO elsewhere")
    assert ends.to_gateway(request) == []
    db.execute("ALTER TABLE elsewhere RENAME TO devices")
    db.close()
    assert ends.gateway.tally.snapshot().store_failures == 1
    started(ends.to_gateway(request))


def fill(disk: CrashingDatabase) -> None:
    ((pages,),) = disk.read("PRAGMA page_count")
    disk.read(f"PRAGMA max_page_count = {pages}")


def make_room(disk: CrashingDatabase) -> None:
    disk.read("PRAGMA max_page_count = 1000000")


def test_a_full_disk_at_the_device_claims_nothing_it_did_not_store(ends: Ends) -> None:
    ends.ask()
    start = started(ends.to_gateway(ends.request()))
    outputs = [bytes(60_000)] * 2
    answers = published(ends.gateway.produced(0.0, [Produced(start.run, x) for x in outputs]))
    answers += ends.finish(start.run)
    fill(ends.device_disk)
    effects = [effect for answer in answers for effect in ends.to_device(answer)]
    assert [type(effect) for effect in effects] == [Delivered, Delivered, Ended]
    assert ends.device.tally.snapshot().store_failures > 0
    make_room(ends.device_disk)
    ends.start_device()
    ends.meet()
    again = published(ends.to_gateway(ends.request()))
    effects = [effect for answer in again for effect in ends.to_device(answer)]
    delivered = [effect for effect in effects if isinstance(effect, Delivered)]
    assert sum(len(effect.payloads) for effect in delivered) == 2


def test_a_full_disk_at_the_gateway_refuses_by_name_and_recovers(ends: Ends) -> None:
    request_id = ends.ask()
    start = started(ends.to_gateway(ends.request()))
    fill(ends.gateway_disk)
    batch = [Produced(start.run, bytes(60_000))] * 4
    assert ends.gateway.produced(0.0, batch) == [Stop(start.run)]
    assert ends.gateway.tally.snapshot().store_failures == 1
    make_room(ends.gateway_disk)
    ends.now_s = 30.0
    again = started(ends.to_gateway(ends.request()))
    assert again.request.request_id == request_id
    assert again.run != start.run


def test_a_payload_over_the_limit_fails_that_request_only(ends: Ends) -> None:
    request_id = ends.ask()
    start = started(ends.to_gateway(ends.request()))
    effects = ends.gateway.produced(0.0, [Produced(start.run, bytes(MAX_PAYLOAD_BYTES + 1))])
    assert Stop(start.run) in effects
    (failure,) = published(effects)
    ended = ends.to_device(failure)[-1]
    assert ended == Ended(request_id=request_id, state=State.FAILED, code="answer_too_large")


def test_a_body_over_the_limit_is_refused_with_the_limit(ends: Ends) -> None:
    with pytest.raises(RequestError, match=str(MAX_REQUEST_BODY_BYTES)):
        ends.ask(bytes(MAX_REQUEST_BODY_BYTES + 1))
    ends.ask(bytes(MAX_REQUEST_BODY_BYTES))
    effects: list[GatewayEffect] = []
    for message in ends.device.poll(ends.now_s + 0.1):
        assert not effects
        assert isinstance(message, Publish)
        effects = ends.to_gateway(message)
    assert len(started(effects).request.body) == MAX_REQUEST_BODY_BYTES


def test_an_answer_that_outgrows_the_outbox_fails_by_name_and_tells_the_gateway(
    tmp_path: Path,
) -> None:
    ends = Ends(tmp_path)
    ends.outbox = Outbox(ends.device_disk, max_bytes=2500)
    ends.start_device()
    ends.meet()
    request_id = ends.ask()
    start = started(ends.to_gateway(ends.request()))
    for number in range(3):
        outputs = [Produced(start.run, bytes(900))]
        for chunk in published(ends.gateway.produced(0.0, outputs)):
            effects = ends.to_device(chunk)
        assert (len(effects) > 1) == (number == 2)
    cancel, ended = effects
    assert ended == Ended(request_id=request_id, state=State.FAILED, code="outbox_full")
    assert isinstance(cancel, Publish)
    assert ends.to_gateway(cancel) == [Stop(start.run)]
    standing = ends.device.standing(request_id)
    assert standing is not None
    assert (standing.outcome, standing.code) == (Outcome.FAILED, "outbox_full")
    ends.close()


def test_answers_together_stop_growing_at_the_gateways_room(tmp_path: Path) -> None:
    ends = Ends(tmp_path)
    ends.store = GatewayStore(ends.gateway_disk, max_bytes=2000)
    ends.start_gateway()
    ends.meet()
    request_id = ends.ask()
    start = started(ends.to_gateway(ends.request()))
    batch = [Produced(start.run, bytes(900))] * 3
    effects = ends.gateway.produced(0.0, batch)
    assert Stop(start.run) in effects
    ended = [effect for one in published(effects) for effect in ends.to_device(one)][-1]
    assert ended == Ended(request_id=request_id, state=State.FAILED, code="over_capacity")
    ends.close()
