"""The two cores against what a hostile or broken network can bring them."""

from __future__ import annotations

import dataclasses
import math
import random
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linklab import CrashingDatabase

from tidegate.errors import ConfigError, RequestError
from tidegate.link import gateway_store, outbox
from tidegate.link.counters import Tally
from tidegate.link.device_core import DeviceCore
from tidegate.link.device_states import State
from tidegate.link.effects import (
    Delivered,
    DeviceEffect,
    Ended,
    GatewayEffect,
    Publish,
    RunId,
    Start,
    Stop,
)
from tidegate.link.envelope import (
    DeviceId,
    MessageType,
    RequestId,
    new_request_id,
    route,
    seal_request,
)
from tidegate.link.fleet import add_device, add_gateway, pair
from tidegate.link.gateway_core import GatewayCore
from tidegate.link.gateway_directory import GatewayDirectory
from tidegate.link.gateway_keys import GatewayKeys
from tidegate.link.gateway_output import Finished, Produced
from tidegate.link.gateway_store import GatewayStore, RequestKey
from tidegate.link.identity import load_device, load_gateway
from tidegate.link.limits import MAX_DEADLINE_S, MAX_REQUEST_BODY_BYTES
from tidegate.link.messages import MAX_ANSWER_BYTES, MAX_PAYLOAD_BYTES, Call, Status
from tidegate.link.outbox import Outbox, Outcome
from tidegate.link.prekeys import VALID_FOR_S, ModelOffer, PrekeyStore
from tidegate.link.registry import DeviceRegistry
from tidegate.link.timing import Timing

WALL_S = 1_800_000_000.0

OFFERS = (ModelOffer(id="m", context_tokens=2048),)


class Ends:
    """Both cores with nothing but our hands between them."""

    other: GatewayCore

    def __init__(self, root: Path, *, max_requests: int = 4, timing: Timing | None = None) -> None:
        pair(root / "device", root / "gateway")
        self.root = root
        self.now_s = 0.0
        self.timing = timing or Timing(pacing="off")
        self.registry = DeviceRegistry(root / "gateway" / "devices.sqlite")
        self.device_disk = CrashingDatabase(root / "o.sqlite", outbox.SCHEMA)
        self.gateway_disk = CrashingDatabase(root / "g.sqlite", gateway_store.SCHEMA)
        self.outbox = Outbox(self.device_disk)
        self.store = GatewayStore(self.gateway_disk)
        self.prekeys = PrekeyStore(root / "prekeys.json")
        self.max_requests = max_requests
        self.start_device()
        self.start_gateway()

    def wall_s(self) -> float:
        return WALL_S + self.now_s

    def start_device(self) -> None:
        self.device = DeviceCore(
            identity=load_device(self.root / "device"),
            outbox=self.outbox,
            timing=self.timing,
            rng=random.Random(0),
            wall_s=self.wall_s,
            now_s=self.now_s,
        )

    def start_gateway(self) -> None:
        self.gateway = GatewayCore(
            keys=GatewayKeys(
                identity=load_gateway(self.root / "gateway"),
                prekeys=self.prekeys,
                registry=self.registry,
                wall_s=self.wall_s,
            ),
            store=self.store,
            timing=self.timing,
            max_requests=self.max_requests,
            wall_s=self.wall_s,
            now_s=self.now_s,
        )

    def meet(self) -> None:
        advert = self.gateway.advert(OFFERS, None)
        self.device.receive(self.now_s, advert.topic, advert.payload)
        self.device.on_connected(self.now_s)

    def ask(
        self, body: bytes = b"prompt", model: str | None = None, priority: int = 1
    ) -> RequestId:
        request_id = new_request_id(int(self.wall_s() * 1000))
        self.device.submit(
            self.now_s,
            body,
            request_id=request_id,
            deadline_s=600.0,
            model=model,
            priority=priority,
        )
        return request_id

    def request(self) -> Publish:
        """The one request message that is due."""
        due = self.device.poll(self.now_s + 0.1)
        (message,) = [
            effect
            for effect in due
            if isinstance(effect, Publish) and effect.payload[0] == MessageType.REQUEST
        ]
        return message

    def seal_as(self, device_name: str, call: Call) -> Publish:
        """A request by hand, of a device that may not be ours."""
        device, prekey = load_device(self.root / device_name), self.prekeys.public(self.wall_s())[0]
        (message,), _ = seal_request(
            call.encode(),
            request_id=new_request_id(int(self.wall_s() * 1000)),
            attempt=0,
            prekey_id=prekey.prekey_id,
            prekey=prekey.public,
            gateway_key=load_gateway(self.root / "gateway").key.public_key(),
            device_id=device.device_id,
            device_key=device.key,
            handle=device.handle,
        )
        return Publish(topic=f"tidegate/1/home/gw/gw0/q/{device.handle}", payload=message)

    def to_gateway(self, message: Publish) -> list[GatewayEffect]:
        return self.gateway.receive(self.now_s, message.topic, message.payload)

    def to_device(self, message: Publish) -> list[DeviceEffect]:
        return self.device.receive(self.now_s, message.topic, message.payload)

    def finish(self, run: RunId, *payloads: bytes) -> list[Publish]:
        outputs: list[bytes | Finished] = [*payloads, Finished(Status.COMPLETE)]
        batch = [Produced(run, output) for output in outputs]
        return published(self.gateway.produced(self.now_s, batch))

    def close(self) -> None:
        self.outbox.close()
        self.store.close()
        self.registry.close()


def published(effects: list[GatewayEffect]) -> list[Publish]:
    return [effect for effect in effects if isinstance(effect, Publish)]


def started(effects: list[GatewayEffect]) -> Start:
    (start,) = [effect for effect in effects if isinstance(effect, Start)]
    return start


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[Ends]:
    ends = Ends(tmp_path)
    ends.meet()
    yield ends
    ends.close()


def test_a_request_reaches_the_handler_and_its_answer_the_application(ends: Ends) -> None:
    request_id = ends.ask(b"prompt")
    start = started(ends.to_gateway(ends.request()))
    assert start.request.body == b"prompt"
    assert start.request.request_id == request_id
    (answer,) = ends.finish(start.run, b"one", b"two")
    delivered, done, ended = ends.to_device(answer)
    assert delivered == Delivered(request_id=request_id, first=0, payloads=(b"one", b"two"))
    assert ended == Ended(request_id=request_id, state=State.DONE, code="")
    assert isinstance(done, Publish)
    ends.to_gateway(done)
    standing = ends.device.standing(request_id)
    assert standing is not None
    assert standing.payloads == [b"one", b"two"]
    assert ends.gateway.tally.snapshot().completed == 1


def flips(message: Publish) -> Iterator[Publish]:
    for at in range(len(message.payload)):
        damaged = bytearray(message.payload)
        damaged[at] ^= 1 << (at % 8)
        yield Publish(topic=message.topic, payload=bytes(damaged))


def test_every_flipped_byte_of_every_message_is_dropped_and_counted(ends: Ends) -> None:
    ends.ask(b"prompt")
    request = ends.request()
    for damaged in flips(request):
        assert ends.to_gateway(damaged) == []
    assert ends.gateway.tally.snapshot().dropped == len(request.payload)
    start = started(ends.to_gateway(request))
    (answer,) = ends.finish(start.run, b"one")
    for damaged in flips(answer):
        assert ends.to_device(damaged) == []
    assert ends.device.tally.snapshot().dropped == len(answer.payload)
    done = ends.to_device(answer)[1]
    assert isinstance(done, Publish)
    before = ends.gateway.tally.snapshot().dropped
    for damaged in flips(done):
        assert ends.to_gateway(damaged) == []
    assert ends.gateway.tally.snapshot().dropped == before + len(done.payload)


def test_every_flipped_byte_of_an_advert_is_counted(ends: Ends) -> None:
    advert = ends.gateway.advert(OFFERS, 0.5)
    for damaged in flips(advert):
        ends.to_device(damaged)
    assert ends.device.tally.snapshot().adverts_rejected == len(advert.payload)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=600), st.sampled_from(["advert", "q/x", "r/x", ""]))
def test_junk_never_raises(ends: Ends, payload: bytes, end: str) -> None:
    topic = f"tidegate/1/home/gw/gw0/{end}"
    assert ends.device.receive(0.0, topic, payload) == []
    assert ends.gateway.receive(0.0, topic, payload) == []


def test_junk_behind_a_good_head_never_raises(ends: Ends) -> None:
    ends.ask()
    request = ends.request()
    (life,) = published(ends.to_gateway(request))
    ends.to_device(life)
    (ack,) = ends.device.poll(1.0)
    assert isinstance(ack, Publish)
    rng = random.Random(0)
    for message, cuts in ((request, (1, 31, 111)), (life, (1, 19, 60)), (ack, (1, 19, 27))):
        for _ in range(200):
            junk = message.payload[: rng.choice(cuts)] + rng.randbytes(rng.randrange(600))
            assert ends.gateway.receive(0.0, request.topic, junk) == []
            assert ends.device.receive(0.0, life.topic, junk) == []
    ends.to_gateway(ack)
    assert ends.gateway.tally.snapshot().dropped == 600
    assert ends.device.tally.snapshot().dropped == 600


def test_a_replayed_request_never_runs_again(ends: Ends) -> None:
    ends.ask()
    request = ends.request()
    start = started(ends.to_gateway(request))
    assert ends.to_gateway(request) == []
    (answer,) = ends.finish(start.run, b"one")
    done = ends.to_device(answer)[1]
    assert isinstance(done, Publish)
    ends.to_gateway(done)
    assert ends.to_gateway(request) == []
    ends.start_gateway()
    assert ends.to_gateway(request) == []
    assert ends.gateway.tally.snapshot().duplicates == 1


@pytest.mark.parametrize("shift_s", [-73 * 3600, 25 * 3600])
def test_a_request_made_too_long_ago_or_ahead_is_dropped(ends: Ends, shift_s: int) -> None:
    device, prekey = load_device(ends.root / "device"), ends.prekeys.public(ends.wall_s())[0]
    (message,), _ = seal_request(
        Call(have=0, credit=1, ttl_ms=1000, body=b"").encode(),
        request_id=new_request_id(int((ends.wall_s() + shift_s) * 1000)),
        attempt=0,
        prekey_id=prekey.prekey_id,
        prekey=prekey.public,
        gateway_key=load_gateway(ends.root / "gateway").key.public_key(),
        device_id=device.device_id,
        device_key=device.key,
        handle=device.handle,
    )
    topic = f"tidegate/1/home/gw/gw0/q/{device.handle}"
    assert ends.gateway.receive(0.0, topic, message) == []
    assert ends.gateway.tally.snapshot().dropped == 1


@pytest.mark.parametrize(
    "name",
    [b"", bytes(16), b"\xff" * 16, new_request_id(1)],
    ids=["empty", "zeros", "ones", "too old"],
)
def test_an_id_that_a_gateway_would_drop_is_refused_at_once(ends: Ends, name: bytes) -> None:
    with pytest.raises(RequestError, match="request_id"):
        ends.device.submit(0.0, b"", request_id=RequestId(name), deadline_s=600.0, model=None)


def test_a_revoked_device_is_refused_by_name_from_the_next_request_on(ends: Ends) -> None:
    name = ends.ask()
    request = ends.request()
    ends.registry.revoke(load_device(ends.root / "device").device_id)
    (refusal,) = published(ends.to_gateway(request))
    ended = ends.to_device(refusal)[-1]
    assert ended == Ended(request_id=name, state=State.FAILED, code="device_revoked")
    assert ends.gateway.load == 0.0


def test_a_revocation_ends_what_runs_with_the_devices_next_message(ends: Ends) -> None:
    name = ends.ask()
    start = started(ends.to_gateway(ends.request()))
    ends.registry.revoke(load_device(ends.root / "device").device_id)
    cancel, _ = ends.device.cancel(0.0, name)
    assert isinstance(cancel, Publish)
    effects = ends.to_gateway(cancel)
    assert Stop(start.run) in effects
    assert ends.gateway.load == 0.0
    assert ends.gateway.tally.snapshot().refused == 1


def test_a_stream_ends_with_the_reason_when_its_device_is_revoked_in_its_middle(
    ends: Ends,
) -> None:
    name = ends.ask()
    start = started(ends.to_gateway(ends.request()))
    ends.now_s += 0.1
    (chunk,) = published(ends.gateway.produced(ends.now_s, [Produced(start.run, b"half")]))
    (delivered,) = ends.to_device(chunk)
    assert isinstance(delivered, Delivered)
    ends.registry.revoke(load_device(ends.root / "device").device_id)
    ends.now_s += 1.0
    (acknowledgement,) = ends.device.poll(ends.now_s)
    assert isinstance(acknowledgement, Publish)
    effects = ends.to_gateway(acknowledgement)
    assert Stop(start.run) in effects
    (refusal,) = published(effects)
    ended = ends.to_device(refusal)[-1]
    assert ended == Ended(request_id=name, state=State.FAILED, code="device_revoked")


@pytest.mark.parametrize(("late_s", "taken"), [(-1, True), (599, True), (600, False)])
def test_a_device_whose_certificate_ended_is_refused_ten_minutes_later(
    ends: Ends, late_s: int, taken: bool
) -> None:
    device = load_device(ends.root / "device")
    record = ends.registry.find(device.device_id)
    assert record is not None
    ends.registry.add(dataclasses.replace(record, expires_s=int(ends.wall_s()) - late_s))
    name = ends.ask()
    effects = ends.to_gateway(ends.request())
    assert any(isinstance(one, Start) for one in effects) == taken
    if not taken:
        (refusal,) = published(effects)
        ended = ends.to_device(refusal)[-1]
        assert ended == Ended(request_id=name, state=State.FAILED, code="device_expired")


def test_a_request_beyond_the_places_is_refused_and_runs_when_asked_again(tmp_path: Path) -> None:
    ends = Ends(tmp_path, max_requests=1)
    ends.meet()
    ends.ask()
    start = started(ends.to_gateway(ends.request()))
    second = ends.ask()
    (refusal,) = published(ends.to_gateway(ends.request()))
    ended = ends.to_device(refusal)[-1]
    assert ended == Ended(request_id=second, state=State.FAILED, code="over_capacity")
    ends.device.release(second)
    ends.finish(start.run, b"one")
    assert ends.gateway.load == 0.0
    ends.device.submit(0.0, b"", request_id=second, deadline_s=600.0, model=None)
    assert started(ends.to_gateway(ends.request())).request.request_id == second
    ends.close()


def test_answers_nobody_fetches_cannot_pile_up(tmp_path: Path) -> None:
    ends = Ends(tmp_path, max_requests=4)
    ends.meet()
    for _ in range(8):
        ends.ask()
        ends.finish(started(ends.to_gateway(ends.request())).run, b"one")
    ends.ask()
    (refusal,) = published(ends.to_gateway(ends.request()))
    assert isinstance(ends.to_device(refusal)[-1], Ended)
    assert ends.gateway.tally.snapshot().refused == 1
    ends.close()


def test_one_device_gets_half_of_the_places_at_most(tmp_path: Path) -> None:
    ends = Ends(tmp_path, max_requests=4)
    add_device(tmp_path / "gateway" / "fleet", tmp_path / "other", [tmp_path / "gateway"])
    ends.meet()
    for _ in range(2):
        ends.ask()
        started(ends.to_gateway(ends.request()))
    third = ends.ask()
    (refusal,) = published(ends.to_gateway(ends.request()))
    ended = ends.to_device(refusal)[-1]
    assert ended == Ended(request_id=third, state=State.FAILED, code="over_capacity")
    message = ends.seal_as("other", Call(have=0, credit=0, ttl_ms=2**32 - 1, body=b""))
    started(ends.to_gateway(message))
    ends.close()


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


@pytest.mark.parametrize(
    ("again", "code"),
    [
        ([b"one", b"TWO", b"three", b"four"], "answer_diverged"),
        ([b"one", b"two", b"THREE", b"four"], "answer_diverged"),
        ([b"one"], "answer_diverged"),
        ([b"failed"], "answer_diverged"),
        ([b"one", b"two", b"THREE"], ""),
        ([b"one", b"two", b"three", b"four"], ""),
    ],
)
def test_a_run_after_a_restart_must_repeat_what_was_stored(
    ends: Ends, again: list[bytes], code: str
) -> None:
    request_id = ends.ask()
    start = started(ends.to_gateway(ends.request()))
    stored = [Produced(start.run, payload) for payload in (b"one", b"two", b"three")]
    (first,) = published(ends.gateway.produced(0.0, stored))
    ends.to_device(first)
    ends.start_gateway()
    ends.now_s = 30.0
    start = started(ends.to_gateway(ends.request()))
    effects = [
        effect for message in ends.finish(start.run, *again) for effect in ends.to_device(message)
    ]
    ended = effects[-1]
    assert isinstance(ended, Ended)
    assert ended.code == code
    standing = ends.device.standing(request_id)
    assert standing is not None
    assert (
        standing.payloads
        == [b"one", b"two", b"three", *([b"four"] if code == "" else [])][: len(standing.payloads)]
    )
    assert len(standing.payloads) == (4 if code == "" and len(again) == 4 else 3)


@pytest.mark.parametrize(
    ("elsewhere", "code"),
    [
        ([b"ONE", b"two", b"three"], "answer_diverged"),
        ([b"one", b"TWO", b"three"], "answer_diverged"),
        ([b"one"], "answer_diverged"),
        ([b"one", b"TWO"], ""),
        ([b"one", b"two", b"three"], ""),
    ],
)
def test_another_gateway_goes_on_only_from_what_it_would_have_said_itself(
    ends: Ends, elsewhere: list[bytes], code: str
) -> None:
    request_id = ends.ask()
    start = started(ends.to_gateway(ends.request()))
    outputs = [Produced(start.run, payload) for payload in (b"one", b"two")]
    (first,) = published(ends.gateway.produced(0.0, outputs))
    ends.to_device(first)
    ends.store.close()
    ends.store = GatewayStore(CrashingDatabase(ends.root / "other.sqlite", gateway_store.SCHEMA))
    ends.start_gateway()
    ends.now_s = 30.0
    start = started(ends.to_gateway(ends.request()))
    messages = ends.finish(start.run, *elsewhere)
    effects = [effect for message in messages for effect in ends.to_device(message)]
    assert isinstance(effects[-1], Ended)
    assert effects[-1].code == code
    standing = ends.device.standing(request_id)
    assert standing is not None
    assert standing.payloads == [b"one", b"two", *(elsewhere[2:] if code == "" else [])]


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


def test_a_late_refusal_of_an_old_attempt_ends_nothing(tmp_path: Path) -> None:
    ends = Ends(tmp_path, max_requests=1)
    ends.meet()
    busy = started(
        ends.to_gateway(ends.seal_as("device", Call(have=0, credit=1, ttl_ms=9, body=b"")))
    )
    ends.ask()
    (refusal,) = published(ends.to_gateway(ends.request()))
    ends.finish(busy.run)
    ends.now_s = 30.0
    effects = ends.to_gateway(ends.request())
    start = started(effects)
    for life in published(effects):
        ends.to_device(life)
    assert ends.to_device(refusal) == []
    (answer,) = ends.finish(start.run, b"one")
    ended = ends.to_device(answer)[-1]
    assert isinstance(ended, Ended)
    assert ended.state is State.DONE
    ends.close()


def test_a_clock_that_jumps_ahead_deletes_no_open_request(ends: Ends) -> None:
    request_id = ends.ask()
    real, ends.wall_s = ends.wall_s, lambda: WALL_S + 90 * 86400  # type: ignore[method-assign]
    ends.start_device()
    (ended,) = ends.device.poll(0.0)
    assert ended == Ended(request_id=request_id, state=State.FAILED, code="deadline_exceeded")
    assert ends.outbox.ids() == [(request_id, Outcome.FAILED)]
    ends.wall_s = real  # type: ignore[method-assign]


def test_a_clock_that_jumps_back_keeps_no_request_for_ever(ends: Ends) -> None:
    request_id = ends.ask()
    ends.wall_s = lambda: 0.0  # type: ignore[method-assign]
    ends.start_device()
    assert ends.device.remaining_s(0.0, request_id) == MAX_DEADLINE_S


def test_prekeys_are_made_and_erased_without_a_connection(tmp_path: Path) -> None:
    ends = Ends(tmp_path)
    ends.gateway.poll(0.0)
    prekey = ends.prekeys.public(ends.wall_s())[0]
    ends.now_s = VALID_FOR_S + 1.0
    ends.gateway.poll(ends.now_s)
    assert prekey.prekey_id.hex() not in (tmp_path / "prekeys.json").read_text()
    ends.close()


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


def test_a_cancel_stops_the_handler_and_a_later_attempt_is_told(ends: Ends) -> None:
    request_id = ends.ask()
    start = started(ends.to_gateway(ends.request()))
    cancel, ended = ends.device.cancel(0.0, request_id)
    assert ended == Ended(request_id=request_id, state=State.CANCELLED, code="")
    assert isinstance(cancel, Publish)
    assert ends.to_gateway(cancel) == [Stop(start.run)]
    assert ends.outbox.ids() == []
    assert ends.gateway.tally.snapshot().cancelled == 1
    assert ends.gateway.produced(0.0, [Produced(start.run, b"late")]) == []


def test_a_lost_cancel_is_repeated_when_the_gateway_goes_on(ends: Ends) -> None:
    request_id = ends.ask()
    effects = ends.to_gateway(ends.request())
    start = started(effects)
    ends.device.cancel(0.0, request_id)
    (life,) = published(effects)
    ends.now_s = 1.0
    (again,) = ends.to_device(life)
    assert isinstance(again, Publish)
    assert ends.to_gateway(again) == [Stop(start.run)]


def test_a_lost_end_is_confirmed_when_the_gateway_repeats_it(ends: Ends) -> None:
    ends.ask()
    start = started(ends.to_gateway(ends.request()))
    (answer,) = ends.finish(start.run, b"one")
    ends.to_device(answer)
    ends.now_s = 3.0
    (repeated,) = published(ends.gateway.poll(ends.now_s))
    (done,) = ends.to_device(repeated)
    assert isinstance(done, Publish)
    ends.to_gateway(done)
    ends.now_s = 30.0
    assert ends.gateway.poll(ends.now_s) == []


def test_a_vanished_device_loses_its_generation_and_gets_a_new_one(ends: Ends) -> None:
    request_id = ends.ask()
    start = started(ends.to_gateway(ends.request()))
    ends.gateway.produced(0.0, [Produced(start.run, b"one")])
    ends.now_s = ends.timing.lease_s
    assert Stop(start.run) in ends.gateway.poll(ends.now_s)
    assert ends.gateway.tally.snapshot().expired == 1
    effects = ends.to_gateway(ends.request())
    again = started(effects)
    assert again.run != start.run
    (stored,) = published(effects)
    (answer,) = ends.finish(again.run, b"one", b"two")
    assert ends.to_device(stored) == [Delivered(request_id=request_id, first=0, payloads=(b"one",))]
    assert ends.to_device(answer)[0] == Delivered(
        request_id=request_id, first=1, payloads=(b"two",)
    )


def test_an_attempt_number_is_not_used_again_after_a_crash(ends: Ends) -> None:
    ends.ask()
    used = [route(ends.request().payload).attempt]
    for _ in range(3):
        ends.start_device()
        ends.meet()
        used.append(route(ends.request().payload).attempt)
    assert used == [0, 1, 2, 3]


def test_a_restarted_gateway_sends_a_finished_answer_without_running_again(ends: Ends) -> None:
    request_id = ends.ask()
    start = started(ends.to_gateway(ends.request()))
    ends.finish(start.run, b"one", b"two")
    ends.start_gateway()
    ends.now_s = 30.0
    effects = ends.to_gateway(ends.request())
    (answer,) = published(effects)
    assert effects == [answer]
    assert ends.to_device(answer)[0] == Delivered(
        request_id=request_id, first=0, payloads=(b"one", b"two")
    )


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


@pytest.mark.parametrize("deadline_s", [0.0, -1.0, math.nan, math.inf, 73 * 3600.0])
def test_a_deadline_out_of_range_is_refused_with_the_limits(ends: Ends, deadline_s: float) -> None:
    with pytest.raises(RequestError, match=r"deadline_s: .*above 0 and at most 259200"):
        ends.device.submit(
            0.0, b"", request_id=new_request_id(0), deadline_s=deadline_s, model=None
        )


def test_only_a_gateway_with_the_model_is_asked(ends: Ends) -> None:
    ends.ask(model="other")
    assert ends.device.poll(0.1) == []
    advert = ends.gateway.advert((*OFFERS, ModelOffer(id="other", context_tokens=512)), 0.0)
    ends.to_device(advert)
    assert isinstance(ends.device.poll(2.0)[0], Publish)


def test_an_older_advert_than_the_known_one_is_rejected(ends: Ends) -> None:
    older = ends.gateway.advert(OFFERS, 0.1)
    newer = ends.gateway.advert(OFFERS, 0.2)
    ends.to_device(newer)
    ends.to_device(newer)
    ends.to_device(older)
    assert [advert.load for advert in ends.device.gateways(ends.now_s)] == [0.2]
    assert ends.device.tally.snapshot().adverts_rejected == 1


def test_an_advert_under_another_gateways_topic_is_rejected(ends: Ends) -> None:
    advert = ends.gateway.advert(OFFERS, 0.1)
    ends.device.receive(0.0, "tidegate/1/home/gw/gw1/advert", advert.payload)
    assert ends.device.tally.snapshot().adverts_rejected == 1


def new_directory(ends: Ends, *, off_s: float = 0.0) -> GatewayDirectory:
    return GatewayDirectory(
        load_device(ends.root / "device"),
        timing=ends.timing,
        rng=random.Random(0),
        wall_s=lambda: ends.wall_s() + off_s,
        tally=Tally(),
    )


@pytest.mark.parametrize("off_s", [-590, 590])
def test_a_gateway_is_alive_on_a_clock_that_is_off_as_long_as_it_advertises(
    tmp_path: Path, off_s: int
) -> None:
    ends = Ends(tmp_path)
    directory = new_directory(ends, off_s=off_s)
    for _ in range(2):
        advert = ends.gateway.advert(OFFERS, 0.1)
        directory.receive(0.0, advert.topic, advert.payload)
    assert len(directory.alive(0.0)) == 1
    assert directory.alive(ends.timing.advert_valid_s + 1) == []
    ends.close()


def test_an_advert_the_broker_kept_of_a_dead_gateway_shows_none(tmp_path: Path) -> None:
    ends = Ends(tmp_path)
    advert = ends.gateway.advert(OFFERS, 0.1)
    ends.now_s += ends.timing.advert_valid_s + 1
    directory = new_directory(ends)
    assert not directory.receive(ends.now_s, advert.topic, advert.payload)
    assert directory.alive(ends.now_s) == []
    ends.close()


def test_a_gateway_is_forgotten_when_its_advert_expires(ends: Ends) -> None:
    assert len(ends.device.gateways(ends.now_s)) == 1
    ends.now_s = ends.timing.advert_valid_s + 1
    assert ends.device.gateways(ends.now_s) == []


def test_nothing_is_sent_while_disconnected(ends: Ends) -> None:
    ends.device.on_disconnected()
    ends.ask()
    assert ends.device.poll(0.1) == []
    ends.device.on_connected(5.0)
    assert len(ends.device.poll(5.1)) == 1


def test_a_gateway_needs_at_least_one_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_requests = 0"):
        Ends(tmp_path, max_requests=0)


def asked(effects: list[DeviceEffect]) -> list[RequestId]:
    """The requests that were sent, in order."""
    sent = [effect.payload for effect in effects if isinstance(effect, Publish)]
    return [route(payload).request_id for payload in sent if payload[0] == MessageType.REQUEST]


def test_urgent_requests_leave_the_outbox_before_others_and_older_ones_first(ends: Ends) -> None:
    ends.device.on_disconnected()
    names = [ends.ask(priority=priority) for priority in (2, 1, 0, 1, 0)]
    ends.device.poll(0.0)
    ends.device.on_connected(1.0)
    first, second, third, fourth, fifth = names
    assert asked(ends.device.poll(1.1)) == [third, fifth, second, fourth, first]


def test_a_full_window_keeps_the_others_waiting_and_a_quarter_free_of_bulk(tmp_path: Path) -> None:
    ends = Ends(tmp_path, max_requests=16, timing=Timing(pacing="off", window=4, resend_min_s=20.0))
    ends.meet()
    bulk = [ends.ask(priority=2) for _ in range(5)]
    assert asked(ends.device.poll(0.1)) == bulk[:3]
    urgent = [ends.ask(priority=0) for _ in range(2)]
    assert asked(ends.device.poll(0.2)) == urgent[:1]
    assert asked(ends.device.poll(0.8)) == []
    ends.device.cancel(0.9, bulk[0])
    assert asked(ends.device.poll(0.98)) == urgent[1:]
    assert ends.device.poll(11.0), "waiting for the window is not waiting for a gateway"
    assert ends.device.remaining_s(11.0, bulk[4]) is not None
    ends.close()


def second_gateway(ends: Ends) -> Publish:
    """Another gateway of the fleet, as busy as can be: it refuses everything."""
    identity = add_gateway(ends.root / "gateway" / "fleet", ends.root / "gateway1", "gw1")
    prekeys = PrekeyStore(ends.root / "prekeys1.json")
    ends.other = GatewayCore(
        keys=GatewayKeys(
            identity=identity, prekeys=prekeys, registry=ends.registry, wall_s=ends.wall_s
        ),
        store=GatewayStore(CrashingDatabase(ends.root / "g1.sqlite", gateway_store.SCHEMA)),
        timing=ends.timing,
        max_requests=1,
        wall_s=ends.wall_s,
        now_s=ends.now_s,
    )
    return ends.other.advert(OFFERS, 0.9)


def test_a_gateway_without_room_is_left_for_another_one(tmp_path: Path) -> None:
    ends = Ends(tmp_path, max_requests=1)
    ends.meet()
    busy = ends.seal_as("device", Call(have=0, credit=1, ttl_ms=9000, body=b""))
    started(ends.to_gateway(busy))
    other = second_gateway(ends)
    request_id = ends.ask()
    refused = ends.request()
    ends.to_device(other)
    (refusal,) = published(ends.to_gateway(refused))
    assert ends.to_device(refusal) == []
    moved = ends.request()
    assert "/gw/gw1/" in moved.topic
    assert started(ends.other.receive(0.0, moved.topic, moved.payload)).request.body == b"prompt"
    assert ends.device.tally.snapshot().moves == 1
    assert ends.device.remaining_s(0.0, request_id) is not None
    ends.close()


def test_a_gateway_that_left_requests_unanswered_comes_last_until_it_is_heard(
    tmp_path: Path,
) -> None:
    ends = Ends(tmp_path)
    ends.meet()
    ends.ask()
    for wait_s in (0.1, 5.0):
        assert "/gw/gw0/" in ends.device.poll(wait_s)[0].topic  # type: ignore[union-attr]
    ends.to_device(second_gateway(ends))
    ends.now_s = 15.0
    (moved,) = ends.device.poll(15.0)
    assert isinstance(moved, Publish)
    assert "/gw/gw1/" in moved.topic
    ends.ask()
    (fresh,) = ends.device.poll(15.1)
    assert isinstance(fresh, Publish)
    assert "/gw/gw1/" in fresh.topic, "a new request does not try the silent one either"
    ends.close()


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
